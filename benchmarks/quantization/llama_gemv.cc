// One row times 4-bit weights in llama.cpp's kernels (ggml): milliseconds of a layer, as JSON, for `kernels.py --llama`.
//
//   llama_gemv INPUTS OUTPUTS COPIES THREADS ROUNDS
//
// Build it against a build of llama.cpp (its sources come with the sdist of llama-cpp-python):
//   g++ -O2 -std=c++17 -I llama.cpp/ggml/include llama_gemv.cc BUILD/ggml/src/*.a -fopenmp -lpthread -ldl -o llama_gemv
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

struct Options {
  int64_t inputs, outputs, copies;
  int threads, rounds;
};

// The fastest of some rounds, in ms for one layer; negative if the kernels cannot take this form of weights.
double measure(const Options& o, ggml_type type, ggml_backend_buffer_type_t place) {
  ggml_backend_t backend = ggml_backend_cpu_init();
  ggml_backend_cpu_set_n_threads(backend, o.threads);
  const size_t nodes = static_cast<size_t>(o.copies) * 2 + 16;
  const ggml_init_params some{ggml_tensor_overhead() * nodes + ggml_graph_overhead_custom(nodes, false), nullptr, true};
  ggml_context* stored = ggml_init(some);
  std::vector<ggml_tensor*> weights;
  for (int64_t i = 0; i < o.copies; ++i) weights.push_back(ggml_new_tensor_2d(stored, type, o.inputs, o.outputs));
  ggml_backend_buffer_t memory = ggml_backend_alloc_ctx_tensors_from_buft(stored, place);
  if (!memory) return -1;
  std::vector<float> numbers(o.inputs * o.outputs);
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<float>((i * 2654435761u >> 8) % 2000) / 1e3f - 1;
  std::vector<uint8_t> bytes(ggml_nbytes(weights[0]));
  ggml_quantize_chunk(type, numbers.data(), bytes.data(), 0, o.outputs, o.inputs, nullptr);
  for (ggml_tensor* w : weights) ggml_backend_tensor_set(w, bytes.data(), 0, bytes.size());

  ggml_context* computed = ggml_init(some);
  ggml_tensor* x = ggml_new_tensor_2d(computed, GGML_TYPE_F32, o.inputs, 1);
  ggml_cgraph* graph = ggml_new_graph_custom(computed, nodes, false);
  for (ggml_tensor* w : weights) ggml_build_forward_expand(graph, ggml_mul_mat(computed, w, x));
  ggml_backend_buffer_t rest = ggml_backend_alloc_ctx_tensors(computed, backend);
  ggml_backend_tensor_set(x, numbers.data(), 0, o.inputs * sizeof(float));

  double best = 1e9;
  for (int round = 0; round < o.rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    // Single layers are too short for the clock and for waking threads.
    const int repeats = o.copies == 1 ? 20 : 1;
    for (int i = 0; i < repeats; ++i) ggml_backend_graph_compute(backend, graph);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / static_cast<double>(repeats * o.copies));
  }
  ggml_backend_buffer_free(rest);
  ggml_backend_buffer_free(memory);
  ggml_free(computed);
  ggml_free(stored);
  ggml_backend_free(backend);
  return best;
}

}  // namespace

int main(int count, char** words) {
  if (count != 6) return std::fputs("llama_gemv INPUTS OUTPUTS COPIES THREADS ROUNDS\n", stderr), 2;
  const Options o{std::atoll(words[1]), std::atoll(words[2]), std::atoll(words[3]), std::atoi(words[4]), std::atoi(words[5])};
  std::vector<std::pair<std::string, ggml_backend_buffer_type_t>> places{{"", ggml_backend_cpu_buffer_type()}};
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  auto* extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  for (ggml_backend_buffer_type_t* b = extra ? extra(device) : nullptr; b && *b; ++b) {
    places.emplace_back(std::string(" ") + ggml_backend_buft_name(*b), *b);
  }
  std::string text;
  for (const auto& [name, place] : places) {
    for (ggml_type type : {GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q4_K}) {
      if (type == GGML_TYPE_Q4_1 && !name.empty()) continue;  // not rearranged
      const double ms = measure(o, type, place);
      if (ms < 0) continue;
      text += (text.empty() ? "" : ", ") + ("\"" + std::string(ggml_type_name(type)) + name + "\": ") + std::to_string(ms);
    }
  }
  std::printf("{%s}\n", text.c_str());
}
