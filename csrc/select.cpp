// What exact selection needs: the keys of a sample, counts around a bracket of keys, and L1 norms of what is kept.
//
// count reads a block of the base once and each model once: four compares per key, sums in vectors; two where the
// bracket is one key, as those of bf16 checkpoints often are. Keys strictly inside the bracket, about one in a hundred,
// are found by a mask over 32 keys and appended at the end of the block.
#include "coded.h"
#include "fused.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

template <class W>
void keys_all(const DeltaKeysArgs& a) {
  const int64_t models = a.deltas.columns(a.table);
  auto* out = static_cast<Key<W>*>(a.out);
  Stage stage(a.table);
  alignas(64) W base[kBlock], d[kBlock];
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    for (int64_t at = 0, n; at < s.length; at += n, out += n * models) {
      n = block_length(s.e0 + at, s.length - at);
      const Segment& block = stage.block(s, at, n);
      base_block(stage.table(), block, at, n, base);
      for (int32_t i = 0; i < models; ++i) {
        if (a.deltas.variance)
          variance_block(stage.table(), block, at, n, d);
        else
          delta_block(stage.table(), block, i, at, n, a.deltas.round_code, base, d);
        if (a.deltas.drop) drop_delta(a.deltas, s, models, i, at, n, d);
        for (int64_t j = 0; j < n; ++j) out[j * models + i] = static_cast<Key<W>>(rank_key(d[j]));
      }
    }
  }
}

// Where the candidates of one model go.
template <class W>
struct Found {
  Key<W>* keys;
  int64_t* where;
  int64_t cap, used, group;

  // The deltas of n places, counted from logical index e.
  template <class Deltas>
  void add(const Deltas& deltas, const uint16_t* places, int64_t n, int64_t e) {
    const int64_t room = cap > used ? cap - used : 0;
    for (int64_t l = 0; l < (n < room ? n : room); ++l) {
      keys[used + l] = static_cast<Key<W>>(rank_key(deltas.one(places[l])));
      where[2 * (used + l)] = group;
      where[2 * (used + l) + 1] = e + places[l];
    }
    used += n;
  }
};

template <class W>
struct Bracket {
  Int<W> lo, hi;
};

// The lowest set bit; anything where there is none.
inline int64_t first_bit(uint32_t bits) {
#if defined(__BMI__)
  return static_cast<int64_t>(_tzcnt_u32(bits));
#else
  return bits ? __builtin_ctz(bits) : 0;
#endif
}

// Deltas of a block: vectors of four at a time, and single ones.
template <class W>
struct InBlock {
  using Type = W;
  const W* d;
  void four(int64_t j, typename Pack<W>::V* v) const {
    for (int g = 0; g < 4; ++g) v[g] = get(d + j + g * kWidth<W>);
  }
  W one(int64_t j) const { return d[j]; }
};

