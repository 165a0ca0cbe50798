// Sixteen fp32 values at a time in registers, in the instruction set that the file is compiled for.
// The order of values inside a Lanes object is that of its storage type and means nothing elsewhere: combine only
// Lanes that were loaded from one type, and store them as that type. For kernel sources only.
#pragma once

#include "bits.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace fastmerge {
namespace {

#define FM_LANES static inline __attribute__((always_inline, unused))

// Vec: a register of fp32; Word: a register of integers.
#if defined(__AVX2__)
using Vec = __m256;
using Word = __m256i;
constexpr int kParts = 2;
#elif defined(__SSE2__)
using Vec = __m128;
using Word = __m128i;
constexpr int kParts = 4;
#elif defined(__ARM_NEON)
using Vec = float32x4_t;
using Word = uint16x8_t;
constexpr int kParts = 4;
#else
using Vec = float;
using Word = uint32_t;
constexpr int kParts = 16;
#endif
constexpr int kPart = 16 / kParts;

struct Lanes {
  Vec v[kParts];
};

// store16 takes values whose NaNs, if any, are canonical or computed from inputs of the stored type alone: rounding
// could make a number of others. store16<true> bypasses the caches: 64-byte aligned addresses only, and streamed()
// after the last one.

// The largest magnitude that was stored, as bits without sign, in lanes as wide as the stored type: tells whether all
// results are finite, in two instructions a register.
struct Peak {
  Word n;
};
// In its place where all results are known to be finite.
struct Unwatched {};
FM_LANES void peak16(Unwatched&, Word) {}
FM_LANES void peak32(Unwatched&, Vec) {}

// In its place where values are finite and up to kNear - 1 units of their last place off: whether any came so near to
// the middle between two of bf16 that the right one might have been rounded to the other. For bf16 on AVX2 and NEON.
struct Near {
  Word n;  // the least distance from kNear below the middle on
};
constexpr uint16_t kNear = 8;

FM_LANES Lanes operator+(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < kParts; ++i) r.v[i] = a.v[i] + b.v[i];
  return r;
}
FM_LANES Lanes operator-(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < kParts; ++i) r.v[i] = a.v[i] - b.v[i];
  return r;
}
FM_LANES Lanes operator*(float c, const Lanes& a) {
  Lanes r;
  for (int i = 0; i < kParts; ++i) r.v[i] = a.v[i] * c;
  return r;
}
FM_LANES Lanes operator*(const Lanes& a, const Lanes& b) {
  Lanes r;
  for (int i = 0; i < kParts; ++i) r.v[i] = a.v[i] * b.v[i];
  return r;
}
FM_LANES Lanes operator/(const Lanes& a, float c) {
  Lanes r;
  for (int i = 0; i < kParts; ++i) r.v[i] = a.v[i] / c;
  return r;
}

FM_LANES void load16(const float* p, Lanes& r) {
  for (int i = 0; i < kParts; ++i) memcpy(&r.v[i], p + i * kPart, sizeof(Vec));
}
// As it is: for blocks of fp32 in the work type.
FM_LANES void put16(const Lanes& a, float* p) {
  for (int i = 0; i < kParts; ++i) memcpy(p + i * kPart, &a.v[i], sizeof(Vec));
}

// Every NaN made canonical. NaNs are rare, so asking first is cheaper than selecting always.
FM_LANES Lanes canonical(Lanes a);

#if defined(__AVX2__)  // v4 as well: the same source, encoded with what that adds

template <bool kStream>
FM_LANES void put(void* p, Word r) {
  kStream ? _mm256_stream_si256(static_cast<Word*>(p), r) : _mm256_storeu_si256(static_cast<Word*>(p), r);
}
FM_LANES void streamed() { _mm_sfence(); }
FM_LANES void clear(Peak& t) { t.n = _mm256_setzero_si256(); }
FM_LANES void peak16(Peak& t, Word r) { t.n = _mm256_max_epi16(t.n, _mm256_and_si256(r, _mm256_set1_epi16(0x7fff))); }
FM_LANES void peak32(Peak& t, Vec r) {
  t.n = _mm256_max_epi32(t.n, _mm256_and_si256(_mm256_castps_si256(r), _mm256_set1_epi32(0x7fffffff)));
}

