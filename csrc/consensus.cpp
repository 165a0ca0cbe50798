// consensus: out = b + factor * mix, where mix joins what is kept of the deltas, with or without an elected sign. Where
// a sign is elected, mix is twice the sum of its values, and factor (lambda / 2) / G with G the sum of their gates.
//
// A block goes through passes in the first-level cache: base, then for each model delta, drop and trim, then one loop
// over the models per vector of elements whose sums stay in registers, and the store. Up to kGroup models at a time;
// with more, the sums wait in memory for the next group.
#include <algorithm>
#include <cmath>
#include <limits>

#include "coded.h"
#include "fused.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

constexpr int kGroup = 8;

// What elects the sign; a loop is compiled for each vote and merge.
enum Vote { kNoVote, kByMass, kBySplit, kByCount };
constexpr int kVoteOnly = 3;  // in place of a Merge: the result is the vote itself

template <class W>
struct Models {
  int n;
  const W* d[kGroup];
  typename Pack<W>::I t[kGroup];  // kept are keys above
  typename Pack<W>::V c[kGroup], g[kGroup], a[kGroup];
};

template <class W>
struct Rule {
  W factor, div;              // factor: lambda, or its half where mix is twice a sum
  bool zero_plus, zero_base;  // a vote of 0 counts as plus; it gives the base
  bool huge;                  // factor / G may be infinite
};

// Running sums of a block between groups of models.
template <class W>
struct Sums {
  alignas(64) W a[kBlock], b[kBlock], plus[kBlock], minus[kBlock], vote[kBlock];
};

// Adds a group of models to the sums of n elements. After the last one `out` gets what is mixed: A without an
// election, the elected numerator or extreme, or the vote itself; the elected denominator goes to sums.plus, and with
// the rule `base` the vote to sums.vote. Division and lambda are a loop of their own: their latency would stall this
// one. Works on whole vectors: the buffers have room, and what is past n is never looked at.
template <class W, int kVote, int kMerge>
void mix_block(const Models<W>& m, const Rule<W>& rule, int64_t n, bool first, bool last, Sums<W>& sums, W* out) {
  using V = typename Pack<W>::V;
  using I = typename Pack<W>::I;
  constexpr int kUnroll = 2;
  constexpr int64_t kStep = kWidth<W>;
  constexpr bool kPairs = kMerge == kMergeMean || kMerge == kMergeMax;
  constexpr bool kS = kVote == kBySplit || kVote == kByCount;
  const V nothing = reinterpret_cast<V>(I{} + ~Pack<W>::kMost);  // -0 leaves the first term as it is, also a -0
  const V zero{}, one = V{} + W(1);
  for (int64_t j = 0; j < n; j += kUnroll * kStep) {
    V a[kUnroll], b[kUnroll], plus[kUnroll], minus[kUnroll], s[kUnroll];
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = j + u * kStep;
      a[u] = first ? nothing : get(sums.a + at);
      b[u] = first ? zero : get(sums.b + at);
      plus[u] = first ? zero : get(sums.plus + at);
      minus[u] = first ? zero : get(sums.minus + at);
      s[u] = first ? nothing : get(sums.vote + at);
    }
    for (int i = 0; i < m.n; ++i) {
      const W* d = m.d[i] + j;
      for (int u = 0; u < kUnroll; ++u) {
        const V raw = get(d + u * kStep);
        const V x = masked((reinterpret_cast<I>(raw) & Pack<W>::kMost) > m.t[i], raw);
        const V v = m.c[i] * x;
        a[u] = a[u] + v;
        b[u] = b[u] + masked(I{} + Pack<W>::kMost, v);
        if (kMerge == kMergeMean) {
          plus[u] = plus[u] + masked(v > zero, m.g[i]);
          minus[u] = minus[u] + masked(v < zero, m.g[i]);
        }
        if (kMerge == kMergeMax) {
          plus[u] = select(v > plus[u], v, plus[u]);
          minus[u] = select(v < minus[u], v, minus[u]);
        }
        if (kVote == kBySplit) s[u] = s[u] + m.a[i] * x;
        if (kVote == kByCount) s[u] = s[u] + (masked(x > zero, one) - masked(x < zero, one));
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = j + u * kStep;
      if (!last) {
        put(sums.a + at, a[u]);
        put(sums.b + at, b[u]);
        if (kPairs) put(sums.plus + at, plus[u]), put(sums.minus + at, minus[u]);
        if (kS) put(sums.vote + at, s[u]);
        continue;
      }
      const V vote = kVote == kByMass ? a[u] : s[u];
      if (kMerge == kVoteOnly || kVote == kNoVote) {
        put(out + at, kVote == kNoVote ? a[u] : vote);
        continue;
      }
      const I up = rule.zero_plus ? vote >= zero : vote > zero;
      if (rule.zero_base) put(sums.vote + at, vote);
      if (kMerge == kMergeMax) {
        put(out + at, select(a[u] == a[u], select(up, plus[u], minus[u]), a[u]));
        continue;
      }
      // A + B, or A - B where minus is elected: B with its sign flipped.
      const V b_signed = reinterpret_cast<V>(reinterpret_cast<I>(b[u]) ^ (~up & ~Pack<W>::kMost));
      put(out + at, a[u] + b_signed);
      if (kMerge == kMergeMean) {
        const V den = select(up, plus[u], minus[u]);
        put(sums.plus + at, select(den == zero, one, den));
      }
    }
  }
}

