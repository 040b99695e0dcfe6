// Running an expression on the CPU: one loop over contiguous elements, vectorised by the compiler, on several threads.
//
// Leaves that are not contiguous, or of another type than is computed in, pass through a small buffer block by block;
// the loop itself is the same.
#pragma once

#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "expression.h"
#include "plan.h"

namespace dr1 __attribute__((visibility("hidden"))) {

// A range shared out over threads. Its body is a plain function, so that this compiles once for all expressions.
struct Team {
  const dr1_context* context;
  void (*body)(void* data, int64_t begin, int64_t end);
  void* data;
  int64_t n, step;
  std::mutex lock;
  std::exception_ptr error;

  void part(int number, int size) {
    const int64_t each = ((n + size - 1) / size + step - 1) / step * step;
    const int64_t begin = std::min(n, each * number), end = std::min(n, begin + each);
    try {
      if (begin < end) body(data, begin, end);
    } catch (...) {
      // An error may not leave its thread.
      const std::lock_guard<std::mutex> guard(lock);
      error = std::current_exception();
    }
  }
  static void borrowed(void* data) {
    Team& team = *static_cast<Team*>(data);
    team.part(team.context->thread_number(), team.context->team_size());
  }
  void run(int threads, bool large) {
    if (context->parallel && context->thread_number && context->team_size) {
      context->parallel(&Team::borrowed, this, static_cast<unsigned>(threads), 0);
    } else if (!large) {
      // No threads to borrow: starting some pays for large work only.
      part(0, 1);
    } else {
      std::vector<std::thread> others;
      for (int i = 1; i < threads; ++i) others.emplace_back([this, i, threads] { part(i, threads); });
      part(0, threads);
      for (std::thread& t : others) t.join();
    }
    if (error) std::rethrow_exception(error);
  }
};

// Calls f(begin, end) on parts of [0, n) in parallel; parts smaller than `grain` are not made.
template <class F>
void parallel_for(const dr1_context& context, int64_t n, int64_t grain, const F& f) {
  grain = std::max<int64_t>(1, grain);
  const int threads = static_cast<int>(std::min<int64_t>(std::max(1, context.threads), std::max<int64_t>(1, n / grain)));
  if (threads <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  const auto body = [](void* data, int64_t begin, int64_t end) { (*static_cast<const F*>(data))(begin, end); };
  // Single elements are cut at multiples of 64, so that no two threads write one cache line of a contiguous output.
  Team team{&context, body, const_cast<F*>(&f), n, grain >= 64 ? 64 : 1, {}, {}};
  team.run(threads, n / threads >= 8 * grain);
}

namespace cpu {

// Elements of a block where leaves pass through a buffer.
constexpr int64_t BLOCK = 512;
// Elements that are worth a thread.
constexpr int64_t GRAIN = 16384;

// Element j of the block; or the element itself, where the expression reads one tensor only.
struct At {
  int64_t j;
};
template <class C>
struct Given {
  C x;
};

template <class C>
struct Leaf : Node {
  const C* p = nullptr;
  int index;
  C seed;
  Leaf(int number, C tangent) : index(number), seed(tangent) {}
  template <class S>
  DR1_HD DR1_INLINE void seek(const S& s) {
    p = s.pointer(index);
  }
  template <class R>
  DR1_HD DR1_INLINE void prepare(R&) {}
  template <class V>
  DR1_HD DR1_INLINE V eval(const At& at) const {
    return seeded<V>(Access<C>::read(p + at.j), seed);
  }
  template <class V>
  DR1_HD DR1_INLINE V eval(const Given<C>& at) const {
    return seeded<V>(at.x, seed);
  }
};

template <class C, class E>
void loop(E e, C* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) Access<C>::write(out + j, e.template eval<C>(At{j}));
}

template <class C, class E>
void loop_of_one(E e, const C* in, C* out, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) Access<C>::write(out + j, e.template eval<C>(Given<C>{Access<C>::read(in + j)}));
}

template <class C, class E>
C sum(E e, int64_t n) {
  C total = C(0);
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += e.template eval<C>(At{j});
  return total;
}

template <class C, class E>
C largest(E e, int64_t n, C start) {
  C best = start;
  int unordered = 0;
#pragma omp simd reduction(max : best) reduction(+ : unordered)
  for (int64_t j = 0; j < n; ++j) {
    const C x = e.template eval<C>(At{j});
    best = best < x ? x : best;
    unordered += x != x;
  }
  return unordered ? std::numeric_limits<C>::quiet_NaN() : best;
}

// One thread's way through its rows.
template <class C, int L>
class Walk {
 public:
  explicit Walk(const Plan<L>& plan) : plan_(plan) {
    for (int t = 0; t < plan.count; ++t) staged_ = staged_ || needs_stage(t);
    for (auto& at : held_) at = nullptr;
  }

  void row(int64_t number) { plan_.offsets(number, offset_); }
  void block(int64_t column, int64_t n) { column_ = column, n_ = n; }
  int64_t column() const { return column_; }
  // Longest block from `column` on.
  int64_t most(int64_t left) const { return staged_ ? std::min(left, BLOCK) : left; }

