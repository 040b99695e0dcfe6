// `dr1::Operator`, its registration, and the plain C functions that a library of operators exports.
#pragma once

#include <cinttypes>
#include <cstdio>

#include "derivative.h"
#include "shape.h"

namespace dr1 __attribute__((visibility("hidden"))) {

class Operator;

class AttributeBase {
 public:
  std::string name;
  char type;
  dr1_value value;

 protected:
  AttributeBase(Operator* owner, const char* name, char type);
  ~AttributeBase() = default;
};

// A number that the caller sets: `dr1::Attribute<double> beta{this, "beta", 1.0};` as a member of the operator.
// It stands in expressions as it is. T is double, float, int64_t, int or bool.
template <class T>
class Attribute : public AttributeBase {
 public:
  Attribute(Operator* owner, const char* name, T initial)
      : AttributeBase(owner, name, std::is_same_v<T, bool> ? 'b' : (std::is_integral_v<T> ? 'i' : 'f')) {
    static_assert(std::is_arithmetic_v<T>, "an attribute is a number or a bool");
    if constexpr (std::is_integral_v<T>) {
      value.integer = initial;
    } else {
      value.real = initial;
    }
  }
  Attribute(const Attribute&) = delete;
  T get() const {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(value.integer);
    } else {
      return static_cast<T>(value.real);
    }
  }
  operator T() const { return get(); }
  auto as_scalar() const { return operand(get()); }
};

// What an operator derives from. It overrides `forward`, and where needed `backward` and `shape`:
//   forward(inputs..., outputs...)                    the last tensor is the output, unless `outputs` says how many are
//   backward(output gradients..., inputs..., input gradients...)
//   backward(output gradients..., inputs..., outputs..., input gradients...)
//   shape(input shapes...) -> Shape, or Shapes        without it, the outputs have the inputs' broadcast shape
// Static members that may be redeclared: `outputs` (how many), `dtypes` (what inputs may be), `output_dtype`.
// More tensors than the overloads below have are fine: the methods are found by name, not through them.
class Operator {
 public:
  static constexpr int outputs = 1;
  static constexpr uint32_t dtypes = floating;

  Operator() = default;
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;
  virtual ~Operator() = default;

  virtual void forward(Tensor, Tensor) { missing(); }
  virtual void forward(Tensor, Tensor, Tensor) { missing(); }
  virtual void forward(Tensor, Tensor, Tensor, Tensor) { missing(); }
  virtual void forward(Tensor, Tensor, Tensor, Tensor, Tensor) { missing(); }
  virtual void forward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) { missing(); }
  virtual void backward(Tensor, Tensor, Tensor) { missing(); }
  virtual void backward(Tensor, Tensor, Tensor, Tensor) { missing(); }
  virtual void backward(Tensor, Tensor, Tensor, Tensor, Tensor) { missing(); }
  virtual void backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) { missing(); }
  virtual void backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) { missing(); }
  virtual Shape shape(Shape) { return missing(), Shape(); }
  virtual Shape shape(Shape, Shape) { return missing(), Shape(); }
  virtual Shape shape(Shape, Shape, Shape) { return missing(), Shape(); }

  const std::vector<AttributeBase*>& attributes() const { return attributes_; }

 private:
  friend class AttributeBase;
  static void missing() { check(false, "the operator overrides no method with these arguments"); }
  std::vector<AttributeBase*> attributes_;
};

inline AttributeBase::AttributeBase(Operator* owner, const char* n, char t) : name(n), type(t), value() {
  owner->attributes_.push_back(this);
}

// ---- what an operator class has, found at compile time

template <class M>
struct Method;
template <class O, class R, class... A>
struct Method<R (O::*)(A...)> {
  static constexpr int count = sizeof...(A);
  using Result = R;
};

#define DR1_FIND(Trait, name)                                                  \
  template <class Op, class = void>                                            \
  struct Trait : std::false_type {                                             \
    static constexpr int count = 0;                                            \
  };                                                                           \
  template <class Op>                                                          \
  struct Trait<Op, std::void_t<decltype(&Op::name)>> : std::true_type {        \
    static constexpr int count = Method<decltype(&Op::name)>::count;           \
  };
DR1_FIND(Forward, forward)
DR1_FIND(Backward, backward)
DR1_FIND(ShapeOf, shape)
#undef DR1_FIND

