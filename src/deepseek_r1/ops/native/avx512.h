// The products for processors with AVX-512 VNNI: one instruction adds four products to each of 16 sums.
//
// The instruction takes an unsigned and a signed operand. Activations are stored unsigned, weights signed; a 4-bit
// weight as it is packed (0 to 15) may stand for either, so that a single row needs no unpacking to memory.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include "portable.h"

#define INTEGER_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

namespace integer {
namespace avx512 {

// With few rows a product waits for memory. So many bytes before they are needed, weights are asked for.
constexpr int FEW = 4;
constexpr int64_t AHEAD = 2048;

INTEGER_AVX512 inline __m512i four(const uint8_t* p) { return _mm512_set1_epi32(word(p)); }

// Adds the products of `steps` times 4 inputs, for R rows and one panel.
template <int R>
INTEGER_AVX512 inline __attribute__((always_inline)) void add(
    const uint8_t* rows, const int8_t* weights, int64_t steps, __m512i (&sums)[R][2]) {
#pragma GCC unroll 4
  for (int64_t s = 0; s < steps; ++s) {
    const __m512i left = _mm512_loadu_si512(weights + s * 128), right = _mm512_loadu_si512(weights + s * 128 + 64);
    if (R <= FEW) {
      _mm_prefetch(weights + s * 128 + AHEAD, _MM_HINT_T0);
      _mm_prefetch(weights + s * 128 + AHEAD + 64, _MM_HINT_T0);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i x = four(rows + (s * R + r) * 4);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], x, left);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], x, right);
    }
  }
}

template <int R>
INTEGER_AVX512 void sums8_of(const Part& part, int32_t* sums) {
  __m512i kept[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    kept[r][0] = _mm512_loadu_si512(sums + r * PANEL);
    kept[r][1] = _mm512_loadu_si512(sums + r * PANEL + 16);
  }
  add<R>(part.rows, part.weights, part.inputs / 4, kept);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_si512(sums + r * PANEL, kept[r][0]);
    _mm512_storeu_si512(sums + r * PANEL + 16, kept[r][1]);
  }
}

template <int R>
INTEGER_AVX512 void sums4_of(const Part& part, float* sums) {
  __m512 kept[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    kept[r][0] = _mm512_loadu_ps(sums + r * PANEL);
    kept[r][1] = _mm512_loadu_ps(sums + r * PANEL + 16);
  }
  const float* scales = part.scales;
  for (int64_t k = 0; k < part.inputs; k += part.group, scales += part.scale_step) {
    __m512i whole[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) whole[r][0] = whole[r][1] = _mm512_setzero_si512();
    add<R>(part.rows + k * R, part.weights + k * PANEL, part.group / 4, whole);
    const __m512 left = _mm512_loadu_ps(scales), right = _mm512_loadu_ps(scales + 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      kept[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][0]), left, kept[r][0]);
      kept[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][1]), right, kept[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sums + r * PANEL, kept[r][0]);
    _mm512_storeu_ps(sums + r * PANEL + 16, kept[r][1]);
  }
}

// The zero points' share is a group's sum of activations times the zero point: one more product, of 16-bit numbers.
template <int R>
INTEGER_AVX512 void few4_of(const Rows& rows, const Weights& weights, int64_t panel, float* sums) {
  const uint8_t* x = rows.stored;
  const __m512i low = _mm512_set1_epi8(15);
  __m512 kept[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) kept[r][0] = kept[r][1] = _mm512_setzero_ps();
  const int64_t pairs = weights.group / 8;
  for (int64_t g = 0; g < weights.groups(); ++g, x += weights.group * R) {
    const uint8_t* zeros = weights.zeros(panel, g);
    const uint8_t* packed = weights.nibbles(panel, g);
    const __m512i zero_left = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    const __m512i zero_right = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + 16)));
    __m512i whole[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i minus = _mm512_set1_epi32(rows.group_sums[r * rows.groups + g]);
      whole[r][0] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero_left, minus);
      whole[r][1] = _mm512_dpwssd_epi32(_mm512_setzero_si512(), zero_right, minus);
    }
