// Passes over tensors of one storage type, sixteen elements at a time: what lies in memory is widened, taken apart and
// summed in registers, where other types go block by block through the first-level cache (keep.h). For three bf16
// models that halves the instructions of a merge. For kernel sources only.
#pragma once

#include "keep.h"

#if defined(__SSE2__) || defined(__ARM_NEON)  // a register of lanes.h is a vector of keep.h
#define FM_FUSED 1
#else
#define FM_FUSED 0
#endif
#if defined(__AVX2__)  // a lane of a register by its number
#define FM_SETS 1
#else
#define FM_SETS 0
#endif

namespace fastmerge {
namespace {

using Floats = Pack<float>::V;
using Keys = Pack<float>::I;

// The type of a base, its models and whatever else is named, where they have one; -1 where not.
inline int32_t one_type(const Table& t, int32_t code) {
  for (int32_t i = 0; i < t.inputs; ++i)
    if (t.codes[i] != code) return -1;
  return FM_FUSED && code != kF64 ? code : -1;
}

// How the values of the models become one: all of them added, or those of the elected sign, or the mean of those.
enum Joined { kAdded, kSum, kMean };

constexpr int kMostFused = 4;  // models; with more, sums would not stay in registers

// What a merge does to a block, and to each of its models; X is the type of the sums.
template <class X>
struct FusedMerge {
  X factor, div;  // factor: lambda, or its half where a sign is elected
  bool zero_plus;
  struct {
    X c, g;
    int32_t bound;         // kept are keys above, where there are no bits
    const uint32_t* bits;  // of the block
  } model[kMostFused];
};

template <class X>
using MergeBlock = int64_t (*)(const Segment&, int64_t, const FusedMerge<X>&, int64_t);

#if FM_FUSED

struct Sixteen {
  Floats v[kParts];
};

template <class T>
FM_LANES Sixteen sixteen(const T* p) {
  Lanes a;
  load16(p, a);
  Sixteen r;
  for (int i = 0; i < kParts; ++i) r.v[i] = reinterpret_cast<Floats>(a.v[i]);
  return r;
}

// Widens whole steps of n elements, in the order of their storage type.
template <class T>
inline void widen_stored(const T* p, int64_t n, float* to) {
  for (int64_t j = 0; j + kStep <= n; j += kStep) {
    Lanes a;
    load16(p + j, a);
    put16(a, to + j);
  }
}

// What is left to do where 16 values at a time were stored: NaNs, whose bits are those of an input's until then, and
// the count of what is not finite.
template <class T>
inline int64_t finish_stored(const Peak& peak, int64_t n, T* out) {
  if (all_finite(peak, out)) return 0;
  for (int64_t j = 0; j < n; ++j) out[j] = store<T>(load<float>(out[j]));
  return nonfinite_block(out, n);
}

template <class T>
FM_LANES Sixteen difference(const T* x, const T* base) {
  Sixteen a = sixteen(x), b = sixteen(base);
  for (int i = 0; i < kParts; ++i) a.v[i] = a.v[i] - b.v[i];
  return a;
}

// n bits from bit j of an array on, n a multiple of 16 and j one of n.
FM_LANES uint32_t bits_at(const uint32_t* bits, int64_t j) {
  uint16_t some;
  memcpy(&some, reinterpret_cast<const char*>(bits) + j / 8, sizeof some);
  return some;
}

// The last n < kStep elements, zeros behind them.
template <class T>
struct Padded {
  T v[kStep] = {};
  Padded(const T* p, int64_t n) { memcpy(v, p, static_cast<size_t>(n) * sizeof(T)); }
};

// Adds the magnitudes of n differences to `whole`, and those that have a bit to `kept`; both in the order of the
// storage type.
template <class T>
void add_magnitudes(const T* x, const T* base, const uint32_t* bits, int64_t n, float* whole, float* kept) {
  for (int64_t j = 0; j + kStep <= n; j += kStep) {
    const Sixteen d = difference(x + j, base + j);
    const Bits<float, AsStored<T>> mask(bits_at(bits, j));
    for (int i = 0; i < kParts; ++i) {
      float *w = whole + j + i * kPart, *k = kept + j + i * kPart;
      const Floats size = masked(Keys{} + Pack<float>::kMost, d.v[i]);
      put(w, get(w) + size);
      put(k, get(k) + mask.keep(i, size));
    }
  }
  if (const int64_t left = n % kStep) {
    const int64_t j = n - left;
    const uint32_t some = bits_at(bits, j);
    add_magnitudes(Padded<T>(x + j, left).v, Padded<T>(base + j, left).v, &some, kStep, whole + j, kept + j);
  }
}

// Sums from the order of a storage type to the logical one.
template <class T>
void in_order(float* lanes) {
  for (int64_t j = 0; j < kLanes; j += kStep) {
    Lanes a;
    load16(lanes + j, a);
    logical(static_cast<const T*>(nullptr), a);
    put16(a, lanes + j);
  }
}

using Doubles = Pack<double>::V;

// The lower or upper half of a register in fp64, and the register of two such halves.
FM_LANES Doubles widened(Floats v, bool upper) {
#if defined(__AVX2__)
  return reinterpret_cast<Doubles>(_mm256_cvtps_pd(upper ? _mm256_extractf128_ps(reinterpret_cast<__m256>(v), 1)
                                                         : _mm256_castps256_ps128(reinterpret_cast<__m256>(v))));
#elif defined(__SSE2__)
  const auto x = reinterpret_cast<__m128>(v);
  return reinterpret_cast<Doubles>(_mm_cvtps_pd(upper ? _mm_movehl_ps(x, x) : x));
#else
  const auto x = reinterpret_cast<float32x4_t>(v);
  return reinterpret_cast<Doubles>(upper ? vcvt_high_f64_f32(x) : vcvt_f64_f32(vget_low_f32(x)));
#endif
}
FM_LANES Floats narrowed(Doubles low, Doubles high) {
#if defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_set_m128(_mm256_cvtpd_ps(reinterpret_cast<__m256d>(high)),
                                                  _mm256_cvtpd_ps(reinterpret_cast<__m256d>(low))));
#elif defined(__SSE2__)
  return reinterpret_cast<Floats>(
      _mm_movelh_ps(_mm_cvtpd_ps(reinterpret_cast<__m128d>(low)), _mm_cvtpd_ps(reinterpret_cast<__m128d>(high))));
#else
  return reinterpret_cast<Floats>(
      vcvt_high_f32_f64(vcvt_f32_f64(reinterpret_cast<float64x2_t>(low)), reinterpret_cast<float64x2_t>(high)));
#endif
}

