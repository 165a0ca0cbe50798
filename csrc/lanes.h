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

// store16<true> bypasses the caches: 64-byte aligned addresses only, and streamed() after the last one.

// Counts the stored results that are not finite, in lanes as wide as the stored type: read it at the latest every
// 2^15 stores.
struct Tally {
  Word n;
};

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
FM_LANES void clear(Tally& t) { t.n = _mm256_setzero_si256(); }
FM_LANES void tally16(Tally& t, Word r, int16_t exponent) {
  const Word e = _mm256_set1_epi16(exponent);
  t.n = _mm256_sub_epi16(t.n, _mm256_cmpeq_epi16(_mm256_and_si256(r, e), e));
}
FM_LANES void tally32(Tally& t, Vec r) {
  const Word e = _mm256_set1_epi32(0x7f800000);
  t.n = _mm256_sub_epi32(t.n, _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_castps_si256(r), e), e));
}

FM_LANES Lanes canonical(Lanes a) {
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a.v[0], a.v[1], _CMP_UNORD_Q)), 0))
    for (Vec& x : a.v) x = _mm256_blendv_ps(x, _mm256_set1_ps(float_of(kNanF32)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return a;
}
FM_LANES Word bf16_of(Vec x) {
  const Word u = _mm256_castps_si256(x);
  const Word odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
}
// Values 0-3 and 8-11, then 4-7 and 12-15: packus puts them back.
FM_LANES void load16(const Bf16* p, Lanes& r) {
  const Word x = _mm256_loadu_si256(reinterpret_cast<const Word*>(p)), zero = _mm256_setzero_si256();
  r.v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, x));
  r.v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, x));
}
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Bf16* p, Tally& t) {
  const Lanes x = canonical(a);
  const Word r = _mm256_packus_epi32(bf16_of(x.v[0]), bf16_of(x.v[1]));
  put<kStream>(p, r);
  tally16(t, r, 0x7f80);
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  r.v[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  r.v[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Fp16* p, Tally& t) {
  const Lanes x = canonical(a);
  const Word r = _mm256_set_m128i(_mm256_cvtps_ph(x.v[1], _MM_FROUND_TO_NEAREST_INT),
                                  _mm256_cvtps_ph(x.v[0], _MM_FROUND_TO_NEAREST_INT));
  put<kStream>(p, r);
  tally16(t, r, 0x7c00);
}

#elif defined(__SSE2__)

template <bool kStream>
FM_LANES void put(void* p, Word r) {
  kStream ? _mm_stream_si128(static_cast<Word*>(p), r) : _mm_storeu_si128(static_cast<Word*>(p), r);
}
FM_LANES void streamed() { _mm_sfence(); }
FM_LANES void clear(Tally& t) { t.n = _mm_setzero_si128(); }
FM_LANES void tally16(Tally& t, Word r, int16_t exponent) {
  const Word e = _mm_set1_epi16(exponent);
  t.n = _mm_sub_epi16(t.n, _mm_cmpeq_epi16(_mm_and_si128(r, e), e));
}
FM_LANES void tally32(Tally& t, Vec r) {
  const Word e = _mm_set1_epi32(0x7f800000);
  t.n = _mm_sub_epi32(t.n, _mm_cmpeq_epi32(_mm_and_si128(_mm_castps_si128(r), e), e));
}

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
FM_LANES Word either(Word mask, Word a, Word b) {
  return _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b));
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
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Bf16* p, Tally& t) {
  const Lanes x = canonical(a);
  for (int i = 0; i < 2; ++i) {
    const Word r = _mm_packs_epi32(bf16_of(x.v[2 * i]), bf16_of(x.v[2 * i + 1]));
    put<kStream>(p + 8 * i, r);
    tally16(t, r, 0x7f80);
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
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Fp16* p, Tally& t) {
  const Lanes x = canonical(a);  // a canonical NaN has no sign
  for (int i = 0; i < 2; ++i) {
    const Word r = _mm_packs_epi32(fp16_of(x.v[2 * i]), fp16_of(x.v[2 * i + 1]));
    put<kStream>(p + 8 * i, r);
    tally16(t, r, 0x7c00);
  }
}

#elif defined(__ARM_NEON)

template <bool>
FM_LANES void put(void* p, Word r) {
  memcpy(p, &r, sizeof r);
}
FM_LANES void streamed() {}
FM_LANES void clear(Tally& t) { t.n = vdupq_n_u16(0); }
FM_LANES void tally16(Tally& t, Word r, uint16_t exponent) {
  const Word e = vdupq_n_u16(exponent);
  t.n = vsubq_u16(t.n, vceqq_u16(vandq_u16(r, e), e));
}
FM_LANES void tally32(Tally& t, Vec r) {
  const uint32x4_t e = vdupq_n_u32(0x7f800000), mask = vceqq_u32(vandq_u32(vreinterpretq_u32_f32(r), e), e);
  t.n = vreinterpretq_u16_u32(vsubq_u32(vreinterpretq_u32_u16(t.n), mask));
}

FM_LANES Lanes canonical(Lanes a) {
  for (Vec& x : a.v) x = vbslq_f32(vceqq_f32(x, x), x, vdupq_n_f32(float_of(kNanF32)));
  return a;
}
FM_LANES uint16x4_t bf16_of(Vec x) {
  const uint32x4_t u = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  return vshrn_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
}
FM_LANES void load16(const Bf16* p, Lanes& r) {
  for (int i = 0; i < 4; ++i)
    r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i), 16));
}
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Bf16* p, Tally& t) {
  const Lanes x = canonical(a);
  for (int i = 0; i < 2; ++i) {
    const Word r = vcombine_u16(bf16_of(x.v[2 * i]), bf16_of(x.v[2 * i + 1]));
    put<kStream>(p + 8 * i, r);
    tally16(t, r, 0x7f80);
  }
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  for (int i = 0; i < 4; ++i)
    r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i)));
}
template <bool kStream = false>
FM_LANES void store16(const Lanes& a, Fp16* p, Tally& t) {
  const Lanes x = canonical(a);
  for (int i = 0; i < 2; ++i) {
    const Word r = vcombine_u16(vreinterpret_u16_f16(vcvt_f16_f32(x.v[2 * i])),
                                vreinterpret_u16_f16(vcvt_f16_f32(x.v[2 * i + 1])));
    put<kStream>(p + 8 * i, r);
    tally16(t, r, 0x7c00);
  }
}

