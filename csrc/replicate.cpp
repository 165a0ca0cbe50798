// Expert replication on a CPU core: the source is read once, and written for every output while it stays in cache.
#include "replicate.h"

#include <limits>
#include <type_traits>

#include "fused.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

// Counting results that are not finite takes a few percent of a copy, and is done where it is asked for (kCount).

constexpr int64_t kRun = 8 * kBlock;    // elements that go to every output before the next ones are read
constexpr int64_t kFarBytes = 8 << 20;  // outputs that no cache could hold are written past it
constexpr size_t kLine = 64;            // bytes

// What tells finite values of a type from others as bytes pass: the parts of a word that hold exponents, as signed
// integers that are largest where a value is not finite.
template <class T>
struct Exponents {
  using Part = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;
  using Parts __attribute__((vector_size(sizeof(Word)))) = Part;
  static constexpr Part kInfinity = std::is_same_v<T, Fp16>    ? 0x7c00
                                    : std::is_same_v<T, Bf16>  ? 0x7f80
                                    : std::is_same_v<T, float> ? 0x7f800000
                                                               : 0x7ff00000;
  static Parts mask() {
    Parts m = {};
    constexpr size_t kStride = sizeof(T) / sizeof(Part);  // little-endian: the last part of a value has the exponent
    for (size_t i = kStride - 1; i < sizeof m / sizeof(Part); i += kStride) m[i] = std::numeric_limits<Part>::max();
    return m;
  }
};

// Copies bytes; kFar: past the caches, which saves the reading of what is overwritten. (memcpy changes at a few
// kilobytes to an instruction that is slow in the cache of some processors.)
template <class T, bool kFar, bool kCount>
int64_t copy(char* to, const char* from, size_t n) {
  size_t i = kFar ? -reinterpret_cast<uintptr_t>(to) % kLine : 0;
  i = i < n ? i : n;
  memcpy(to, from, i);
  using Parts = typename Exponents<T>::Parts;
  const Parts mask = Exponents<T>::mask();
  Parts most = {};
  const size_t start = i;
  for (; i + kLine <= n; i += kLine)
    for (size_t j = 0; j < kLine; j += sizeof(Word)) {
      Word w;
      memcpy(&w, from + i + j, sizeof w);
      put<kFar>(to + i + j, w);
      if constexpr (kCount) {
        Parts p;
        memcpy(&p, &w, sizeof p);
        p &= mask;
        most = p > most ? p : most;
      }
    }
  memcpy(to + i, from + i, n - i);
  if constexpr (!kCount) return 0;
  const auto count = [&](size_t low, size_t high) {
    return nonfinite_block(reinterpret_cast<const T*>(from + low), static_cast<int64_t>((high - low) / sizeof(T)));
  };
  bool finite = true;
  for (size_t j = 0; j < sizeof most / sizeof(most[0]); ++j) finite &= most[j] < Exponents<T>::kInfinity;
  return count(0, start) + (finite ? 0 : count(start, i)) + count(i, n);
}

// Elements [at, at + n) to every output that is a mere copy.
template <class T, bool kCount, bool kFar>
int64_t copies(const ReplicateArgs& a, const Segment& s, int64_t at, int64_t n) {
  using W = typename WorkOf<T>::type;
  const auto* from = reinterpret_cast<const char*>(s.in[0] + at * static_cast<int64_t>(sizeof(T)));
  const double* sigmas = a.sigma + s.group * a.table.outputs;
  int64_t each = 0, made = 0;
  for (int32_t e = 0; e < a.table.outputs; ++e) {
    if (static_cast<W>(sigmas[e]) != W(0)) continue;
    auto* to = reinterpret_cast<char*>(a.table.output(s, e) + at * static_cast<int64_t>(sizeof(T)));
    const auto run = made++ ? copy<T, kFar, false> : copy<T, kFar, kCount>;
    each += run(to, from, static_cast<size_t>(n) * sizeof(T));
  }
  return made * each;
}

template <bool kCount, bool kFar>
int64_t copies(const ReplicateArgs& a, const Segment& s, int64_t at, int64_t n) {
  switch (a.out_code) {
    case kBF16:
      return copies<Bf16, kCount, kFar>(a, s, at, n);
    case kF16:
      return copies<Fp16, kCount, kFar>(a, s, at, n);
    case kF32:
      return copies<float, kCount, kFar>(a, s, at, n);
    default:
      return copies<double, kCount, kFar>(a, s, at, n);
  }
}

