// Expert replication on a CPU core: the source is read once, and written for every output while it stays in cache.
#include "replicate.h"

#include <cmath>
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

// Lines of either sign, so that no number needs its sign put in; the negative ones are as far from the others as a sign
// is in slots (see ranks16), and nothing between is touched.
constexpr int kNegative = 0x8000 >> 3;
struct SignedLines {
  NormalLine lines[kNegative + kNormalLines];
  explicit SignedLines(const NormalLine* positive) {
    for (int i = 0; i < kNormalLines; ++i) {
      lines[i] = positive[i];
      lines[kNegative + i] = {-positive[i].a, -positive[i].b};
    }
  }
};
constexpr float kMostNormal = 8;  // and more than any number of the table, 4.325

// What random bits come to: t + 16 (see normal_place), of sixteen elements at a time those at even places before those
// at odd ones; and slots in the order of elements, with 0x830 and the sign left in.
struct Ranks {
  alignas(64) float places[kBlock];
  alignas(64) uint16_t slots[kBlock];
};

// Of sixteen elements. From random bits to a result it takes some 60 cycles one after the other, and of those chains a
// Zen 3 has room for two: cut here, in memory, they are 1.2 times as fast.
FM_LANES void ranks16(Word w, float* places, uint16_t* slots) {
  const Word bits = _mm256_set1_epi16(0x7fff), t = _mm256_and_si256(w, bits);
  const Word e = _mm256_blend_epi16(t, _mm256_set1_epi16(0x4b00), 0xaa);
  const Word o = _mm256_or_si256(_mm256_srli_epi32(t, 16), _mm256_set1_epi32(0x4b000000));
  const Vec even = _mm256_castsi256_ps(e) - _mm256_set1_ps(8388592.0f);
  const Vec odd = _mm256_castsi256_ps(o) - _mm256_set1_ps(8388592.0f);
  _mm256_store_ps(places, even), _mm256_store_ps(places + kPart, odd);
  const Word top = _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(even), 16), _mm256_castps_si256(odd), 0xaa);
  put<false>(slots, _mm256_srli_epi16(_mm256_or_si256(top, _mm256_andnot_si256(bits, w)), 3));
}

// Of n elements from counter `first` on. Not inlined: one copy, as fast as three.
__attribute__((noinline)) void ranks_of(uint64_t key, uint32_t model, uint64_t first, int64_t n, Ranks& to) {
  const Stream stream(key, model, kNoise, static_cast<uint32_t>(first >> 32));
  draw(stream, static_cast<uint32_t>(first), n, [&](int i, const Drawn& d) {
    ranks16(d.low, to.places + 32 * i, to.slots + 32 * i);
    ranks16(d.high, to.places + 32 * i + kStep, to.slots + 32 * i + kStep);
  });
}

// Sixteen normal numbers, those at even places first. A gather would take 39 operations on some processors for what are
// eight loads of a line. A Zen 4 does 2.5 such loads a cycle: slots that are loaded in pairs made replication 1.04
// times as fast, with 8 instructions more.
FM_LANES Lanes normals16(const float* places, const uint16_t* slots, const NormalLine* lines) {
  const auto line = [&](uint32_t slot) {
    return reinterpret_cast<const double*>(lines + static_cast<int64_t>(slot) - 0x830);
  };
  __m128d even[4], odd[4];
  for (int i = 0; i < 4; ++i) {
    uint32_t p, q;
    memcpy(&p, slots + 4 * i, sizeof p), memcpy(&q, slots + 4 * i + 2, sizeof q);
    even[i] = _mm_loadh_pd(_mm_load_sd(line(p & 0xffff)), line(q & 0xffff));
    odd[i] = _mm_loadh_pd(_mm_load_sd(line(p >> 16)), line(q >> 16));
  }
  const auto eight = [](const __m128d* d, const float* place) {
    const Vec p = _mm256_castpd_ps(_mm256_set_m128d(d[2], d[0])), q = _mm256_castpd_ps(_mm256_set_m128d(d[3], d[1]));
    return _mm256_shuffle_ps(p, q, 0x88) + _mm256_shuffle_ps(p, q, 0xdd) * _mm256_load_ps(place);
  };
  return {eight(even, places), eight(odd, places + kPart)};
}

// From the order of a storage type to that of bf16, which is that of Ranks, and back.
template <class T>
FM_LANES void ranked(const T*, Lanes& a) {
  if constexpr (!std::is_same_v<T, Bf16>) stored(static_cast<const Bf16*>(nullptr), a);
}
template <class T>
FM_LANES void unranked(const T*, Lanes& a) {
  if constexpr (!std::is_same_v<T, Bf16>) logical(static_cast<const Bf16*>(nullptr), a);
}

// y = x + sigma * normal for whole steps of n elements of one storage type; x is ranked. P: Peak, or Unwatched.
template <class P, class T>
int64_t noisy_fused(const float* x, const Ranks& ranks, float sigma, const NormalLine* lines, int64_t n, T* y) {
  P peak{};
  for (int64_t j = 0; j < n; j += kStep) {
    Lanes r;
    load16(x + j, r);
    r = r + sigma * normals16(ranks.places + j, ranks.slots + j, lines);
    unranked(y, r);
    store16(r, y + j, peak);
  }
  if constexpr (std::is_same_v<P, Peak>) return finish_stored(peak, n, y);
  return 0;
}

// n elements from `at` on, whole steps of one word of counters, for all outputs that have noise. a.lines: SignedLines.
template <class T>
int64_t block_fused(const ReplicateArgs& a, const Segment& s, int64_t at, int64_t n) {
  alignas(64) float x[kBlock];
  Ranks ranks;
  const T* from = reinterpret_cast<const T*>(s.in[0]) + at;
  Peak peak;
  clear(peak);
  for (int64_t j = 0; j < n; j += kStep) {
    Lanes r;
    load16(from + j, r);
    for (const Vec& v : r.v) peak32(peak, v);
    ranked(from, r);
    put16(r, x + j);
  }
  // Results that cannot overflow need no watch: 1.04 times as fast.
  const float most = largest_magnitude(peak), limit = std::is_same_v<T, Fp16> ? 0x1p15f : 0x1p126f;
  const uint64_t first = static_cast<uint64_t>(s.e0 + at) >> 3;
  int64_t bad = 0;
  for (int32_t e = 0; e < a.table.outputs; ++e) {
    const auto sigma = static_cast<float>(a.sigma[s.group * a.table.outputs + e]);
    if (sigma == 0.0f) continue;
    ranks_of(static_cast<uint64_t>(s.key), static_cast<uint32_t>(a.numbers[e]), first, n, ranks);
    const auto run = most + std::abs(sigma) * kMostNormal < limit ? noisy_fused<Unwatched, T> : noisy_fused<Peak, T>;
    bad += run(x, ranks, sigma, a.lines, n, reinterpret_cast<T*>(a.table.output(s, e)) + at);
  }
  return bad;
}

#endif

// n <= kBlock elements from `at` on, for all outputs that are not mere copies.
template <class W, bool kCount>
int64_t block(const ReplicateArgs& a, const Segment& s, int64_t at, int64_t n) {
#if defined(__AVX2__)
  const int64_t e = s.e0 + at;
  const bool whole = n % kStep == 0 && e % 8 == 0 && same_high(static_cast<uint64_t>(e) >> 3) >= kBlock / 8;
  const int32_t code = whole ? one_type(a.table, a.out_code) : -1;
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

void replicate(const ReplicateArgs& given) {
  ReplicateArgs a = given;
#if defined(__AVX2__)
  const SignedLines lines(a.lines);
  a.lines = lines.lines;
#endif
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
