// Products of stored rows and stored weights in plain C++, for processors without one of the other paths.
//
// What each path has, and what its functions give, is said here once:
//   sums8   rows x [inputs][32] int8: whole sums in int32
//   sums4   the same for signed 4-bit weights, a group's sum times its scales in float, group after group
//   few4    like sums4, but straight from the packed form; null where a path has no use for it
//   unpack  a group's 4-bit weights less their zero points, as int8 in the order of 8-bit weights
#pragma once

#include <cmath>

#include "rows.h"

namespace integer {

struct Part {
  const uint8_t* rows;  // [inputs / 4][count][4]
  int64_t count;
  // Weights of `inputs` inputs; for 4 bits their scales, `scale_step` floats from group to group.
  const int8_t* weights;
  int64_t inputs;
  const float* scales;
  int64_t scale_step;
  int64_t group;
};

struct Path {
  // The most rows that one call takes.
  int rows8, rows4;
  void (*sums8)(const Part& part, int32_t* sums);
  void (*sums4)(const Part& part, float* sums);
  void (*few4)(const Rows& rows, const Weights& weights, int64_t panel, float* sums);
  // Up to this many rows, all in one block, `few4` is worth it.
  int few;
  void (*unpack)(const uint8_t* nibbles, const uint8_t* zeros, int64_t group, int8_t* to);
  // A row of n numbers to 8 bits, as `rows.h` has it.
  void (*store)(const float* x, int64_t n, float scale, int32_t zero, uint8_t* to);
};

namespace portable {

template <class T>
inline void multiply(const uint8_t* row, int64_t count, const int8_t* weights, int64_t inputs, T* sums) {
  for (int64_t k = 0; k < inputs; k += 4, row += 4 * count) {
    const int8_t* w = weights + k * PANEL;
    const T a = row[0], b = row[1], c = row[2], d = row[3];
#pragma omp simd
    for (int64_t n = 0; n < PANEL; ++n) {
      sums[n] += a * w[4 * n] + b * w[4 * n + 1] + c * w[4 * n + 2] + d * w[4 * n + 3];
    }
  }
}

inline void sums8(const Part& part, int32_t* sums) {
  for (int64_t r = 0; r < part.count; ++r) {
    multiply(part.rows + 4 * r, part.count, part.weights, part.inputs, sums + r * PANEL);
  }
}

inline void sums4(const Part& part, float* sums) {
  for (int64_t r = 0; r < part.count; ++r) {
    const float* scales = part.scales;
    for (int64_t k = 0; k < part.inputs; k += part.group, scales += part.scale_step) {
      int32_t whole[PANEL] = {};
      multiply(part.rows + k * part.count + 4 * r, part.count, part.weights + k * PANEL, part.group, whole);
      for (int64_t n = 0; n < PANEL; ++n) {
        sums[r * PANEL + n] = std::fma(static_cast<float>(whole[n]), scales[n], sums[r * PANEL + n]);
      }
    }
  }
}

inline void unpack(const uint8_t* nibbles, const uint8_t* zeros, int64_t group, int8_t* to) {
  for (int64_t pair = 0; pair < group / 8; ++pair) {
    const uint8_t* from = nibbles + pair * PANEL * 4;
    int8_t* even = to + 2 * pair * PANEL * 4;
#pragma omp simd
    for (int64_t i = 0; i < PANEL * 4; ++i) {
      even[i] = static_cast<int8_t>((from[i] & 15) - zeros[i / 4]);
      even[PANEL * 4 + i] = static_cast<int8_t>((from[i] >> 4) - zeros[i / 4]);
    }
  }
}

constexpr Path path{4, 4, sums8, sums4, nullptr, 0, unpack, store};

}  // namespace portable
}  // namespace integer