// y = x + sigma * normal(u) for whole steps of n elements.
template <class W>
void noisy_steps(const W* x, const uint16_t* u, W sigma, const NormalLine* lines, int64_t n, W* y) {
  FM_LOOP for (int64_t j = 0; j < (n & -kStep); ++j) {
    const uint32_t bits = u[j];
    const float place = normal_place(0x4b000000u | (bits & 0x7fffu));
    y[j] = noisy(x[j], sigma, normal_on(lines[normal_slot(place)], place, bits << 16));
  }
}

#if defined(__AVX2__)

// t + 16, from the bits t: see normal_place.
FM_LANES Vec places8(Word t) {
  return _mm256_castsi256_ps(_mm256_or_si256(t, _mm256_set1_epi32(0x4b000000))) - _mm256_set1_ps(8388592.0f);
}

// The same of the random bits of sixteen elements: of those at even places, and of those at odd ones.
FM_LANES void places16(Word w, Vec& even, Vec& odd) {
  const Word t = _mm256_and_si256(w, _mm256_set1_epi16(0x7fff));
  even = places8(_mm256_blend_epi16(t, _mm256_setzero_si256(), 0xaa)), odd = places8(_mm256_srli_epi32(t, 16));
}

FM_LANES Word random16(const uint16_t* u) { return _mm256_loadu_si256(reinterpret_cast<const Word*>(u)); }

// The slots of n elements. From random bits to a normal it takes some 60 cycles one after the other, and of those
// chains a Zen 3 has room for two. Cut here, in memory, they are 1.2 times as fast with as many instructions (5.6 for
// each number beside those of its bits). Reading the slots back at once, from a register's worth of memory, was slower
// than either.
void slots_of(const uint16_t* u, int64_t n, uint16_t* slots) {
  for (int64_t j = 0; j < n; j += kStep) {
    Vec even, odd;
    places16(random16(u + j), even, odd);
    const Word e = _mm256_srli_epi32(_mm256_castps_si256(even), 19), o = _mm256_srli_epi32(_mm256_castps_si256(odd), 3);
    _mm256_storeu_si256(reinterpret_cast<Word*>(slots + j), _mm256_blend_epi16(e, o, 0xaa));
  }
}

// Eight normal numbers, from t + 16 and the signs; slot i is that of lane i: see normal_on. A gather would take 39
// operations on some processors for what are eight loads of a line.
template <int kApart>
FM_LANES Vec normals8(Vec place, Word signs, const uint16_t* slots, const NormalLine* lines) {
  const auto two = [&](int i) {  // of slots
    const auto line = [&](int k) {
      return reinterpret_cast<const double*>(lines + static_cast<int64_t>(slots[k * kApart]) - 0x830);
    };
    return _mm_castpd_ps(_mm_loadh_pd(_mm_load_sd(line(i)), line(i + 1)));
  };
  const Vec p = _mm256_set_m128(two(4), two(0)), q = _mm256_set_m128(two(6), two(2));
  const Vec n = _mm256_shuffle_ps(p, q, 0x88) + _mm256_shuffle_ps(p, q, 0xdd) * place;
  return _mm256_xor_ps(n, _mm256_castsi256_ps(_mm256_and_si256(signs, _mm256_set1_epi32(~0x7fffffff))));
}

// Sixteen from their random bits, in the order of a storage type.
template <class T>
FM_LANES Lanes normals16(const uint16_t* u, const uint16_t* slots, const NormalLine* lines, const T*) {
  Lanes r;
  for (int p = 0; p < kParts; ++p) {
    const Word w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(u + p * kPart)));
    const Vec place = places8(_mm256_and_si256(w, _mm256_set1_epi32(0x7fff)));
    r.v[p] = normals8<1>(place, _mm256_slli_epi32(w, 16), slots + p * kPart, lines);
  }
  return r;
}
FM_LANES Lanes normals16(const uint16_t* u, const uint16_t* slots, const NormalLine* lines, const Bf16*) {
  const Word w = random16(u);
  Vec even, odd;
  places16(w, even, odd);
  return {normals8<2>(even, _mm256_slli_epi32(w, 16), slots, lines), normals8<2>(odd, w, slots + 1, lines)};
}