template <class Op>
struct Traits {
  static_assert(std::is_base_of_v<Operator, Op>, "DR1_REGISTER_OP: the class must derive from dr1::Operator");
  static constexpr int outputs = Op::outputs;
  // A method that is overridden in a private section is reached through the base class.
  static constexpr int inputs = (Forward<Op>::value ? Forward<Op>::count : 2) - outputs;
  static_assert(outputs >= 1 && inputs >= 1, "forward takes at least one input and one output");
  static_assert(outputs <= 32, "an operator has at most 32 outputs");
  static constexpr int backward = Backward<Op>::count;
  static constexpr bool takes_outputs = backward == 2 * (inputs + outputs);
  static_assert(backward == 0 || takes_outputs || backward == outputs + 2 * inputs,
                "backward takes the output gradients, the inputs, the outputs or not, and the input gradients");
  static_assert(!ShapeOf<Op>::value || ShapeOf<Op>::count == inputs, "shape takes one Shape for each input");
};

template <class Op, size_t... I>
void call_forward(Op& op, const std::vector<Tensor>& t, std::index_sequence<I...>) {
  if constexpr (Forward<Op>::value) {
    op.forward(t[I]...);
  } else {
    static_cast<Operator&>(op).forward(t[I]...);
  }
}
template <class Op, size_t... I>
void call_backward(Op& op, const std::vector<Tensor>& t, std::index_sequence<I...>) {
  op.backward(t[I]...);
}
template <class Op, size_t... I>
Shapes call_shape(Op& op, const std::vector<Shape>& s, std::index_sequence<I...>) {
  auto result = op.shape(s[I]...);
  if constexpr (std::is_same_v<decltype(result), Shape>) {
    return {result};
  } else {
    return result;
  }
}

template <class Op, class = void>
struct OutputDType {
  static std::string text() { return "null"; }
};
template <class Op>
struct OutputDType<Op, std::void_t<decltype(Op::output_dtype)>> {
  static std::string text() { return "\"" + std::string(name_of(Op::output_dtype)) + "\""; }
};

inline void set_attributes(Operator& op, const dr1_value* values) {
  for (size_t i = 0; i < op.attributes().size(); ++i) op.attributes()[i]->value = values[i];
}

template <class Op>
void run_pass(const dr1_call& call) {
  using T = Traits<Op>;
  constexpr size_t nf = T::inputs + T::outputs;
  Op op;
  set_attributes(op, call.attributes);
  std::vector<Tensor> t;
  t.reserve(call.tensor_count);
  const auto need = [&](size_t n) { check(call.tensor_count == n, "this pass takes another number of tensors"); };
  const auto take = [&](size_t from, size_t n) {
    for (size_t i = 0; i < n; ++i) t.emplace_back(call.tensors[from + i], call.context);
  };
  if (call.pass == DR1_FORWARD) {
    need(nf);
    take(0, nf);
    return call_forward(op, t, std::make_index_sequence<nf>());
  }
  if (call.pass == DR1_BACKWARD) {
    if constexpr (T::backward > 0) {
      need(2 * nf);
      take(0, nf);
      if (T::takes_outputs) take(nf, T::outputs);
      take(nf + T::outputs, T::inputs);
      return call_backward(op, t, std::make_index_sequence<T::backward>());
    }
    check(false, "the operator has no backward");
  }
  check(call.pass == DR1_DERIVATIVE, "unknown pass");
  need(nf + T::inputs * T::outputs);
  std::vector<Tensor> gradients;
  for (int o = 0; o < T::outputs; ++o) gradients.emplace_back(call.tensors[T::inputs + o], call.context);
  for (int k = 0; k < T::inputs; ++k) {
    const dr1_tensor* shares = call.tensors + nf + k * T::outputs;
    if (shares->ndim < 0) continue;
    std::vector<Tensor> into;
    for (int o = 0; o < T::outputs; ++o) into.emplace_back(shares[o], call.context);
    const Derivation derivation{k, T::outputs, gradients.data(), into.data()};
    t.clear();
    for (int i = 0; i < T::inputs; ++i) t.emplace_back(call.tensors[i], call.context, i, &derivation);
    // The outputs have their gradients' shapes; nothing is written to them.
    for (int o = 0; o < T::outputs; ++o) t.emplace_back(call.tensors[T::inputs + o], call.context, -2 - o, &derivation);
    call_forward(op, t, std::make_index_sequence<nf>());
    check(derivation.assigned == static_cast<uint32_t>((uint64_t(1) << T::outputs) - 1),
          "the operator assigns no expression to one of its outputs, so that its derivative cannot be found; give it a "
          "backward(...)");
  }
}

