// gram: inner products of the inputs (or of their differences from input 0) in the written order of sums, and the
// ordered fp64 fold of tile sums.
//
// A tile is walked by chunks of kWide lanes, so that a chunk's running sums stay in the first-level cache; four
// elements of each lane are widened at a time, so that a running sum is loaded and stored once per four products.
// Elements past the end are widened to +0: a lane starts at +0 and can never become -0, so adding +0 changes nothing.
#include "coded.h"
#include "keep.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

constexpr int64_t kWide = 256;
constexpr int kDeep = 4;
constexpr int64_t kInput = kDeep * kWide + 64;  // one input's chunk; padded, as streams 4 KiB apart share cache sets

// One chunk of sums: U rows of kWide elements of M inputs, kInput apart.
template <class W, int U, int M, bool kDiff>
void sums_of(const W* x, W* acc) {
  const W *a = x, *b = x + (M > 1 ? kInput : 0), *c = x + (M > 2 ? 2 * kInput : 0);
  W *s0 = acc, *s1 = acc + kWide, *s2 = acc + 2 * kWide, *s3 = acc + 3 * kWide, *s4 = acc + 4 * kWide,
    *s5 = acc + 5 * kWide, *sd = acc + (M * (M + 1) / 2) * kWide;
  FM_LOOP for (int64_t j = 0; j < kWide; ++j) {
    W t0 = s0[j], t1 = M > 1 ? s1[j] : W(0), t2 = M > 1 ? s2[j] : W(0), t3 = M > 2 ? s3[j] : W(0),
      t4 = M > 2 ? s4[j] : W(0), t5 = M > 2 ? s5[j] : W(0), td = kDiff ? sd[j] : W(0);
    for (int u = 0; u < U; ++u) {
      const W p = a[u * kWide + j], q = b[u * kWide + j], r = c[u * kWide + j];
      t0 = t0 + p * p;
      if (M == 2) t1 = t1 + p * q, t2 = t2 + q * q;
      if (M == 3) t1 = t1 + p * q, t2 = t2 + p * r, t3 = t3 + q * q, t4 = t4 + q * r, t5 = t5 + r * r;
      if (kDiff) td = td + (p - q) * (p - q);
    }
    s0[j] = t0;
    if (M > 1) s1[j] = t1, s2[j] = t2;
    if (M > 2) s3[j] = t3, s4[j] = t4, s5[j] = t5;
    if (kDiff) sd[j] = td;
  }
}

// K columns of one row of the triangle: acc[k] += p * q[k].
template <class W, int U, int K>
void row_of(const W* p, const W* q, W* acc) {
  FM_LOOP for (int64_t j = 0; j < kWide; ++j) {
    W t[K];
    for (int k = 0; k < K; ++k) t[k] = acc[k * kWide + j];
    for (int u = 0; u < U; ++u) {
      const W v = p[u * kWide + j];
      for (int k = 0; k < K; ++k) t[k] = t[k] + v * q[k * kInput + u * kWide + j];
    }
    for (int k = 0; k < K; ++k) acc[k * kWide + j] = t[k];
  }
}

template <class W, int U>
void sums(int m, bool diff, const W* x, W* acc) {
  if (m == 1) return sums_of<W, U, 1, false>(x, acc);
  if (m == 2) return diff ? sums_of<W, U, 2, true>(x, acc) : sums_of<W, U, 2, false>(x, acc);
  if (m == 3) return diff ? sums_of<W, U, 3, true>(x, acc) : sums_of<W, U, 3, false>(x, acc);
  for (int i = 0; i < m; ++i) {
    const W* p = x + i * kInput;
    for (int j = i; j < m;) {
      const W* q = x + j * kInput;
      const int k = m - j < 4 ? m - j : 4;
      switch (k) {
        case 1:
          row_of<W, U, 1>(p, q, acc);
          break;
        case 2:
          row_of<W, U, 2>(p, q, acc);
          break;
        case 3:
          row_of<W, U, 3>(p, q, acc);
          break;
        default:
          row_of<W, U, 4>(p, q, acc);
          break;
      }
      acc += k * kWide;
      j += k;
    }
  }
  if (diff) {
    const W *p = x, *q = x + kInput;
    for (int u = 0; u < U; ++u) FM_LOOP for (int64_t j = 0; j < kWide; ++j) {
        const W d = p[u * kWide + j] - q[u * kWide + j];
        acc[j] = acc[j] + d * d;
      }
  }
}