// What a block adds to the counts: keys above hi, from hi and from lo on, and strictly between. kOne: lo is hi. kNans:
// hi is not below the key of the NaNs, whose payloads then matter.
template <bool kOne, bool kNans, class W, class Deltas>
void count_block(const Deltas& deltas, int64_t n, Bracket<W> b, int64_t* c, uint16_t* inside) {
  using V = typename Pack<W>::V;
  using I = typename Pack<W>::I;
  constexpr int64_t kFour = 4 * kWidth<W>;
  I above{}, from_hi{}, from_lo{};
  int64_t j = 0, found = 0, sums[3] = {};
  for (; j + kFour <= n; j += kFour) {
    V d[4];
    I between[4];
    deltas.four(j, d);
    for (int g = 0; g < 4; ++g) {
      const I k = kNans ? keys_of<W>(d[g]) : reinterpret_cast<I>(d[g]) & Pack<W>::kMost;
      const I at_hi = kOne ? k == b.hi : k > b.hi - 1;
      above -= k > b.hi;
      from_hi -= at_hi;
      if (kOne) continue;
      from_lo -= k > b.lo - 1;
      between[g] = (k > b.lo) & ~at_hi;
    }
    if (kOne) continue;
    uint32_t bits = mask_bits(between, static_cast<const typename Deltas::Type*>(nullptr));
    // Places of two candidates are written whether there are any or not: few groups have more, and a branch on
    // one candidate in a hundred keys would be mispredicted.
    uint16_t* place = inside + found;
    found += __builtin_popcount(bits);
    place[0] = static_cast<uint16_t>(j + first_bit(bits));
    bits &= bits - 1;
    place[1] = static_cast<uint16_t>(j + first_bit(bits));
    for (bits &= bits - 1, place += 2; __builtin_expect(bits != 0, 0); bits &= bits - 1)
      *place++ = static_cast<uint16_t>(j + first_bit(bits));
  }
  for (int64_t l = 0; l < kWidth<W>; ++l) sums[0] += above[l], sums[1] += from_hi[l], sums[2] += from_lo[l];
  for (; j < n; ++j) {
    const Int<W> k = rank_key(deltas.one(j));
    sums[0] += k > b.hi;
    sums[1] += kOne ? k == b.hi : k >= b.hi;
    sums[2] += k >= b.lo;
    if (k > b.lo && k < b.hi) inside[found++] = static_cast<uint16_t>(j);
  }
  c[0] += sums[0];
  c[1] += kOne ? sums[1] : sums[1] - sums[0];
  if (!kOne) c[2] += sums[2] - sums[1] - found;
  c[3] += found;
}

// Adds the four counts of a block to c and its candidates to found; e is the logical index of its first element.
template <class W, class Deltas>
void count_block(const Deltas& deltas, int64_t n, int64_t e, Bracket<W> b, int64_t* c, Found<W>& found) {
  uint16_t inside[kBlock + 2];
  const int64_t before = c[3];
  if (b.hi >= Pack<W>::kNan)
    b.lo == b.hi ? count_block<true, true>(deltas, n, b, c, inside) : count_block<false, true>(deltas, n, b, c, inside);
  else
    b.lo == b.hi ? count_block<true, false>(deltas, n, b, c, inside)
                 : count_block<false, false>(deltas, n, b, c, inside);
  found.add(deltas, inside, c[3] - before, e);
}

template <class W, class Deltas>
void count_model(const CountArgs& a, const Segment& s, int32_t i, const Deltas& deltas, int64_t at, int64_t n,
                 int64_t* counts) {
  const int64_t p = s.group * a.deltas.columns(a.table) + i;
  Found<W> found{static_cast<Key<W>*>(a.keys) + i * a.cap, a.where + 2 * i * a.cap, a.cap, a.used[i], s.group};
  count_block(deltas, n, s.e0 + at, Bracket<W>{key_bound<W>(a.lo[p]), key_bound<W>(a.hi[p])}, counts + 4 * i, found);
  a.used[i] = found.used;
}

#if FM_FUSED
// Deltas of one storage type: formed where they are looked at, against a base that was widened once for all models.
template <class T>
struct InStorage {
  using Type = T;
  const T *x, *base;
  const float* wide;  // of the base, in the order of its storage type
  void four(int64_t j, Floats* v) const {
    for (int64_t g = 0; g < 4; g += kParts) {
      const int64_t at = j + g * kWidth<float>;
      const Sixteen a = sixteen(x + at);
      for (int p = 0; p < kParts; ++p) v[g + p] = a.v[p] - get(wide + at + p * kPart);
    }
  }
  float one(int64_t j) const { return load<float>(x[j]) - load<float>(base[j]); }
};

template <class T>
void count_fused(const CountArgs& a, const Segment& s, int64_t at, int64_t n, int64_t* counts) {
  const int64_t models = a.table.inputs - 1;
  const auto* base = reinterpret_cast<const T*>(s.in[0]) + at;
  alignas(64) float wide[kBlock];
  widen_stored(base, n, wide);
  for (int32_t i = 0; i < models; ++i) {
    const InStorage<T> deltas{reinterpret_cast<const T*>(s.in[1 + i]) + at, base, wide};
    count_model<float>(a, s, i, deltas, at, n, counts);
  }
}
#endif