constexpr bool kTellsNear = true;
FM_LANES void clear(Near& t) { t.n = _mm256_set1_epi16(-1); }
FM_LANES bool any(const Near& t) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi16(t.n, _mm256_min_epu16(t.n, _mm256_set1_epi16(2 * kNear))));
}

FM_LANES Lanes canonical(Lanes a) {
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a.v[0], a.v[1], _CMP_UNORD_Q)), 0))
    for (Vec& x : a.v) x = _mm256_blendv_ps(x, _mm256_set1_ps(float_of(kNanF32)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return a;
}
// The even values, then the odd ones: a shift and a mask each way, and no shuffle.
FM_LANES void load16(const Bf16* p, Lanes& r) {
  const Word x = _mm256_loadu_si256(reinterpret_cast<const Word*>(p));
  r.v[0] = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  r.v[1] = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536)));
}
template <bool kStream = false, class P>
FM_LANES void store16(const Lanes& a, Bf16* p, P& t) {
  const Word even = _mm256_castps_si256(a.v[0]), odd = _mm256_castps_si256(a.v[1]);
  const Word high = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  const Word low = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
  // Rounds up where low is 0x8000 or more, less one where high is even: the top bit of that difference, from 0 on.
  const Word even_high = _mm256_andnot_si256(high, _mm256_set1_epi16(1));
  const Word r = _mm256_add_epi16(high, _mm256_srli_epi16(_mm256_subs_epu16(low, even_high), 15));
  put<kStream>(p, r);
  peak16(t, r);
}
// Half of a bf16's last place and kNear more are added: right unless what is left is at most twice kNear.
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Bf16* p, Near& t) {
  const Word half = _mm256_set1_epi32(0x8000 + kNear);
  const Word even = _mm256_add_epi32(_mm256_castps_si256(a.v[0]), half);
  const Word odd = _mm256_add_epi32(_mm256_castps_si256(a.v[1]), half);
  put<kStream>(p, _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa));
  t.n = _mm256_min_epu16(t.n, _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa));
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  r.v[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  r.v[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
template <bool kStream = false, class P>
FM_LANES void store16(const Lanes& a, Fp16* p, P& t) {
  const Word r = _mm256_set_m128i(_mm256_cvtps_ph(a.v[1], _MM_FROUND_TO_NEAREST_INT),
                                  _mm256_cvtps_ph(a.v[0], _MM_FROUND_TO_NEAREST_INT));
  put<kStream>(p, r);
  peak16(t, r);
}

#elif defined(__SSE2__)

template <bool kStream>
FM_LANES void put(void* p, Word r) {
  kStream ? _mm_stream_si128(static_cast<Word*>(p), r) : _mm_storeu_si128(static_cast<Word*>(p), r);
}
FM_LANES void streamed() { _mm_sfence(); }
FM_LANES void clear(Peak& t) { t.n = _mm_setzero_si128(); }
FM_LANES void peak16(Peak& t, Word r) { t.n = _mm_max_epi16(t.n, _mm_and_si128(r, _mm_set1_epi16(0x7fff))); }
FM_LANES Word either(Word mask, Word a, Word b) {
  return _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b));
}
FM_LANES void peak32(Peak& t, Vec r) {
  const Word magnitude = _mm_and_si128(_mm_castps_si128(r), _mm_set1_epi32(0x7fffffff));
  t.n = either(_mm_cmpgt_epi32(magnitude, t.n), magnitude, t.n);
}

constexpr bool kTellsNear = false;
FM_LANES void clear(Near&) {}
FM_LANES bool any(const Near&) { return true; }

