// How the weights of an integer linear layer lie in memory; `ops/_integer_linear.py` writes it.
//
// Output channels come in panels of 32, one panel after the other, so that a product reads memory in one direction:
//   8 bits   [inputs / 4][32][4] int8, then 32 scales (float), then 32 sums of the stored weights (int32)
//   4 bits   for each group [group / 8][32][4] bytes and 32 scales; then the zero points [groups][32] uint8, up to a
//            multiple of 64 bytes; then for each channel the sum of its real weights (32 float)
// Inputs are counted in steps of 4, as many as a 32-bit lane holds. A byte of 4-bit weights has the even step's weight
// in its low half and the odd step's in its high half. Inputs of 8-bit weights are filled up to a multiple of 32, and
// channels to a multiple of 32, with zeros.
#pragma once

#include <cstdint>
#include <cstring>

namespace integer {

constexpr int64_t PANEL = 32;
// The most rows that are quantised and multiplied in one go: what they need stays in the second cache.
constexpr int64_t ROWS = 192;
// Inputs of a panel that are multiplied with all rows before the next ones: they stay in the first cache.
constexpr int64_t CHUNK = 512;

constexpr int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Four stored activations at once.
inline int32_t word(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return four;
}

struct Weights {
  const uint8_t* data;
  int64_t inputs;  // as stored, filled up
  int64_t outputs;
  int64_t group;  // 0 for 8 bits

  int64_t groups() const { return group ? inputs / group : 0; }
  int64_t group_bytes() const { return group * PANEL / 2 + PANEL * 4; }
  int64_t panels() const { return up(outputs, PANEL) / PANEL; }
  int64_t panel_bytes() const {
    if (!group) return inputs * PANEL + 2 * PANEL * 4;
    return groups() * group_bytes() + up(groups() * PANEL, 64) + PANEL * 4;
  }
  const uint8_t* panel(int64_t p) const { return data + p * panel_bytes(); }

  // 8 bits
  const int8_t* values(int64_t p) const { return reinterpret_cast<const int8_t*>(panel(p)); }
  const float* channel_scales(int64_t p) const { return reinterpret_cast<const float*>(panel(p) + inputs * PANEL); }
  const int32_t* channel_sums(int64_t p) const {
    return reinterpret_cast<const int32_t*>(panel(p) + inputs * PANEL) + PANEL;
  }
  // 4 bits
  const uint8_t* nibbles(int64_t p, int64_t g) const { return panel(p) + g * group_bytes(); }
  const float* scales(int64_t p, int64_t g) const {
    return reinterpret_cast<const float*>(nibbles(p, g) + group * PANEL / 2);
  }
  const uint8_t* zeros(int64_t p, int64_t g) const { return nibbles(p, groups()) + g * PANEL; }
  const float* real_sums(int64_t p) const {
    return reinterpret_cast<const float*>(panel(p + 1)) - PANEL;
  }
};

// Rows of activations: value = scale * (stored - zero), stored and zero from 0 to 255.
//
// They come in blocks that are multiplied together, as even in size as can be; in a block 4 inputs of the first row are
// followed by the same 4 of the next one, so that a product reads memory in one direction here as well.
struct Rows {
  uint8_t* stored;  // [blocks][inputs / 4][rows of the block][4], zeros behind a row's end
  int64_t inputs;   // as stored, filled up
  int64_t count;
  int64_t blocks;
  float* scale;
  int32_t* zero;
  // [count][groups], minus the sum of a group's stored numbers; at most 128 * 255, which 16 bits hold
  int32_t* group_sums;
  int64_t groups;

  int64_t first(int64_t block) const { return count * block / blocks; }
  int64_t size(int64_t block) const { return first(block + 1) - first(block); }
  int64_t block_of(int64_t row) const { return ((row + 1) * blocks - 1) / count; }
  uint8_t* at(int64_t block) const { return stored + first(block) * inputs; }
};

}  // namespace integer
