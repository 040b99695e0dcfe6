// The swish of the example, counting every element that its loop reads and writes.
#include <deepseek_r1/core/storage.h>

static volatile int64_t reads, writes;
template <>
struct dr1::Access<float> {
  static float read(const float* p) {
    reads = reads + 1;
    return *p;
  }
  static void write(float* p, float value) {
    writes = writes + 1;
    *p = value;
  }
};
extern "C" DR1_EXPORT int64_t reads_so_far() { return reads; }
extern "C" DR1_EXPORT int64_t writes_so_far() { return writes; }

#include <deepseek_r1/core/operator.h>

class CountedSwishOp : public dr1::Operator {
 public:
  void forward(dr1::Tensor input, dr1::Tensor output) override {
    output = input * (1.0f / (1.0f + expf(-input)));
  }
};
DR1_REGISTER_OP(CountedSwishOp, "counted_swish");