FM_LANES Lanes canonical(Lanes a) {
  const Vec some = _mm_or_ps(_mm_cmpunord_ps(a.v[0], a.v[1]), _mm_cmpunord_ps(a.v[2], a.v[3]));
  if (__builtin_expect(_mm_movemask_ps(some), 0))
    for (Vec& x : a.v) {
      const Vec nan = _mm_cmpunord_ps(x, x);
      x = _mm_or_ps(_mm_andnot_ps(nan, x), _mm_and_ps(nan, _mm_set1_ps(float_of(kNanF32))));
    }
  return a;
}
FM_LANES Word bf16_of(Vec x) {  // sign-extended, so that packs_epi32 saturates nothing
  const Word u = _mm_castps_si128(x);
  const Word odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
  return _mm_srai_epi32(_mm_add_epi32(_mm_add_epi32(u, _mm_set1_epi32(0x7fff)), odd), 16);
}
FM_LANES Vec f32_of(Word h) {  // fp16 bits in 32-bit lanes; see widen(Fp16)
  const Word mag = _mm_and_si128(h, _mm_set1_epi32(0x7fff)), top = _mm_set1_epi32(0x38000000);
  const Word rebias = _mm_add_epi32(top, _mm_and_si128(_mm_cmpgt_epi32(mag, _mm_set1_epi32(0x7bff)), top));
  const Word normal = _mm_add_epi32(_mm_slli_epi32(mag, 13), rebias);
  const Word small = _mm_castps_si128(_mm_mul_ps(_mm_cvtepi32_ps(mag), _mm_set1_ps(0x1p-24f)));
  const Word sign = _mm_slli_epi32(_mm_and_si128(h, _mm_set1_epi32(0x8000)), 16);
  return _mm_castsi128_ps(_mm_or_si128(either(_mm_cmplt_epi32(mag, _mm_set1_epi32(0x400)), small, normal), sign));
}
FM_LANES Word fp16_of(Vec x) {  // sign-extended; see fp16_bits
  const Word u = _mm_castps_si128(x), mag = _mm_and_si128(u, _mm_set1_epi32(0x7fffffff));
  const Word half = _mm_set1_epi32(0x3f000000);
  const Word sum = _mm_castps_si128(_mm_add_ps(_mm_castsi128_ps(mag), _mm_castsi128_ps(half)));
  const Word odd = _mm_and_si128(_mm_srli_epi32(mag, 13), _mm_set1_epi32(1));
  const Word biased = _mm_add_epi32(mag, _mm_set1_epi32(0xfff - 0x38000000));
  const Word normal = _mm_srli_epi32(_mm_add_epi32(biased, odd), 13);
  Word r = either(_mm_cmplt_epi32(mag, _mm_set1_epi32(0x38800000)), _mm_sub_epi32(sum, half), normal);
  r = either(_mm_cmpgt_epi32(mag, _mm_set1_epi32(0x477fefff)), _mm_set1_epi32(0x7c00), r);
  r = either(_mm_cmpgt_epi32(mag, _mm_set1_epi32(0x7f800000)), _mm_set1_epi32(kNanF16), r);
  return _mm_or_si128(r, _mm_slli_epi32(_mm_srai_epi32(u, 31), 15));
}
FM_LANES void load16(const Bf16* p, Lanes& r) {
  const Word zero = _mm_setzero_si128();
  for (int i = 0; i < 2; ++i) {
    const Word x = _mm_loadu_si128(reinterpret_cast<const Word*>(p + 8 * i));
    r.v[2 * i] = _mm_castsi128_ps(_mm_unpacklo_epi16(zero, x));
    r.v[2 * i + 1] = _mm_castsi128_ps(_mm_unpackhi_epi16(zero, x));
  }
}
template <bool kStream = false, class P>
FM_LANES void store16(const Lanes& a, Bf16* p, P& t) {
  for (int i = 0; i < 2; ++i) {
    const Word r = _mm_packs_epi32(bf16_of(a.v[2 * i]), bf16_of(a.v[2 * i + 1]));
    put<kStream>(p + 8 * i, r);
    peak16(t, r);
  }
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  const Word zero = _mm_setzero_si128();
  for (int i = 0; i < 2; ++i) {
    const Word x = _mm_loadu_si128(reinterpret_cast<const Word*>(p + 8 * i));
    r.v[2 * i] = f32_of(_mm_unpacklo_epi16(x, zero));
    r.v[2 * i + 1] = f32_of(_mm_unpackhi_epi16(x, zero));
  }
}
template <bool kStream = false, class P>
FM_LANES void store16(const Lanes& a, Fp16* p, P& t) {
  for (int i = 0; i < 2; ++i) {
    const Word r = _mm_packs_epi32(fp16_of(a.v[2 * i]), fp16_of(a.v[2 * i + 1]));
    put<kStream>(p + 8 * i, r);
    peak16(t, r);
  }
}