// out = b + factor * mix, from what mix_block left; an infinite quotient is the largest number.
template <class W>
void apply_block(const Rule<W>& rule, bool mean, int64_t n, const Sums<W>& sums, const W* base, W* out) {
  constexpr W kMost = std::numeric_limits<W>::max();
  if (mean && rule.huge) FM_LOOP for (int64_t j = 0; j < n; ++j) {
      W h = rule.factor / sums.plus[j];
      h = h > kMost ? kMost : h;
      h = h < -kMost ? -kMost : h;
      out[j] = base[j] + out[j] * h;
    }
  else if (mean)
    FM_LOOP for (int64_t j = 0; j < n; ++j) out[j] = base[j] + out[j] * (rule.factor / sums.plus[j]);
  else if (rule.div != W(1))
    FM_LOOP for (int64_t j = 0; j < n; ++j) out[j] = base[j] + rule.factor * (out[j] / rule.div);
  else
    FM_LOOP for (int64_t j = 0; j < n; ++j) out[j] = base[j] + rule.factor * out[j];
  if (rule.zero_base) FM_LOOP for (int64_t j = 0; j < n; ++j) out[j] = sums.vote[j] == W(0) ? base[j] : out[j];
}

// Whether factor / G may overflow. A sum of gates that is not 0 is at least the last place of the smallest of them.
template <class W>
bool overflows(const double* f, int64_t models, W factor) {
  using Limits = std::numeric_limits<W>;
  for (int64_t i = 0; i < models; ++i) {
    const W g = std::abs(static_cast<W>(f[3 * i + 1]));
    if (g != W(0) && !(std::abs(factor) <= g * (Limits::epsilon() / 2 * Limits::max()))) return true;
  }
  return false;
}

template <class W>
using Mix = void (*)(const Models<W>&, const Rule<W>&, int64_t, bool, bool, Sums<W>&, W*);

template <class W, int kVote>
Mix<W> mix_for(int32_t merge) {
  switch (merge) {
    case kMergeMean:
      return mix_block<W, kVote, kMergeMean>;
    case kMergeSum:
      return mix_block<W, kVote, kMergeSum>;
    case kMergeMax:
      return mix_block<W, kVote, kMergeMax>;
    default:
      return mix_block<W, kVote, kVoteOnly>;
  }
}

template <class W>
Mix<W> mix_for(int32_t elect, bool split, int32_t merge) {
  if (elect == kElectNone) return mix_block<W, kNoVote, kMergeSum>;
  if (elect == kElectCount) return mix_for<W, kByCount>(merge);
  return split ? mix_for<W, kBySplit>(merge) : mix_for<W, kByMass>(merge);
}

// Keys above t, in the type of the sums.
template <class W, class X>
FM_STEP void widen_kept(const W* d, Int<W> t, int64_t n, X* to) {
  FM_LOOP for (int64_t j = 0; j < n; ++j) to[j] = rank_key(d[j]) > t ? static_cast<X>(d[j]) : X(0);
}

// The buffers of one call, and the way of a block through them: task vectors in W, what is made of them in X.
template <class W, class X>
struct Work {
  static constexpr bool kSame = sizeof(W) == sizeof(X);
  using V = typename Pack<X>::V;
  using I = typename Pack<X>::I;
  const Table& table;
  const KeepArgs& keep;
  const double* f;
  Mix<X> mix;
  int64_t models;
  int64_t* rank;                                                      // running rank of ties, one per model
  int64_t block = 0;                                                  // number of the table's next one
  alignas(64) W narrow[kSame ? 1 : kBlock], one[kSame ? 1 : kBlock];  // base and task vector before they are widened
  alignas(64) X base[kBlock];
  alignas(64) X out[kBlock];
  alignas(64) X d[kGroup][kBlock + 64 / sizeof(X)];  // padded: 4 KiB apart, streams would share cache sets
  Sums<X> sums;
  alignas(64) uint32_t drawn[kMostFused][kWords];

