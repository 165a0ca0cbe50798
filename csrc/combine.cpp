// combine: out = sum c_i x_i (plain), or b + lambda sum c_i (x_i - b) (delta), one coefficient row per tensor or row.
//
// Up to kMost inputs of the output's own type are summed in registers (fused), more than kNamed of them by a loop that
// counts; in fp64 up to four of fp32. Everything else goes block by block through the first-level cache: widen, add up
// to four inputs per pass, store. Segments that share their inputs, the candidates of a search, share their loads as
// well. All add in input order. Coded inputs become blocks of fp32 first.
#include "candidates.h"
#include "coded.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

constexpr int kNamed = 8, kMost = 64;
constexpr int64_t kRun = 8192;  // elements after which a fused run looks at what it stored

// ---- fused ----------------------------------------------------------------------------------------------

// What is done to a sum: nothing, times lambda, or divided as well.
enum Scaling { kUnit, kLambda, kDivided };

// A far run is one whose output the caches could not hold, or that the caller calls so: it is written past them.
constexpr int64_t kFarBytes = 8 << 20;

// A sum of M inputs; M = 0 stands for any number of them.
template <class T, int M>
struct Terms {
  static constexpr int kSlots = M ? M : kMost;
  const T* in[kSlots];
  float coef[kSlots];
  int count;
};

// Pointers and coefficients are copied to locals: stores could otherwise be thought to change them.
template <class T, int M, bool kDelta, Scaling kScaling, bool kFar>
__attribute__((noinline)) int64_t fused_steps(const Terms<T, M>& terms, T* out, int64_t n, Scale<float> s) {
  constexpr int kFrom = kDelta ? 1 : 0;
  constexpr int64_t kSpan = kFar ? kLine<T> : kStep;
  const int count = M ? M : terms.count;
  const T* x[Terms<T, M>::kSlots];
  float c[Terms<T, M>::kSlots];
  for (int i = 0; i < count; ++i) x[i] = terms.in[i], c[i] = terms.coef[i];
  Peak peak;
  clear(peak);
  for (int64_t line = 0; line < n; line += kSpan) {
    for (int i = 0; i < (kFar ? count : 0); ++i) __builtin_prefetch(x[i] + line + kAhead);
    for (int64_t j = line; j < line + kSpan; j += kStep) {
      Lanes base, v, acc;
      if (kDelta) load16(x[0] + j, base);
      for (int i = kFrom; i < count; ++i) {
        load16(x[i] + j, v);
        if (kDelta) v = v - base;
        acc = i == kFrom ? c[i] * v : acc + c[i] * v;
      }
      if (kScaling == kDivided) acc = acc / s.div;
      if (kDelta) acc = base + (kScaling == kUnit ? acc : s.lambda * acc);
      store16<kFar>(acc, out + j, peak);
    }
  }
  if (all_finite(peak, out)) return 0;
  for (int64_t j = 0; j < n; ++j) out[j] = store<T>(load<float>(out[j]));  // canonical NaNs
  return nonfinite_block(out, n);
}

template <class T, int M, bool kDelta, bool kFar>
int64_t fused_scaled(const Terms<T, M>& terms, T* out, int64_t n, Scale<float> s) {
  if (s.div != 1.0f) return fused_steps<T, M, kDelta, kDivided, kFar>(terms, out, n, s);
  if (kDelta && s.lambda != 1.0f) return fused_steps<T, M, kDelta, kDelta ? kLambda : kUnit, kFar>(terms, out, n, s);
  return fused_steps<T, M, kDelta, kUnit, kFar>(terms, out, n, s);
}

// m < kStep elements.
template <class T, int M, bool kDelta>
__attribute__((noinline)) int64_t fused_few(const Terms<T, M>& terms, T* out, int64_t m, Scale<float> s) {
  T stage[Terms<T, M>::kSlots][kStep], result[kStep];
  Terms<T, M> staged = terms;
  for (int i = 0; i < terms.count; ++i) staged.in[i] = whole_steps(terms.in[i], m, stage[i]);
  fused_scaled<T, M, kDelta, false>(staged, result, kStep, s);
  memcpy(out, result, static_cast<size_t>(m) * sizeof(T));
  return nonfinite_block(result, m);
}

