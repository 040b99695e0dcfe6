// The functions on one element as loops over arrays: values in float, and values with derivatives in double.
#include <deepseek_r1/core/operator.h>

#define DR1_TEST(name)                                                                               \
  extern "C" DR1_EXPORT void value_##name(const float* x, float* y, int64_t n) {                     \
    _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) y[i] = dr1::scalar::name(x[i]);              \
  }                                                                                                  \
  extern "C" DR1_EXPORT void slope_##name(const double* x, double* y, double* d, int64_t n) {        \
    for (int64_t i = 0; i < n; ++i) {                                                                \
      const auto r = dr1::scalar::name(dr1::Dual<double>(x[i], 1.0));                                \
      y[i] = r.v, d[i] = r.d;                                                                        \
    }                                                                                                \
  }
DR1_TEST(exp)
DR1_TEST(exp2)
DR1_TEST(expm1)
DR1_TEST(log)
DR1_TEST(log2)
DR1_TEST(log10)
DR1_TEST(log1p)
DR1_TEST(sqrt)
DR1_TEST(sin)
DR1_TEST(cos)
DR1_TEST(sinh)
DR1_TEST(cosh)
DR1_TEST(tanh)
DR1_TEST(erf)
DR1_TEST(sigmoid)
DR1_TEST(abs)
DR1_TEST(floor)
DR1_TEST(ceil)

extern "C" DR1_EXPORT void to_half(const float* x, uint16_t* half, uint16_t* brain, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    half[i] = dr1::storage::to_float16(x[i]).raw;
    brain[i] = dr1::storage::to_bfloat16(x[i]).raw;
  }
}
extern "C" DR1_EXPORT void from_half(const uint16_t* raw, float* half, float* brain, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    half[i] = dr1::storage::to_float(dr1::float16{raw[i]});
    brain[i] = dr1::storage::to_float(dr1::bfloat16{raw[i]});
  }
}
