// A whole layer: activations to 8 bits, products on all threads, then scales, bias and activation function.
#pragma once

#include <deepseek_r1/core/operator.h>

#include <vector>

#include "avx2.h"
#include "avx512.h"
#include "portable.h"
#include "rows.h"

namespace integer {

// Numbers of the operators' attributes, as `ops/_integer_linear.py` has them.
enum Isa : int64_t { ANY, PORTABLE, AVX2, AVX512 };
enum Function : int64_t { NONE, RELU, GELU, GELU_TANH, SILU };

inline const Path& path_of(int64_t isa) {
#if defined(__x86_64__)
  if ((isa == ANY || isa == AVX512) && avx512::here()) return avx512::path;
  if ((isa == ANY || isa == AVX2) && avx2::here()) return avx2::path;
#endif
  dr1::check(isa == ANY || isa == PORTABLE, "this processor, or this build, has not the instructions asked for");
  return portable::path;
}

inline void apply(int64_t function, int64_t n, float* y) {
  namespace s = dr1::scalar;
  switch (function) {
    case RELU:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = y[i] < 0 ? 0 : y[i];
      return;
    case GELU:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] *= 0.5f * (1.0f + s::erf(y[i] * 0.70710678f));
      return;
    case GELU_TANH:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        y[i] *= 0.5f * (1.0f + s::tanh(0.79788456f * (y[i] + 0.044715f * y[i] * y[i] * y[i])));
      }
      return;
    case SILU:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] /= 1.0f + s::exp(-y[i]);
      return;
    default: return;
  }
}

struct Job {
  const Weights& weights;
  const Path& path;
  Rows rows;
  const float* bias;
  int64_t function;
  float* output;  // of the first of these rows
};

// Rows [from, from + count) of a panel's sums to the output.
template <class T>
void finish(const Job& job, int64_t panel, int64_t from, int64_t count, const T* sums) {
  const Weights& w = job.weights;
  const int64_t first = panel * PANEL, width = std::min(PANEL, w.outputs - first);
  float narrow[PANEL], bias[PANEL] = {};
  std::copy(job.bias + first, job.bias + first + width, bias);
  for (int64_t r = 0; r < count; ++r, sums += PANEL) {
    const float scale = job.rows.scale[from + r];
    const int32_t zero = job.rows.zero[from + r];
    float* to = job.output + (from + r) * w.outputs + first;
    float* line = width == PANEL ? to : narrow;
    if constexpr (std::is_same_v<T, float>) {
      const float* real = w.real_sums(panel);
      const float shift = static_cast<float>(zero);
#pragma omp simd
      for (int64_t n = 0; n < PANEL; ++n) line[n] = scale * (sums[n] - shift * real[n]) + bias[n];
    } else {
      const float* scales = w.channel_scales(panel);
      const int32_t* stored = w.channel_sums(panel);
#pragma omp simd
      for (int64_t n = 0; n < PANEL; ++n) {
        line[n] = scale * scales[n] * static_cast<float>(sums[n] - zero * stored[n]) + bias[n];
      }
    }
    if (job.function != NONE) apply(job.function, PANEL, line);
    if (width < PANEL) std::copy(line, line + width, to);
  }
}

// Asks for one of several parts of what comes next in memory, while the processor multiplies what it has.
inline void ahead(const void* from, int64_t bytes, int64_t part, int64_t parts) {
  const char* start = static_cast<const char*>(from);
  for (int64_t i = bytes * part / parts; i < bytes * (part + 1) / parts; i += 64) __builtin_prefetch(start + i, 0, 2);
}

inline void panel8(const Job& job, int64_t panel, int64_t from, int64_t to) {
  const int64_t first = job.rows.first(from), count = job.rows.first(to) - first;
  alignas(64) int32_t sums[ROWS * PANEL];
  std::fill(sums, sums + count * PANEL, 0);
  for (int64_t k = 0; k < job.weights.inputs; k += CHUNK) {
    const int64_t inputs = std::min(CHUNK, job.weights.inputs - k);
    const int8_t* values = job.weights.values(panel) + k * PANEL;
    for (int64_t b = from; b < to; ++b) {
      const int64_t rows = job.rows.size(b);
      if (to - from > 1) ahead(values + inputs * PANEL, inputs * PANEL, b - from, to - from);
      const Part part{job.rows.at(b) + k * rows, rows, values, inputs, nullptr, 0, 0};
      job.path.sums8(part, sums + (job.rows.first(b) - first) * PANEL);
    }
  }
  finish(job, panel, first, count, sums);
}

