// Running an expression on an NVIDIA GPU: the same expression, compiled by nvcc into a kernel on the caller's stream.
//
// Elementwise: one access for four elements where all tensors are contiguous or a single element. With row reductions:
// one block a row, which reads the row anew for each reduction (it stays in the cache), four elements at a time where the
// rows are contiguous.
#pragma once

#include <algorithm>

#include "expression.h"
#include "plan.h"

namespace dr1 __attribute__((visibility("hidden"))) {
namespace cuda {

#if !defined(__CUDACC__)

template <class E>
void run(const Tensor&, const E&) {
  check(false, "this library was built without CUDA; build it with --cuda, or move the tensors to the CPU");
}

#else

inline void succeed(cudaError_t status) {
  check(status == cudaSuccess, std::string("CUDA: ") + cudaGetErrorString(status));
}

// The caller's device, whichever is current.
class OnDevice {
 public:
  explicit OnDevice(int index) {
    succeed(cudaGetDevice(&before_));
    if (before_ != index) succeed(cudaSetDevice(index));
    changed_ = before_ != index;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct At {
  int64_t j;
};
template <class C>
struct Given {
  C x;
};
// Element j of the row, which is number k of the four that the leaves hold.
struct Among {
  int64_t j;
  int k;
};

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};
template <>
struct Four<void> {};

// A leaf whose elements are T, or of a type known at run time only where T is void.
template <class C, class T>
struct Leaf : Node {
  const void* p = nullptr;
  int64_t stride = 0;
  DType dtype = DType::float32;
  Four<T> held;
  int index;
  C seed;
  Leaf(int number, C tangent) : index(number), seed(tangent) {}
  template <class S>
  DR1_HD DR1_INLINE void seek(const S& s) {
    s.place(*this);
  }
  template <class R>
  DR1_HD DR1_INLINE void prepare(R&) {}
  bool same(const Leaf& other) const { return index == other.index && seed == other.seed; }
  template <class V>
  DR1_HD DR1_INLINE V made(C x) const {
    if constexpr (DualTraits<V>::dual) {
      return V(x, seed);
    } else {
      return x;
    }
  }
  DR1_HD DR1_INLINE C at(int64_t offset) const {
    if constexpr (std::is_void_v<T>) {
      return storage::dispatch(
          dtype, [&](auto* type) { return storage::read<C>(static_cast<decltype(type)>(const_cast<void*>(p)) + offset); });
    } else {
      return storage::read<C>(static_cast<const T*>(p) + offset);
    }
  }
  template <class V>
  DR1_HD DR1_INLINE V eval(const At& a) const {
    return made<V>(at(a.j * stride));
  }
  template <class V>
  DR1_HD DR1_INLINE V eval(const Given<C>& a) const {
    return made<V>(a.x);
  }
  template <class V>
  DR1_HD DR1_INLINE V eval(const Among& a) const {
    return made<V>(storage::read<C>(held.x + a.k));
  }
};

template <class C, class T>
DR1_HD DR1_INLINE void put(DType dtype, void* p, int64_t offset, C value) {
  if constexpr (std::is_void_v<T>) {
    storage::dispatch(dtype, [&](auto* type) { storage::write<C>(static_cast<decltype(type)>(p) + offset, value); });
  } else {
    storage::write<C>(static_cast<T*>(p) + offset, value);
  }
}

// Where a row begins, for the leaves that are below it.
template <class C, class T, int L>
struct Place {
  const Plan<L>& plan;
  int64_t offset[Plan<L>::tensors];
  DR1_HD int64_t column() const { return 0; }
  template <class F>
  DR1_HD DR1_INLINE void place(F& leaf) const {
    const int t = leaf.index + 1;
    leaf.dtype = plan.dtype[t];
    leaf.stride = plan.inner[t];
    if constexpr (std::is_void_v<T>) {
      leaf.p = static_cast<const char*>(plan.data[t]) + offset[t] * width(plan.dtype[t]);
    } else {
      leaf.p = static_cast<const T*>(plan.data[t]) + offset[t];
    }
  }
  static DR1_HD int64_t width(DType dtype) {
    return storage::dispatch(dtype, [](auto* type) { return static_cast<int64_t>(sizeof(*type)); });
  }
};

// Makes the leaves hold elements 4 j to 4 j + 3 of their rows.
struct Hold {
  int64_t j;
  DR1_HD int64_t column() const { return 0; }
  template <class C, class T>
  DR1_HD DR1_INLINE void place(Leaf<C, T>& leaf) const {
    const T* p = static_cast<const T*>(leaf.p);
    leaf.held = leaf.stride ? reinterpret_cast<const Four<T>*>(p)[j] : Four<T>{p[0], p[0], p[0], p[0]};
  }
};

// Elements 4 j to 4 j + 3 of a row.
template <class C, class T, class E>
DR1_INLINE __device__ Four<T> four(E& e, int64_t j) {
  e.seek(Hold{j});
  Four<T> to;
#pragma unroll
  for (int k = 0; k < 4; ++k) storage::write<C>(to.x + k, e.template eval<C>(Among{4 * j + k, k}));
  return to;
}

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
  const int64_t fours = n / 4, step = 2 * int64_t(gridDim.x) * blockDim.x;
  // Two reads on their way at a time.
  for (int64_t i = 2 * int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < fours; i += step) {
    const int64_t other = i + blockDim.x;
    const Four<T> first = from[i];
    if (other < fours) {
      const Four<T> second = from[other];
      to[i] = of_four<C>(e, first);
      to[other] = of_four<C>(e, second);
    } else {
      to[i] = of_four<C>(e, first);
    }
  }
  const int64_t last = fours * 4 + threadIdx.x;
  if (blockIdx.x == 0 && last < n) storage::write<C>(out + last, e.template eval<C>(Given<C>{storage::read<C>(in + last)}));
}

template <class C, class T, int L, class E>
__global__ void elements(const __grid_constant__ Plan<L> plan, E e) {
  Place<C, T, L> place{plan, {}};
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
    const int64_t row = i / plan.width, j = i % plan.width;
    plan.offsets(row, place.offset);
    e.seek(place);
    put<C, T>(plan.dtype[0], plan.data[0], place.offset[0] + j * plan.inner[0], e.template eval<C>(At{j}));
  }
}

// Several tensors, each of them contiguous, or one element that all others meet.
template <class C, class T, int L, class E>
__global__ void contiguous(const __grid_constant__ Plan<L> plan, E e) {
  const Place<C, T, L> place{plan, {}};
  e.seek(place);
  auto* to = reinterpret_cast<Four<T>*>(static_cast<T*>(plan.data[0]));
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < plan.width / 4; j += step) to[j] = four<C, T>(e, j);
}

