// low_rank: y = x + s (B A) of fp32 factors, the sum of an element in the order of the ranks, every operation rounded.
//
// A strip of A's columns is copied side by side, so that all ranks of it lie in the first-level cache; sums of a few
// rows by sixteen columns stay in registers from the first rank to the last.
#include "kernels.h"
#include "lanes.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

constexpr int kRows = 4;

// Rows [row, row + M) of the columns [at, at + m) that the strip holds.
template <int M>
void rows_of(const LowRankArgs& a, int64_t row, int64_t at, int64_t m) {
  const float* left = a.left + row * a.rank;
  alignas(64) float x[M][kStrip];
  for (int i = 0; i < M; ++i) load_any(a.code, a.x, (row + i) * a.columns + at, m, x[i]);
  for (int64_t j = 0; j < m; j += kStep) {
    Lanes sum[M], v;
    load16(a.strip + j, v);
    for (int i = 0; i < M; ++i) sum[i] = left[i * a.rank] * v;
    for (int64_t k = 1; k < a.rank; ++k) {
      load16(a.strip + k * kStrip + j, v);
      for (int i = 0; i < M; ++i) sum[i] = sum[i] + left[i * a.rank + k] * v;
    }
    for (int i = 0; i < M; ++i) {
      load16(x[i] + j, v);
      put16(v + a.scale * sum[i], x[i] + j);
    }
  }
  for (int i = 0; i < M; ++i) memcpy(a.out + (row + i) * a.columns + at, x[i], static_cast<size_t>(m) * sizeof(float));
}

}  // namespace

void low_rank(const LowRankArgs& a) {
  for (int64_t at = 0; at < a.columns; at += kStrip) {
    const int64_t m = a.columns - at < kStrip ? a.columns - at : kStrip;
    for (int64_t k = 0; k < a.rank; ++k) {
      memcpy(a.strip + k * kStrip, a.right + k * a.stride + at, static_cast<size_t>(m) * sizeof(float));
      memset(a.strip + k * kStrip + m, 0, static_cast<size_t>(kStrip - m) * sizeof(float));
    }
    int64_t row = 0;
    for (; row + kRows <= a.rows; row += kRows) rows_of<kRows>(a, row, at, m);
    for (; row < a.rows; ++row) rows_of<1>(a, row, at, m);
  }
}

}  // namespace FM_ISA
}  // namespace fastmerge
