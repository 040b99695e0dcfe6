// Activations to 8 bits, each row with its own range, as torch's choose_qparams_per_token_asymmetric and
// quantize_per_token have it, bit by bit; stored as unsigned numbers (128 more), with the sums of their groups.
#pragma once

#include <deepseek_r1/core/scalar.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "layout.h"

namespace integer {

// Scale and zero point of a row; the scale is no number if one of the row's values is none.
inline void choose(const float* x, int64_t n, float* scale, int32_t* zero) {
  float low = 0, high = 0, strange = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : strange)
  for (int64_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    strange += x[i] * 0.0f;
  }
  const float s = std::max((high - low) / 255.0f, std::numeric_limits<float>::epsilon());
  const float below = low / s, above = high / s;
  float z = (-128.0f + below) + (127.0f + above) > 0 ? -128.0f - below : 127.0f - above;
  z = std::nearbyint(std::min(std::max(z, -128.0f), 127.0f));
  *zero = static_cast<int32_t>(z) + 128;
  *scale = s + strange;
}

// In double, as torch does: a number halfway between two steps must go to the same side. Adding a number so large that
// a double has no place for fractions beside it rounds to the nearest, half to even, and leaves the integer in its low
// bits; unlike a call it is vector code on every processor.
inline void store(const float* x, int64_t n, float scale, int32_t zero, uint8_t* to) {
  const double inverse = 1.0 / static_cast<double>(scale), shift = zero - 128;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    double y = static_cast<double>(x[i]) * inverse + shift;
    y = y < -128.0 ? -128.0 : y;
    y = y > 127.0 ? 127.0 : y;
    to[i] = static_cast<uint8_t>(dr1::scalar::bits<int64_t>(y + 6755399441055744.0) + 128);
  }
}

// A row to its place between the other rows of its block.
inline void spread(const uint8_t* row, const Rows& rows, int64_t r) {
  const int64_t block = rows.block_of(r), size = rows.size(block);
  uint8_t* to = rows.at(block) + (r - rows.first(block)) * 4;
  if (size == 1) {
    std::copy(row, row + rows.inputs, to);
    return;
  }
  for (int64_t k = 0; k < rows.inputs; k += 4, to += 4 * size) std::memcpy(to, row + k, 4);
}

inline void sum_groups(const uint8_t* stored, int64_t groups, int64_t size, int32_t* sums) {
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += stored[g * size + i];
    sums[g] = -sum;
  }
}

}  // namespace integer