#pragma GCC unroll 4
    for (int64_t p = 0; p < pairs; ++p) {
      const __m512i left = _mm512_loadu_si512(packed + p * 128), right = _mm512_loadu_si512(packed + p * 128 + 64);
      _mm_prefetch(packed + p * 128 + AHEAD, _MM_HINT_T0);
      _mm_prefetch(packed + p * 128 + AHEAD + 64, _MM_HINT_T0);
      const __m512i even_left = _mm512_and_si512(left, low), even_right = _mm512_and_si512(right, low);
      const __m512i odd_left = _mm512_and_si512(_mm512_srli_epi16(left, 4), low);
      const __m512i odd_right = _mm512_and_si512(_mm512_srli_epi16(right, 4), low);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512i even = four(x + (2 * p * R + r) * 4), odd = four(x + ((2 * p + 1) * R + r) * 4);
        whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], even, even_left);
        whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], even, even_right);
        whole[r][0] = _mm512_dpbusd_epi32(whole[r][0], odd, odd_left);
        whole[r][1] = _mm512_dpbusd_epi32(whole[r][1], odd, odd_right);
      }
    }
    const __m512 scale_left = _mm512_loadu_ps(weights.scales(panel, g));
    const __m512 scale_right = _mm512_loadu_ps(weights.scales(panel, g) + 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      kept[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][0]), scale_left, kept[r][0]);
      kept[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][1]), scale_right, kept[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(sums + r * PANEL, kept[r][0]);
    _mm512_storeu_ps(sums + r * PANEL + 16, kept[r][1]);
  }
}

INTEGER_AVX512 inline void unpack(const uint8_t* nibbles, const uint8_t* zeros, int64_t group, int8_t* to) {
  const __m512i low = _mm512_set1_epi8(15);
  // Each zero point four times, for the four inputs of a lane.
  const __m512i spread = _mm512_set1_epi32(0x01010101);
  __m512i zero[2];
  for (int half = 0; half < 2; ++half) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros + 16 * half));
    zero[half] = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(some), spread);
  }
  for (int64_t pair = 0; pair < group / 8; ++pair) {
    for (int half = 0; half < 2; ++half) {
      const __m512i both = _mm512_loadu_si512(nibbles + pair * 128 + half * 64);
      const __m512i even = _mm512_and_si512(both, low), odd = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      _mm512_storeu_si512(to + pair * 256 + half * 64, _mm512_sub_epi8(even, zero[half]));
      _mm512_storeu_si512(to + pair * 256 + 128 + half * 64, _mm512_sub_epi8(odd, zero[half]));
    }
  }
}

// Conversion rounds to the nearest, half to even, as everywhere else. The operators of vectors are the plain ones,
// which a compiler may not join to one rounding where it was told so.
INTEGER_AVX512 inline void store(const float* x, int64_t n, float scale, int32_t zero, uint8_t* to) {
  const __m512d inverse = _mm512_set1_pd(1.0 / static_cast<double>(scale)), shift = _mm512_set1_pd(zero - 128);
  const __m512i half = _mm512_set1_epi32(128), none = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(n - i < 16 ? (1 << (n - i)) - 1 : 0xffff);
    const __m512 some = _mm512_maskz_loadu_ps(there, x + i);
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(some));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(some, 1));
    const __m256i first = _mm512_cvtpd_epi32(_mm512_add_pd(_mm512_mul_pd(low, inverse), shift));
    const __m256i second = _mm512_cvtpd_epi32(_mm512_add_pd(_mm512_mul_pd(high, inverse), shift));
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    const __m512i stored = _mm512_max_epi32(_mm512_add_epi32(both, half), none);
    _mm_mask_storeu_epi8(to + i, there, _mm512_cvtusepi32_epi8(stored));
  }
}

inline void sums8(const Part& part, int32_t* sums) {
  switch (part.count) {
    case 1: return sums8_of<1>(part, sums);
    case 2: return sums8_of<2>(part, sums);
    case 3: return sums8_of<3>(part, sums);
    case 4: return sums8_of<4>(part, sums);
    case 5: return sums8_of<5>(part, sums);
    case 6: return sums8_of<6>(part, sums);
    case 7: return sums8_of<7>(part, sums);
    case 8: return sums8_of<8>(part, sums);
    case 9: return sums8_of<9>(part, sums);
    case 10: return sums8_of<10>(part, sums);
    case 11: return sums8_of<11>(part, sums);
    default: return sums8_of<12>(part, sums);
  }
}

inline void sums4(const Part& part, float* sums) {
  switch (part.count) {
    case 1: return sums4_of<1>(part, sums);
    case 2: return sums4_of<2>(part, sums);
    case 3: return sums4_of<3>(part, sums);
    case 4: return sums4_of<4>(part, sums);
    case 5: return sums4_of<5>(part, sums);
    default: return sums4_of<6>(part, sums);
  }
}

inline void few4(const Rows& rows, const Weights& w, int64_t panel, float* sums) {
  switch (rows.count) {
    case 1: return few4_of<1>(rows, w, panel, sums);
    case 2: return few4_of<2>(rows, w, panel, sums);
    case 3: return few4_of<3>(rows, w, panel, sums);
    default: return few4_of<4>(rows, w, panel, sums);
  }
}

constexpr Path path{12, 6, sums8, sums4, few4, 4, unpack, store};

inline bool here() {
  return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace avx512
}  // namespace integer
#endif