// base + factor * mix of a register of elements whose kept task vectors are given, with sums in X. See mix_block and
// apply_block (consensus.cpp), whose results these are.
template <class X, int N, Joined kMix>
struct Mixer {
  using V = typename Pack<X>::V;
  using I = typename Pack<X>::I;
  V c[N], g[N], factor, div;
  bool zero_plus, divides;

  // Three models have eight sets that may agree with a sign: factor / sum g of each is a lane of one register. A
  // division per element kept TIES at 0.9 of this speed.
  static constexpr bool kSets = FM_SETS && kMix == kMean && sizeof(X) == 4 && N <= 3;
  X quotients[8] = {};

  explicit Mixer(const FusedMerge<X>& m) : zero_plus(m.zero_plus), divides(m.div != X(1)) {
    for (int i = 0; i < N; ++i) c[i] = V{} + m.model[i].c, g[i] = V{} + m.model[i].g;
    factor = V{} + m.factor, div = V{} + m.div;
    for (int set = 0; kSets && set < 1 << N; ++set) {
      X sum = 0;
      for (int i = 0; i < N; ++i) sum = sum + (set >> i & 1 ? m.model[i].g : X(0));
      quotients[set] = m.factor / (sum == X(0) ? X(1) : sum);
    }
  }

  FM_MEMBER Floats merged(Floats base, const Floats* kept) const {
    if constexpr (sizeof(X) == 4) {
      return mixed(base, kept);
    } else {
      Doubles half[2], d[N];
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < N; ++i) d[i] = widened(kept[i], h == 1);
        half[h] = mixed(widened(base, h == 1), d);
      }
      return narrowed(half[0], half[1]);
    }
  }

 private:
  FM_MEMBER V mixed(V base, const V* d) const {
    const V zero{}, one = zero + X(1);
    const I sign = I{} + ~Pack<X>::kMost;
    V v[N];
    for (int i = 0; i < N; ++i) v[i] = c[i] * d[i];
    V a = v[0];
    for (int i = 1; i < N; ++i) a = a + v[i];
    if (kMix == kAdded) {
      if (divides) a = a / div;
      a = factor * a;
    } else {
      V b = masked(~sign, v[0]), sum = zero;
      for (int i = 1; i < N; ++i) b = b + masked(~sign, v[i]);
      const I minus = (zero_plus ? a < zero : a <= zero) & sign;
      I set{};
      for (int i = 0; i < (kMix == kMean ? N : 0); ++i) {
        const I agrees = reinterpret_cast<V>(reinterpret_cast<I>(v[i]) ^ minus) > zero;
        if (kSets)
          set = set | (agrees & (I{} + (1 << i)));
        else
          sum = sum + masked(agrees, g[i]);
      }
      a = a + reinterpret_cast<V>(reinterpret_cast<I>(b) ^ minus);
      if (kSets)
        a = a * quotient(set);
      else
        a = kMix == kMean ? a * (factor / select(sum == zero, one, sum)) : factor * a;
    }
    return base + a;
  }

  // Of a set per lane.
  FM_MEMBER V quotient(I set) const {
#if FM_SETS
    if constexpr (kSets)
      return reinterpret_cast<V>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(quotients), reinterpret_cast<__m256i>(set)));