template <class W>
void count_wide(const CountArgs& a, const Segment& s, int64_t at, int64_t n, int64_t* counts) {
  const int64_t models = a.table.inputs - 1;
  alignas(64) W base[kBlock], d[kBlock];
  base_block(a.table, s, at, n, base);
  for (int32_t i = 0; i < models; ++i) {
    delta_block(a.table, s, i, at, n, a.deltas.round_code, base, d);
    if (a.deltas.drop) drop_delta(a.deltas, s, models, i, at, n, d);
    count_model<W>(a, s, i, InBlock<W>{d}, at, n, counts);
  }
}

template <class W>
void count_variance(const CountArgs& a, const Segment& s, int64_t at, int64_t n, int64_t* counts) {
  alignas(64) W sum[kBlock];
  variance_block(a.table, s, at, n, sum);
  count_model<W>(a, s, 0, InBlock<W>{sum}, at, n, counts);
}

using CountBlock = void (*)(const CountArgs&, const Segment&, int64_t, int64_t, int64_t*);

template <class W>
CountBlock count_for(const CountArgs& a) {
  if (a.deltas.variance) return count_variance<W>;
#if FM_FUSED
  const int32_t code = a.deltas.drop || a.deltas.round_code != -1 ? -1 : one_type(a.table, a.table.codes[0]);
  if (code == kBF16) return count_fused<Bf16>;
  if (code == kF16) return count_fused<Fp16>;
  if (code == kF32) return count_fused<float>;
#endif
  return count_wide<W>;
}

template <class W>
void count_all(const CountArgs& given) {
  Stage stage(given.table);
  CountArgs a = given;
  a.table = stage.table();
  const int64_t models = a.deltas.columns(a.table);
  const CountBlock block = count_for<W>(a);
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    int64_t* counts = a.counts + s.stats * models * 4;
    for (int64_t at = 0, end; at < s.length; at = end, counts += models * 4) {
      end = at + tile_length(s.e0 + at, s.length - at);
      for (int64_t c = 0; c < models * 4; ++c) counts[c] = 0;
      for (int64_t n; at < end; at += n) {
        n = block_length(s.e0 + at, end - at);
        block(a, stage.block(s, at, n), at, n, counts);
      }
    }
  }
}

template <class W>
inline W fold_lanes(W* lane) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    FM_LOOP for (int64_t j = 0; j < half; ++j) lane[j] = lane[j] + lane[j + half];
  return lane[0];
}

// The sum of a tile's lanes, in fp64 where that is asked for.
template <class W>
double folded(W* lanes, bool wide) {
  if (sizeof(W) == 8 || !wide) return store<double>(fold_lanes(lanes));  // one NaN: x86 makes negative ones, arm64 not
  alignas(64) double more[kLanes];
  FM_LOOP for (int64_t j = 0; j < kLanes; ++j) more[j] = lanes[j];
  return store<double>(fold_lanes(more));
}

