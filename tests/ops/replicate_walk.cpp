// The walk of the CUDA kernel, thread by thread on the host: what tests/ops/test_replicate_cuda.py compiles.
#include <cstddef>

#include "../../csrc/replicate.h"

using namespace fastmerge;

namespace {

struct Grid {
  int programs, threads;
};

template <class In, class Out, bool kRandom>
void all(const ReplicateArgs& a, const ReplicateWalk& walk, Grid grid) {
  const Lines table = {a.lines};
  for (int p = 0; p < grid.programs; ++p)
    for (int64_t t = p; t < walk.tiles; t += grid.programs)
      for (int i = 0; i < grid.threads; ++i) replicate_tile<In, Out, kRandom>(a, walk, t, i, grid.threads, table);
}

template <class In, class Out>
void all(const ReplicateArgs& a, const ReplicateWalk& walk, Grid grid, bool random) {
  random ? all<In, Out, true>(a, walk, grid) : all<In, Out, false>(a, walk, grid);
}

template <class In>
void all(const ReplicateArgs& a, const ReplicateWalk& walk, Grid grid, bool random) {
  switch (a.out_code) {
    case kBF16:
      return all<In, Bf16>(a, walk, grid, random);
    case kF16:
      return all<In, Fp16>(a, walk, grid, random);
    case kF32:
      return all<In, float>(a, walk, grid, random);
    default:
      return all<In, double>(a, walk, grid, random);
  }
}

}  // namespace

extern "C" void walk(const int64_t* table, int64_t segments, int32_t outputs, int32_t in_code, int32_t out_code,
                     const double* sigma, const int64_t* numbers, const float* lines, int64_t* nonfinite,
                     const int64_t* first, int64_t tile, int32_t programs, int32_t threads, double most) {
  const ReplicateArgs a = {
      {table, segments, 1, &in_code, outputs},    out_code, safe_input(out_code, most), sigma, numbers,
      reinterpret_cast<const NormalLine*>(lines), nonfinite};
  const ReplicateWalk w = {first, first[segments], tile};
  const Grid grid = {programs, threads};
  const bool random = most > 0;
  switch (in_code) {
    case kBF16:
      return all<Bf16>(a, w, grid, random);
    case kF16:
      return all<Fp16>(a, w, grid, random);
    case kF32:
      return all<float>(a, w, grid, random);
    default:
      return all<double>(a, w, grid, random);
  }
}
