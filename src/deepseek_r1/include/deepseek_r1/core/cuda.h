// Running an expression on an NVIDIA GPU: the same expression, compiled by nvcc into a kernel on the caller's stream.
//
// Elementwise: each thread takes four elements a step, as one 16-byte access where the expression reads one contiguous
// tensor. With row reductions: one block a row, which reads the row anew for each reduction (it stays in the cache).
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

// A leaf whose elements are T, or of a type known at run time only where T is void.
template <class C, class T>
struct Leaf : Node {
  const void* p = nullptr;
  int64_t stride = 0;
  DType dtype = DType::float32;
  int index;
  C seed;
  Leaf(int number, C tangent) : index(number), seed(tangent) {}
  template <class S>
  DR1_HD DR1_INLINE void seek(const S& s) {
    s.place(*this);
  }
  template <class R>
  DR1_HD DR1_INLINE void prepare(R&) {}
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

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// One contiguous tensor in, one out.
template <class C, class T, class E>
__global__ void one_tensor(E e, const T* in, T* out, int64_t n) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread; i < n / 4; i += step) {
    const Four<T> from = reinterpret_cast<const Four<T>*>(in)[i];
    Four<T> to;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      storage::write<C>(to.x + k, e.template eval<C>(Given<C>{storage::read<C>(from.x + k)}));
    }
    reinterpret_cast<Four<T>*>(out)[i] = to;
  }
  for (int64_t i = n / 4 * 4 + thread; i < n; i += step) {
    storage::write<C>(out + i, e.template eval<C>(Given<C>{storage::read<C>(in + i)}));
  }
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

// Every thread of the block gets the fold of what each of them has.
template <class F, class C>
__device__ C fold_block(C mine) {
  __shared__ C shared[33];
  const auto join = [](C a, C b) { return F::sum ? a + b : scalar::maximum(a, b); };
  for (int k = 16; k > 0; k /= 2) mine = join(mine, __shfl_xor_sync(0xffffffffu, mine, k));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    C total = shared[0];
    for (unsigned w = 1; w < blockDim.x / 32; ++w) total = join(total, shared[w]);
    shared[32] = total;
  }
  __syncthreads();
  const C result = shared[32];
  __syncthreads();
  return result;
}

template <class C, class T, int L>
struct BlockFold {
  const Place<C, T, L>& place;
  template <class F, class A>
  __device__ C fold(A& a, int64_t width) {
    a.seek(place);
    C mine = F::sum ? C(0)
                    : (std::is_floating_point_v<C> ? -std::numeric_limits<C>::infinity()
                                                   : std::numeric_limits<C>::lowest());
    for (int64_t j = threadIdx.x; j < width; j += blockDim.x) {
      const C x = a.template eval<C>(At{j});
      mine = F::sum ? mine + x : scalar::maximum(mine, x);
    }
    return fold_block<F>(mine);
  }
};

template <class C, class T, int L, class E>
__global__ void rows(const __grid_constant__ Plan<L> plan, E e) {
  Place<C, T, L> place{plan, {}};
  BlockFold<C, T, L> fold{place};
  for (int64_t row = blockIdx.x; row < plan.rows; row += gridDim.x) {
    plan.offsets(row, place.offset);
    e.prepare(fold);
    e.seek(place);
    for (int64_t j = threadIdx.x; j < plan.width; j += blockDim.x) {
      put<C, T>(plan.dtype[0], plan.data[0], place.offset[0] + j * plan.inner[0], e.template eval<C>(At{j}));
    }
  }
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
    const int threads = width >= 2048 ? 512 : width >= 512 ? 256 : width >= 128 ? 128 : 32;
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(plan.rows, 1 << 20));
    rows<C, T><<<blocks, threads, 0, stream>>>(plan, bound);
  } else {
    const int64_t n = plan.rows * plan.width;
    const unsigned blocks = static_cast<unsigned>(std::min<int64_t>((n + 1023) / 1024, 1 << 16));
    bool vector = plan.count == 2 && plan.rows == 1 && plan.inner[0] == 1 && plan.inner[1] == 1;
    if constexpr (!std::is_void_v<T>) {
      for (int t = 0; t < 2 && vector; ++t) vector = reinterpret_cast<uintptr_t>(plan.data[t]) % (4 * sizeof(T)) == 0;
      if (vector) {
        one_tensor<C, T><<<blocks, 256, 0, stream>>>(bound, static_cast<const T*>(plan.data[1]),
                                                     static_cast<T*>(plan.data[0]), n);
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