template <class T, int M, bool kDelta>
int64_t fused_run(int count, const Segment& s, int64_t at, int64_t n, const double* coef, Scale<float> scale,
                  bool far) {
  Terms<T, M> terms;
  terms.count = M ? M : count;
  for (int i = 0; i < terms.count; ++i) {
    terms.coef[i] = static_cast<float>(coef[i]);
    terms.in[i] = reinterpret_cast<const T*>(s.in[i]) + at;
  }
  T* out = reinterpret_cast<T*>(s.out) + at;
  int64_t bad = 0, m = 0;
  const auto advance = [&] {
    for (int i = 0; i < terms.count; ++i) terms.in[i] += m;
    out += m;
    n -= m;
  };
  far = far || n * static_cast<int64_t>(sizeof(T)) >= kFarBytes;
  for (; far && n > 0 && reinterpret_cast<intptr_t>(out) % 64 != 0; advance()) {
    m = 1;
    bad += fused_few<T, M, kDelta>(terms, out, m, scale);
  }
  for (; n >= kStep; advance()) {
    far = far && n >= kLine<T>;
    m = n < kRun ? n & -(far ? kLine<T> : kStep) : kRun;
    bad += far ? fused_scaled<T, M, kDelta, true>(terms, out, m, scale)
               : fused_scaled<T, M, kDelta, false>(terms, out, m, scale);
  }
  streamed();
  return n > 0 ? bad + fused_few<T, M, kDelta>(terms, out, n, scale) : bad;
}

template <class T, bool kDelta>
int64_t fused(int m, const Segment& s, int64_t at, int64_t n, const double* coef, Scale<float> scale, bool far) {
  switch (m) {
    case 1:
      return fused_run<T, kDelta ? 2 : 1, kDelta>(m, s, at, n, coef, scale, far);  // delta has two inputs at least
    case 2:
      return fused_run<T, 2, kDelta>(m, s, at, n, coef, scale, far);
    case 3:
      return fused_run<T, 3, kDelta>(m, s, at, n, coef, scale, far);
    case 4:
      return fused_run<T, 4, kDelta>(m, s, at, n, coef, scale, far);
    case 5:
      return fused_run<T, 5, kDelta>(m, s, at, n, coef, scale, far);
    case 6:
      return fused_run<T, 6, kDelta>(m, s, at, n, coef, scale, far);
    case 7:
      return fused_run<T, 7, kDelta>(m, s, at, n, coef, scale, far);
    case kNamed:
      return fused_run<T, kNamed, kDelta>(m, s, at, n, coef, scale, far);
    default:
      return fused_run<T, 0, kDelta>(m, s, at, n, coef, scale, far);
  }
}

bool fusable(const CombineArgs& a) {
  const int32_t least = a.delta ? 2 : 1;
  if (a.table.inputs < least || a.table.inputs > kMost || a.out_code == kF64) return false;
  for (int32_t i = 0; i < a.table.inputs; ++i)
    if (a.table.codes[i] != a.out_code) return false;
  return true;
}

// ---- fp32 in fp64 --------------------------------------------------------------------------------------------

template <int M, bool kDivided>
void wide_steps(const float* const* in, const double* coef, double div, int64_t n, float* out) {
  const float* x[M];
  double c[M];
  for (int i = 0; i < M; ++i) x[i] = in[i], c[i] = coef[i];
  FM_LOOP for (int64_t j = 0; j < n; ++j) {
    double sum = c[0] * x[0][j];
    for (int i = 1; i < M; ++i) sum = sum + c[i] * x[i][j];
    out[j] = static_cast<float>(kDivided ? sum / div : sum);
  }
}

template <int M>
int64_t wide_run(const Segment& s, int64_t at, int64_t n, const double* coef, double div) {
  const float* in[M];
  for (int i = 0; i < M; ++i) in[i] = reinterpret_cast<const float*>(s.in[i]) + at;
  float* out = reinterpret_cast<float*>(s.out) + at;
  int64_t bad = 0;
  for (int64_t m; n > 0; n -= m, out += m) {
    m = n < kRun ? n : kRun;
    div == 1.0 ? wide_steps<M, false>(in, coef, div, m, out) : wide_steps<M, true>(in, coef, div, m, out);
    const int64_t found = nonfinite_block(out, m);
    for (int64_t j = 0; j < (found ? m : 0); ++j) out[j] = store<float>(out[j]);  // canonical NaNs
    bad += found;
    for (int i = 0; i < M; ++i) in[i] += m;
  }
  return bad;
}

// Up to four inputs, each of its own compiled loop; 0 for more.
int64_t (*wide_run_for(int32_t m))(const Segment&, int64_t, int64_t, const double*, double) {
  constexpr decltype(&wide_run<1>) kRuns[] = {nullptr, wide_run<1>, wide_run<2>, wide_run<3>, wide_run<4>};
  return m <= 4 ? kRuns[m] : nullptr;
}

// ---- by blocks --------------------------------------------------------------------------------------------