template <class Op>
std::string shape_text(const uint32_t* ndims, const dr1_value* attributes) {
  if constexpr (ShapeOf<Op>::value) {
    Op op;
    set_attributes(op, attributes);
    std::vector<Shape> inputs;
    for (int i = 0; i < Traits<Op>::inputs; ++i) {
      inputs.emplace_back();
      for (uint32_t d = 0; d < ndims[i]; ++d) {
        inputs.back().push_back(Dim("i" + std::to_string(i) + "." + std::to_string(d)));
      }
    }
    const Shapes found = call_shape(op, inputs, std::make_index_sequence<Traits<Op>::inputs>());
    check(found.size() == Traits<Op>::outputs, "shape gives another number of shapes than there are outputs");
    std::string text;
    for (const Shape& s : found) text += (text.empty() ? "" : ";") + s.text() + ".";
    return text;
  }
  check(false, "the operator has no shape function");
  return {};
}

template <class Op>
std::string description(const char* name) {
  using T = Traits<Op>;
  Op op;
  std::string attributes, dtypes;
  for (const AttributeBase* a : op.attributes()) {
    char number[64];
    if (a->type == 'f') {
      std::snprintf(number, sizeof number, "%.17g", a->value.real);
    } else {
      std::snprintf(number, sizeof number, "%" PRId64, a->value.integer);
    }
    attributes += std::string(attributes.empty() ? "" : ", ") + "{\"name\": \"" + a->name + "\", \"type\": \"" +
                  std::string(1, a->type) + "\", \"default\": " + number + "}";
  }
  for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
    if (!(Op::dtypes & (1u << i))) continue;
    dtypes += std::string(dtypes.empty() ? "" : ", ") + "\"" + name_of(static_cast<DType>(i)) + "\"";
  }
#if defined(__CUDACC__)
  const char* devices = "\"cpu\", \"cuda\"";
#else
  const char* devices = "\"cpu\"";
#endif
  return std::string("{\"name\": \"") + name + "\", \"inputs\": " + std::to_string(T::inputs) +
         ", \"outputs\": " + std::to_string(T::outputs) + ", \"attributes\": [" + attributes + "], \"backward\": " +
         (T::backward ? "true" : "false") + ", \"shape\": " + (ShapeOf<Op>::value ? "true" : "false") +
         ", \"dtypes\": [" + dtypes + "], \"output_dtype\": " + OutputDType<Op>::text() + ", \"devices\": [" + devices +
         "]}";
}

// ---- the library's list, and its door

struct Entry {
  std::string description;
  void (*run)(const dr1_call&);
  std::string (*shape)(const uint32_t*, const dr1_value*);
};

inline std::vector<Entry>& entries() {
  static std::vector<Entry> all;
  return all;
}

template <class Op>
struct Registration {
  explicit Registration(const char* name) {
    entries().push_back({description<Op>(name), &run_pass<Op>, &shape_text<Op>});
  }
};

inline int fail(char* error, uint64_t bytes, const char* text) {
  if (error && bytes) std::snprintf(error, bytes, "%s", text);
  return 1;
}

// Runs `f`; whatever it throws becomes text in the caller's buffer and 1.
template <class F>
int guarded(char* error, uint64_t bytes, F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    return fail(error, bytes, e.what());
  } catch (...) {
    return fail(error, bytes, "the operator threw something that is no std::exception");
  }
}

}  // namespace dr1

extern "C" {
DR1_EXPORT inline uint32_t dr1_abi_version() { return DR1_ABI_VERSION; }
DR1_EXPORT inline uint32_t dr1_op_count() { return static_cast<uint32_t>(dr1::entries().size()); }
DR1_EXPORT inline const char* dr1_op_describe(uint32_t op) {
  return op < dr1::entries().size() ? dr1::entries()[op].description.c_str() : nullptr;
}
DR1_EXPORT inline int dr1_op_shape(uint32_t op, const uint32_t* ndims, const dr1_value* attributes, char* text,
                                   uint64_t bytes, char* error, uint64_t error_bytes) {
  return dr1::guarded(error, error_bytes, [&] {
    dr1::check(op < dr1::entries().size(), "no such operator in this library");
    const std::string found = dr1::entries()[op].shape(ndims, attributes);
    dr1::check(found.size() < bytes, "the shape function's text is too long");
    std::memcpy(text, found.c_str(), found.size() + 1);
  });
}
DR1_EXPORT inline int dr1_op_run(const dr1_call* call) {
  return dr1::guarded(call->error, call->error_bytes, [&] {
    dr1::check(call->op < dr1::entries().size(), "no such operator in this library");
    dr1::entries()[call->op].run(*call);
  });
}
}

#define DR1_JOIN_AGAIN(a, b) a##b
#define DR1_JOIN(a, b) DR1_JOIN_AGAIN(a, b)
// At namespace scope, once for each operator. The name is how PyTorch will call it: lower case, digits, underscores.
#define DR1_REGISTER_OP(Class, name) \
  static const ::dr1::Registration<Class> DR1_JOIN(dr1_registration_, __COUNTER__) { name }