#endif
    return reinterpret_cast<V>(set);
  }
};

// The results of elements [from, to), whole steps; returns how many are not finite.
template <class T, class X, int N, Joined kMix, bool kDrop>
__attribute__((noinline)) int64_t merge_steps(const T* const* in, const FusedMerge<X>& m, int64_t from, int64_t to,
                                              T* out) {
  const T* x[N + 1];
  Keys bound[N];
  const uint32_t* bits[N];
  for (int i = 0; i <= N; ++i) x[i] = in[i];
  for (int i = 0; i < N; ++i) bound[i] = Keys{} + m.model[i].bound, bits[i] = m.model[i].bits;
  const Mixer<X, N, kMix> mixer(m);
  Peak peak;
  clear(peak);
  for (int64_t j = from; j < to; j += kStep) {
    const Sixteen base = sixteen(x[0] + j);
    Sixteen kept[N];
    for (int i = 0; i < N; ++i) {
      kept[i] = sixteen(x[i + 1] + j);
      const Bits<float, AsStored<T>> mask(kDrop ? bits_at(bits[i], j) : 0);
      for (int p = 0; p < kParts; ++p) {
        const Floats d = kept[i].v[p] - base.v[p];
        kept[i].v[p] = kDrop ? mask.keep(p, d) : masked((reinterpret_cast<Keys>(d) & Pack<float>::kMost) > bound[i], d);
      }
    }
    Lanes r;
    for (int p = 0; p < kParts; ++p) {
      Floats d[N];
      for (int i = 0; i < N; ++i) d[i] = kept[i].v[p];
      r.v[p] = reinterpret_cast<Vec>(mixer.merged(base.v[p], d));
    }
    store16(r, out + j, peak);
  }
  return finish_stored(peak, to - from, out + from);
}

template <class T, class X, int N, Joined kMix, bool kDrop>
int64_t merge_block(const Segment& s, int64_t at, const FusedMerge<X>& m, int64_t n) {
  const T* in[N + 1];
  for (int i = 0; i <= N; ++i) in[i] = reinterpret_cast<const T*>(s.in[i]) + at;
  T* out = reinterpret_cast<T*>(s.out) + at;
  const int64_t left = n % kStep, whole = n - left;
  int64_t bad = whole ? merge_steps<T, X, N, kMix, kDrop>(in, m, 0, whole, out) : 0;
  if (left) {
    T stage[N + 1][kStep] = {}, result[kStep];
    for (int i = 0; i <= N; ++i) {
      memcpy(stage[i], in[i] + whole, static_cast<size_t>(left) * sizeof(T));
      in[i] = stage[i] - whole;
    }
    merge_steps<T, X, N, kMix, kDrop>(in, m, whole, n, result - whole);
    memcpy(out + whole, result, static_cast<size_t>(left) * sizeof(T));
    bad += nonfinite_block(result, left);
  }
  return bad;
}

template <class T, class X, Joined kMix, bool kDrop>
MergeBlock<X> merge_for(int64_t models) {
  switch (models) {
    case 1:
      return merge_block<T, X, 1, kMix, kDrop>;
    case 2:
      return merge_block<T, X, 2, kMix, kDrop>;
    case 3:
      return merge_block<T, X, 3, kMix, kDrop>;
    case 4:
      return merge_block<T, X, 4, kMix, kDrop>;
    default:
      return nullptr;
  }
}

template <class T, class X, Joined kMix>
MergeBlock<X> merge_for(int64_t models, bool drop) {
  return drop ? merge_for<T, X, kMix, true>(models) : merge_for<T, X, kMix, false>(models);
}

template <class T, class X>
MergeBlock<X> merge_for(int64_t models, Joined mix, bool drop) {
  if (mix == kMean) return merge_for<T, X, kMean>(models, drop);
  return mix == kSum ? merge_for<T, X, kSum>(models, drop) : merge_for<T, X, kAdded>(models, drop);
}

#endif  // FM_FUSED

}  // namespace
}  // namespace fastmerge