#elif defined(__ARM_NEON)

template <bool>
FM_LANES void put(void* p, Word r) {
  memcpy(p, &r, sizeof r);
}
FM_LANES void streamed() {}
FM_LANES void clear(Peak& t) { t.n = vdupq_n_u16(0); }
FM_LANES void peak16(Peak& t, Word r) { t.n = vmaxq_u16(t.n, vandq_u16(r, vdupq_n_u16(0x7fff))); }
FM_LANES void peak32(Peak& t, Vec r) {
  const uint32x4_t magnitude = vandq_u32(vreinterpretq_u32_f32(r), vdupq_n_u32(0x7fffffff));
  t.n = vreinterpretq_u16_u32(vmaxq_u32(vreinterpretq_u32_u16(t.n), magnitude));
}

constexpr bool kTellsNear = true;
FM_LANES void clear(Near& t) { t.n = vdupq_n_u16(0xffff); }
FM_LANES bool any(const Near& t) { return vminvq_u16(t.n) <= 2 * kNear; }

FM_LANES Lanes canonical(Lanes a) {
  for (Vec& x : a.v) x = vbslq_f32(vceqq_f32(x, x), x, vdupq_n_f32(float_of(kNanF32)));
  return a;
}
FM_LANES Word bf16_of(Vec x, Vec y) {  // as for AVX2
  const Word a = vreinterpretq_u16_f32(x), b = vreinterpretq_u16_f32(y);
  const Word high = vuzp2q_u16(a, b), even_high = vbicq_u16(vdupq_n_u16(1), high);
  return vsraq_n_u16(high, vqsubq_u16(vuzp1q_u16(a, b), even_high), 15);
}
FM_LANES void load16(const Bf16* p, Lanes& r) {
  for (int i = 0; i < 4; ++i)
    r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i), 16));
}
template <bool kStream = false, class P>
FM_LANES void store16(const Lanes& a, Bf16* p, P& t) {
  for (int i = 0; i < 2; ++i) {
    const Word r = bf16_of(a.v[2 * i], a.v[2 * i + 1]);
    put<kStream>(p + 8 * i, r);
    peak16(t, r);
  }
}
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Bf16* p, Near& t) {  // as for AVX2
  const uint32x4_t half = vdupq_n_u32(0x8000 + kNear);
  for (int i = 0; i < 2; ++i) {
    const Word x = vreinterpretq_u16_u32(vaddq_u32(vreinterpretq_u32_f32(a.v[2 * i]), half));
    const Word y = vreinterpretq_u16_u32(vaddq_u32(vreinterpretq_u32_f32(a.v[2 * i + 1]), half));
    put<kStream>(p + 8 * i, vuzp2q_u16(x, y));
    t.n = vminq_u16(t.n, vuzp1q_u16(x, y));
  }
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  for (int i = 0; i < 4; ++i)
    r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i)));
}
template <bool kStream = false, class P>
FM_LANES void store16(const Lanes& a, Fp16* p, P& t) {
  for (int i = 0; i < 2; ++i) {
    const Word r = vcombine_u16(vreinterpret_u16_f16(vcvt_f16_f32(a.v[2 * i])),
                                vreinterpret_u16_f16(vcvt_f16_f32(a.v[2 * i + 1])));
    put<kStream>(p + 8 * i, r);
    peak16(t, r);
  }
}

