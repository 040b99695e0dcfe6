// How a kernel on an NVIDIA GPU reaches elements: one at a time anywhere, or four at once in a contiguous row.
#pragma once

#include "expression.h"
#include "plan.h"

#if defined(__CUDACC__)

namespace dr1 __attribute__((visibility("hidden"))) {
namespace cuda {

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
// The same, where a part of the expression is computed already.
template <class C>
struct AmongKept : Among {
  C kept;
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
    return seeded<V>(at(a.j * stride), seed);
  }
  template <class V>
  DR1_HD DR1_INLINE V eval(const Given<C>& a) const {
    return seeded<V>(a.x, seed);
  }
  template <class V>
  DR1_HD DR1_INLINE V eval(const Among& a) const {
    return seeded<V>(storage::read<C>(held.x + a.k), seed);
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
  int64_t row = 0;
  DR1_HD int64_t column() const { return 0; }
  template <class F>
  DR1_HD DR1_INLINE void place(F& leaf) const {
    const int t = leaf.index + 1;
    const int64_t offset = plan.offset(row, t);
    leaf.dtype = plan.dtype[t];
    leaf.stride = plan.inner[t];
    if constexpr (std::is_void_v<T>) {
      leaf.p = static_cast<const char*>(plan.data[t]) + offset * width(plan.dtype[t]);
    } else {
      leaf.p = static_cast<const T*>(plan.data[t]) + offset;
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

}  // namespace cuda
}  // namespace dr1

#endif
