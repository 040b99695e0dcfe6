// x * sigmoid(gate), each row divided by its root mean square: a row reduction inside of an expression.
#include <deepseek_r1/core/operator.h>

class GatedNormOp : public dr1::Operator {
 public:
  dr1::Attribute<double> eps{this, "eps", 1e-6};

  void forward(dr1::Tensor x, dr1::Tensor gate, dr1::Tensor output) override {
    auto y = x * sigmoid(gate);
    output = y / sqrt(row_mean(y * y) + eps);
  }
};
DR1_REGISTER_OP(GatedNormOp, "gated_norm");
