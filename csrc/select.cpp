// What exact selection needs: the keys of a sample, counts around a bracket of keys, and L1 norms of what is kept.
//
// count reads a block of the base once and each model once: four compares per key, sums in vectors. Keys strictly
// inside the bracket, about one in a hundred, are found by a mask over 32 keys and appended at the end of the block.
#include "keep.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

template <class W>
void keys_all(const DeltaKeysArgs& a) {
  const int64_t models = a.table.inputs - 1;
  auto* out = static_cast<Key<W>*>(a.out);
  alignas(64) W base[kBlock], d[kBlock];
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    for (int64_t at = 0, n; at < s.length; at += n, out += n * models) {
      n = block_length(s.e0 + at, s.length - at);
      base_block(a.table, s, at, n, base);
      for (int32_t i = 0; i < models; ++i) {
        delta_block(a.table, s, i, at, n, a.deltas.round_code, base, d);
        if (a.deltas.drop) drop_block(a.deltas.bern[s.group * models + i], s, a.deltas.model_index[i], at, n, d);
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

  void add(W d, int64_t e) {
    if (used < cap) {
      keys[used] = static_cast<Key<W>>(rank_key(d));
      where[2 * used] = group;
      where[2 * used + 1] = e;
    }
    ++used;
  }
};

template <class W>
struct Bracket {
  Int<W> lo, hi;
};

// One bit per lane of a mask.
#if defined(__AVX2__)
inline uint32_t lane_bits(Pack<float>::I m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
}
inline uint32_t lane_bits(Pack<double>::I m) {
  return static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(m)));
}
#else
template <class I>
inline uint32_t lane_bits(I m) {
  uint64_t half[2];
  static_assert(sizeof m == sizeof half, "vectors of 16 bytes");
  memcpy(half, &m, sizeof m);
  if (!(half[0] | half[1])) return 0;
  uint32_t bits = 0;
  for (uint32_t l = 0; l < sizeof m / sizeof m[0]; ++l) bits |= (m[l] ? 1u : 0u) << l;
  return bits;
}
#endif

// The lowest set bit; anything where there is none.
inline int64_t first_bit(uint32_t bits) {
#if defined(__BMI__)
  return static_cast<int64_t>(_tzcnt_u32(bits));
#else
  return bits ? __builtin_ctz(bits) : 0;
#endif
}

// Adds the four counts of a block to c and its candidates to found; e is the logical index of d[0].
template <class W>
void count_block(const W* d, int64_t n, int64_t e, Bracket<W> b, int64_t* c, Found<W>& found) {
  using I = typename Pack<W>::I;
  constexpr int64_t kStep = kWidth<W>, kGroup = 4;
  // Where the bracket is one key, no key is below it: a key equal to both counts once, as equal to hi.
  const Int<W> lo_equal = b.lo == b.hi ? Int<W>(-1) : b.lo;
  I above{}, at_hi{}, at_lo{};
  uint16_t inside[kBlock + 2];
  int64_t j = 0, found_here = 0;
  for (; j + kGroup * kStep <= n; j += kGroup * kStep) {
    uint32_t bits = 0;
    for (int64_t g = 0; g < kGroup; ++g) {
      const I k = keys_of<W>(get(d + j + g * kStep));
      above -= k > b.hi;
      at_hi -= k == b.hi;
      at_lo -= k == lo_equal;
      bits |= lane_bits((k > b.lo) & (k < b.hi)) << (g * kStep);
    }
    // Places of two candidates are written whether there are any or not: few groups have more, and a branch on
    // one candidate in a hundred keys would be mispredicted.
    uint16_t* place = inside + found_here;
    found_here += __builtin_popcount(bits);
    place[0] = static_cast<uint16_t>(j + first_bit(bits));
    bits &= bits - 1;
    place[1] = static_cast<uint16_t>(j + first_bit(bits));
    for (bits &= bits - 1, place += 2; __builtin_expect(bits != 0, 0); bits &= bits - 1)
      *place++ = static_cast<uint16_t>(j + first_bit(bits));
  }
  for (int64_t l = 0; l < kStep; ++l) c[0] += above[l], c[1] += at_hi[l], c[2] += at_lo[l];
  for (; j < n; ++j) {
    const Int<W> k = rank_key(d[j]);
    c[0] += k > b.hi;
    c[1] += k == b.hi;
    c[2] += k == lo_equal;
    if (k > b.lo && k < b.hi) inside[found_here++] = static_cast<uint16_t>(j);
  }
  for (int64_t l = 0; l < found_here; ++l) found.add(d[inside[l]], e + inside[l]);
  c[3] += found_here;
}