  // Where the elements of leaf k in this block lie, of the type computed in and side by side.
  const C* pointer(int k) const {
    const int t = k + 1;
    const char* base = static_cast<const char*>(plan_.data[t]);
    const char* at = base + (offset_[t] + column_ * plan_.inner[t]) * storage::bytes_of(plan_.dtype[t]);
    if (!needs_stage(t)) return reinterpret_cast<const C*>(at);
    if (held_[t] != at || held_n_[t] < n_) {
      storage::load_block(plan_.dtype[t], at, plan_.inner[t], n_, stage_[t]);
      held_[t] = at, held_n_[t] = n_;
    }
    return stage_[t];
  }
  C* output() {
    return needs_stage(0) ? stage_[0] : static_cast<C*>(plan_.data[0]) + offset_[0] + column_ * plan_.inner[0];
  }
  void flush() {
    if (!needs_stage(0)) return;
    char* to = static_cast<char*>(plan_.data[0]) +
               (offset_[0] + column_ * plan_.inner[0]) * storage::bytes_of(plan_.dtype[0]);
    storage::store_block(plan_.dtype[0], to, plan_.inner[0], n_, stage_[0]);
  }

  template <class F, class A>
  C fold(A& a, int64_t width) {
    // Blocks are folded into a double, so that long rows lose nothing.
    using Wide = std::conditional_t<std::is_floating_point_v<C>, double, C>;
    Wide total = 0;
    C best = std::numeric_limits<C>::has_infinity ? -std::numeric_limits<C>::infinity()
                                                  : std::numeric_limits<C>::lowest();
    for (int64_t j = 0; j < width; j += n_) {
      block(j, most(std::min<int64_t>(width - j, 2 * BLOCK)));
      a.seek(*this);
      if constexpr (F::sum) {
        total += sum<C>(a, n_);
      } else {
        const C x = largest<C>(a, n_, best);
        best = best != best ? best : x;
      }
    }
    return F::sum ? static_cast<C>(total) : best;
  }

 private:
  bool needs_stage(int t) const { return plan_.inner[t] != 1 || plan_.dtype[t] != DTypeOf<C>::value; }

  const Plan<L>& plan_;
  bool staged_ = false;
  int64_t offset_[Plan<L>::tensors];
  int64_t column_ = 0, n_ = 0;
  mutable const char* held_[Plan<L>::tensors];
  mutable int64_t held_n_[Plan<L>::tensors];
  alignas(64) mutable C stage_[Plan<L>::tensors][BLOCK];
};

template <class C, int L, class E>
void run_rows(const Plan<L>& plan, const E& bound, int64_t begin, int64_t end) {
  Walk<C, L> walk(plan);
  E e = bound;
  for (int64_t r = begin; r < end; ++r) {
    walk.row(r);
    e.prepare(walk);
    for (int64_t j = 0, n; j < plan.width; j += n) {
      n = walk.most(plan.width - j);
      walk.block(j, n);
      e.seek(walk);
      loop<C>(e, walk.output(), n);
      walk.flush();
    }
  }
}

// Elements [begin, end) in the plan's order; a part may begin and end within a row.
template <class C, int L, class E>
void run_elements(const Plan<L>& plan, const E& bound, int64_t begin, int64_t end) {
  Walk<C, L> walk(plan);
  E e = bound;
  for (int64_t i = begin, n; i < end; i += n) {
    const int64_t row = i / plan.width, j = i % plan.width;
    if (j == 0 || i == begin) walk.row(row);
    n = walk.most(std::min(plan.width - j, end - i));
    walk.block(j, n);
    if (plan.count == 2) {
      loop_of_one<C>(e, walk.pointer(0), walk.output(), n);
    } else {
      e.seek(walk);
      loop<C>(e, walk.output(), n);
    }
    walk.flush();
  }
}

template <class C, class E>
void run_as(const Tensor& out, const E& e) {
  constexpr bool by_row = E::reductions > 0;
  Leaves<E::leaves> leaves;
  Binder<C, Leaf<C>, E::leaves> binder{&leaves, out.ndim() ? out.size(-1) : 1};
  const auto bound = e.bind(binder);
  const Plan<E::leaves> plan(out, leaves, by_row);
  if constexpr (by_row) {
    check_width(out, e);
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, std::max(width_of(e), plan.width)));
    parallel_for(out.context(), plan.rows, grain,
                 [&](int64_t begin, int64_t end) { run_rows<C>(plan, bound, begin, end); });
  } else {
    parallel_for(out.context(), plan.rows * plan.width, GRAIN,
                 [&](int64_t begin, int64_t end) { run_elements<C>(plan, bound, begin, end); });
  }
}

template <class E>
void run(const Tensor& out, const E& e) {
  Leaves<E::leaves> leaves;
  e.visit([&](const Tensor& t) {
    leaves.add(t);
    check(t.device() == Device::cpu, "an expression reads a tensor on the GPU and writes one on the CPU");
  });
  switch (compute_of(out, leaves)) {
    case Compute::real32: return run_as<float>(out, e);
    case Compute::real64: return run_as<double>(out, e);
    case Compute::whole: return run_as<int64_t>(out, e);
  }
}

}  // namespace cpu
}  // namespace dr1
