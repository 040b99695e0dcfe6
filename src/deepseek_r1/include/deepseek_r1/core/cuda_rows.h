// Row reductions on an NVIDIA GPU: one block a row.
#pragma once

#include "cuda_access.h"

#if defined(__CUDACC__)

namespace dr1 __attribute__((visibility("hidden"))) {
namespace cuda {

template <class F, class C>
DR1_INLINE __device__ C join(C a, C b) {
  return F::sum ? a + b : scalar::maximum(a, b);
}

// What changes nothing when joined.
template <class F, class C>
DR1_INLINE __device__ C neutral() {
  if (F::sum) return C(0);
  return std::is_floating_point_v<C> ? -std::numeric_limits<C>::infinity() : std::numeric_limits<C>::lowest();
}

// Every thread of the block gets the fold of what each of them has.
template <class F, class C>
__device__ C fold_block(C mine) {
  __shared__ C shared[32];
  const auto fold_warp = [&](C x) {
    for (int k = 16; k > 0; k /= 2) x = join<F>(x, __shfl_xor_sync(0xffffffffu, x, k));
    return x;
  };
  const unsigned lane = threadIdx.x % 32;
  mine = fold_warp(mine);
  if (lane == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  const C result = fold_warp(lane < blockDim.x / 32 ? shared[lane] : neutral<F, C>());
  __syncthreads();
  return result;
}

template <class C, class T, int L, bool fours>
struct BlockFold {
  const Place<C, T, L>& place;
  template <class F, class A>
  __device__ C fold(A& a, int64_t width) {
    a.seek(place);
    C mine = neutral<F, C>();
    const auto take = [&](C x) { mine = join<F>(mine, x); };
    if (fours && width % 4 == 0) {
      if constexpr (fours) {
#pragma unroll 2
        for (int64_t j = threadIdx.x; j < width / 4; j += blockDim.x) {
          a.seek(Hold{j});
#pragma unroll
          for (int k = 0; k < 4; ++k) take(a.template eval<C>(Among{4 * j + k, k}));
        }
      }
    } else {
      for (int64_t j = threadIdx.x; j < width; j += blockDim.x) take(a.template eval<C>(At{j}));
    }
    return fold_block<F>(mine);
  }
};

inline __device__ int64_t own_row() { return int64_t(blockIdx.y) * gridDim.x + blockIdx.x; }

template <class C, class T, int L, bool fours, class E>
__global__ void __launch_bounds__(256, 4) rows(const __grid_constant__ Plan<L> plan, E e) {
  const Place<C, T, L> place{plan, own_row()};
  if (place.row >= plan.rows) return;
  BlockFold<C, T, L, fours> fold{place};
  e.prepare(fold);
  e.seek(place);
  const int64_t offset = plan.offset(place.row, 0);
  if (fours && plan.width % 4 == 0) {
    if constexpr (fours) {
      auto* to = reinterpret_cast<Four<T>*>(static_cast<T*>(plan.data[0]) + offset);
#pragma unroll 2
      for (int64_t j = threadIdx.x; j < plan.width / 4; j += blockDim.x) to[j] = four<C, T>(e, j);
    }
  } else {
    for (int64_t j = threadIdx.x; j < plan.width; j += blockDim.x) {
      put<C, T>(plan.dtype[0], plan.data[0], offset + j * plan.inner[0], e.template eval<C>(At{j}));
    }
  }
}

}  // namespace cuda
}  // namespace dr1

#endif