#else

template <bool>
FM_LANES void put(void* p, Word r) {
  memcpy(p, &r, sizeof r);
}
FM_LANES void streamed() {}
FM_LANES void clear(Peak& t) { t.n = 0; }
FM_LANES void peak32(Peak& t, Vec r) { t.n = key_of(r) > t.n ? key_of(r) : t.n; }
constexpr bool kTellsNear = false;
FM_LANES void clear(Near&) {}
FM_LANES bool any(const Near&) { return true; }
FM_LANES Lanes canonical(Lanes a) {
  for (Vec& x : a.v) x = store<float>(x);
  return a;
}
template <class T>
FM_LANES void load16(const T* p, Lanes& r) {
  for (int i = 0; i < 16; ++i) r.v[i] = load<float>(p[i]);
}
template <bool kStream = false, class T, class P>
FM_LANES void store16(const Lanes& a, T* p, P& t) {
  for (int i = 0; i < 16; ++i) p[i] = store<T>(a.v[i]), peak32(t, load<float>(p[i]));
}

#endif

template <bool kStream = false, class P>
FM_LANES void store16(const Lanes& a, float* p, P& t) {
  for (int i = 0; i < kParts; ++i) {
    Word r;
    memcpy(&r, &a.v[i], sizeof r);
    put<kStream>(p + i * kPart, r);
    peak32(t, a.v[i]);
  }
}

constexpr uint32_t infinity(const Bf16*) { return 0x7f80; }
constexpr uint32_t infinity(const Fp16*) { return 0x7c00; }
constexpr uint32_t infinity(const float*) { return 0x7f800000; }

// The largest lane, of the width of N.
template <class N>
FM_LANES uint32_t largest_of(const Peak& t) {
  N lanes[sizeof(Word) / sizeof(N)];
  uint32_t most = 0;
  memcpy(lanes, &t.n, sizeof t.n);
  for (const N n : lanes) most = n > most ? n : most;
  return most;
}

// Whether all results of type T since clear() are finite.
template <class T>
FM_LANES bool all_finite(const Peak& t, const T* type) {
  if (sizeof(Word) == 4) return largest_of<uint32_t>(t) < 0x7f800000u;  // of the values in fp32
  return (sizeof(T) == 2 ? largest_of<uint16_t>(t) : largest_of<uint32_t>(t)) < infinity(type);
}

// The largest magnitude since clear(), where peak32 alone was used; infinite or a NaN where one of the values was.
FM_LANES float largest_magnitude(const Peak& t) { return float_of(largest_of<uint32_t>(t)); }

// From the order of a storage type to the logical one, and back.
template <class T>
FM_LANES void logical(const T*, Lanes&) {}
template <class T>
FM_LANES void stored(const T*, Lanes&) {}
#if defined(__AVX2__)
FM_LANES void logical(const Bf16*, Lanes& a) {
  const Vec low = _mm256_unpacklo_ps(a.v[0], a.v[1]), high = _mm256_unpackhi_ps(a.v[0], a.v[1]);
  a.v[0] = _mm256_permute2f128_ps(low, high, 0x20);
  a.v[1] = _mm256_permute2f128_ps(low, high, 0x31);
}
FM_LANES void stored(const Bf16*, Lanes& a) {
  const Vec even = _mm256_shuffle_ps(a.v[0], a.v[1], 0x88), odd = _mm256_shuffle_ps(a.v[0], a.v[1], 0xdd);
  a.v[0] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
  a.v[1] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
}
#endif

// Which of the sixteen a lane holds.
template <class T>
constexpr int place_of(const T*, int part, int lane) {
  return kPart * part + lane;
}
#if defined(__AVX2__)
constexpr int place_of(const Bf16*, int part, int lane) { return 2 * lane + part; }
#endif

}  // namespace
}  // namespace fastmerge