// y = x + sigma * normal(u) for whole steps of n elements of one storage type; x is widened, in its order.
template <class T>
int64_t noisy_fused(const float* x, const uint16_t* u, float sigma, const NormalLine* lines, int64_t n, T* y) {
  alignas(64) uint16_t slots[kBlock];
  slots_of(u, n, slots);
  Peak peak;
  clear(peak);
  for (int64_t j = 0; j < n; j += kStep) {
    Lanes r;
    load16(x + j, r);
    store16(r + sigma * normals16(u + j, slots + j, lines, y), y + j, peak);
  }
  return finish_stored(peak, n, y);
}

// n elements from `at` on, whole steps, for all outputs that have noise.
template <class T>
int64_t block_fused(const ReplicateArgs& a, const Segment& s, int64_t at, int64_t n) {
  alignas(64) float x[kBlock];
  alignas(64) uint16_t u[kBlock];
  widen_stored(reinterpret_cast<const T*>(s.in[0]) + at, n, x);
  int64_t bad = 0;
  for (int32_t e = 0; e < a.table.outputs; ++e) {
    const auto sigma = static_cast<float>(a.sigma[s.group * a.table.outputs + e]);
    if (sigma == 0.0f) continue;
    random_block(static_cast<uint64_t>(s.key), static_cast<uint32_t>(a.numbers[e]), kNoise, s.e0 + at, n, u);
    bad += noisy_fused(x, u, sigma, a.lines, n, reinterpret_cast<T*>(a.table.output(s, e)) + at);
  }
  return bad;
}

#endif

// n <= kBlock elements from `at` on, for all outputs that are not mere copies.
template <class W, bool kCount>
int64_t block(const ReplicateArgs& a, const Segment& s, int64_t at, int64_t n) {
#if defined(__AVX2__)
  const int32_t code = n % kStep ? -1 : one_type(a.table, a.out_code);
  if (code == kBF16) return block_fused<Bf16>(a, s, at, n);
  if (code == kF16) return block_fused<Fp16>(a, s, at, n);
  if (code == kF32) return block_fused<float>(a, s, at, n);
#endif
  alignas(64) W x[kBlock], y[kBlock];
  alignas(64) uint16_t u[kBlock];
  load_any(a.table.codes[0], s.in[0], at, n, x);
  const double* sigmas = a.sigma + s.group * a.table.outputs;
  int64_t bad = 0;
  for (int32_t e = 0; e < a.table.outputs; ++e) {
    const W sigma = static_cast<W>(sigmas[e]);
    const W* made = x;
    if (sigma != W(0)) {
      random_block(static_cast<uint64_t>(s.key), static_cast<uint32_t>(a.numbers[e]), kNoise, s.e0 + at, n, u);
      memset(u + n, 0, static_cast<size_t>(round_up(n) - n) * 2);
      noisy_steps(x, u, sigma, a.lines, round_up(n), y);
      made = y;
    } else if (a.table.codes[0] == a.out_code) {
      continue;
    }
    const int64_t some = store_any(a.out_code, a.table.output(s, e), at, n, made);
    if (kCount) bad += some;
  }
  return bad;
}

// One segment.
template <class W, bool kCount>
int64_t segment(const ReplicateArgs& a, const Segment& s) {
  const bool far = s.length * size_of(a.table.codes[0]) >= kFarBytes;
  const double* sigmas = a.sigma + s.group * a.table.outputs;
  int32_t mere = 0;
  for (int32_t e = 0; e < a.table.outputs; ++e)
    mere += a.table.codes[0] == a.out_code && static_cast<W>(sigmas[e]) == W(0);
  int64_t bad = 0;
  for (int64_t at = 0, n; at < s.length; at += n) {
    n = s.length - at < kRun ? s.length - at : kRun;
    if (mere) bad += far ? copies<kCount, true>(a, s, at, n) : copies<kCount, false>(a, s, at, n);
    // All blocks but the first start where a counter does.
    for (int64_t j = 0, m; mere < a.table.outputs && j < n; j += m) {
      m = kBlock - ((s.e0 + at + j) & 7);
      m = n - j < m ? n - j : m;
      bad += block<W, kCount>(a, s, at + j, m);
    }
  }
  if (far) streamed();
  return bad;
}

}  // namespace

void replicate(const ReplicateArgs& a) {
  const bool wide = a.table.wide(), counts = a.nonfinite != nullptr;
  const auto run = wide ? (counts ? segment<double, true> : segment<double, false>)
                        : (counts ? segment<float, true> : segment<float, false>);
  for (int64_t i = 0; i < a.table.segments; ++i) {
    const int64_t bad = run(a, a.table[i]);
    if (counts) a.nonfinite[i] += bad;
  }
}

}  // namespace FM_ISA
}  // namespace fastmerge