// acc (+)= c0 v0 + c1 v1 + ... in this order; v = x, or x - base.
template <class W, int K, bool kDelta, bool kFirst>
void add_steps(const W* const* in, const W* coef, const W* base, int64_t n, W* acc) {
  FM_LOOP for (int64_t j = 0; j < (n & -kStep); ++j) {
    const W b = kDelta ? base[j] : W(0);
    W a = kFirst ? W(0) : acc[j];
    for (int k = 0; k < K; ++k) {
      const W v = coef[k] * (kDelta ? in[k][j] - b : in[k][j]);
      a = kFirst && k == 0 ? v : a + v;
    }
    acc[j] = a;
  }
}

template <class W, bool kDelta, bool kFirst>
void add(int k, const W* const* in, const W* coef, const W* base, int64_t n, W* acc) {
  switch (k) {
    case 1:
      return add_steps<W, 1, kDelta, kFirst>(in, coef, base, n, acc);
    case 2:
      return add_steps<W, 2, kDelta, kFirst>(in, coef, base, n, acc);
    case 3:
      return add_steps<W, 3, kDelta, kFirst>(in, coef, base, n, acc);
    default:
      return add_steps<W, 4, kDelta, kFirst>(in, coef, base, n, acc);
  }
}

template <class W, bool kDelta>
int64_t block_run(const CombineArgs& a, const Segment& s, int64_t at, int64_t n, const double* coef, Scale<W> scale) {
  alignas(64) W acc[kBlock], base[kDelta ? kBlock : kStep], x[4][kBlock];
  const W* in[4] = {x[0], x[1], x[2], x[3]};
  const int32_t from = kDelta ? 1 : 0;
  int64_t bad = 0;
  for (int64_t end = at + n; at < end; at += kBlock) {
    const int64_t m = end - at < kBlock ? end - at : kBlock, whole = round_up(m);
    if (kDelta) load_any(a.table.codes[0], s.in[0], at, m, base);
    if (a.table.inputs == from) memset(acc, 0, sizeof acc);
    for (int32_t i = from; i < a.table.inputs; i += 4) {
      const int32_t k = a.table.inputs - i < 4 ? a.table.inputs - i : 4;
      W c[4] = {};
      for (int32_t l = 0; l < k; ++l) {
        c[l] = static_cast<W>(coef[i + l]);
        load_any(a.table.codes[i + l], s.in[i + l], at, m, x[l]);
      }
      if (i == from)
        add<W, kDelta, true>(k, in, c, base, whole, acc);
      else
        add<W, kDelta, false>(k, in, c, base, whole, acc);
    }
    if (scale.div != W(1))
      for (int64_t j = 0; j < (whole & -kStep); ++j) acc[j] = acc[j] / scale.div;
    if (kDelta)
      for (int64_t j = 0; j < (whole & -kStep); ++j) acc[j] = base[j] + scale.lambda * acc[j];
    bad += store_any(a.out_code, s.out, at, m, acc);
  }
  return bad;
}

// One run of elements [at, at + n) of a segment under one parameter row; returns its count of non-finite results.
template <class W, bool kDelta>
int64_t run(const CombineArgs& a, bool fuse, const Segment& s, int64_t at, int64_t n, int64_t p) {
  const double* coef = a.coef + p * a.table.inputs;
  const Scale<W> scale = {static_cast<W>(a.scale[2 * p]), static_cast<W>(a.scale[2 * p + 1])};
  if (sizeof(W) == 4 && fuse) {
    const Scale<float> narrow = {static_cast<float>(scale.lambda), static_cast<float>(scale.div)};
    if (a.out_code == kBF16) return fused<Bf16, kDelta>(a.table.inputs, s, at, n, coef, narrow, a.far);
    if (a.out_code == kF16) return fused<Fp16, kDelta>(a.table.inputs, s, at, n, coef, narrow, a.far);
    return fused<float, kDelta>(a.table.inputs, s, at, n, coef, narrow, a.far);
  }
  if (sizeof(W) == 8 && !kDelta && fuse) return wide_run_for(a.table.inputs)(s, at, n, coef, scale.div);
  return block_run<W, kDelta>(a, s, at, n, coef, scale);
}

// ---- candidates -------------------------------------------------------------------------------------------

