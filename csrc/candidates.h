// Weighted sums of the same inputs, the candidates of a search: a block of the inputs is widened once, into the
// first-level cache, and read from there for each of them. For combine.cpp.
#pragma once

#include "kernels.h"
#include "lanes.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

// The parameters of one run, rounded once to the work type.
template <class W>
struct Scale {
  W lambda, div;
};

constexpr int64_t kAhead = 1024;  // elements; inputs are fetched this much earlier
template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

constexpr int64_t kSome = 4 * kStep;  // elements that go together; fewer at the end of a segment go by themselves

// A block of M inputs, in the order of T; with kDelta the base, and what the others differ from it by.
template <class T, int M, bool kDelta>
struct Widened {
  static constexpr int64_t kElements = M > 4 ? kBlock / 2 : kBlock;
  alignas(64) float x[M][kElements];
  float most;  // the largest magnitude of an input; infinite or a NaN where one of the values is
};

template <class T, int M, bool kDelta>
void widen_all(const Segment& s, int64_t at, int64_t n, Widened<T, M, kDelta>& to) {
  const T* in[M];
  for (int i = 0; i < M; ++i) in[i] = reinterpret_cast<const T*>(s.in[i]) + at;
  Peak peak;
  clear(peak);
  for (int64_t line = 0; line < n; line += kLine<T>) {
    for (int i = 0; i < M; ++i) __builtin_prefetch(in[i] + line + kAhead);
    for (int64_t j = line; j < line + kLine<T>; j += kStep) {
      Lanes base, v;
      for (int i = 0; i < M; ++i) {
        load16(in[i] + j, v);
        for (const Vec& part : v.v) peak32(peak, part);
        if (kDelta && i == 0) base = v;
        put16(kDelta && i > 0 ? v - base : v, to.x[i] + j);
      }
    }
  }
  to.most = largest_magnitude(peak);
}

// Whether all results are finite, and all that is computed on the way, whatever inputs of such magnitudes are: below
// half of T's largest, which leaves room for what roundings add.
template <class T, int M, bool kDelta>
bool stays_finite(double most, const double* coef, Scale<float> s) {
  const double limit = infinity(static_cast<const T*>(nullptr)) == 0x7c00 ? 0x1p15 : 0x1p127;
  double mix = 0;
  for (int i = kDelta ? 1 : 0; i < M; ++i) mix += __builtin_fabs(static_cast<float>(coef[i]));
  const double reach = kDelta ? 2 * most : most;
  mix *= reach;
  const double divided = mix / __builtin_fabs(s.div);
  const double result = kDelta ? most + __builtin_fabs(s.lambda) * divided : divided;
  return reach < limit && mix < limit && divided < limit && result < limit;
}

// How a sum is divided: not at all, or exactly, or by a product with the divisor's inverse, which is off by less than
// kNear units in the last place.
enum Division { kNone, kExact, kProduct };

template <class T, int M, bool kDelta, Division kDivision, bool kFar, class Watch>
FM_LANES void shared_steps(const float (&x)[M][Widened<T, M, kDelta>::kElements], const float* c, Scale<float> s,
                           int64_t from, int64_t to, T* out, Watch& watch) {
  constexpr int kFrom = kDelta ? 1 : 0;
  for (int64_t j = from; j < to; j += kStep) {
    Lanes base, v, acc;
    for (int i = kFrom; i < M; ++i) {
      load16(x[i] + j, v);
      acc = i == kFrom ? c[i] * v : acc + c[i] * v;
    }
    if (kDivision == kExact) acc = acc / s.div;
    if (kDivision == kProduct) acc = s.div * acc;
    if (kDelta) load16(x[0] + j, base);
    if (kDelta) acc = base + s.lambda * acc;
    store16<kFar>(acc, out + j, watch);
  }
}

// n elements of a block for one segment. Divisions take longer than all the rest; the product rounds to another bf16
// than the quotient only near the middle between two, and there the quotients are computed.
template <class T, int M, bool kDelta, bool kFar>
__attribute__((noinline)) void shared_out(const Widened<T, M, kDelta>& in, const double* coef, Scale<float> s, T* out,
                                          int64_t n) {
  float c[M];
  for (int i = 0; i < M; ++i) c[i] = static_cast<float>(coef[i]);
  Unwatched none;
  if (s.div == 1.0f) return shared_steps<T, M, kDelta, kNone, kFar>(in.x, c, s, 0, n, out, none);
  constexpr bool kTells = kTellsNear && !kDelta && sizeof(T) == 2 && infinity(static_cast<const T*>(nullptr)) == 0x7f80;
  const float size = __builtin_fabsf(s.div);
  if constexpr (kTells) {
    if (size > 0x1p-60f && size < 0x1p60f) {
      const Scale<float> inverse = {s.lambda, 1.0f / s.div};
      for (int64_t j = 0; j < n; j += kSome) {
        Near near;
        clear(near);
        shared_steps<T, M, kDelta, kProduct, kFar>(in.x, c, inverse, j, j + kSome, out, near);
        if (__builtin_expect(any(near), 0))
          shared_steps<T, M, kDelta, kExact, kFar>(in.x, c, s, j, j + kSome, out, none);
      }
      return;
    }
  }
  shared_steps<T, M, kDelta, kExact, kFar>(in.x, c, s, 0, n, out, none);
}

}  // namespace
}  // namespace FM_ISA
}  // namespace fastmerge