// Widens up to kWide elements of one row of lanes; beyond the end of the tile (n elements from `at`) zeros. Rows are
// 2048 elements apart, which no hardware foresees: what the next chunk will ask for (`ahead`) is fetched meanwhile.
template <class W>
void widen_row(const Table& t, const Segment& s, int i, int64_t at, int64_t start, int64_t n, int64_t ahead, W* dst) {
  const int64_t size = size_of(t.codes[i]);
  const char* next = reinterpret_cast<const char*>(s.in[i]) + (at + ahead) * size;
  for (int64_t byte = 0; byte < kWide * size; byte += 64) __builtin_prefetch(next + byte);
  int64_t m = n - start < kWide ? n - start : kWide;
  if (m > 0)
    load_input(t, s, i, at + start, m, dst);
  else
    m = 0;
  const int64_t whole = round_up(m);
  if (whole < kWide) memset(dst + whole, 0, static_cast<size_t>(kWide - whole) * sizeof(W));
}

// What is kept of the deltas of a tile, one bit per element.
template <class W>
void kept_bits(const KeepArgs& k, Stage& stage, const Segment& s, int64_t at, int64_t n, uint32_t* bits) {
  int64_t rank = 0;
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t m = n - j < kBlock ? n - j : kBlock;
    variance_bits<W>(k, stage.table(), stage.block(s, at + j, m), at + j, m, rank, bits + j / 32);
  }
}

template <class W>
void tile(const GramArgs& a, const Segment& s, int64_t at, int64_t n, const uint32_t* kept, W* scratch, double* out) {
  const int from = a.delta ? 1 : 0, m = a.table.inputs - from;
  const int64_t columns = a.columns, rows = (n + kLanes - 1) / kLanes;
  const int64_t lanes = n < kLanes ? n : kLanes;
  // scratch: running sums [chunk][column][kWide], then one chunk of widened inputs [m][kInput], then a row of the base.
  W* x = scratch + columns * kLanes;
  W* base = x + m * kInput;
  int64_t used = 1;  // chunks, a power of two, that hold all lanes in use; the rest are +0
  while (used * kWide < lanes) used *= 2;
  for (int64_t c = 0; c < used; ++c) {
    W* acc = scratch + c * columns * kWide;
    memset(acc, 0, static_cast<size_t>(columns * kWide) * sizeof(W));
    for (int64_t r = 0; r < rows;) {
      const int deep = rows - r >= kDeep ? kDeep : 1;
      for (int u = 0; u < deep; ++u) {
        const int64_t start = (r + u) * kLanes + c * kWide;
        const int64_t ahead = c + 1 < used ? start + kWide : n + (r + u) * kLanes;
        if (a.delta) widen_row(a.table, s, 0, at, start, n, ahead, base);
        for (int i = 0; i < m; ++i) {
          W* dst = x + i * kInput + u * kWide;
          widen_row(a.table, s, i + from, at, start, n, ahead, dst);
          if (a.delta) FM_LOOP for (int64_t j = 0; j < kWide; ++j) dst[j] = dst[j] - base[j];
          if (kept) drop_block(kept + start / 32, kWide, dst);
        }
      }
      if (deep == kDeep)
        sums<W, kDeep>(m, a.diff, x, acc);
      else
        sums<W, 1>(m, a.diff, x, acc);
      r += deep;
    }
  }
  for (int64_t half = used / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half * columns * kWide; ++j) scratch[j] = scratch[j] + scratch[j + half * columns * kWide];
  for (int64_t c = 0; c < columns; ++c) {
    W* v = scratch + c * kWide;
    for (int64_t half = kWide / 2; half > 0; half /= 2)
      for (int64_t j = 0; j < half; ++j) v[j] = v[j] + v[j + half];
    out[c] = store<double>(v[0]);
  }
}

template <class W>
void all(const GramArgs& a) {
  W* scratch = static_cast<W*>(a.scratch);
  Stage stage(a.table);
  uint32_t kept[kTile / 32] = {};
  for (int64_t i = 0; i < a.table.segments; ++i) {
    const Segment& s = a.table[i];
    double* out = a.partials + s.stats * a.columns;
    for (int64_t at = 0; at < s.length; out += a.columns) {
      int64_t n = s.length - at;
      if (a.per_row) {
        const int64_t left = s.row - (s.e0 + at) % s.row;
        n = left < n ? left : n;
      }
      n = n < kTile ? n : kTile;
      if (a.keep) kept_bits<W>(*a.keep, stage, s, at, n, kept);
      tile<W>(a, s, at, n, a.keep ? kept : nullptr, scratch, out);
      at += n;
    }
  }
}

}  // namespace

void gram(const GramArgs& a) { a.table.wide() ? all<double>(a) : all<float>(a); }

void fold(const FoldArgs& a) {
  for (int64_t g = 0; g < a.groups; ++g) {
    double* out = a.out + g * a.columns;
    for (int64_t c = 0; c < a.columns; ++c) out[c] = 0.0;
    for (int64_t r = a.first[g]; r < a.first[g + 1]; ++r)
      for (int64_t c = 0; c < a.columns; ++c) out[c] = out[c] + a.partials[r * a.columns + c];
    for (int64_t c = 0; c < a.columns; ++c) out[c] = store<double>(out[c]);
  }
}

}  // namespace FM_ISA
}  // namespace fastmerge
