// Rows of which a part stands both below a reduction and beside it, where a GPU may keep what it computed.
#include <deepseek_r1/core/operator.h>

using dr1::Tensor;

class GpuSoftmaxOp : public dr1::Operator {
 public:
  void forward(Tensor x, Tensor output) override {
    auto e = exp(x - row_max(x));
    output = e / row_sum(e);
  }
};
DR1_REGISTER_OP(GpuSoftmaxOp, "gpu_softmax");

class GpuLayerNormOp : public dr1::Operator {
 public:
  void forward(Tensor x, Tensor weight, Tensor bias, Tensor output) override {
    auto centred = x - row_mean(x);
    output = weight * (centred / sqrt(row_mean(square(centred)) + 1e-5)) + bias;
  }
};
DR1_REGISTER_OP(GpuLayerNormOp, "gpu_layer_norm");

// Parts of one type that are not equal, unless `a` and `b` are one tensor.
class GpuLookalikesOp : public dr1::Operator {
 public:
  void forward(Tensor a, Tensor b, Tensor output) override { output = exp(a) / row_sum(exp(b)); }
};
DR1_REGISTER_OP(GpuLookalikesOp, "gpu_lookalikes");
