// The derivative of an operator without a `backward`, from the expression that it assigns.
//
// Elements are differentiated forwards, on dual numbers, one pass for each input; row reductions are stepped through
// backwards, so that a gradient is again one expression and runs as any other.
#pragma once

#include "expression.h"

namespace dr1 __attribute__((visibility("hidden"))) {

// What a derivative pass hands through the tensors to the assignments inside `forward`.
struct Derivation {
  int input;
  int outputs;
  // By output: the gradient that comes in, and where this input's share goes.
  const Tensor* gradients;
  const Tensor* shares;
  mutable uint32_t assigned = 0;
};

// The derivative of `a` along one input, or along the value of one reduction in it.
template <class A>
struct Tangent : Node {
  static constexpr int leaves = A::leaves;
  static constexpr int reductions = A::reductions;
  A a;
  int role, reduction;
  DR1_HD Tangent(const A& of, int input, int through) : a(of), role(input), reduction(through) {}
  template <class F>
  void visit(F&& f) const {
    a.visit(f);
  }
  template <class F>
  void visit_outside(F&& f) const {
    a.visit_outside(f);
  }
  template <class W>
  auto bind(W& w) const {
    auto inner = w.plain();
    inner.seed_role = role;
    inner.seed_reduction = reduction;
    return Tangent<decltype(a.bind(inner))>(a.bind(inner), role, reduction);
  }
  template <class S>
  DR1_HD DR1_INLINE void seek(const S& s) {
    a.seek(s);
  }
  template <class R>
  DR1_HD DR1_INLINE void prepare(R& r) {
    a.prepare(r);
  }
  bool same(const Tangent& other) const {
    return a.same(other.a) && role == other.role && reduction == other.reduction;
  }
  template <class V, class P>
  DR1_HD DR1_INLINE V eval(const P& p) const {
    if constexpr (std::is_floating_point_v<V>) {
      return a.template eval<Dual<V>>(p).d;
    } else {
      return V(0);  // whole numbers have no derivative; torch asks for none
    }
  }
};

// 1, but where `active` it is 0 in all columns except the first: what is one element wide counts once in a wider row.
struct Once : Node {
  static constexpr int leaves = 0;
  static constexpr int reductions = 0;
  int64_t width;
  bool active = false;
  int64_t start = 0;
  explicit Once(int64_t own_width) : width(own_width) {}
  template <class F>
  void visit(F&&) const {}
  template <class F>
  void visit_outside(F&&) const {}
  template <class W>
  Once bind(W& w) const {
    Once bound = *this;
    bound.active = width == 1 && w.columns > 1;
    return bound;
  }
  template <class S>
  DR1_HD DR1_INLINE void seek(const S& s) {
    start = s.column();
  }
  template <class R>
  DR1_HD DR1_INLINE void prepare(R&) {}
  bool same(const Once& other) const { return width == other.width; }
  template <class V, class P>
  DR1_HD DR1_INLINE V eval(const P& at) const {
    return V(!active || start + at.j == 0 ? 1 : 0);
  }
};

// ---- the reductions of an expression, inner ones first

template <class N>
std::tuple<> reductions_of(const N&) {
  return {};
}
template <class F, class A, class B, class D>
auto reductions_of(const Apply<F, A, B, D>& e);
template <class F, class A>
auto reductions_of(const Reduce<F, A>& r) {
  return std::tuple_cat(reductions_of(r.a), std::make_tuple(r));
}
template <class F, class A, class B, class D>
auto reductions_of(const Apply<F, A, B, D>& e) {
  return std::tuple_cat(reductions_of(e.a), reductions_of(e.b), reductions_of(e.d));
}

// How much a reduction changes with each element that it reads. Equal largest elements share, as in torch.
template <class A>
auto weight(const Reduce<SumFold, A>&) {
  return Scalar(1.0);
}
template <class A>
auto weight(const Reduce<MaxFold, A>& r) {
  return (r.a == r) / row_sum(r.a == r);
}

template <size_t Q, size_t I, class E, class R>
auto through_later(const E& e, const Tensor& gradient, const R& all);

// How much the loss changes with reduction I of each row.
template <size_t I, class E, class R>
auto adjoint(const E& e, const Tensor& gradient, const R& all) {
  const auto direct = row_sum(gradient * Tangent<E>(e, -1, std::get<I>(all).id));
  if constexpr (I + 1 < std::tuple_size_v<R>) {
    return direct + through_later<I + 1, I>(e, gradient, all);
  } else {
    return direct;
  }
}

template <size_t Q, size_t I, class E, class R>
auto through_later(const E& e, const Tensor& gradient, const R& all) {
  const auto& later = std::get<Q>(all);
  using A = std::decay_t<decltype(later.a)>;
  const auto step = row_sum(weight(later) * Tangent<A>(later.a, -1, std::get<I>(all).id));
  const auto share = adjoint<Q>(e, gradient, all) * step;
  if constexpr (Q + 1 < std::tuple_size_v<R>) {
    return share + through_later<Q + 1, I>(e, gradient, all);
  } else {
    return share;
  }
}

template <size_t I, class E, class R>
auto through_reductions(const E& e, const Tensor& gradient, int input, const R& all) {
  const auto& r = std::get<I>(all);
  using A = std::decay_t<decltype(r.a)>;
  const auto share = adjoint<I>(e, gradient, all) * weight(r) * Tangent<A>(r.a, input, -1) * Once(width_of(r.a));
  if constexpr (I + 1 < std::tuple_size_v<R>) {
    return share + through_reductions<I + 1>(e, gradient, input, all);
  } else {
    return share;
  }
}

// The gradient of input `input` where `e` was assigned to an output of `width` columns, as an expression.
template <class E>
auto gradient_of(const E& e, const Tensor& gradient, int input, int64_t width) {
  if constexpr (E::reductions == 0) {
    (void)width;
    return gradient * Tangent<E>(e, input, -1);
  } else {
    return gradient * Tangent<E>(e, input, -1) * Once(width) +
           through_reductions<0>(e, gradient, input, reductions_of(e));
  }
}

template <class E>
void run(const Tensor& out, const E& e);

template <class E>
void derive(const Tensor& out, E e) {
  const Derivation& d = *out.derivation();
  const int o = -2 - out.role();
  check(o >= 0, "an operator assigns to one of its inputs; its derivative cannot be found");
  bool depends = false;
  e.visit([&](const Tensor& t) {
    check(t.role() >= -1, "an operator reads its own output, so that its derivative cannot be found; write it in one "
                          "expression, or give it a backward(...)");
    depends = depends || t.role() == d.input;
  });
  d.assigned |= 1u << o;
  const Tensor& share = d.shares[o];
  if (!depends) {
    run(share, Scalar(0.0));
    return;
  }
  for (int i = 0; i < share.ndim(); ++i) {
    const bool last = i == share.ndim() - 1 && E::reductions > 0 && out.size(i) == 1;
    check(last || share.size(i) == out.size(i),
          "inputs and output differ in shape, so that the derivative cannot be found; give it a backward(...)");
  }
  int next = 0;
  e.number(next);
  if constexpr (E::reductions <= 3) {
    run(share, gradient_of(e, d.gradients[o], d.input, out.ndim() ? out.size(-1) : 1));
  } else {
    check(false, "an expression of more than three row reductions has no derivative; give it a backward(...)");
  }
}

}  // namespace dr1
