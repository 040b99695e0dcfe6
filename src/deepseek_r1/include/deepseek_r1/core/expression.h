// Expressions: what stands right of `output = ...`, kept as a type so that it compiles to one loop.
//
// Every function here is found for tensors without a prefix. A node is first `bind`-ed to a device's way of reading
// memory; the bound tree then `seek`s a place, `prepare`s the row reductions of a row, and `eval`uates an element, on
// plain values or on dual numbers.
#pragma once

#include <tuple>
#include <utility>

#include "tensor.h"

namespace dr1 __attribute__((visibility("hidden"))) {

// A missing operand.
struct Nothing : Node {
  static constexpr int leaves = 0;
  static constexpr int reductions = 0;
  template <class F>
  void visit(F&&) const {}
  template <class F>
  void visit_outside(F&&) const {}
  template <class B>
  Nothing bind(B&) const {
    return {};
  }
  template <class S>
  DR1_HD DR1_INLINE void seek(const S&) {}
  template <class R>
  DR1_HD DR1_INLINE void prepare(R&) {}
  bool same(const Nothing&) const { return true; }
  void number(int&) {}
};

// What a reduction has computed of this element on its way: see `cuda::Kept`.
struct KeptElement : Node {
  template <class S>
  DR1_HD DR1_INLINE void seek(const S&) {}
  template <class R>
  DR1_HD DR1_INLINE void prepare(R&) {}
  template <class V, class P>
  DR1_HD DR1_INLINE V eval(const P& p) const {
    return p.kept;
  }
};

struct Scalar : Node {
  static constexpr int leaves = 0;
  static constexpr int reductions = 0;
  double real;
  int64_t whole;
  DR1_HD explicit Scalar(double value) : real(value), whole(static_cast<int64_t>(value)) {}
  DR1_HD explicit Scalar(int64_t value) : real(static_cast<double>(value)), whole(value) {}
  template <class F>
  void visit(F&&) const {}
  template <class F>
  void visit_outside(F&&) const {}
  template <class B>
  Scalar bind(B&) const {
    return *this;
  }
  template <class S>
  DR1_HD DR1_INLINE void seek(const S&) {}
  template <class R>
  DR1_HD DR1_INLINE void prepare(R&) {}
  bool same(const Scalar& other) const { return real == other.real && whole == other.whole; }
  void number(int&) {}
  template <class V, class P>
  DR1_HD DR1_INLINE V eval(const P&) const {
    using C = typename DualTraits<V>::Real;
    if constexpr (std::is_same_v<C, int64_t>) {
      return V(whole);
    } else {
      return V(static_cast<C>(real));
    }
  }
};

template <class F, class A, class B = Nothing, class D = Nothing>
struct Apply : Node {
  static constexpr int leaves = A::leaves + B::leaves + D::leaves;
  static constexpr int reductions = A::reductions + B::reductions + D::reductions;
  A a;
  B b;
  D d;
  DR1_HD Apply(const A& first, const B& second = B(), const D& third = D()) : a(first), b(second), d(third) {}
  template <class V>
  void visit(V&& v) const {
    a.visit(v), b.visit(v), d.visit(v);
  }
  template <class V>
  void visit_outside(V&& v) const {
    a.visit_outside(v), b.visit_outside(v), d.visit_outside(v);
  }
  template <class W>
  auto bind(W& w) const {
    if constexpr (std::is_same_v<Apply, typename W::Kept>) {
      return KeptElement();
    } else {
      return Apply<F, decltype(a.bind(w)), decltype(b.bind(w)), decltype(d.bind(w))>{a.bind(w), b.bind(w), d.bind(w)};
    }
  }
  bool same(const Apply& other) const { return a.same(other.a) && b.same(other.b) && d.same(other.d); }
  template <class S>
  DR1_HD DR1_INLINE void seek(const S& s) {
    a.seek(s), b.seek(s), d.seek(s);
  }
  template <class R>
  DR1_HD DR1_INLINE void prepare(R& r) {
    a.prepare(r), b.prepare(r), d.prepare(r);
  }
  void number(int& next) { a.number(next), b.number(next), d.number(next); }
  template <class V, class P>
  DR1_HD DR1_INLINE V eval(const P& p) const {
    if constexpr (std::is_same_v<B, Nothing>) {
      return F::apply(a.template eval<V>(p));
    } else if constexpr (std::is_same_v<D, Nothing>) {
      return F::apply(a.template eval<V>(p), b.template eval<V>(p));
    } else {
      return F::apply(a.template eval<V>(p), b.template eval<V>(p), d.template eval<V>(p));
    }
  }
};

// ---- operands: nodes, numbers, and attributes (anything with `as_scalar`)

template <class T, class = void>
struct HasScalar : std::false_type {};
template <class T>
struct HasScalar<T, std::void_t<decltype(std::declval<const T&>().as_scalar())>> : std::true_type {};

template <class T>
constexpr bool is_operand = is_node<T> || std::is_arithmetic_v<std::decay_t<T>> || HasScalar<std::decay_t<T>>::value;

template <class T>
auto operand(const T& x) {
  if constexpr (is_node<T>) {
    return x;
  } else if constexpr (HasScalar<T>::value) {
    return x.as_scalar();
  } else if constexpr (std::is_integral_v<T>) {
    return Scalar(static_cast<int64_t>(x));
  } else {
    return Scalar(static_cast<double>(x));
  }
}
template <class T>
using Operand = decltype(operand(std::declval<const T&>()));

// At least one operand must be a tensor, an expression or an attribute, all must be able to stand in one.
template <class... T>
using IfExpression =
    std::enable_if_t<((is_node<T> || HasScalar<std::decay_t<T>>::value) || ...) && (is_operand<T> && ...), int>;

#define DR1_UNARY_TAG(tag, body)                \
  struct tag {                                  \
    template <class V>                          \
    static DR1_HD DR1_INLINE V apply(V x) {     \
      return body;                              \
    }                                           \
  };
#define DR1_UNARY_NAME(tag, name)                               \
  template <class A, IfExpression<A> = 0>                       \
  auto name(const A& a) {                                       \
    return Apply<tag, Operand<A>>(operand(a));                  \
  }
#define DR1_UNARY(tag, name, body) \
  DR1_UNARY_TAG(tag, body)         \
  DR1_UNARY_NAME(tag, name)
#define DR1_BINARY_TAG(tag, body)                \
  struct tag {                                   \
    template <class V>                           \
    static DR1_HD DR1_INLINE V apply(V x, V y) { \
      return body;                               \
    }                                            \
  };
#define DR1_BINARY_NAME(tag, name)                                          \
  template <class A, class B, IfExpression<A, B> = 0>                       \
  auto name(const A& a, const B& b) {                                       \
    return Apply<tag, Operand<A>, Operand<B>>(operand(a), operand(b));      \
  }
#define DR1_BINARY(tag, name, body) \
  DR1_BINARY_TAG(tag, body)         \
  DR1_BINARY_NAME(tag, name)
// A function under the name of C's float version and under that of the overloaded one.
#define DR1_MATH(tag, name)                \
  DR1_UNARY(tag, name, scalar::name(x))    \
  DR1_UNARY_NAME(tag, name##f)

DR1_UNARY(Negate, operator-, -x)
DR1_UNARY(Not, operator!, V(scalar::value_of(x) == 0))
DR1_MATH(Exp, exp)
DR1_MATH(Exp2, exp2)
DR1_MATH(Expm1, expm1)
DR1_MATH(Log, log)
DR1_MATH(Log2, log2)
DR1_MATH(Log10, log10)
DR1_MATH(Log1p, log1p)
DR1_MATH(Sqrt, sqrt)
DR1_MATH(Sin, sin)
DR1_MATH(Cos, cos)
DR1_MATH(Sinh, sinh)
DR1_MATH(Cosh, cosh)
DR1_MATH(Tanh, tanh)
DR1_MATH(Erf, erf)
DR1_MATH(Floor, floor)
DR1_MATH(Ceil, ceil)
DR1_UNARY(Abs, abs, scalar::abs(x))
DR1_UNARY_NAME(Abs, fabs)
DR1_UNARY_NAME(Abs, fabsf)
DR1_UNARY(Sign, sign, scalar::sign(x))
DR1_UNARY(Sigmoid, sigmoid, scalar::sigmoid(x))
DR1_UNARY(Relu, relu, scalar::value_of(x) > 0 || scalar::value_of(x) != scalar::value_of(x) ? x : V(0))
DR1_UNARY(Square, square, x* x)
DR1_UNARY(Rsqrt, rsqrt, scalar::divide(V(1), scalar::sqrt(x)))

DR1_BINARY(Add, operator+, x + y)
DR1_BINARY(Subtract, operator-, x - y)
DR1_BINARY(Multiply, operator*, x* y)
DR1_BINARY(Divide, operator/, scalar::divide(x, y))
DR1_BINARY(Less, operator<, V(scalar::value_of(x) < scalar::value_of(y)))
DR1_BINARY(LessEqual, operator<=, V(scalar::value_of(x) <= scalar::value_of(y)))
DR1_BINARY(Greater, operator>, V(scalar::value_of(x) > scalar::value_of(y)))
DR1_BINARY(GreaterEqual, operator>=, V(scalar::value_of(x) >= scalar::value_of(y)))
DR1_BINARY(Equal, operator==, V(scalar::value_of(x) == scalar::value_of(y)))
DR1_BINARY(NotEqual, operator!=, V(scalar::value_of(x) != scalar::value_of(y)))
DR1_BINARY(And, operator&&, V((scalar::value_of(x) != 0) & (scalar::value_of(y) != 0)))
DR1_BINARY(Or, operator||, V((scalar::value_of(x) != 0) | (scalar::value_of(y) != 0)))
DR1_BINARY(Power, pow, scalar::pow(x, y))
DR1_BINARY_NAME(Power, powf)
DR1_BINARY(Maximum, max, scalar::maximum(x, y))
DR1_BINARY_NAME(Maximum, fmax)
DR1_BINARY_NAME(Maximum, fmaxf)
DR1_BINARY(Minimum, min, scalar::minimum(x, y))
DR1_BINARY_NAME(Minimum, fmin)
DR1_BINARY_NAME(Minimum, fminf)

struct Where {
  template <class V>
  static DR1_HD DR1_INLINE V apply(V condition, V x, V y) {
    return scalar::value_of(condition) != 0 ? x : y;
  }
};
template <class Q, class A, class B, IfExpression<Q, A, B> = 0>
auto where(const Q& condition, const A& a, const B& b) {
  return Apply<Where, Operand<Q>, Operand<A>, Operand<B>>(operand(condition), operand(a), operand(b));
}
template <class A, class L, class H, IfExpression<A, L, H> = 0>
auto clamp(const A& a, const L& low, const H& high) {
  return min(max(a, low), high);
}

// ---- reductions of the last dimension

struct SumFold {
  static constexpr bool sum = true;
};
struct MaxFold {
  static constexpr bool sum = false;
};

// Whether S stands in N, not counting what is below N's reductions.
template <class N, class S>
struct HasPart : std::false_type {};
template <class F, class A, class B, class D, class S>
struct HasPart<Apply<F, A, B, D>, S>
    : std::bool_constant<std::is_same_v<Apply<F, A, B, D>, S> || HasPart<A, S>::value || HasPart<B, S>::value ||
                         HasPart<D, S>::value> {};

// A reduction with its place in a row: `value` is set by `prepare`, and then the same for every element of the row.
// `core` is the part of `a` that is kept, if any.
template <class C, class F, class A, class K = Nothing>
struct BoundReduce : Node {
  A a;
  int64_t width;
  C seed;
  K core;
  C value;
  DR1_HD BoundReduce(const A& of, int64_t length, C tangent, const K& kept = K())
      : a(of), width(length), seed(tangent), core(kept), value() {}
  // `seek` moves through the outer expression's elements; what is below is moved by the fold.
  template <class S>
  DR1_HD DR1_INLINE void seek(const S&) {}
  template <class R>
  DR1_HD DR1_INLINE void prepare(R& r) {
    core.prepare(r), a.prepare(r);
    if constexpr (std::is_same_v<K, Nothing>) {
      value = r.template fold<F>(a, width);
    } else {
      value = r.template fold<F>(a, width, core);
    }
  }
  template <class V, class P>
  DR1_HD DR1_INLINE V eval(const P&) const {
    return seeded<V>(value, seed);
  }
};

template <class E>
int64_t width_of(const E& e) {
  int64_t width = 1;
  e.visit_outside([&](const Tensor& t) {
    const int64_t n = t.ndim() ? t.size(-1) : 1;
    check(n == width || n == 1 || width == 1, "a row reduction reads rows of different lengths");
    if (n != 1) width = n;
  });
  return width;
}

template <class F, class A>
struct Reduce : Node {
  static constexpr int leaves = A::leaves;
  static constexpr int reductions = A::reductions + 1;
  using Fold = F;
  A a;
  int id = -1;
  explicit Reduce(const A& of) : a(of) {}
  template <class V>
  void visit(V&& v) const {
    a.visit(v);
  }
  template <class V>
  void visit_outside(V&&) const {}
  template <class W>
  auto bind(W& w) const {
    using C = typename W::Compute;
    const C seed(w.seed_reduction == id && id >= 0);
    if constexpr (HasPart<A, typename W::Kept>::value) {
      auto plain = w.plain();
      return BoundReduce<C, F, decltype(a.bind(w)), decltype(w.kept->bind(plain))>(a.bind(w), width_of(a), seed,
                                                                                   w.kept->bind(plain));
    } else {
      return BoundReduce<C, F, decltype(a.bind(w))>(a.bind(w), width_of(a), seed);
    }
  }
  bool same(const Reduce& other) const { return a.same(other.a); }
  void number(int& next) {
    a.number(next);
    id = next++;
  }
};

// The length of the rows of `A`, as a number.
template <class A>
struct Width : Node {
  static constexpr int leaves = 0;
  static constexpr int reductions = 0;
  A a;
  explicit Width(const A& of) : a(of) {}
  template <class V>
  void visit(V&&) const {}
  template <class V>
  void visit_outside(V&&) const {}
  template <class W>
  Scalar bind(W&) const {
    return Scalar(width_of(a));
  }
  bool same(const Width& other) const { return a.same(other.a); }
  void number(int&) {}
};

// Sum, largest, smallest element and mean of each row (the last dimension, kept as size 1).
template <class A, IfExpression<A> = 0>
auto row_sum(const A& a) {
  return Reduce<SumFold, Operand<A>>(operand(a));
}
template <class A, IfExpression<A> = 0>
auto row_max(const A& a) {
  return Reduce<MaxFold, Operand<A>>(operand(a));
}
template <class A, IfExpression<A> = 0>
auto row_min(const A& a) {
  return -row_max(-operand(a));
}
template <class A, IfExpression<A> = 0>
auto row_mean(const A& a) {
  return row_sum(a) / Width<Operand<A>>(operand(a));
}

}  // namespace dr1
