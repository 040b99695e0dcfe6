// Write an operator, build it with `deepseek-r1 build-op`, and use it from PyTorch:
//
//   #include <deepseek_r1/core/operator.h>
//
//   class SwishOp : public dr1::Operator {
//    public:
//     void forward(dr1::Tensor input, dr1::Tensor output) override {
//       output = input * (1.0f / (1.0f + expf(-input)));
//     }
//   };
//   DR1_REGISTER_OP(SwishOp, "swish");
//
// Header-only C++17; nothing of PyTorch is needed to build it, and one library serves every version.
#pragma once

#include "cpu.h"
#include "cuda.h"
#include "derivative.h"
#include "registry.h"

namespace dr1 __attribute__((visibility("hidden"))) {

template <class E>
void run(const Tensor& out, const E& e) {
  if (out.numel() == 0) return;
  if (out.device() == Device::cpu) {
    cpu::run(out, e);
  } else {
    cuda::run(out, e);
  }
}

template <class E>
void assign(const Tensor& out, const E& e) {
  if (out.derivation()) {
    derive(out, e);
  } else {
    run(out, e);
  }
}

inline Tensor& Tensor::operator=(const Tensor& value) {
  assign(*this, value);
  return *this;
}
template <class E>
Tensor& Tensor::operator=(const E& value) {
  static_assert(is_operand<E>, "only expressions of tensors and numbers can be assigned to a tensor");
  assign(*this, operand(value));
  return *this;
}
#define DR1_COMPOUND(op)                            \
  template <class E>                                \
  Tensor& Tensor::operator op##=(const E & value) { \
    return *this = *this op value;                  \
  }
DR1_COMPOUND(+)
DR1_COMPOUND(-)
DR1_COMPOUND(*)
DR1_COMPOUND(/)
#undef DR1_COMPOUND

}  // namespace dr1