inline void panel4(const Job& job, int64_t panel, int64_t from, int64_t to) {
  const Weights& w = job.weights;
  const int64_t first = job.rows.first(from), count = job.rows.first(to) - first;
  alignas(64) float sums[ROWS * PANEL];
  if (job.rows.groups) {
    job.path.few4(job.rows, w, panel, sums);
    return finish(job, panel, first, count, sums);
  }
  std::fill(sums, sums + count * PANEL, 0.0f);
  alignas(64) int8_t values[CHUNK * PANEL];
  for (int64_t k = 0; k < w.inputs; k += CHUNK) {
    const int64_t inputs = std::min(CHUNK, w.inputs - k), group = k / w.group;
    for (int64_t g = 0; g < inputs / w.group; ++g) {
      job.path.unpack(w.nibbles(panel, group + g), w.zeros(panel, group + g), w.group, values + g * w.group * PANEL);
    }
    for (int64_t b = from; b < to; ++b) {
      const int64_t rows = job.rows.size(b), step = w.group_bytes() / 4;
      const int64_t bytes = w.group_bytes() * (inputs / w.group);
      ahead(w.nibbles(panel, group) + bytes, bytes, b - from, to - from);
      const Part part{job.rows.at(b) + k * rows, rows, values, inputs, w.scales(panel, group), step, w.group};
      job.path.sums4(part, sums + (job.rows.first(b) - first) * PANEL);
    }
  }
  finish(job, panel, first, count, sums);
}

// Where a row of a tensor of any strides begins, in elements.
inline int64_t row_offset(const dr1::Tensor& x, int64_t row) {
  int64_t offset = 0;
  for (int i = x.ndim() - 2; i >= 0; --i) {
    offset += row % x.size(i) * x.stride(i);
    row /= x.size(i);
  }
  return offset;
}

// One row of the input to its place; `stored` and `straight` are places for a row.
inline void read_row(const dr1::Tensor& x, int64_t row, int64_t at, const Rows& rows, const Weights& w,
                     const Path& path, uint8_t* stored, float* straight) {
  const int64_t n = x.size(-1), step = x.stride(-1);
  const float* from = x.data<float>() + row_offset(x, row);
  if (step != 1 && n > 1) {
    for (int64_t i = 0; i < n; ++i) straight[i] = from[i * step];
    from = straight;
  }
  choose(from, n, rows.scale + at, rows.zero + at);
  path.store(from, n, rows.scale[at], rows.zero[at], stored);
  std::fill(stored + n, stored + rows.inputs, uint8_t(0));
  spread(stored, rows, at);
  if (rows.groups) sum_groups(stored, rows.groups, w.group, rows.group_sums + at * rows.groups);
}

// Products that are worth a thread; about 10 microseconds of them.
constexpr int64_t GRAIN = 1 << 20;

inline void multiply(const Job& job, const dr1_context& context) {
  const int64_t panels = job.weights.panels(), count = job.rows.count, blocks = job.rows.blocks;
  // With many threads and few channels, blocks of rows are shared out as well.
  const int64_t wanted = context.threads > 1 ? (4 * context.threads + panels - 1) / panels : 1;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(wanted, blocks / 2));
  const int64_t work = std::max<int64_t>(1, job.weights.inputs * PANEL * count / parts);
  dr1::parallel_for(context, panels * parts, std::max<int64_t>(1, GRAIN / work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / parts, part = i % parts, from = blocks * part / parts, to = blocks * (part + 1) / parts;
      job.weights.group ? panel4(job, panel, from, to) : panel8(job, panel, from, to);
    }
  });
}

inline void linear(const dr1::Tensor& x, const Weights& w, const float* bias, int64_t function, int64_t isa,
                   const dr1::Tensor& output) {
  const Path& path = path_of(isa);
  const int64_t total = x.numel() / x.size(-1), most = std::min(ROWS, total);
  const bool few = w.group && total <= path.few;
  const int64_t in_block = few ? path.few : w.group ? path.rows4 : path.rows8;
  const int64_t groups = few ? w.groups() : 0;
  static thread_local std::vector<uint8_t> stored;
  static thread_local std::vector<float> scale;
  static thread_local std::vector<int32_t> zero, sums;
  stored.resize(most * w.inputs), scale.resize(most), zero.resize(most), sums.resize(most * groups);
  const dr1_context& context = output.context();
  for (int64_t first = 0; first < total; first += ROWS) {
    const int64_t count = std::min(ROWS, total - first), blocks = (count + in_block - 1) / in_block;
    const Rows rows{stored.data(), w.inputs, count, blocks, scale.data(), zero.data(), sums.data(), groups};
    dr1::parallel_for(context, count, std::max<int64_t>(1, 65536 / w.inputs), [&](int64_t begin, int64_t end) {
      static thread_local std::vector<uint8_t> row;
      static thread_local std::vector<float> straight;
      row.resize(w.inputs), straight.resize(x.stride(-1) == 1 ? 0 : x.size(-1));
      for (int64_t r = begin; r < end; ++r) read_row(x, first + r, r, rows, w, path, row.data(), straight.data());
    });
    const Job job{w, path, rows, bias, function, output.data<float>() + first * w.outputs};
    multiply(job, context);
  }
}

}  // namespace integer
