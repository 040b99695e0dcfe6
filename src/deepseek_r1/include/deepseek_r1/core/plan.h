// The iteration that a CPU or GPU kernel makes: outer dimensions, an inner one, and strides for every tensor.
#pragma once

#include "storage.h"

namespace dr1 __attribute__((visibility("hidden"))) {

// The tensors that an expression reads; the same memory read twice has one place.
template <int L>
struct Leaves {
  // A long expression names few tensors many times.
  static constexpr int most = L < 1 ? 1 : (L < 24 ? L : 24);
  const Tensor* tensor[most];
  int count = 0;

  int add(const Tensor& t) {
    for (int i = 0; i < count; ++i) {
      if (tensor[i]->same(t)) return i;
    }
    check(count < most, "an expression reads more than 24 different tensors; write it in several statements");
    tensor[count] = &t;
    return count++;
  }
};

inline std::string text_of(const Tensor& t) {
  std::string text = "(";
  for (int i = 0; i < t.ndim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

// Tensor 0 is the output, tensor k + 1 is leaf k. Strides in elements.
template <int L>
struct Plan {
  static constexpr int tensors = Leaves<L>::most + 1;
  int ndim = 0;
  int count = 0;
  int64_t sizes[DR1_MAX_DIMS];
  int64_t strides[DR1_MAX_DIMS][tensors];
  int64_t rows = 1;
  int64_t width = 1;
  int64_t inner[tensors];
  void* data[tensors];
  DType dtype[tensors];

  // With `by_row` the inner dimension is the last one, and leaves may be wider there than the output.
  Plan(const Tensor& out, const Leaves<L>& leaves, bool by_row) : count(leaves.count + 1) {
    const int nd = out.ndim();
    take(0, out);
    for (int k = 0; k < leaves.count; ++k) take(k + 1, *leaves.tensor[k]);
    for (int t = 0; t < count; ++t) inner[t] = 0;
    const int outer = by_row && nd ? nd - 1 : nd;
    for (int i = 0; i < outer; ++i) {
      if (out.size(i) == 1) {
        for (int k = 0; k < leaves.count; ++k) stride_at(out, *leaves.tensor[k], i);
        continue;
      }
      sizes[ndim] = out.size(i);
      strides[ndim][0] = out.stride(i);
      for (int k = 0; k < leaves.count; ++k) strides[ndim][k + 1] = stride_at(out, *leaves.tensor[k], i);
      ++ndim;
    }
    for (int k = 0; k < leaves.count; ++k) {
      check(leaves.tensor[k]->ndim() <= nd, "an expression of shape " + text_of(*leaves.tensor[k]) +
                                                " has more dimensions than its output of shape " + text_of(out));
    }
    sort_by_output();
    merge();
    if (by_row && nd) {
      width = out.size(-1);
      inner[0] = out.size(-1) == 1 ? 0 : out.stride(-1);
      for (int k = 0; k < leaves.count; ++k) {
        const Tensor& t = *leaves.tensor[k];
        inner[k + 1] = t.ndim() == 0 || t.size(-1) == 1 ? 0 : t.stride(-1);
      }
    } else if (ndim) {
      --ndim;
      width = sizes[ndim];
      for (int t = 0; t < count; ++t) inner[t] = strides[ndim][t];
    }
    for (int i = 0; i < ndim; ++i) rows *= sizes[i];
    if (inner[0] == 0) inner[0] = 1;
  }

  // Where a row begins, in elements, for each tensor.
  DR1_HD DR1_INLINE void offsets(int64_t row, int64_t* to) const {
    for (int t = 0; t < count; ++t) to[t] = 0;
    for (int i = ndim - 1; i >= 0; --i) {
      const int64_t index = row % sizes[i];
      row /= sizes[i];
      for (int t = 0; t < count; ++t) to[t] += index * strides[i][t];
    }
  }

  // The same for one tensor, where an array of them would lie in memory: a GPU's threads have few registers.
  DR1_HD DR1_INLINE int64_t offset(int64_t row, int t) const {
    int64_t to = 0;
    for (int i = ndim - 1; i > 0; --i) {
      to += row % sizes[i] * strides[i][t];
      row /= sizes[i];
    }
    return ndim ? to + row * strides[0][t] : to;
  }

 private:
  void take(int t, const Tensor& tensor) {
    data[t] = tensor.memory().data;
    dtype[t] = tensor.dtype();
  }
  // Stride of a leaf along the output's dimension `i`, as broadcasting has it.
  static int64_t stride_at(const Tensor& out, const Tensor& leaf, int i) {
    const int own = i - (out.ndim() - leaf.ndim());
    if (own < 0 || leaf.size(own) == 1) return 0;
    check(leaf.size(own) == out.size(i),
          "an expression of shape " + text_of(leaf) + " does not broadcast to its output of shape " + text_of(out));
    return leaf.stride(own);
  }
  void sort_by_output() {
    for (int i = 1; i < ndim; ++i) {
      for (int j = i; j > 0 && strides[j - 1][0] < strides[j][0]; --j) {
        std::swap(sizes[j - 1], sizes[j]);
        for (int t = 0; t < count; ++t) std::swap(strides[j - 1][t], strides[j][t]);
      }
    }
  }
  void merge() {
    int last = 0;
    for (int i = 1; i < ndim; ++i) {
      bool whole = true;
      for (int t = 0; t < count; ++t) whole = whole && strides[last][t] == strides[i][t] * sizes[i];
      if (whole) {
        sizes[last] *= sizes[i];
      } else {
        sizes[++last] = sizes[i];
      }
      for (int t = 0; t < count; ++t) strides[last][t] = strides[i][t];
    }
    if (ndim) ndim = last + 1;
  }
};

// Outside of reductions a row-wise expression is as wide as its output.
template <class E>
void check_width(const Tensor& out, const E& e) {
  const int64_t width = out.ndim() ? out.size(-1) : 1;
  e.visit_outside([&](const Tensor& t) {
    check(t.ndim() == 0 || t.size(-1) == 1 || t.size(-1) == width,
          "an expression of shape " + text_of(t) + " does not broadcast to its output of shape " + text_of(out));
  });
}

// What is computed in: double if any tensor is, whole numbers if all are, else float.
enum class Compute { real32, real64, whole };
template <int L>
Compute compute_of(const Tensor& out, const Leaves<L>& leaves) {
  uint32_t all = mask(out.dtype());
  for (int k = 0; k < leaves.count; ++k) all |= mask(leaves.tensor[k]->dtype());
  if (all & mask(DType::float64)) return Compute::real64;
  return all & floating ? Compute::real32 : Compute::whole;
}

// Reads leaves through a shared plan: what `bind` builds of an expression is the same for CPU and GPU but for `Leaf`.
// With K, parts of that type become what a reduction kept of them.
template <class C, class Leaf, int L, class K = Nothing>
struct Binder {
  using Compute = C;
  using Kept = K;
  Leaves<L>* leaves;
  int64_t columns = 1;
  const K* kept = nullptr;
  int seed_role = -1;
  int seed_reduction = -1;
  Binder<C, Leaf, L> plain() const { return {leaves, columns, nullptr, seed_role, seed_reduction}; }
  auto leaf(const Tensor& t) const {
    const bool seeded = seed_role >= 0 && t.role() == seed_role;
    return Leaf(leaves->add(t), C(seeded ? 1 : 0));
  }
};

}  // namespace dr1
