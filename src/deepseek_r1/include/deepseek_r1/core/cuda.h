// Running an expression on an NVIDIA GPU: the same expression, compiled by nvcc into a kernel on the caller's stream.
//
// Elementwise: one access for four elements where all tensors are contiguous or a single element. With row reductions:
// one block a row, which reads the row anew for each reduction (it stays in the cache), four elements at a time where the
// rows are contiguous. A part that stands both below a reduction and beside it, as the exponential in a softmax, is then
// computed once and kept in registers.
#pragma once

#include <algorithm>

#include "cuda_keep.h"

namespace dr1 __attribute__((visibility("hidden"))) {
namespace cuda {

#if !defined(__CUDACC__)

template <class E>
void run(const Tensor&, const E&) {
  check(false, "this library was built without CUDA; build it with --cuda, or move the tensors to the CPU");
}

#else

// One contiguous tensor in, one out.
template <class C, class T, class E>
DR1_INLINE __device__ Four<T> of_four(const E& e, const Four<T>& from) {
  Four<T> to;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    storage::write<C>(to.x + k, e.template eval<C>(Given<C>{storage::read<C>(from.x + k)}));
  }
  return to;
}

template <class C, class T, class E>
__global__ void one_tensor(E e, const T* in, T* out, int64_t n) {
  const auto* from = reinterpret_cast<const Four<T>*>(in);
  auto* to = reinterpret_cast<Four<T>*>(out);
  const int64_t fours = n / 4, i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < fours) to[i] = of_four<C>(e, from[i]);
  const int64_t last = fours * 4 + threadIdx.x;
  if (blockIdx.x == 0 && last < n) storage::write<C>(out + last, e.template eval<C>(Given<C>{storage::read<C>(in + last)}));
}

template <class C, class T, int L, class E>
__global__ void elements(const __grid_constant__ Plan<L> plan, E e) {
  Place<C, T, L> place{plan};
  const int64_t n = plan.rows * plan.width;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  if (plan.rows == 1) {
    e.seek(place);
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
      put<C, T>(plan.dtype[0], plan.data[0], i * plan.inner[0], e.template eval<C>(At{i}));
    }
    return;
  }
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) {
    const int64_t j = i % plan.width;
    place.row = i / plan.width;
    e.seek(place);
    put<C, T>(plan.dtype[0], plan.data[0], plan.offset(place.row, 0) + j * plan.inner[0], e.template eval<C>(At{j}));
  }
}

// Several tensors, each of them contiguous, or one element that all others meet.
template <class C, class T, int L, class E>
__global__ void contiguous(const __grid_constant__ Plan<L> plan, E e) {
  const Place<C, T, L> place{plan};
  e.seek(place);
  auto* to = reinterpret_cast<Four<T>*>(static_cast<T*>(plan.data[0]));
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < plan.width / 4; j += step) to[j] = four<C, T>(e, j);
}

// Whether every row of every tensor that varies along it begins where four elements can be read at once.
template <class T, int L>
bool aligned(const Plan<L>& plan) {
  for (int t = 0; t < plan.count; ++t) {
    // One element a row: the output of a reduction alone, or what is broadcast.
    if (plan.inner[t] == 0 || (t == 0 && plan.width == 1)) continue;
    if (plan.inner[t] != 1 || reinterpret_cast<uintptr_t>(plan.data[t]) % (4 * sizeof(T)) != 0) return false;
    for (int i = 0; i < plan.ndim; ++i) {
      if (plan.strides[i][t] % 4 != 0) return false;
    }
  }
  return true;
}

template <class C, class T, class E>
void launch(const Tensor& out, const E& e) {
  constexpr bool by_row = E::reductions > 0;
  Leaves<E::leaves> leaves;
  Binder<C, Leaf<C, T>, E::leaves> binder{&leaves, out.ndim() ? out.size(-1) : 1};
  const auto bound = e.bind(binder);
  const Plan<E::leaves> plan(out, leaves, by_row);
  const auto stream = static_cast<cudaStream_t>(out.stream());
  const OnDevice device(out.device_index());
  if constexpr (by_row) {
    check_width(out, e);
    const int64_t width = std::max(plan.width, width_of(e));
    const int threads = width >= 512 ? 256 : width >= 128 ? 128 : 32;
    const int64_t across = std::min<int64_t>(plan.rows, 1 << 30);
    const dim3 blocks(across, (plan.rows + across - 1) / across);
    if constexpr (!std::is_void_v<T>) {
      if (aligned<T>(plan)) {
        if (keep<C, T>(plan, e, leaves, blocks, stream)) return;
        rows<C, T, E::leaves, true><<<blocks, threads, 0, stream>>>(plan, bound);
        return succeed(cudaGetLastError());
      }
    }
    rows<C, T, E::leaves, false><<<blocks, threads, 0, stream>>>(plan, bound);
  } else {
    const int64_t n = plan.rows * plan.width;
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((n + 1023) / 1024, 1 << 16));
    bool vector = plan.count == 2 && plan.rows == 1 && plan.inner[0] == 1 && plan.inner[1] == 1;
    if constexpr (!std::is_void_v<T>) {
      for (int t = 0; t < 2 && vector; ++t) vector = reinterpret_cast<uintptr_t>(plan.data[t]) % (4 * sizeof(T)) == 0;
      if (vector) {
        // Four elements a thread and small blocks were fastest on an H200.
        const auto whole = static_cast<unsigned>((n + 511) / 512);
        one_tensor<C, T><<<whole, 128, 0, stream>>>(bound, static_cast<const T*>(plan.data[1]),
                                                     static_cast<T*>(plan.data[0]), n);
        return succeed(cudaGetLastError());
      }
      if (plan.rows == 1 && plan.width % 4 == 0 && aligned<T>(plan)) {
        contiguous<C, T><<<blocks, 256, 0, stream>>>(plan, bound);
        return succeed(cudaGetLastError());
      }
    }
    elements<C, T><<<blocks, 256, 0, stream>>>(plan, bound);
  }
  succeed(cudaGetLastError());
}

template <class E>
void run(const Tensor& out, const E& e) {
  Leaves<E::leaves> leaves;
  bool one_type = true;
  e.visit([&](const Tensor& t) {
    leaves.add(t);
    check(t.device() == Device::cuda && t.device_index() == out.device_index(),
          "an expression reads a tensor that is on another device than its output");
    one_type = one_type && t.dtype() == out.dtype();
  });
  if (one_type && out.dtype() == DType::float32) return launch<float, float>(out, e);
  if (one_type && out.dtype() == DType::bfloat16) return launch<float, bfloat16>(out, e);
  if (one_type && out.dtype() == DType::float16) return launch<float, float16>(out, e);
  switch (compute_of(out, leaves)) {
    case Compute::real32: return launch<float, void>(out, e);
    case Compute::real64: return launch<double, void>(out, e);
    case Compute::whole: return launch<int64_t, void>(out, e);
  }
}

#endif

}  // namespace cuda
}  // namespace dr1
