// Operators that the tests use: one for each thing an operator may do.
#include <deepseek_r1/core/operator.h>

using dr1::Tensor;

class CopyOp : public dr1::Operator {
 public:
  static constexpr uint32_t dtypes = dr1::floating | dr1::integral | dr1::boolean;
  void forward(Tensor input, Tensor output) override { output = input; }
};
DR1_REGISTER_OP(CopyOp, "copy_of");

// Attributes of each kind, standing in expressions.
class AffineOp : public dr1::Operator {
 public:
  dr1::Attribute<double> scale{this, "scale", 0.1};
  dr1::Attribute<int> shift{this, "shift", 3};
  dr1::Attribute<bool> negate{this, "negate", false};
  void forward(Tensor input, Tensor output) override {
    if (negate) {
      output = -(scale * input + shift);
    } else {
      output = scale * input + shift;
    }
  }
};
DR1_REGISTER_OP(AffineOp, "affine");

// Three inputs that broadcast, comparison and choice.
class BlendOp : public dr1::Operator {
 public:
  void forward(Tensor x, Tensor a, Tensor b, Tensor output) override {
    output = where(x > 0.0f, a * x, b - x) + max(a, b) * tanhf(x);
  }
};
DR1_REGISTER_OP(BlendOp, "blend");

// A method in the private section, and one reduction inside another.
class SoftmaxOp : public dr1::Operator {
  void forward(Tensor input, Tensor output) override {
    auto e = exp(input - row_max(input));
    output = e / row_sum(e);
  }
};
DR1_REGISTER_OP(SoftmaxOp, "row_softmax");

// The output's shape differs: one element a row, the dimension dropped.
class SpreadOp : public dr1::Operator {
 public:
  void forward(Tensor input, Tensor output) override {
    output.unsqueeze(-1) = row_max(input) - row_min(input);
  }
  dr1::Shape shape(dr1::Shape input) override {
    dr1::Shape result;
    for (int i = 0; i + 1 < input.ndim(); ++i) result.push_back(input[i]);
    return result;
  }
};
DR1_REGISTER_OP(SpreadOp, "spread");

// The same with the dimension kept: its derivative comes from the expression, and a narrow input is read by each row.
class WeightedTotalOp : public dr1::Operator {
 public:
  void forward(Tensor x, Tensor weight, Tensor output) override { output = weight * row_sum(x * x) + weight; }
  dr1::Shape shape(dr1::Shape x, dr1::Shape) override { return {x[0], 1}; }
};
DR1_REGISTER_OP(WeightedTotalOp, "weighted_total");

// Two outputs of one input.
class SineCosineOp : public dr1::Operator {
 public:
  static constexpr int outputs = 2;
  void forward(Tensor input, Tensor sine, Tensor cosine) override {
    sine = sinf(input);
    cosine = cosf(input);
  }
};
DR1_REGISTER_OP(SineCosineOp, "sine_cosine");

// A backward of its own that reads the outputs.
class RootOp : public dr1::Operator {
 public:
  void forward(Tensor input, Tensor output) override { output = sqrtf(input); }
  void backward(Tensor grad_output, Tensor, Tensor output, Tensor grad_input) override {
    grad_input = 0.5 * grad_output / output;
  }
};
DR1_REGISTER_OP(RootOp, "root");

// By hand: neighbours are added up, so that the last dimension halves.
class PairSumOp : public dr1::Operator {
 public:
  void forward(Tensor input, Tensor output) override {
    dr1::check(input.size(-1) % 2 == 0, "the last dimension must be even");
    dr1::check(input.is_contiguous(), "contiguous input is needed");
    dr1::dispatch_real(input.dtype(), [&](auto zero) {
      using T = decltype(zero);
      const T* from = input.data<T>();
      T* to = output.data<T>();
      dr1::parallel_for(output.context(), output.numel(), 1024, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[i] = from[2 * i] + from[2 * i + 1];
      });
    });
  }
  dr1::Shape shape(dr1::Shape input) override {
    input[-1] = input[-1] / 2;
    return input;
  }
};
DR1_REGISTER_OP(PairSumOp, "pair_sum");

// An output of another dtype, for inputs of any.
class AboveOp : public dr1::Operator {
 public:
  static constexpr uint32_t dtypes = dr1::floating | dr1::integral;
  static constexpr dr1::DType output_dtype = dr1::DType::boolean;
  void forward(Tensor a, Tensor b, Tensor output) override { output = a > b; }
};
DR1_REGISTER_OP(AboveOp, "above");

class QuotientOp : public dr1::Operator {
 public:
  static constexpr uint32_t dtypes = dr1::integral;
  void forward(Tensor a, Tensor b, Tensor output) override { output = a / b; }
};
DR1_REGISTER_OP(QuotientOp, "quotient");

// Two statements, the second on what the first wrote.
class InStepsOp : public dr1::Operator {
 public:
  void forward(Tensor input, Tensor output) override {
    output = input + 1.0f;
    output *= input;
  }
};
DR1_REGISTER_OP(InStepsOp, "in_steps");

// Sums of columns, by a view.
class ColumnTotalOp : public dr1::Operator {
 public:
  void forward(Tensor input, Tensor output) override { output.transpose(0, 1) = row_sum(input.transpose(0, 1)); }
  dr1::Shape shape(dr1::Shape input) override { return {1, input[1]}; }
};
DR1_REGISTER_OP(ColumnTotalOp, "column_total");

// Every name that an expression may use, with and without C's f.
class EverythingOp : public dr1::Operator {
 public:
  void forward(Tensor x, Tensor output) override {
    auto a = expf(x) + exp(x) + exp2f(x) + expm1f(x) + logf(x) + log(x) + log2f(x) + log10f(x) + log1pf(x);
    auto b = sqrtf(x) + sqrt(x) + sinf(x) + cosf(x) + sinhf(x) + coshf(x) + tanhf(x) + tanh(x) + erff(x) + erf(x);
    auto c = floorf(x) + ceilf(x) + abs(-x) + fabs(-x) + fabsf(x) + sign(x) + sigmoid(x) + relu(x) + square(x) + rsqrt(x);
    auto d = powf(x, 1.5f) + pow(2.0, x) + max(x, 0.7) + fmaxf(x, 0.7f) + min(x, 0.7) + fminf(0.7f, x) + clamp(x, 0.4, 0.9);
    auto e = where((x < 1.0) && (x <= 1.0) || !(x > 2.0), x, 1.0) + (x >= 0.5) * x + (x == x) * x + (x != x) * x;
    output = a + b + c + d + e;
  }
};
DR1_REGISTER_OP(EverythingOp, "everything");
