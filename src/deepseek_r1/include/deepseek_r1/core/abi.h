// The door between an operator's library and its caller: plain C, versioned, with no C++ type in it.
//
// A library exports five functions:
//   dr1_abi_version    must equal DR1_ABI_VERSION
//   dr1_op_count       how many operators are in the library
//   dr1_op_describe    one operator as JSON text: name, counts, attributes, dtypes, devices, abilities
//   dr1_op_shape       sizes of the outputs as postfix text, see shape.h
//   dr1_op_run         one pass of one operator
// Nothing is thrown across the door: a function that can fail gives 0 or fills the caller's buffer with a message.
#pragma once

#include <stdint.h>

#define DR1_ABI_VERSION 1
#define DR1_MAX_DIMS 16

#if defined(__GNUC__)
#define DR1_EXPORT __attribute__((visibility("default"), used))
#else
#define DR1_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Strides are in elements. `dtype` is a dr1::DType; `device_type` 0 is the CPU, 1 is CUDA.
typedef struct dr1_tensor {
  void* data;
  int64_t sizes[DR1_MAX_DIMS];
  int64_t strides[DR1_MAX_DIMS];
  int32_t ndim;
  int32_t dtype;
  int32_t device_type;
  int32_t device_index;
} dr1_tensor;

// `stream` is the CUDA stream to work on. The three functions lend the caller's thread team in the form that OpenMP's
// GNU runtime has them; they may be null, and then the library starts threads of its own for large work.
typedef struct dr1_context {
  void* stream;
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_number)(void);
  int (*team_size)(void);
  int32_t threads;
  int32_t reserved;
} dr1_context;

typedef union dr1_value {
  double real;
  int64_t integer;
} dr1_value;

enum { DR1_FORWARD = 0, DR1_BACKWARD = 1, DR1_DERIVATIVE = 2 };

// Tensors of a pass, in their order:
//   forward     inputs, outputs
//   backward    gradients of the outputs, inputs, outputs, gradients of the inputs
//   derivative  inputs, gradients of the outputs, then for each input one buffer for each output: what that output
//               contributes to the input's gradient, at the size that inputs and outputs broadcast to
// A gradient of an input that nobody wants has null data and a negative ndim.
typedef struct dr1_call {
  uint32_t op;
  uint32_t pass;
  const dr1_context* context;
  const dr1_value* attributes;
  const dr1_tensor* tensors;
  uint64_t tensor_count;
  char* error;
  uint64_t error_bytes;
} dr1_call;

#ifdef __cplusplus
}
#endif
