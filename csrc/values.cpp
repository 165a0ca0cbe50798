// Kernels on single streams of values: the counter generator and the count of values that are not finite.
#include "kernels.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {

void philox(uint64_t key, uint32_t model, uint32_t op, int64_t e0, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kBlock)
    random_block(key, model, op, e0 + i, n - i < kBlock ? n - i : kBlock, out + i);
}

int64_t count_nonfinite(const void* data, int64_t n, int32_t code) {
  switch (code) {
    case kBF16:
      return nonfinite_block(static_cast<const Bf16*>(data), n);
    case kF16:
      return nonfinite_block(static_cast<const Fp16*>(data), n);
    case kF32:
      return nonfinite_block(static_cast<const float*>(data), n);
    default:
      return nonfinite_block(static_cast<const double*>(data), n);
  }
}

}  // namespace FM_ISA
}  // namespace fastmerge