#else

template <bool>
FM_LANES void put(void* p, Word r) {
  memcpy(p, &r, sizeof r);
}
FM_LANES void streamed() {}
FM_LANES void clear(Tally& t) { t.n = 0; }
FM_LANES void tally32(Tally& t, Vec r) { t.n += !is_finite(r); }
FM_LANES Lanes canonical(Lanes a) {
  for (Vec& x : a.v) x = store<float>(x);
  return a;
}
template <class T>
FM_LANES void load16(const T* p, Lanes& r) {
  for (int i = 0; i < 16; ++i) r.v[i] = load<float>(p[i]);
}
template <bool kStream = false, class T>
FM_LANES void store16(const Lanes& a, T* p, Tally& t) {
  for (int i = 0; i < 16; ++i) p[i] = store<T>(a.v[i]), t.n += !is_finite(p[i]);
}

#endif

template <bool kStream = false>
FM_LANES void store16(const Lanes& a, float* p, Tally& t) {
  const Lanes x = canonical(a);
  for (int i = 0; i < kParts; ++i) {
    Word r;
    memcpy(&r, &x.v[i], sizeof r);
    put<kStream>(p + i * kPart, r);
    tally32(t, x.v[i]);
  }
}

// What has been counted for results of type T since clear().
template <class T>
FM_LANES int64_t total(const Tally& t, const T*) {
  uint16_t narrow[sizeof(Word) / 2];
  uint32_t wide[sizeof(Word) / 4];
  memcpy(narrow, &t.n, sizeof t.n);
  memcpy(wide, &t.n, sizeof t.n);
  uint32_t sum = 0;
  if (sizeof(T) == 2 && sizeof(Word) > 4)
    for (const uint16_t n : narrow) sum += n;
  else
    for (const uint32_t n : wide) sum += n;
  return sum;
}

// Between the order of a storage type and the logical one; its own inverse.
template <class T>
FM_LANES void reorder(const T*, Lanes&) {}
#if defined(__AVX2__)
FM_LANES void reorder(const Bf16*, Lanes& a) {
  const Vec low = _mm256_permute2f128_ps(a.v[0], a.v[1], 0x20);
  a.v[1] = _mm256_permute2f128_ps(a.v[0], a.v[1], 0x31);
  a.v[0] = low;
}
#endif

}  // namespace
}  // namespace fastmerge