// One tile of one model: the base is read again for each, so that two sets of lanes are all that is live.
template <class W>
void l1_tile(const L1Args& a, Stage& stage, const Segment& given, int32_t i, int64_t at, int64_t end, int64_t block,
             double* sums) {
  const int64_t models = a.table.inputs - 1;
  alignas(64) W whole[kLanes] = {}, kept[kLanes] = {}, base[kBlock], d[kBlock];
  int64_t rank = 0;
  for (int64_t n; at < end; at += n) {
    n = block_length(given.e0 + at, end - at);
    const Segment& s = stage.block(given, at, n, i);
    W* w = whole + ((s.e0 + at) & (kLanes - 1));
    W* k = kept + ((s.e0 + at) & (kLanes - 1));
    base_block(a.table, s, at, n, base);
    delta_block(a.table, s, i, at, n, a.keep.round_code, base, d);
    FM_LOOP for (int64_t j = 0; j < n; ++j) w[j] = w[j] + (d[j] < 0 ? -d[j] : d[j]);
    uint32_t* bits = left_bits(a.keep, models, i, block++);
    if (bits && !a.keep.given) drop_bits(a.keep.bern[s.group * models + i], s, a.keep.model_index[i], at, n, bits);
    const Int<W> t = keep_block(a.keep, s, models, i, at, n, bits, rank, d);
    FM_LOOP for (int64_t j = 0; j < n; ++j) k[j] = k[j] + (rank_key(d[j]) > t ? (d[j] < 0 ? -d[j] : d[j]) : W(0));
  }
  sums[0] = folded(whole, a.keep.wide_sums);
  sums[1] = folded(kept, a.keep.wide_sums);
}

#if FM_FUSED
// The same for tensors of one storage type and no trim.
template <class T>
void l1_fused(const L1Args& a, Stage& stage, const Segment& given, int32_t i, int64_t at, int64_t end, int64_t block,
              double* sums) {
  const int64_t models = a.table.inputs - 1;
  const int32_t t = a.keep.drop ? a.keep.bern[given.group * models + i] : 65536;
  alignas(64) float whole[kLanes] = {}, kept[kLanes] = {};
  alignas(64) uint32_t drawn[kWords];
  for (int64_t n; at < end; at += n) {
    const int64_t lane = (given.e0 + at) & (kLanes - 1);
    n = block_length(given.e0 + at, end - at);
    const Segment& s = stage.block(given, at, n, i);
    const auto *base = reinterpret_cast<const T*>(s.in[0]), *x = reinterpret_cast<const T*>(s.in[1 + i]);
    uint32_t *left = left_bits(a.keep, models, i, block++), *bits = left ? left : drawn;
    if (!left || !a.keep.given) drop_bits(t, s, a.keep.model_index[i], at, n, bits);
    add_magnitudes(x + at, base + at, bits, n, whole + lane, kept + lane);
  }
  in_order<T>(whole), in_order<T>(kept);
  sums[0] = folded(whole, a.keep.wide_sums);
  sums[1] = folded(kept, a.keep.wide_sums);
}
#endif

using L1Tile = void (*)(const L1Args&, Stage&, const Segment&, int32_t, int64_t, int64_t, int64_t, double*);

template <class W>
L1Tile l1_for(const L1Args& a) {
#if FM_FUSED
  const int32_t code = a.keep.trim || a.keep.round_code != -1 ? -1 : one_type(a.table, a.table.codes[0]);
  if (code == kBF16) return l1_fused<Bf16>;
  if (code == kF16) return l1_fused<Fp16>;
  if (code == kF32) return l1_fused<float>;
#endif
  return l1_tile<W>;
}

template <class W>
void l1_all(const L1Args& given) {
  Stage stage(given.table);
  L1Args a = given;
  a.table = stage.table();
  const int64_t models = a.table.inputs - 1;
  const L1Tile tile = l1_for<W>(a);
  int64_t block = 0;
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    double* sums = a.sums + s.stats * models * 2;
    for (int64_t at = 0, end; at < s.length; at = end, sums += models * 2) {
      end = at + tile_length(s.e0 + at, s.length - at);
      for (int32_t i = 0; i < models; ++i) tile(a, stage, s, i, at, end, block, sums + 2 * i);
      block += blocks_of(end - at);
    }
  }
}

}  // namespace

void delta_keys(const DeltaKeysArgs& a) { a.table.wide() ? keys_all<double>(a) : keys_all<float>(a); }

void count(const CountArgs& a) { a.table.wide() ? count_all<double>(a) : count_all<float>(a); }

void l1(const L1Args& a) { a.table.wide() ? l1_all<double>(a) : l1_all<float>(a); }

}  // namespace FM_ISA
}  // namespace fastmerge
