// Arithmetic on one element: the functions an expression may name, for float, double, int64_t and dual numbers.
//
// The float versions of exp, log, tanh and erf have no branch and call nothing, so that a loop over them becomes vector
// code on every instruction set; their polynomials are minimax fits made for this file. Errors, in units of the last
// place over all floats: exp 1.5, log 2, tanh 2.5, erf 2.5 (held by tests). The rest is the C library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define DR1_HD __host__ __device__
#define DR1_INLINE __forceinline__
#else
#define DR1_HD
#define DR1_INLINE inline __attribute__((always_inline))
#endif

namespace dr1 __attribute__((visibility("hidden"))) {

// A value and its derivative along one direction.
template <class C>
struct Dual {
  C v, d;
  DR1_HD DR1_INLINE Dual() : v(), d() {}
  DR1_HD DR1_INLINE Dual(C value) : v(value), d() {}
  DR1_HD DR1_INLINE Dual(C value, C derivative) : v(value), d(derivative) {}
};

template <class V>
struct DualTraits {
  static constexpr bool dual = false;
  using Real = V;
};
template <class C>
struct DualTraits<Dual<C>> {
  static constexpr bool dual = true;
  using Real = C;
};

// A value as V: with its direction, where V is a dual number.
template <class V, class C>
DR1_HD DR1_INLINE V seeded(C x, C seed) {
  if constexpr (DualTraits<V>::dual) {
    return V(x, seed);
  } else {
    return x;
  }
}

namespace scalar {

template <class To, class From>
DR1_HD DR1_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "only between types of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// ---- float, own

DR1_HD DR1_INLINE float exp(float x) {
#ifdef __CUDA_ARCH__
  return ::expf(x);
#else
  // Not-a-number passes both comparisons by, and stays what it is.
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
  const float shifter = 12582912.0f;
  const float t = x * 1.44269504f + shifter;
  const int32_t k = bits<int32_t>(t) - bits<int32_t>(shifter);
  const float n = t - shifter;
  const float r = (x - n * 0.69287109375f) - n * 2.760868228506297e-4f;
  float q = 1.3942165533080697e-3f;
  q = q * r + 8.363775908946991e-3f;
  q = q * r + 4.1666362434625626e-2f;
  q = q * r + 1.6666573286056519e-1f;
  q = q * r + 0.5f;
  const float p = (q * r) * r + r + 1.0f;
  // Two factors, because 2^k itself may lie outside the floats where the result does not.
  const int32_t half = k >> 1;
  return p * bits<float>((half + 127) << 23) * bits<float>((k - half + 127) << 23);
#endif
}

DR1_HD DR1_INLINE float log(float x) {
#ifdef __CUDA_ARCH__
  return ::logf(x);
#else
  const bool tiny = x < 1.17549435e-38f;
  const float y = tiny ? x * 8388608.0f : x;
  const int32_t raw = bits<int32_t>(y);
  // 0x3f3504f3 is sqrt(1/2): the mantissa lands in [sqrt(1/2), sqrt(2)).
  const int32_t e = (raw - 0x3f3504f3) >> 23;
  const float m = bits<float>(raw - static_cast<int32_t>(static_cast<uint32_t>(e) << 23));
  const float k = static_cast<float>(e) - (tiny ? 23.0f : 0.0f);
  const float f = m - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  float q = 0.23610523343086243f;
  q = q * z + 0.28535890579223633f;
  q = q * z + 0.4000035524368286f;
  q = q * z + 0.6666666269302368f;
  // log(1 + f) = f - f^2/2 + s (f^2/2 + z q): the leading term stays exact.
  const float h = 0.5f * f * f;
  const float small = f - (h - s * (h + z * q));
  float result = k * 0.69287109375f + (k * 2.760868228506297e-4f + small);
  result = x == 0.0f ? -std::numeric_limits<float>::infinity() : result;
  result = x < 0.0f ? std::numeric_limits<float>::quiet_NaN() : result;
  result = x > 3.40282347e38f ? x : result;
  return x != x ? x : result;
#endif
}

DR1_HD DR1_INLINE float tanh(float x) {
#ifdef __CUDA_ARCH__
  return ::tanhf(x);
#else
  const float a = std::fabs(x);
  const float z = x * x;
  float p = -5.5286334827542305e-3f;
  p = p * z + 2.0483316853642464e-2f;
  p = p * z - 5.369296669960022e-2f;
  p = p * z + 1.333089917898178e-1f;
  p = p * z - 3.333326280117035e-1f;
  const float small = x + x * (z * p);
  const float large = std::copysign(1.0f - 2.0f / (exp(2.0f * a) + 1.0f), x);
  return a < 0.65f ? small : large;
#endif
}

DR1_HD DR1_INLINE float erf(float x) {
#ifdef __CUDA_ARCH__
  return ::erff(x);
#else
  float a = std::fabs(x);
  const float z = x * x;
  float p = 7.889122935011983e-5f;
  p = p * z - 8.020842215046287e-4f;
  p = p * z + 5.189535673707724e-3f;
  p = p * z - 2.6854444295167923e-2f;
  p = p * z + 1.1283600330352783e-1f;
  p = p * z - 3.761262595653534e-1f;
  p = p * z + 1.1283791065216064f;
  // Beyond 1: one less the exponential of a fit to log(erfc), whose own error hardly counts there.
  a = a > 4.0f ? 4.0f : a;
  float q = -2.1686746549676172e-5f;
  q = q * a + 4.413351125549525e-4f;
  q = q * a - 4.204555414617062e-3f;
  q = q * a + 2.5208238512277603e-2f;
  q = q * a - 1.084185466170311e-1f;
  q = q * a - 6.332198977470398e-1f;
  q = q * a - 1.1295783519744873f;
  q = q * a + 1.880363852251321e-4f;
  const float large = std::copysign(1.0f - exp(q), x);
  return z < 1.0f ? x * p : (x != x ? x : large);
#endif
}

// ---- the C library's, and whole numbers by way of double

DR1_HD DR1_INLINE double exp(double x) { return ::exp(x); }
DR1_HD DR1_INLINE double log(double x) { return ::log(x); }
DR1_HD DR1_INLINE double tanh(double x) { return ::tanh(x); }
DR1_HD DR1_INLINE double erf(double x) { return ::erf(x); }

#define DR1_FROM_LIBRARY(name)                                 \
  DR1_HD DR1_INLINE float name(float x) { return ::name##f(x); } \
  DR1_HD DR1_INLINE double name(double x) { return ::name(x); }
DR1_FROM_LIBRARY(exp2)
DR1_FROM_LIBRARY(expm1)
DR1_FROM_LIBRARY(log2)
DR1_FROM_LIBRARY(log10)
DR1_FROM_LIBRARY(log1p)
DR1_FROM_LIBRARY(sqrt)
DR1_FROM_LIBRARY(sin)
DR1_FROM_LIBRARY(cos)
DR1_FROM_LIBRARY(sinh)
DR1_FROM_LIBRARY(cosh)
DR1_FROM_LIBRARY(floor)
DR1_FROM_LIBRARY(ceil)
#undef DR1_FROM_LIBRARY

#define DR1_BY_DOUBLE(name) \
  DR1_HD DR1_INLINE int64_t name(int64_t x) { return static_cast<int64_t>(::name(static_cast<double>(x))); }
DR1_BY_DOUBLE(exp)
DR1_BY_DOUBLE(exp2)
DR1_BY_DOUBLE(expm1)
DR1_BY_DOUBLE(log)
DR1_BY_DOUBLE(log2)
DR1_BY_DOUBLE(log10)
DR1_BY_DOUBLE(log1p)
DR1_BY_DOUBLE(sqrt)
DR1_BY_DOUBLE(sin)
DR1_BY_DOUBLE(cos)
DR1_BY_DOUBLE(sinh)
DR1_BY_DOUBLE(cosh)
DR1_BY_DOUBLE(tanh)
DR1_BY_DOUBLE(erf)
#undef DR1_BY_DOUBLE
DR1_HD DR1_INLINE int64_t floor(int64_t x) { return x; }
DR1_HD DR1_INLINE int64_t ceil(int64_t x) { return x; }

DR1_HD DR1_INLINE float pow(float a, float b) { return ::powf(a, b); }
DR1_HD DR1_INLINE double pow(double a, double b) { return ::pow(a, b); }
DR1_HD DR1_INLINE int64_t pow(int64_t a, int64_t b) {
  return static_cast<int64_t>(::pow(static_cast<double>(a), static_cast<double>(b)));
}

template <class C>
DR1_HD DR1_INLINE C abs(C x) {
  return x < C(0) ? -x : (x == C(0) ? C(0) : x);
}
template <class C>
DR1_HD DR1_INLINE C sign(C x) {
  return x > C(0) ? C(1) : (x < C(0) ? C(-1) : x);
}
template <class C>
DR1_HD DR1_INLINE C sigmoid(C x) {
  return C(1) / (C(1) + exp(-x));
}
// As torch has them: not-a-number on either side wins.
template <class C>
DR1_HD DR1_INLINE C maximum(C a, C b) {
  return (a > b || a != a) ? a : b;
}
template <class C>
DR1_HD DR1_INLINE C minimum(C a, C b) {
  return (a < b || a != a) ? a : b;
}
template <class C>
DR1_HD DR1_INLINE C divide(C a, C b) {
  return a / b;
}
// The processor stops the program on these two; a kernel must not.
DR1_HD DR1_INLINE int64_t divide(int64_t a, int64_t b) {
  const bool plain = b != 0 && b != -1;
  const int64_t other = b == 0 ? 0 : static_cast<int64_t>(0 - static_cast<uint64_t>(a));
  return plain ? a / b : other;
}

// ---- dual numbers

// A slope without bound times a direction that is zero stays zero.
template <class C>
DR1_HD DR1_INLINE Dual<C> chain(C value, C slope, C direction) {
  return {value, direction == C(0) ? C(0) : slope * direction};
}
// An overflown exponential has a steep but finite slope, so that 1 / (1 + exp(-x)) is flat far out and not undefined.
template <class C>
DR1_HD DR1_INLINE C finite(C x) {
  const C most = std::numeric_limits<C>::max();
  return x > most ? most : x;
}

}  // namespace scalar

template <class C>
DR1_HD DR1_INLINE Dual<C> operator+(Dual<C> a, Dual<C> b) {
  return {a.v + b.v, a.d + b.d};
}
template <class C>
DR1_HD DR1_INLINE Dual<C> operator-(Dual<C> a, Dual<C> b) {
  return {a.v - b.v, a.d - b.d};
}
template <class C>
DR1_HD DR1_INLINE Dual<C> operator*(Dual<C> a, Dual<C> b) {
  return {a.v * b.v, scalar::chain(C(), b.v, a.d).d + scalar::chain(C(), a.v, b.d).d};
}
template <class C>
DR1_HD DR1_INLINE Dual<C> operator-(Dual<C> a) {
  return {-a.v, -a.d};
}
namespace scalar {

template <class C>
DR1_HD DR1_INLINE Dual<C> divide(Dual<C> a, Dual<C> b) {
  const C q = a.v / b.v;
  return {q, (a.d - chain(C(), q, b.d).d) / b.v};
}

#define DR1_DUAL(name, slope)                      \
  template <class C>                               \
  DR1_HD DR1_INLINE Dual<C> name(Dual<C> x) {      \
    const C y = name(x.v);                         \
    (void)y;                                       \
    return chain(y, static_cast<C>(slope), x.d);   \
  }
DR1_DUAL(exp, finite(y))
DR1_DUAL(exp2, finite(y) * C(0.69314718055994530942))
DR1_DUAL(expm1, finite(y) + C(1))
DR1_DUAL(log, C(1) / x.v)
DR1_DUAL(log2, C(1.44269504088896340736) / x.v)
DR1_DUAL(log10, C(0.43429448190325182765) / x.v)
DR1_DUAL(log1p, C(1) / (C(1) + x.v))
DR1_DUAL(sqrt, C(0.5) / y)
DR1_DUAL(sin, cos(x.v))
DR1_DUAL(cos, -sin(x.v))
DR1_DUAL(sinh, cosh(x.v))
DR1_DUAL(cosh, sinh(x.v))
DR1_DUAL(tanh, C(1) - y * y)
DR1_DUAL(erf, C(1.12837916709551257390) * exp(-x.v * x.v))
DR1_DUAL(abs, sign(x.v))
DR1_DUAL(sigmoid, y * (C(1) - y))
DR1_DUAL(sign, C(0))
DR1_DUAL(floor, C(0))
DR1_DUAL(ceil, C(0))
#undef DR1_DUAL

template <class C>
DR1_HD DR1_INLINE Dual<C> pow(Dual<C> a, Dual<C> b) {
  const C y = pow(a.v, b.v);
  const C by_base = a.d == C(0) ? C(0) : b.v * pow(a.v, b.v - C(1)) * a.d;
  const C by_exponent = (b.d == C(0) || y == C(0)) ? C(0) : y * log(a.v) * b.d;
  return {y, by_base + by_exponent};
}
// Where both are equal each side gets half of the slope, as in torch.
template <class C>
DR1_HD DR1_INLINE Dual<C> maximum(Dual<C> a, Dual<C> b) {
  return {maximum(a.v, b.v), a.v == b.v ? C(0.5) * (a.d + b.d) : (a.v > b.v ? a.d : b.d)};
}
template <class C>
DR1_HD DR1_INLINE Dual<C> minimum(Dual<C> a, Dual<C> b) {
  return {minimum(a.v, b.v), a.v == b.v ? C(0.5) * (a.d + b.d) : (a.v < b.v ? a.d : b.d)};
}

template <class V>
DR1_HD DR1_INLINE typename DualTraits<V>::Real value_of(V x) {
  if constexpr (DualTraits<V>::dual) {
    return x.v;
  } else {
    return x;
  }
}

}  // namespace scalar
}  // namespace dr1
