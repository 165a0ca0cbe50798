// dot: inner products of a gradient (the last input) with the differences of the inputs between from input 0, in the
// written order of sums.
//
// Inputs of one 16-bit or fp32 type are widened in registers, four rows of lanes at a time, so that a running sum is
// loaded and stored once per four products. Others go through blocks in the first-level cache, a row at a time.
// Elements past the end are +0: a lane starts at +0 and can never become -0, so adding +0 changes nothing.
#include "kernels.h"
#include "lanes.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

constexpr int kDeep = 4;         // rows of lanes at a time
constexpr int kTogether = 4;     // models at a time: their sums, the gradient, the base and a model fill 16 registers
constexpr int64_t kAhead = 512;  // elements of a row; what is fetched this much earlier

// The inputs of a tile, from its first element on.
struct Tile {
  const DotArgs& a;
  const Segment& s;
  int64_t at, n;

  int models() const { return a.table.inputs - 2; }
  template <class T>
  const T* input(int i) const {
    return reinterpret_cast<const T*>(s.in[i]) + at;
  }
};

// ---- in registers -----------------------------------------------------------------------------------------

// acc[k] += g (x[k] - b) for `lanes` lanes (whole steps) of U rows of K models; the sums are in the order of T.
template <class T, int K, int U>
void add_rows(const T* g, const T* b, const T* const* in, int64_t lanes, float* acc) {
  const T* x[K];
  for (int k = 0; k < K; ++k) x[k] = in[k];
  for (int64_t j = 0; j < lanes; j += kStep) {
    Lanes sum[K];
    for (int k = 0; k < K; ++k) load16(acc + k * kLanes + j, sum[k]);
    if (U == kDeep && j % static_cast<int64_t>(64 / sizeof(T)) == 0) {
      // Beyond the end of a row comes what four rows of others are read before.
      const int64_t next = j + kAhead + (j + kAhead < kLanes ? 0 : (kDeep - 1) * kLanes);
      for (int u = 0; u < U; ++u) {
        __builtin_prefetch(g + u * kLanes + next);
        __builtin_prefetch(b + u * kLanes + next);
        for (int k = 0; k < K; ++k) __builtin_prefetch(x[k] + u * kLanes + next);
      }
    }
    for (int u = 0; u < U; ++u) {
      const int64_t e = u * kLanes + j;
      Lanes slope, base, v;
      load16(g + e, slope);
      load16(b + e, base);
      for (int k = 0; k < K; ++k) {
        load16(x[k] + e, v);
        sum[k] = sum[k] + slope * (v - base);
      }
    }
    for (int k = 0; k < K; ++k) put16(sum[k], acc + k * kLanes + j);
  }
}

template <class T, int K>
void add_tile(const Tile& t, int first, float* acc) {
  const T *g = t.input<T>(t.models() + 1), *b = t.input<T>(0), *x[K];
  for (int k = 0; k < K; ++k) x[k] = t.input<T>(first + 1 + k);
  for (int64_t left = t.n; left > 0;) {
    const int deep = left >= kDeep * kLanes ? kDeep : 1;
    const int64_t lanes = left < kLanes ? left : kLanes, whole = lanes & -kStep, rest = lanes - whole;
    if (deep == kDeep)
      add_rows<T, K, kDeep>(g, b, x, whole, acc);
    else
      add_rows<T, K, 1>(g, b, x, whole, acc);
    if (rest > 0) {  // the last row ends within a step
      T stage[K + 2][kStep];
      const T* few[K];
      for (int k = 0; k < K; ++k) few[k] = whole_steps(x[k] + whole, rest, stage[k]);
      add_rows<T, K, 1>(whole_steps(g + whole, rest, stage[K]), whole_steps(b + whole, rest, stage[K + 1]), few, kStep,
                        acc + whole);
    }
    for (int k = 0; k < K; ++k) x[k] += deep * kLanes;
    g += deep * kLanes, b += deep * kLanes, left -= deep * kLanes;
  }
}

