// Elements as they lie in memory: reading them as the type that is computed in, and writing them back.
#pragma once

#include "tensor.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace dr1 __attribute__((visibility("hidden"))) {

// How a computed element leaves and enters memory that already holds the type computed in. A test replaces it to count.
template <class C>
struct Access {
  static DR1_HD DR1_INLINE C read(const C* p) { return *p; }
  static DR1_HD DR1_INLINE void write(C* p, C value) { *p = value; }
};

namespace storage {

DR1_HD DR1_INLINE float to_float(bfloat16 x) { return scalar::bits<float>(static_cast<uint32_t>(x.raw) << 16); }
DR1_HD DR1_INLINE float to_float(float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(scalar::bits<__half>(x.raw));
#else
  const uint32_t sign = static_cast<uint32_t>(x.raw & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(x.raw & 0x7fffu) << 13;
  // The exponent's bias goes from 15 to 127 by a multiplication, which makes subnormals right as well.
  const float scaled = scalar::bits<float>(rest) * 5.192296858534828e33f;
  const uint32_t magnitude = rest >= 0x0f800000u ? (rest | 0x7f800000u) : scalar::bits<uint32_t>(scaled);
  return scalar::bits<float>(sign | magnitude);
#endif
}

DR1_HD DR1_INLINE bfloat16 to_bfloat16(float x) {
  const uint32_t raw = scalar::bits<uint32_t>(x);
  const uint32_t rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((raw & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u | (raw >> 31 << 15) : rounded)};
}
DR1_HD DR1_INLINE float16 to_float16(float x) {
#ifdef __CUDA_ARCH__
  return {scalar::bits<uint16_t>(__float2half_rn(x))};
#else
  const uint32_t raw = scalar::bits<uint32_t>(x);
  const uint32_t sign = (raw >> 16) & 0x8000u;
  const uint32_t magnitude = raw & 0x7fffffffu;
  // Normal halves: round the mantissa to 10 bits, half to even, and move the exponent's bias.
  const uint32_t normal = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  // Subnormal halves: adding 0.5 makes the processor round at the last bit that a half keeps.
  const uint32_t small = scalar::bits<uint32_t>(scalar::bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(sign | half)};
#endif
}

template <class C, class T>
DR1_HD DR1_INLINE C read(const T* p) {
  if constexpr (std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>) {
    return static_cast<C>(to_float(*p));
  } else {
    return static_cast<C>(*p);
  }
}

template <class C, class T>
DR1_HD DR1_INLINE void write(T* p, C value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    *p = to_bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, float16>) {
    *p = to_float16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, bool>) {
    *p = value != C(0);
  } else if constexpr (std::is_integral_v<T> && !std::is_integral_v<C>) {
    // By way of int64, because a float outside a narrow type's range has no defined value in it.
    *p = static_cast<T>(static_cast<int64_t>(value));
  } else {
    *p = static_cast<T>(value);
  }
}

// Call `f` with a null pointer of the element type.
template <class F>
DR1_HD DR1_INLINE auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
    case DType::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case DType::float16: return f(static_cast<float16*>(nullptr));
    case DType::int8: return f(static_cast<int8_t*>(nullptr));
    case DType::uint8: return f(static_cast<uint8_t*>(nullptr));
    case DType::int16: return f(static_cast<int16_t*>(nullptr));
    case DType::int32: return f(static_cast<int32_t*>(nullptr));
    case DType::int64: return f(static_cast<int64_t*>(nullptr));
    default: return f(static_cast<bool*>(nullptr));
  }
}

inline int64_t bytes_of(DType dtype) {
  static const int8_t sizes[] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1};
  return sizes[static_cast<int32_t>(dtype)];
}

// n elements, `stride` apart, into a buffer of the type computed in.
template <class C>
void load_block(DType dtype, const void* from, int64_t stride, int64_t n, C* to) {
  dispatch(dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(const_cast<void*>(from));
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = read<C>(p + i);
    } else if (stride == 0) {
      const C value = read<C>(p);
      for (int64_t i = 0; i < n; ++i) to[i] = value;
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = read<C>(p + i * stride);
    }
  });
}

template <class C>
void store_block(DType dtype, void* to, int64_t stride, int64_t n, const C* from) {
  dispatch(dtype, [&](auto* type) {
    auto* p = static_cast<decltype(type)>(to);
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) write<C>(p + i, from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) write<C>(p + i * stride, from[i]);
    }
  });
}

}  // namespace storage

// Call `f` with a zero of the tensor's element type, for kernels written by hand; float32 and float64 only.
template <class F>
auto dispatch_real(DType dtype, F&& f) {
  check(dtype == DType::float32 || dtype == DType::float64, "this kernel takes float32 and float64");
  return dtype == DType::float32 ? f(float()) : f(double());
}

}  // namespace dr1
