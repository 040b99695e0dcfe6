// The products for processors with AVX2.
//
// Its product of unsigned and signed bytes adds pairs in 16 bits and stops at their limit. Signed 4-bit weights are far
// from it (four pairs reach 255 * 15 * 8); 8-bit weights are not, and go through 16-bit numbers.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "portable.h"

#define INTEGER_AVX2 __attribute__((target("avx2,fma")))

namespace integer {
namespace avx2 {

INTEGER_AVX2 inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// R rows and 16 channels: the sums of two neighbouring inputs stay apart until the end.
template <int R>
INTEGER_AVX2 void half8(const Part& part, const int8_t* weights, int32_t* sums) {
  __m256i kept[R][4];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 4; ++i) kept[r][i] = _mm256_setzero_si256();
  }
  for (int64_t k = 0; k < part.inputs; k += 4, weights += PANEL * 4) {
    __m256i w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 16 * i)));
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m128i wide = _mm_cvtepu8_epi16(_mm_cvtsi32_si128(word(part.rows + k * R + 4 * r)));
      const __m256i x = _mm256_broadcastq_epi64(wide);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) kept[r][i] = _mm256_add_epi32(kept[r][i], _mm256_madd_epi16(x, w[i]));
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 2; ++i) {
      const __m256i both = _mm256_hadd_epi32(kept[r][2 * i], kept[r][2 * i + 1]);
      auto* to = reinterpret_cast<__m256i*>(sums + r * PANEL + 8 * i);
      _mm256_storeu_si256(to, _mm256_add_epi32(load(to), _mm256_permute4x64_epi64(both, 0xd8)));
    }
  }
}

template <int R>
INTEGER_AVX2 void half4(const Part& part, const int8_t* weights, const float* scales, float* sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 kept[R][2];
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 2; ++i) kept[r][i] = _mm256_loadu_ps(sums + r * PANEL + 8 * i);
  }
  for (int64_t k = 0; k < part.inputs; k += part.group, scales += part.scale_step) {
    __m256i whole[R][2];
    for (int r = 0; r < R; ++r) whole[r][0] = whole[r][1] = _mm256_setzero_si256();
    for (int64_t i = k; i < k + part.group; i += 16) {
      __m256i narrow[R][2];
      for (int r = 0; r < R; ++r) narrow[r][0] = narrow[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int64_t j = i; j < i + 16; j += 4) {
        const __m256i left = load(weights + j * PANEL), right = load(weights + j * PANEL + 32);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m256i x = _mm256_set1_epi32(word(part.rows + j * R + 4 * r));
          narrow[r][0] = _mm256_add_epi16(narrow[r][0], _mm256_maddubs_epi16(x, left));
          narrow[r][1] = _mm256_add_epi16(narrow[r][1], _mm256_maddubs_epi16(x, right));
        }
      }
      for (int r = 0; r < R; ++r) {
        for (int h = 0; h < 2; ++h) {
          whole[r][h] = _mm256_add_epi32(whole[r][h], _mm256_madd_epi16(narrow[r][h], ones));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int h = 0; h < 2; ++h) {
        const __m256 scale = _mm256_loadu_ps(scales + 8 * h);
        kept[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[r][h]), scale, kept[r][h]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 2; ++i) _mm256_storeu_ps(sums + r * PANEL + 8 * i, kept[r][i]);
  }
}

inline void sums8(const Part& part, int32_t* sums) {
  for (int half = 0; half < 2; ++half) {
    part.count == 1 ? half8<1>(part, part.weights + 64 * half, sums + 16 * half)
                    : half8<2>(part, part.weights + 64 * half, sums + 16 * half);
  }
}

inline void sums4(const Part& part, float* sums) {
  for (int half = 0; half < 2; ++half) {
    part.count == 1 ? half4<1>(part, part.weights + 64 * half, part.scales + 16 * half, sums + 16 * half)
                    : half4<2>(part, part.weights + 64 * half, part.scales + 16 * half, sums + 16 * half);
  }
}

INTEGER_AVX2 inline void unpack(const uint8_t* nibbles, const uint8_t* zeros, int64_t group, int8_t* to) {
  const __m256i low = _mm256_set1_epi8(15), spread = _mm256_set1_epi32(0x01010101);
  for (int64_t quarter = 0; quarter < 4; ++quarter) {
    const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * quarter));
    const __m256i zero = _mm256_mullo_epi32(_mm256_cvtepu8_epi32(some), spread);
    for (int64_t pair = 0; pair < group / 8; ++pair) {
      const __m256i both = load(nibbles + pair * 128 + quarter * 32);
      const __m256i even = _mm256_and_si256(both, low), odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
      auto* at = to + pair * 256 + quarter * 32;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_sub_epi8(even, zero));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 128), _mm256_sub_epi8(odd, zero));
    }
  }
}

constexpr Path path{2, 2, sums8, sums4, nullptr, 0, unpack, store};

inline bool here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

}  // namespace avx2
}  // namespace integer
#endif