  Work(const Table& t, const KeepArgs& k, const double* factors, Mix<X> m, int64_t* ranks)
      : table(t), keep(k), f(factors), mix(m), models(t.inputs - 1), rank(ranks) {}

  void start() {  // of a segment: ties are ranked in one tile at most
    for (int64_t i = 0; i < models; ++i) rank[i] = 0;
  }

  // Drop and trim of model i's delta; the result as keep_block's.
  Int<W> kept_above(const Segment& s, int32_t i, int64_t at, int64_t n, W* d) {
    if (!keep.variance) return keep_block(keep, s, models, i, at, n, left_bits(keep, models, i, block), rank[i], d);
    drop_block(drawn[0], n, d);
    return -1;
  }

  // What is mixed of elements [at, at + n) of a segment, in `out`.
  void mixed(const Segment& s, const Rule<X>& rule, int64_t at, int64_t n) {
    W* from = subtracted();
    base_block(table, s, at, n, from);
    if (!kSame) FM_LOOP for (int64_t j = 0; j < n; ++j) base[j] = from[j];
    if (keep.variance) variance_bits<W>(keep, table, s, at, n, rank[0], drawn[0]);
    int64_t i = 0;
    do {
      Models<X> m;
      const bool first = i == 0;
      for (m.n = 0; m.n < kGroup && i < models; ++m.n, ++i) {
        W* to = reinterpret_cast<W*>(kSame ? static_cast<void*>(d[m.n]) : one);
        const double* factor = f + 3 * (s.group * models + i);
        delta_block(table, s, static_cast<int32_t>(i), at, n, keep.round_code, from, to);
        // No NaN is kept where the bound is the NaN's key; then not one of any payload.
        const Int<W> t = kept_above(s, static_cast<int32_t>(i), at, n, to);
        m.t[m.n] = I{} + (kSame ? (t >= Pack<W>::kNan ? Pack<X>::kMost : Int<X>(t)) : Int<X>(-1));
        if (!kSame) widen_kept(to, t, n, d[m.n]);
        m.d[m.n] = d[m.n];
        m.c[m.n] = V{} + static_cast<X>(factor[0]);
        m.g[m.n] = V{} + static_cast<X>(factor[1]);
        m.a[m.n] = V{} + static_cast<X>(factor[2]);
      }
      mix(m, rule, n, first, i == models, sums, out);
    } while (i < models);
  }

  // Where the base is that task vectors are formed with.
  W* subtracted() { return reinterpret_cast<W*>(kSame ? static_cast<void*>(base) : narrow); }

  // What the fused loop takes of a block; false where it depends on single elements what is kept: ties that are
  // thinned, or cut here.
  bool fused(const Segment& s, int64_t at, int64_t n, FusedMerge<X>& m) {
    int64_t ranks[kMostFused];
    for (int32_t i = 0; i < models; ++i) {
      const int64_t p = s.group * models + i;
      auto& own = m.model[i];
      own.c = static_cast<X>(f[3 * p]), own.g = static_cast<X>(f[3 * p + 1]);
      own.bound = -1, ranks[i] = rank[i];
      if (keep.drop) {
        own.bits = left_bits(keep, models, i, block);
        if (own.bits) continue;
        drop_bits(keep.bern[p], s, keep.model_index[i], at, n, drawn[i]);
        own.bits = drawn[i];
      } else if (keep.trim && !trim_bound<float>(keep, p, s.e0 + at, rank[i], own.bound)) {
        if (keep.cut[3 * p + 2] >= 0) return false;
        W* from = subtracted();
        W* to = reinterpret_cast<W*>(d[0]);
        base_block(table, s, at, n, from);
        delta_block(table, s, i, at, n, -1, from, to);
        ranks[i] += ties_in(to, n, key_bound<W>(keep.thr[p]));
        if (ranks[i] > keep.cut[3 * p + 1]) return false;
        --own.bound;
      }
      if (own.bound >= Pack<float>::kNan) own.bound = Pack<float>::kMost;
    }
    std::copy_n(ranks, models, rank);
    return true;
  }
};