template <class W>
void count_all(const CountArgs& a) {
  const int64_t models = a.table.inputs - 1;
  alignas(64) W base[kBlock], d[kBlock];
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    int64_t* counts = a.counts + s.stats * models * 4;
    for (int64_t at = 0, end; at < s.length; at = end, counts += models * 4) {
      end = at + tile_length(s.e0 + at, s.length - at);
      for (int64_t c = 0; c < models * 4; ++c) counts[c] = 0;
      for (int64_t n; at < end; at += n) {
        n = block_length(s.e0 + at, end - at);
        base_block(a.table, s, at, n, base);
        for (int32_t i = 0; i < models; ++i) {
          const int64_t p = s.group * models + i;
          delta_block(a.table, s, i, at, n, a.deltas.round_code, base, d);
          if (a.deltas.drop) drop_block(a.deltas.bern[p], s, a.deltas.model_index[i], at, n, d);
          Found<W> found{static_cast<Key<W>*>(a.keys) + i * a.cap, a.where + 2 * i * a.cap, a.cap, a.used[i], s.group};
          count_block(d, n, s.e0 + at, Bracket<W>{key_bound<W>(a.lo[p]), key_bound<W>(a.hi[p])}, counts + 4 * i, found);
          a.used[i] = found.used;
        }
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

// One tile of one model: the base is read again for each, so that two sets of lanes are all that is live.
template <class W>
void l1_tile(const L1Args& a, const Segment& s, int32_t i, int64_t at, int64_t end, double* sums) {
  const int64_t models = a.table.inputs - 1;
  alignas(64) W whole[kLanes] = {}, kept[kLanes] = {}, base[kBlock], d[kBlock];
  int64_t rank = 0;
  for (int64_t n; at < end; at += n) {
    n = block_length(s.e0 + at, end - at);
    W* w = whole + ((s.e0 + at) & (kLanes - 1));
    W* k = kept + ((s.e0 + at) & (kLanes - 1));
    base_block(a.table, s, at, n, base);
    delta_block(a.table, s, i, at, n, a.keep.round_code, base, d);
    FM_LOOP for (int64_t j = 0; j < n; ++j) w[j] = w[j] + (d[j] < 0 ? -d[j] : d[j]);
    const Int<W> t = keep_block(a.keep, s, models, i, at, n, rank, d);
    FM_LOOP for (int64_t j = 0; j < n; ++j) k[j] = k[j] + (rank_key(d[j]) > t ? (d[j] < 0 ? -d[j] : d[j]) : W(0));
  }
  sums[0] = store<double>(fold_lanes(whole));  // one NaN: x86 makes negative ones, arm64 positive ones
  sums[1] = store<double>(fold_lanes(kept));
}

template <class W>
void l1_all(const L1Args& a) {
  const int64_t models = a.table.inputs - 1;
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    double* sums = a.sums + s.stats * models * 2;
    for (int64_t at = 0, end; at < s.length; at = end, sums += models * 2) {
      end = at + tile_length(s.e0 + at, s.length - at);
      for (int32_t i = 0; i < models; ++i) l1_tile<W>(a, s, i, at, end, sums + 2 * i);
    }
  }
}

}  // namespace

void delta_keys(const DeltaKeysArgs& a) { a.table.wide() ? keys_all<double>(a) : keys_all<float>(a); }

void count(const CountArgs& a) { a.table.wide() ? count_all<double>(a) : count_all<float>(a); }

void l1(const L1Args& a) { a.table.wide() ? l1_all<double>(a) : l1_all<float>(a); }

}  // namespace FM_ISA
}  // namespace fastmerge
