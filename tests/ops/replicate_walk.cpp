// The walk of the CUDA kernel, thread by thread on the host: what tests/ops/test_replicate_cuda.py compiles.
#include <cstddef>
#include <vector>

#include "../../csrc/replicate.h"

using namespace fastmerge;

namespace {

struct Grid {
  int programs, threads;
};

template <class In, class Out, bool kRandom>
void all(const ReplicateArgs& a, const ReplicateWalk& walk, Grid grid) {
  const Lines table = {a.lines};
  const int each = (walk.tile + grid.threads - 1) / grid.threads;
  std::vector<Place> places(static_cast<size_t>(grid.programs), Place{0, 0, 0});
  std::vector<int32_t> at(places.size(), 0);
  // The programs draw in turn, so that each moves on by as many items as there are programs.
  for (int32_t drawn = 0, tired = 0; tired < grid.programs; ++drawn) {
    const auto p = static_cast<size_t>(drawn % grid.programs);
    const bool more = places[p].advance(walk, a.table.outputs, drawn - at[p]);
    at[p] = drawn, tired += !more;
    if (!more) continue;
    Item item;
    set_item<In, Out>(a, walk, places[p], item);
    for (int i = 0; i < grid.threads; ++i) replicate_item<In, Out, kRandom>(a, item, i, grid.threads, each, table);
  }
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
                     const int64_t* first, int32_t tile, int32_t group, int32_t programs, int32_t threads,
                     int32_t random) {
  const ReplicateArgs a = {{table, segments, 1, &in_code, outputs},    out_code, sigma, numbers,
                           reinterpret_cast<const NormalLine*>(lines), nonfinite};
  const ReplicateWalk w = {first, static_cast<int32_t>(first[segments]), tile, group, nullptr};
  const Grid grid = {programs, threads};
  switch (in_code) {
    case kBF16:
      return all<Bf16>(a, w, grid, random != 0);
    case kF16:
      return all<Fp16>(a, w, grid, random != 0);
    case kF32:
      return all<float>(a, w, grid, random != 0);
    default:
      return all<double>(a, w, grid, random != 0);
  }
}

// Every `step`-th item in the order of the walk, as (tile, output); returns how many there are.
extern "C" int32_t places(int32_t tiles, int32_t group, int32_t outputs, int32_t step, int32_t* to) {
  const ReplicateWalk w = {nullptr, tiles, 0, group, nullptr};
  Place place = {0, 0, 0};
  int32_t n = 0;
  for (bool more = place.advance(w, outputs, 0); more; more = place.advance(w, outputs, step), ++n)
    to[2 * n] = place.start + place.tile, to[2 * n + 1] = place.output;
  return n;
}