// The fused loop of a call; none where there is none.
template <class X>
MergeBlock<X> fused_for(const ConsensusArgs& a, const Table& t, int32_t out_code) {
#if FM_FUSED
  const bool added = a.elect == kElectNone, mean = a.merge == kMergeMean;
  const bool by_mass = a.elect == kElectMass && !a.split && a.merge != kMergeMax && a.zero != kZeroBase;
  const bool plain = a.keep.round_code == -1 && !(a.keep.drop && a.keep.trim) && !a.keep.variance;
  const int32_t code = plain && (added || by_mass) ? one_type(t, out_code) : -1;
  const int64_t models = a.table.inputs - 1;
  const Joined mix = added ? kAdded : mean ? kMean : kSum;
  if constexpr (sizeof(X) == 4) {
    if (code == kBF16) return merge_for<Bf16, X>(models, mix, a.keep.drop);
    if (code == kF16) return merge_for<Fp16, X>(models, mix, a.keep.drop);
  }
  if (code == kF32) return merge_for<float, X>(models, mix, a.keep.drop);
#endif
  return nullptr;
}

template <class W, class X>
void consensus_all(const ConsensusArgs& a) {
  auto* rank = static_cast<int64_t*>(__builtin_alloca(static_cast<size_t>(a.table.inputs) * sizeof(int64_t)));
  Stage stage(a.table, a.out_code);
  Work<W, X> work(stage.table(), a.keep, a.f, mix_for<X>(a.elect, a.split, a.merge), rank);
  const MergeBlock<X> fused = fused_for<X>(a, stage.table(), stage.out_code());
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    if (s.length == 0) continue;
    const double* scale = a.scale + 3 * s.group;
    const bool plus = a.zero == kZeroPlus || (a.zero == kZeroMajority && scale[2] > 0);
    const bool elects = a.elect != kElectNone, mean = elects && a.merge == kMergeMean;
    const X lambda = static_cast<X>(scale[0]), factor = elects && a.merge != kMergeMax ? lambda * X(0.5) : lambda;
    const int64_t models = a.table.inputs - 1;
    const Rule<X> rule{factor, elects ? X(1) : static_cast<X>(scale[1]), plus, elects && a.zero == kZeroBase,
                       mean && overflows(a.f + 3 * s.group * models, models, factor)};
    FusedMerge<X> merge{factor, rule.div, plus, {}};
    int64_t bad = 0;
    work.start();
    for (int64_t at = 0, n; at < s.length; at += n, ++work.block) {
      n = block_length(s.e0 + at, s.length - at);
      const Segment& block = stage.block(s, at, n);
      if (fused && !rule.huge && work.fused(block, at, n, merge)) {
        bad += stage.stored(s, at, n, fused(block, at, merge, n));
        continue;
      }
      work.mixed(block, rule, at, n);
      apply_block(rule, mean, n, work.sums, work.base, work.out);
      bad += store_any(a.out_code, s.out, at, n, work.out);
    }
    a.nonfinite[r] += bad;
  }
}

template <class W, class X>
void votes_all(const VotesArgs& a) {
  auto* rank = static_cast<int64_t*>(__builtin_alloca(static_cast<size_t>(a.table.inputs) * sizeof(int64_t)));
  Stage stage(a.table);
  Work<W, X> work(stage.table(), a.keep, a.f,
                  mix_for<X>(a.elect == kElectCount ? kElectCount : kElectMass, a.split, kVoteOnly), rank);
  const Rule<X> rule{};
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    int64_t* counts = a.counts + 2 * s.stats;
    work.start();
    for (int64_t at = 0, end; at < s.length; at = end, counts += 2) {
      end = at + tile_length(s.e0 + at, s.length - at);
      counts[0] = counts[1] = 0;
      for (int64_t n; at < end; at += n) {
        n = block_length(s.e0 + at, end - at);
        work.mixed(stage.block(s, at, n), rule, at, n);
        int32_t up = 0, down = 0;
        for (int64_t j = 0; j < n; ++j) up += work.out[j] > X(0), down += work.out[j] < X(0);
        counts[0] += up;
        counts[1] += down;
      }
    }
  }
}

}  // namespace

void consensus(const ConsensusArgs& a) {
  if (a.table.wide()) return consensus_all<double, double>(a);
  a.keep.wide_sums ? consensus_all<float, double>(a) : consensus_all<float, float>(a);
}

void votes(const VotesArgs& a) {
  if (a.table.wide()) return votes_all<double, double>(a);
  a.keep.wide_sums ? votes_all<float, double>(a) : votes_all<float, float>(a);
}

}  // namespace FM_ISA
}  // namespace fastmerge
