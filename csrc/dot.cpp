// dot: inner products of a gradient (the last input) with the differences of the inputs between from input 0, in the
// written order of sums.
//
// Inputs of one 16-bit or fp32 type are widened in registers, others through blocks in the first-level cache. Both go
// through memory in its order, a row of lanes after the other, which hardware foresees; the running sums, 8 KB a model,
// stay in the second-level cache. Elements past the end are +0: a lane starts at +0 and can never become -0, so adding
// +0 changes nothing.
#include "kernels.h"
#include "lanes.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

constexpr int64_t kAhead = 1024;  // elements; inputs are fetched this much earlier
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

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

// acc[k] += g (x[k] - b) of n < kLine elements from element e of the tile on.
template <class T>
void add_few(const Tile& t, int64_t e, int64_t n, float* acc) {
  const int models = t.models();
  for (const int64_t end = e + n; e < end; e += kStep) {
    const int64_t m = end - e < kStep ? end - e : kStep;
    T stage[kStep];
    Lanes gradient, base, v, sum;
    load16(whole_steps(t.input<T>(models + 1) + e, m, stage), gradient);
    load16(whole_steps(t.input<T>(0) + e, m, stage), base);
    float* to = acc + e % kLanes;
    for (int k = 0; k < models; ++k, to += kLanes) {
      load16(whole_steps(t.input<T>(k + 1) + e, m, stage), v);
      load16(to, sum);
      put16(sum + gradient * (v - base), to);
    }
  }
}

// The same of n elements, whole lines from the first on, and of N models; N = 0 stands for any number of them.
template <class T, int N>
__attribute__((noinline)) void add_lines(const Tile& t, int64_t n, float* acc) {
  const int models = N ? N : t.models();
  const T *base = t.input<T>(0), *gradient = t.input<T>(models + 1), *x[N ? N : 1];
  for (int k = 0; k < N; ++k) x[k] = t.input<T>(k + 1);
  for (int64_t row = 0; row < n; row += kLanes)
    for (int64_t line = row; line < n && line < row + kLanes; line += kLine<T>) {
      __builtin_prefetch(base + line + kAhead);
      __builtin_prefetch(gradient + line + kAhead);
      for (int k = 0; k < models; ++k) __builtin_prefetch((N ? x[k] : t.input<T>(k + 1)) + line + kAhead);
      for (int64_t j = line; j < line + kLine<T>; j += kStep) {
        Lanes g, b, v, sum;
        load16(gradient + j, g);
        load16(base + j, b);
        float* to = acc + (j - row);
        for (int k = 0; k < models; ++k, to += kLanes) {
          load16((N ? x[k] : t.input<T>(k + 1)) + j, v);
          load16(to, sum);
          put16(sum + g * (v - b), to);
        }
      }
    }
}

template <class T>
void add_narrow(const Tile& t, float* acc) {
  using Add = void (*)(const Tile&, int64_t, float*);
  constexpr Add kNamed[] = {add_lines<T, 0>, add_lines<T, 1>, add_lines<T, 2>, add_lines<T, 3>, add_lines<T, 4>,
                            add_lines<T, 5>, add_lines<T, 6>, add_lines<T, 7>, add_lines<T, 8>};
  const int64_t whole = t.n & -kLine<T>;
  kNamed[t.models() <= 8 ? t.models() : 0](t, whole, acc);
  add_few<T>(t, whole, t.n - whole, acc);
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