template <class T>
void add_narrow(const Tile& t, float* acc) {
  for (int i = 0; i < t.models(); i += kTogether, acc += kTogether * kLanes) switch (t.models() - i) {
      case 1:
        add_tile<T, 1>(t, i, acc);
        break;
      case 2:
        add_tile<T, 2>(t, i, acc);
        break;
      case 3:
        add_tile<T, 3>(t, i, acc);
        break;
      default:
        add_tile<T, kTogether>(t, i, acc);
        break;
    }
}

// ---- by blocks --------------------------------------------------------------------------------------------

template <class W>
void add_blocks(const Tile& t, W* acc, W* blocks) {
  W *g = blocks, *b = g + kBlock, *x = b + kBlock;
  const auto widen = [&](int i, int64_t start, int64_t m, W* to) {
    load_any(t.a.table.codes[i], t.s.in[i], t.at + start, m, to);
  };
  for (int64_t start = 0; start < t.n; start += kBlock) {
    const int64_t m = t.n - start < kBlock ? t.n - start : kBlock, whole = round_up(m);
    widen(t.models() + 1, start, m, g);
    widen(0, start, m, b);
    for (int i = 0; i < t.models(); ++i) {
      W* sum = acc + i * kLanes + start % kLanes;
      widen(i + 1, start, m, x);
      FM_LOOP for (int64_t j = 0; j < (whole & -kStep); ++j) sum[j] = sum[j] + g[j] * (x[j] - b[j]);
    }
  }
}

// ---- tiles ------------------------------------------------------------------------------------------------

// Adds the lanes up by halves; the last sixteen of sums that are in the order of T are put in order before.
template <class T, class W>
W fold_lanes(W* v, int64_t used, const T* type) {
  int64_t half = used / 2;
  for (; half >= kStep; half /= 2) FM_LOOP for (int64_t j = 0; j < half; ++j) v[j] = v[j] + v[j + half];
  if (sizeof(T) == 2) {
    Lanes last;
    float* narrow = reinterpret_cast<float*>(v);
    load16(narrow, last);
    logical(type, last);
    put16(last, narrow);
  }
  for (; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) v[j] = v[j] + v[j + half];
  return v[0];
}

template <class T, class W, class Add>
void tiles(const DotArgs& a, const Add& add) {
  W* acc = static_cast<W*>(a.scratch);
  for (int64_t i = 0; i < a.table.segments; ++i) {
    const Segment& s = a.table[i];
    for (int64_t at = 0, row = s.stats; at < s.length; at += kTile, ++row) {
      const Tile t{a, s, at, s.length - at < kTile ? s.length - at : kTile};
      int64_t used = kStep;  // lanes, a power of two; the rest are +0
      while (used < t.n && used < kLanes) used *= 2;
      for (int k = 0; k < t.models(); ++k) memset(acc + k * kLanes, 0, static_cast<size_t>(used) * sizeof(W));
      add(t, acc);
      for (int k = 0; k < t.models(); ++k)
        a.partials[row * t.models() + k] =
            store<double>(fold_lanes<T>(acc + k * kLanes, used, static_cast<const T*>(nullptr)));
    }
  }
}

template <class T>
void narrow(const DotArgs& a) {
  tiles<T, float>(a, [](const Tile& t, float* acc) { add_narrow<T>(t, acc); });
}

template <class W>
void mixed(const DotArgs& a) {
  W* blocks = static_cast<W*>(a.scratch) + (a.table.inputs - 2) * kLanes;
  tiles<double, W>(a, [blocks](const Tile& t, W* acc) { add_blocks(t, acc, blocks); });
}

}  // namespace

void dot(const DotArgs& a) {
  const int32_t first = a.table.codes[0];
  bool alike = true;
  for (int32_t i = 1; i < a.table.inputs; ++i) alike = alike && a.table.codes[i] == first;
  if (a.table.wide()) return mixed<double>(a);
  if (!alike) return mixed<float>(a);
  if (first == kBF16) return narrow<Bf16>(a);
  if (first == kF16) return narrow<Fp16>(a);
  narrow<float>(a);
}

}  // namespace FM_ISA
}  // namespace fastmerge
