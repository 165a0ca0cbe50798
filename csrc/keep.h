// The delta of a block and what is kept of it: round, Bernoulli drop, magnitude trim with its tie rule.
// Shared by select.cpp and consensus.cpp. A block is at most kBlock elements and lies within one tile.
#pragma once

#include "kernels.h"
#include "tile.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastmerge {
namespace {

// Vectors of the compiler's own: loops over models stay loops at run time, their sums stay in registers.
#if defined(__AVX2__)
#define FM_VECTOR __attribute__((vector_size(32)))
#else
#define FM_VECTOR __attribute__((vector_size(16)))
#endif

// Keys are compared as signed integers, which orders them: the sign bit is clear.
template <class W>
struct Pack;
template <>
struct Pack<float> {
  typedef float V FM_VECTOR;
  typedef int32_t I FM_VECTOR;
  using Int = int32_t;
  static constexpr Int kNan = 0x7fc00000, kMost = 0x7fffffff;
};
template <>
struct Pack<double> {
  typedef double V FM_VECTOR;
  typedef int64_t I FM_VECTOR;
  using Int = int64_t;
  static constexpr Int kNan = 0x7ff8000000000000, kMost = 0x7fffffffffffffff;
};
template <class W>
using Int = typename Pack<W>::Int;
template <class W>
constexpr int64_t kWidth = sizeof(typename Pack<W>::V) / sizeof(W);

template <class W>
inline typename Pack<W>::V get(const W* p) {
  typename Pack<W>::V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class W>
inline void put(W* p, typename Pack<W>::V v) {
  memcpy(p, &v, sizeof v);
}

// Where the mask m (all ones or all zeros per lane) is set, a, else b.
template <class V, class I>
inline V select(I m, V a, V b) {
#if defined(__AVX2__)
  return reinterpret_cast<V>(
      _mm256_blendv_epi8(reinterpret_cast<__m256i>(b), reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(m)));
#else
  return reinterpret_cast<V>((m & reinterpret_cast<I>(a)) | (~m & reinterpret_cast<I>(b)));
#endif
}
template <class V, class I>
inline V masked(I m, V v) {
  return reinterpret_cast<V>(m & reinterpret_cast<I>(v));
}

// Keys of a vector. Processors disagree on the payload of a NaN that arithmetic makes, never on its quiet bit, so
// the smaller of the key and the canonical NaN's is the same everywhere.
template <class W>
inline typename Pack<W>::I keys_of(typename Pack<W>::V d) {
  const typename Pack<W>::I k = reinterpret_cast<typename Pack<W>::I>(d) & Pack<W>::kMost;
  const typename Pack<W>::I nan = typename Pack<W>::I{} + Pack<W>::kNan;
#if defined(__AVX2__)
  if (sizeof(W) == 4)
    return reinterpret_cast<typename Pack<W>::I>(
        _mm256_min_epi32(reinterpret_cast<__m256i>(k), reinterpret_cast<__m256i>(nan)));
#endif
  return select(k < nan, k, nan);
}
template <class W>
inline Int<W> rank_key(W d) {
  const Int<W> k = static_cast<Int<W>>(key_of(d));
  return k < Pack<W>::kNan ? k : Pack<W>::kNan;
}

// A threshold of a table as a key; one above every key stays so.
template <class W>
inline Int<W> key_bound(uint64_t thr) {
  return thr < static_cast<uint64_t>(Pack<W>::kMost) ? static_cast<Int<W>>(thr) : Pack<W>::kMost;
}

// How many elements from e on belong to the same block: blocks start at multiples of kBlock in the whole tensor.
inline int64_t block_length(int64_t e, int64_t left) {
  const int64_t n = kBlock - (e & (kBlock - 1));
  return n < left ? n : left;
}
inline int64_t tile_length(int64_t e, int64_t left) {
  const int64_t n = kTile - (e & (kTile - 1));
  return n < left ? n : left;
}

// A pass over a block: called, not inlined, so that a kernel holds one copy of it.
#define FM_STEP __attribute__((noinline, unused))

template <class T, class W>
inline void subtract(const T* x, const W* base, int64_t n, W* d) {
  FM_LOOP for (int64_t j = 0; j < n; ++j) d[j] = load<W>(x[j]) - base[j];
}
#if defined(__F16C__)
inline void subtract(const Fp16* x, const float* base, int64_t n, float* d) {
  load_block(x, n, d);
  FM_LOOP for (int64_t j = 0; j < n; ++j) d[j] = d[j] - base[j];
}
#endif

template <class T, class W>
inline void round_block(int64_t n, W* d) {
  FM_LOOP for (int64_t j = 0; j < n; ++j) d[j] = load<W>(store<T>(d[j]));
}

template <class W>
FM_STEP void base_block(const Table& t, const Segment& s, int64_t at, int64_t n, W* base) {
  load_any(t.codes[0], s.in[0], at, n, base);
}

// d = x_i - b of elements [at, at + n) of the segment, rounded to a storage type where round_code names one.
template <class W>
FM_STEP void delta_block(const Table& t, const Segment& s, int32_t i, int64_t at, int64_t n, int32_t round_code,
                         const W* base, W* d) {
  const int64_t x = s.in[1 + i];
  switch (t.codes[1 + i]) {
    case kBF16:
      subtract(reinterpret_cast<const Bf16*>(x) + at, base, n, d);
      break;
    case kF16:
      subtract(reinterpret_cast<const Fp16*>(x) + at, base, n, d);
      break;
    case kF32:
      subtract(reinterpret_cast<const float*>(x) + at, base, n, d);
      break;
    default:  // an fp64 input makes the work type double
      if (sizeof(W) == 8) subtract(reinterpret_cast<const double*>(x) + at, base, n, d);
  }
  if (round_code == kBF16) round_block<Bf16>(n, d);
  if (round_code == kF16) round_block<Fp16>(n, d);
  if (round_code == kF32 && sizeof(W) == 8) round_block<float>(n, d);
}

// What a mask of bits leaves of a vector: `Places` says which bit belongs to a lane.
template <class W, class Places>
struct Bits {
  using V = typename Pack<W>::V;
  using I = typename Pack<W>::I;
  I bits;

  explicit Bits(uint32_t word) : bits(I{} + static_cast<Int<W>>(word)) {}
  V keep(int part, V v) const {
    I where;
#if defined(__AVX2__)
    if constexpr (sizeof(W) == 4) {  // a shift brings the bits to the top, where blendv looks
      for (int l = 0; l < kWidth<W>; ++l) where[l] = 31 - Places::of(part, l);
      const auto top = _mm256_sllv_epi32(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(where));
      return reinterpret_cast<V>(_mm256_blendv_ps(__m256{}, reinterpret_cast<__m256>(v), _mm256_castsi256_ps(top)));
    }
#endif
    for (int l = 0; l < kWidth<W>; ++l) where[l] = Int<W>(1) << Places::of(part, l);
    return masked((bits & where) == where, v);
  }
};
template <class W>
struct InOrder {
  static constexpr int of(int part, int lane) { return static_cast<int>(kWidth<W>) * part + lane; }
};
template <class T>
struct AsStored {
  static constexpr int of(int part, int lane) { return place_of(static_cast<const T*>(nullptr), part, lane); }
};

// Bernoulli drop: which elements have 16 random bits below t, bit j of word j / 32.
FM_STEP void drop_bits(int32_t t, const Segment& s, int32_t model, int64_t at, int64_t n, uint32_t* bits) {
  if (t <= 0 || t >= 65536) {
    memset(bits, t <= 0 ? 0 : 0xff, kWords * sizeof *bits);
    return;
  }
  const int64_t e = s.e0 + at;
  const auto key = static_cast<uint64_t>(s.key), block = static_cast<uint64_t>(e) >> 3;
  const auto below_t = static_cast<uint32_t>(t);
  if (e % 8 == 0 && same_high(block) >= kBlock / 8) {
    const Stream stream(key, static_cast<uint32_t>(model), kDrop, static_cast<uint32_t>(block >> 32));
    draw(stream, static_cast<uint32_t>(block), n, [&](int i, const Drawn& d) { bits[i] = below(d, below_t); });
    return;
  }
  alignas(64) uint16_t u[kBlock];
  random_block(key, static_cast<uint32_t>(model), kDrop, e, n, u);
  memset(bits, 0, kWords * sizeof *bits);
  for (int64_t j = 0; j < n; ++j) bits[j / 32] |= (u[j] < below_t ? 1u : 0u) << (j % 32);
}

template <class W>
FM_STEP void drop_block(const uint32_t* bits, int64_t n, W* d) {
  for (int64_t j = 0; j < n; j += 32) {
    const Bits<W, InOrder<W>> mask(bits[j / 32]);
    for (int p = 0; p < static_cast<int>(32 / kWidth<W>); ++p, d += kWidth<W>) put(d, mask.keep(p, get(d)));
  }
}

template <class W>
inline void drop_delta(const DeltaArgs& a, const Segment& s, int64_t models, int32_t i, int64_t at, int64_t n, W* d) {
  const int32_t t = a.bern[s.group * models + i];
  if (t >= 65536) return;
  alignas(64) uint32_t bits[kWords];
  drop_bits(t, s, a.model_index[i], at, n, bits);
  drop_block(bits, n, d);
}

// Where the bits of a block are that l1 left; null where it left none.
inline uint32_t* left_bits(const KeepArgs& k, int64_t models, int32_t i, int64_t block) {
  return k.bits ? k.bits + (block * models + i) * kWords : nullptr;
}

template <class W>
inline int64_t ties_in(const W* d, int64_t n, Int<W> thr) {
  typename Pack<W>::I some{};
  int64_t j = 0, ties = 0;
  for (; j + kWidth<W> <= n; j += kWidth<W>) some -= keys_of<W>(get(d + j)) == thr;
  for (int64_t l = 0; l < kWidth<W>; ++l) ties += some[l];
  for (; j < n; ++j) ties += rank_key(d[j]) == thr;
  return ties;
}

// The bound of a block's magnitude trim, where no element has to be looked at for it: kept are keys above.
template <class W>
inline bool trim_bound(const KeepArgs& k, int64_t p, int64_t e, int64_t rank, Int<W>& bound) {
  const Int<W> thr = key_bound<W>(k.thr[p]);
  const int64_t cut_tile = k.cut[3 * p], cut_rank = k.cut[3 * p + 1], tie_t = k.cut[3 * p + 2], tile = e / kTile;
  bound = (tie_t >= 0 ? tie_t >= 65536 : tile < cut_tile) ? thr - 1 : thr;
  return tie_t >= 0 ? tie_t == 0 || tie_t >= 65536 : tile != cut_tile || rank >= cut_rank;
}

// Magnitude trim of one model's block. Returns t: what is kept are the elements with key > t, which the caller's
// next pass applies; only where that does not say it all (ties thinned, or cut within this block) are elements
// zeroed here. `rank` runs over the ties of the cut tile, from 0.
template <class W>
FM_STEP Int<W> trim_block(const KeepArgs& k, const Segment& s, int64_t models, int32_t i, int64_t at, int64_t n,
                          int64_t& rank, W* d) {
  const int64_t p = s.group * models + i, e = s.e0 + at;
  Int<W> bound;
  if (trim_bound<W>(k, p, e, rank, bound)) return bound;
  const Int<W> thr = key_bound<W>(k.thr[p]);
  const int64_t cut_rank = k.cut[3 * p + 1], tie_t = k.cut[3 * p + 2], ties = ties_in(d, n, thr);
  if (tie_t >= 0) {
    if (ties == 0) return thr;
    alignas(64) uint16_t u[kBlock];
    random_block(static_cast<uint64_t>(s.key), static_cast<uint32_t>(k.model_index[i]), kSpread, e, n, u);
    const auto t = static_cast<int32_t>(tie_t);
    FM_LOOP for (int64_t j = 0; j < n; ++j) d[j] =
        (rank_key(d[j]) == thr) & (static_cast<int32_t>(u[j]) >= t) ? W(0) : d[j];
    return thr - 1;
  }
  const int64_t before = rank;
  rank += ties;
  if (rank > cut_rank) {
    int64_t left = cut_rank - before;
    for (int64_t j = 0; j < n; ++j)
      if (rank_key(d[j]) == thr && --left < 0) d[j] = W(0);
  }
  return thr - 1;
}

// One bit per lane of four masks.
#if defined(__AVX2__)
template <class T>
inline uint32_t mask_bits(const Pack<float>::I* m, const T*) {
  const auto* v = reinterpret_cast<const __m256i*>(m);
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  // Packing works on halves of a vector: each now holds four bytes of every mask.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(bytes, order)));
}
inline uint32_t mask_bits(const Pack<float>::I* m, const Bf16*) {  // even and odd elements, and again
  const auto* v = reinterpret_cast<const __m256i*>(m);
  const __m256i bytes = _mm256_packs_epi16(_mm256_blend_epi16(v[0], v[1], 0xaa), _mm256_blend_epi16(v[2], v[3], 0xaa));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
}
inline uint32_t mask_bits(const Pack<double>::I* m, const double*) {
  uint32_t bits = 0;
  for (int g = 0; g < 4; ++g)
    bits |= static_cast<uint32_t>(_mm256_movemask_pd(reinterpret_cast<__m256d>(m[g]))) << (4 * g);
  return bits;
}
#else
template <class I, class T>
inline uint32_t mask_bits(const I* m, const T*) {
  uint64_t half[2];
  static_assert(sizeof *m == sizeof half, "vectors of 16 bytes");
  const I any = m[0] | m[1] | m[2] | m[3];
  memcpy(&half, &any, sizeof any);
  if (!(half[0] | half[1])) return 0;
  constexpr uint32_t kLanesOf = sizeof *m / sizeof m[0][0];
  uint32_t bits = 0;
  for (uint32_t g = 0; g < 4; ++g)
    for (uint32_t l = 0; l < kLanesOf; ++l) bits |= (m[g][l] ? 1u : 0u) << (g * kLanesOf + l);
  return bits;
}
#endif

constexpr int32_t kTogether = 8;           // models that are widened before their pairs are looked at
constexpr int64_t kApartBy = kBlock + 16;  // numbers from one to the next: streams 4 KiB apart would share cache sets

// The sums of a block of `models` models, widened to rows of kApartBy; kModels: their number, 0 for any.
template <class W, int kModels>
inline void square_pairs(const W* x, int32_t models, int64_t n, W* sum) {
  using V = typename Pack<W>::V;
  if (kModels) models = kModels;
  for (int64_t j = 0; j < n; j += 2 * kWidth<W>) {
    V a{}, b{};
    for (int32_t i = 0; i + 1 < models; ++i)
      for (int32_t k = i + 1; k < models; ++k) {
        const W *p = x + i * kApartBy + j, *q = x + k * kApartBy + j;
        const V c = get(p) - get(q), d = get(p + kWidth<W>) - get(q + kWidth<W>);
        a = a + c * c, b = b + d * d;
      }
    put(sum + j, a), put(sum + j + kWidth<W>, b);
  }
}

// How much the models of a block vary: the sum of the squared differences of all pairs, in order. Beyond n numbers up
// to the next whole step.
template <class W>
FM_STEP void variance_block(const Table& t, const Segment& s, int64_t at, int64_t n, W* sum) {
  alignas(64) W x[kTogether * kApartBy];
  const int32_t models = t.inputs - 1;
  if (models <= kTogether) {
    for (int32_t i = 0; i < models; ++i) load_any(t.codes[1 + i], s.in[1 + i], at, n, x + i * kApartBy);
    if (models == 2) return square_pairs<W, 2>(x, models, n, sum);
    if (models == 3) return square_pairs<W, 3>(x, models, n, sum);
    if (models == 4) return square_pairs<W, 4>(x, models, n, sum);
    return square_pairs<W, 0>(x, models, n, sum);
  }
  W* d = x + kApartBy;
  memset(sum, 0, kBlock * sizeof *sum);
  for (int32_t i = 0; i + 1 < models; ++i) {
    load_any(t.codes[1 + i], s.in[1 + i], at, n, x);
    for (int32_t k = i + 1; k < models; ++k) {
      delta_block(t, s, k, at, n, -1, x, d);
      FM_LOOP for (int64_t j = 0; j < n; ++j) sum[j] = sum[j] + d[j] * d[j];
    }
  }
}

// Which elements of a block stay by variance, bit j of word j / 32; `rank` as trim_block's.
template <class W>
FM_STEP void variance_bits(const KeepArgs& k, const Table& t, const Segment& s, int64_t at, int64_t n, int64_t& rank,
                           uint32_t* bits) {
  constexpr int64_t kFour = 4 * kWidth<W>;
  alignas(64) W sum[kBlock];
  variance_block(t, s, at, n, sum);
  const Int<W> bound = trim_block(k, s, 1, 0, at, n, rank, sum);
  memset(bits, 0, kWords * sizeof *bits);
  for (int64_t j = 0; j < n; j += kFour) {
    typename Pack<W>::I above[4];
    for (int g = 0; g < 4; ++g) above[g] = keys_of<W>(get(sum + j + g * kWidth<W>)) > bound;
    bits[j / 32] |= mask_bits(above, sum) << (j % 32);
  }
}

// Drop and trim of one model's block, whose delta is in d; the result as trim_block's. `bits`: of the drop, or null.
template <class W>
FM_STEP Int<W> keep_block(const KeepArgs& k, const Segment& s, int64_t models, int32_t i, int64_t at, int64_t n,
                          const uint32_t* bits, int64_t& rank, W* d) {
  if (k.drop) bits ? drop_block(bits, n, d) : drop_delta(k, s, models, i, at, n, d);
  return k.trim ? trim_block(k, s, models, i, at, n, rank, d) : Int<W>(-1);
}

}  // namespace
}  // namespace fastmerge