// Every thread of the block gets the fold of what each of them has; `start` changes nothing when folded.
template <class F, class C>
__device__ C fold_block(C mine, C start) {
  __shared__ C shared[32];
  const auto join = [](C a, C b) { return F::sum ? a + b : scalar::maximum(a, b); };
  const auto fold_warp = [&](C x) {
    for (int k = 16; k > 0; k /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, k));
    return x;
  };
  const unsigned lane = threadIdx.x % 32;
  mine = fold_warp(mine);
  if (lane == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  const C result = fold_warp(lane < blockDim.x / 32 ? shared[lane] : start);
  __syncthreads();
  return result;
}

template <class C, class T, int L, bool fours>
struct BlockFold {
  const Place<C, T, L>& place;
  template <class F, class A>
  __device__ C fold(A& a, int64_t width) {
    a.seek(place);
    const C start = F::sum ? C(0)
                           : (std::is_floating_point_v<C> ? -std::numeric_limits<C>::infinity()
                                                          : std::numeric_limits<C>::lowest());
    C mine = start;
    const auto take = [&](C x) { mine = F::sum ? mine + x : scalar::maximum(mine, x); };
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
    return fold_block<F>(mine, start);
  }
};

template <class C, class T, int L, bool fours, class E>
__global__ void rows(const __grid_constant__ Plan<L> plan, E e) {
  Place<C, T, L> place{plan, {}};
  BlockFold<C, T, L, fours> fold{place};
  for (int64_t row = blockIdx.x; row < plan.rows; row += gridDim.x) {
    plan.offsets(row, place.offset);
    e.prepare(fold);
    e.seek(place);
    if (fours && plan.width % 4 == 0) {
      if constexpr (fours) {
        auto* to = reinterpret_cast<Four<T>*>(static_cast<T*>(plan.data[0]) + place.offset[0]);
#pragma unroll 2
        for (int64_t j = threadIdx.x; j < plan.width / 4; j += blockDim.x) to[j] = four<C, T>(e, j);
      }
    } else {
      for (int64_t j = threadIdx.x; j < plan.width; j += blockDim.x) {
        put<C, T>(plan.dtype[0], plan.data[0], place.offset[0] + j * plan.inner[0], e.template eval<C>(At{j}));
      }
    }
  }
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
  Binder<C, Leaf<C, T>, E::leaves> binder{&leaves};
  binder.columns = out.ndim() ? out.size(-1) : 1;
  const auto bound = e.bind(binder);
  const Plan<E::leaves> plan(out, leaves, by_row);
  const auto stream = static_cast<cudaStream_t>(out.stream());
  const OnDevice device(out.device_index());
  if constexpr (by_row) {
    check_width(out, e);
    const int64_t width = std::max(plan.width, width_of(e));
    const int threads = width >= 512 ? 256 : width >= 128 ? 128 : 32;
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(plan.rows, 1 << 20));
    if constexpr (!std::is_void_v<T>) {
      if (aligned<T>(plan)) {
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
        // Eight elements a thread; small blocks were faster than large ones on an H200.
        one_tensor<C, T><<<blocks, 128, 0, stream>>>(bound, static_cast<const T*>(plan.data[1]),
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
