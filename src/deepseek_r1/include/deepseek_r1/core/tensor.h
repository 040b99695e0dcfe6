// `dr1::Tensor`: a handle on somebody else's memory, passed by value, that an expression is assigned through.
//
// It knows sizes, strides, dtype, device and stream. It owns nothing and allocates nothing.
#pragma once

#include <stdexcept>
#include <string>

#include "abi.h"
#include "scalar.h"

namespace dr1 __attribute__((visibility("hidden"))) {

enum class DType : int32_t { float32, float64, bfloat16, float16, int8, uint8, int16, int32, int64, boolean };
enum class Device : int32_t { cpu, cuda };

constexpr uint32_t mask(DType t) { return 1u << static_cast<int32_t>(t); }
constexpr uint32_t floating = mask(DType::float32) | mask(DType::float64) | mask(DType::bfloat16) | mask(DType::float16);
constexpr uint32_t integral =
    mask(DType::int8) | mask(DType::uint8) | mask(DType::int16) | mask(DType::int32) | mask(DType::int64);
constexpr uint32_t boolean = mask(DType::boolean);

inline const char* name_of(DType t) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "int8",
                                      "uint8",   "int16",   "int32",    "int64",   "bool"};
  return names[static_cast<int32_t>(t)];
}

// Raise an error that the caller in Python sees with this text.
inline void check(bool holds, const std::string& message) {
  if (!holds) throw std::runtime_error(message);
}

struct bfloat16 {
  uint16_t raw;
};
struct float16 {
  uint16_t raw;
};

template <class T>
struct DTypeOf;
#define DR1_DTYPE(type, name)                   \
  template <>                                   \
  struct DTypeOf<type> {                        \
    static constexpr DType value = DType::name; \
  };
DR1_DTYPE(float, float32)
DR1_DTYPE(double, float64)
DR1_DTYPE(bfloat16, bfloat16)
DR1_DTYPE(float16, float16)
DR1_DTYPE(int8_t, int8)
DR1_DTYPE(uint8_t, uint8)
DR1_DTYPE(int16_t, int16)
DR1_DTYPE(int32_t, int32)
DR1_DTYPE(int64_t, int64)
DR1_DTYPE(bool, boolean)
#undef DR1_DTYPE

// Base of everything that may stand in an expression.
struct Node {};
template <class T>
constexpr bool is_node = std::is_base_of_v<Node, std::decay_t<T>>;

struct Derivation;

class Tensor : public Node {
 public:
  static constexpr int leaves = 1;
  static constexpr int reductions = 0;

  Tensor(const dr1_tensor& memory, const dr1_context* context, int role = -1, const Derivation* derivation = nullptr)
      : memory_(memory), context_(context), role_(role), derivation_(derivation) {}
  Tensor(const Tensor&) = default;

  int ndim() const { return memory_.ndim; }
  int64_t size(int dim) const { return memory_.sizes[at(dim)]; }
  int64_t stride(int dim) const { return memory_.strides[at(dim)]; }
  DType dtype() const { return static_cast<DType>(memory_.dtype); }
  Device device() const { return static_cast<Device>(memory_.device_type); }
  int device_index() const { return memory_.device_index; }
  void* stream() const { return context_->stream; }
  const dr1_context& context() const { return *context_; }
  const dr1_tensor& memory() const { return memory_; }
  const Derivation* derivation() const { return derivation_; }
  int role() const { return role_; }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim(); ++i) n *= memory_.sizes[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = ndim() - 1; i >= 0; --i) {
      if (memory_.sizes[i] != 1 && memory_.strides[i] != expected) return false;
      expected *= memory_.sizes[i];
    }
    return true;
  }
  // The memory itself, for kernels written by hand. Throws unless T is the tensor's element type.
  template <class T>
  T* data() const {
    check(!by_expression_only(),
          "this operator computes by hand, so that its derivative cannot be found; give it a backward(...)");
    check(DTypeOf<T>::value == dtype(),
          std::string("data<T>() asks for ") + name_of(DTypeOf<T>::value) + ", the tensor is " + name_of(dtype()));
    return static_cast<T*>(memory_.data);
  }
  // A view with a dimension of size 1 more.
  Tensor unsqueeze(int dim) const {
    check(ndim() < DR1_MAX_DIMS, "unsqueeze: the tensor has as many dimensions as there may be");
    if (dim < 0) dim += ndim() + 1;
    check(dim >= 0 && dim <= ndim(), "unsqueeze: no such dimension");
    Tensor view = as_view();
    for (int i = ndim(); i > dim; --i) {
      view.memory_.sizes[i] = view.memory_.sizes[i - 1];
      view.memory_.strides[i] = view.memory_.strides[i - 1];
    }
    view.memory_.sizes[dim] = view.memory_.strides[dim] = 1;
    ++view.memory_.ndim;
    return view;
  }
  // A view with two dimensions exchanged.
  Tensor transpose(int a, int b) const {
    Tensor view = as_view();
    a = at(a), b = at(b);
    view.memory_.sizes[a] = memory_.sizes[b], view.memory_.strides[a] = memory_.strides[b];
    view.memory_.sizes[b] = memory_.sizes[a], view.memory_.strides[b] = memory_.strides[a];
    return view;
  }

  // Assignment always writes through: the elements are computed and stored, the handle stays.
  Tensor& operator=(const Tensor& value);
  template <class E>
  Tensor& operator=(const E& value);
  template <class E>
  Tensor& operator+=(const E& value);
  template <class E>
  Tensor& operator-=(const E& value);
  template <class E>
  Tensor& operator*=(const E& value);
  template <class E>
  Tensor& operator/=(const E& value);

  template <class F>
  void visit(F&& f) const {
    f(*this);
  }
  // Leaves that no reduction stands above.
  template <class F>
  void visit_outside(F&& f) const {
    f(*this);
  }
  template <class B>
  auto bind(B& b) const {
    return b.leaf(*this);
  }
  void number(int&) {}
  // Whether it is the same memory in the same layout.
  bool same(const Tensor& other) const {
    const dr1_tensor &x = memory_, &y = other.memory_;
    if (x.data != y.data || x.ndim != y.ndim || x.dtype != y.dtype) return false;
    for (int i = 0; i < x.ndim; ++i) {
      if (x.sizes[i] != y.sizes[i] || x.strides[i] != y.strides[i]) return false;
    }
    return true;
  }

 private:
  int at(int dim) const {
    if (dim < 0) dim += ndim();
    check(dim >= 0 && dim < ndim(), "a tensor of " + std::to_string(ndim()) + " dimensions has no such dimension");
    return dim;
  }
  bool by_expression_only() const { return derivation_ != nullptr; }
  Tensor as_view() const {
    check(!by_expression_only(), "a derivative through a view cannot be found; give the operator a backward(...)");
    return *this;
  }

  dr1_tensor memory_;
  const dr1_context* context_;
  // Which input of the operator this is; -2 - i for output i; -1 for neither.
  int role_;
  // Set while not the values but the derivatives of the assignments are wanted.
  const Derivation* derivation_;
};

}  // namespace dr1
