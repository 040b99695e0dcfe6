// Linear layers with integer weights and activations that are quantised row by row in the call. See layout.h.
#include "product.h"

namespace {

constexpr int64_t MOST_INPUTS = 65536;  // beyond, sums of 8-bit products may not fit in 32 bits

class Linear : public dr1::Operator {
 public:
  static constexpr uint32_t dtypes = dr1::mask(dr1::DType::float32) | dr1::mask(dr1::DType::uint8);
  static constexpr dr1::DType output_dtype = dr1::DType::float32;

  // x [..., inputs], packed uint8, bias [outputs].
  dr1::Shape shape(dr1::Shape x, dr1::Shape, dr1::Shape bias) override {
    x[-1] = bias[0];
    return x;
  }

 protected:
  void run(const dr1::Tensor& x, const dr1::Tensor& packed, const dr1::Tensor& bias, int64_t group, int64_t function,
           int64_t isa, const dr1::Tensor& output) {
    dr1::check(x.dtype() == dr1::DType::float32, "activations are float32, given " + std::string(name_of(x.dtype())));
    dr1::check(packed.dtype() == dr1::DType::uint8 && packed.ndim() == 1 && packed.is_contiguous(),
               "packed weights are one row of uint8, as pack_int8 and pack_int4 give them");
    dr1::check(bias.dtype() == dr1::DType::float32 && bias.ndim() == 1 && bias.is_contiguous(),
               "a bias is one row of float32, zeros where a layer has none");
    dr1::check(x.ndim() >= 1 && x.size(-1) > 0, "activations have at least one dimension, and inputs in the last");
    dr1::check(function >= 0 && function <= integer::SILU, "no such activation function");
    const int64_t inputs = x.size(-1);
    dr1::check(group || inputs <= MOST_INPUTS, "8-bit layers take at most 65536 inputs");
    dr1::check(!group || inputs % group == 0, "4-bit layers take whole groups of inputs: " + std::to_string(inputs) +
                                                  " is no multiple of " + std::to_string(group));
    const integer::Weights w{packed.data<uint8_t>(), group ? inputs : integer::up(inputs, 32), bias.size(0), group};
    const int64_t bytes = w.panels() * w.panel_bytes();
    dr1::check(packed.size(0) == bytes, "weights of " + std::to_string(w.outputs) + " outputs and " +
                                            std::to_string(inputs) + " inputs are " + std::to_string(bytes) +
                                            " bytes packed, given " + std::to_string(packed.size(0)));
    dr1::check(!output.numel() || output.is_contiguous(), "the output is contiguous");
    integer::linear(x, w, bias.data<float>(), function, isa, output);
  }
};

class Int8Dynamic : public Linear {
 public:
  dr1::Attribute<int64_t> function{this, "function", 0}, isa{this, "isa", 0};
  void forward(dr1::Tensor x, dr1::Tensor packed, dr1::Tensor bias, dr1::Tensor output) override {
    run(x, packed, bias, 0, function, isa, output);
  }
};

class Int4Dynamic : public Linear {
 public:
  dr1::Attribute<int64_t> group{this, "group", 64}, function{this, "function", 0}, isa{this, "isa", 0};
  void forward(dr1::Tensor x, dr1::Tensor packed, dr1::Tensor bias, dr1::Tensor output) override {
    const int64_t size = group;
    dr1::check(size == 32 || size == 64 || size == 128, "groups have 32, 64 or 128 weights");
    run(x, packed, bias, size, function, isa, output);
  }
};

}  // namespace

DR1_REGISTER_OP(Int8Dynamic, "int8_dynamic_linear");
DR1_REGISTER_OP(Int4Dynamic, "int4_dynamic_linear");