// Segments [first, last), of M inputs of the output's own type.
template <class T, int M, bool kDelta>
void shared(const CombineArgs& a, int64_t first, int64_t last) {
  Widened<T, M, kDelta> in;
  const Segment& s = a.table[first];
  const bool far = a.far || (last - first) * s.length * static_cast<int64_t>(sizeof(T)) >= kFarBytes;
  for (int64_t at = 0; at < s.length; at += in.kElements) {
    const int64_t n = s.length - at < in.kElements ? s.length - at : in.kElements, whole = n & -kSome;
    widen_all(s, at, whole, in);
    for (int64_t i = first; i < last; ++i) {
      const Segment& mine = a.table[i];
      const double* coef = a.coef + mine.group * M;
      const Scale<float> scale = {static_cast<float>(a.scale[2 * mine.group]),
                                  static_cast<float>(a.scale[2 * mine.group + 1])};
      T* out = reinterpret_cast<T*>(mine.out) + at;
      const bool fine = stays_finite<T, M, kDelta>(in.most, coef, scale);
      const int64_t done = fine ? whole : 0;
      const bool past = far && reinterpret_cast<intptr_t>(out) % 64 == 0;
      if (done)
        past ? shared_out<T, M, kDelta, true>(in, coef, scale, out, done)
             : shared_out<T, M, kDelta, false>(in, coef, scale, out, done);
      if (done < n) a.nonfinite[i] += run<float, kDelta>(a, true, mine, at + done, n - done, mine.group);
    }
  }
  if (far) streamed();
}

using SharedRun = void (*)(const CombineArgs&, int64_t, int64_t);

template <class T, bool kDelta>
SharedRun shared_for(int32_t inputs) {
  switch (inputs) {
    case 2:
      return shared<T, 2, kDelta>;
    case 3:
      return shared<T, 3, kDelta>;
    case 4:
      return shared<T, 4, kDelta>;
    case 5:
      return shared<T, 5, kDelta>;
    default:
      return nullptr;
  }
}

// How segments that share their inputs are computed; null where each is by itself: of fp32, whose loads cost nothing
// beside the memory, and of more inputs than searches have.
template <bool kDelta>
SharedRun shared_run(const CombineArgs& a) {
  if (a.per_row || !fusable(a)) return nullptr;
  if (a.out_code == kBF16) return shared_for<Bf16, kDelta>(a.table.inputs);
  return a.out_code == kF16 ? shared_for<Fp16, kDelta>(a.table.inputs) : nullptr;
}

// The end of the segments from i on whose inputs are those of i.
int64_t alike_until(const Table& t, int64_t i) {
  const Segment& s = t[i];
  const auto inputs = static_cast<size_t>(t.inputs) * sizeof s.in[0];
  int64_t end = i + 1;
  while (end < t.segments && t[end].length == s.length && memcmp(t[end].in, s.in, inputs) == 0) ++end;
  return end;
}

template <class W, bool kDelta>
void all(const CombineArgs& given) {
  Stage stage(given.table, given.out_code);
  CombineArgs a = given;
  a.table = stage.table(), a.out_code = stage.out_code();
  const bool fuse = (sizeof(W) == 4 || (a.out_code == kF32 && a.table.inputs <= 4)) && fusable(a);
  const auto part = [&](const Segment& s, int64_t at, int64_t n, int64_t p) {
    if (!stage.used()) return run<W, kDelta>(a, fuse, s, at, n, p);
    int64_t bad = 0;
    for (const int64_t end = at + n; at < end; at += kBlock) {
      const int64_t m = end - at < kBlock ? end - at : kBlock;
      bad += stage.stored(s, at, m, run<W, kDelta>(a, fuse, stage.block(s, at, m), at, m, p));
    }
    return bad;
  };
  const SharedRun together = sizeof(W) == 4 && !stage.used() ? shared_run<kDelta>(a) : nullptr;
  for (int64_t i = 0; i < a.table.segments; ++i) {
    if (const int64_t end = together ? alike_until(a.table, i) : 0; end > i + 1) {
      together(a, i, end);
      i = end - 1;
      continue;
    }
    const Segment& s = a.table[i];
    int64_t bad = 0;
    if (!a.per_row) {
      bad = part(s, 0, s.length, s.group);
    } else {
      for (int64_t at = 0; at < s.length;) {
        const int64_t e = s.e0 + at, left = s.row - e % s.row, rest = s.length - at;
        const int64_t n = left < rest ? left : rest;
        bad += part(s, at, n, s.group + e / s.row);
        at += n;
      }
    }
    a.nonfinite[i] += bad;
  }
}

}  // namespace

void combine(const CombineArgs& a) {
  if (a.wide || a.table.wide())
    a.delta ? all<double, true>(a) : all<double, false>(a);
  else
    a.delta ? all<float, true>(a) : all<float, false>(a);
}

}  // namespace FM_ISA
}  // namespace fastmerge
