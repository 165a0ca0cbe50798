// Sixteen values at a time in registers, in the instruction set that the file is compiled for.
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

#if defined(__AVX2__)
using Vec = __m256;
constexpr int kParts = 2;
#elif defined(__SSE2__)
using Vec = __m128;
constexpr int kParts = 4;
#elif defined(__ARM_NEON)
using Vec = float32x4_t;
constexpr int kParts = 4;
#else
using Vec = float;
constexpr int kParts = 16;
#endif

struct Lanes {
  Vec v[kParts];
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

constexpr int kPart = 16 / kParts;
FM_LANES void load16(const float* p, Lanes& r) {
  for (int i = 0; i < kParts; ++i) memcpy(&r.v[i], p + i * kPart, sizeof(Vec));
}
FM_LANES void put16(const Lanes& a, float* p) {
  for (int i = 0; i < kParts; ++i) memcpy(p + i * kPart, &a.v[i], sizeof(Vec));
}

#if defined(__AVX2__)  // v4 as well: the same code, encoded with what that adds

FM_LANES __m256 canonical(__m256 x) {
  return _mm256_blendv_ps(x, _mm256_set1_ps(float_of(kNanF32)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
FM_LANES __m256i rounded(__m256 x) {
  const __m256i u = _mm256_castps_si256(canonical(x));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
}
FM_LANES void load16(const Bf16* p, Lanes& r) {  // values 0-3 and 8-11, then 4-7 and 12-15, as packus puts them back
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), zero = _mm256_setzero_si256();
  r.v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, x));
  r.v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, x));
}
FM_LANES void store16(const Lanes& a, Bf16* p) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_packus_epi32(rounded(a.v[0]), rounded(a.v[1])));
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  r.v[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  r.v[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
FM_LANES void store16(const Lanes& a, Fp16* p) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(canonical(a.v[0]), _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(canonical(a.v[1]), _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__SSE2__)

FM_LANES __m128 canonical(__m128 x) {
  const __m128 nan = _mm_cmpunord_ps(x, x);
  return _mm_or_ps(_mm_andnot_ps(nan, x), _mm_and_ps(nan, _mm_set1_ps(float_of(kNanF32))));
}
FM_LANES __m128i rounded(__m128 x) {  // arithmetic shift: packs_epi32 then saturates nothing
  const __m128i u = _mm_castps_si128(canonical(x));
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(u, 16), _mm_set1_epi32(1));
  return _mm_srai_epi32(_mm_add_epi32(_mm_add_epi32(u, _mm_set1_epi32(0x7fff)), odd), 16);
}
FM_LANES void load16(const Bf16* p, Lanes& r) {
  const __m128i zero = _mm_setzero_si128();
  for (int i = 0; i < 2; ++i) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
    r.v[2 * i] = _mm_castsi128_ps(_mm_unpacklo_epi16(zero, x));
    r.v[2 * i + 1] = _mm_castsi128_ps(_mm_unpackhi_epi16(zero, x));
  }
}
FM_LANES void store16(const Lanes& a, Bf16* p) {
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                     _mm_packs_epi32(rounded(a.v[2 * i]), rounded(a.v[2 * i + 1])));
}
FM_LANES __m128i either(__m128i mask, __m128i a, __m128i b) {
  return _mm_or_si128(_mm_and_si128(mask, a), _mm_andnot_si128(mask, b));
}
FM_LANES __m128 wide_of(__m128i h) {  // fp16 bits in 32-bit lanes; see widen(Fp16)
  const __m128i mag = _mm_and_si128(h, _mm_set1_epi32(0x7fff));
  const __m128i high = _mm_cmpgt_epi32(mag, _mm_set1_epi32(0x7bff)), low = _mm_cmplt_epi32(mag, _mm_set1_epi32(0x400));
  const __m128i rebias = _mm_add_epi32(_mm_set1_epi32(0x38000000), _mm_and_si128(high, _mm_set1_epi32(0x38000000)));
  const __m128i normal = _mm_add_epi32(_mm_slli_epi32(mag, 13), rebias);
  const __m128i small = _mm_castps_si128(_mm_mul_ps(_mm_cvtepi32_ps(mag), _mm_set1_ps(0x1p-24f)));
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(h, _mm_set1_epi32(0x8000)), 16);
  return _mm_castsi128_ps(_mm_or_si128(either(low, small, normal), sign));
}
FM_LANES __m128i half_of(__m128 x) {  // fp16 bits, sign-extended; see fp16_bits
  const __m128i u = _mm_castps_si128(x), mag = _mm_and_si128(u, _mm_set1_epi32(0x7fffffff));
  const __m128i half = _mm_set1_epi32(0x3f000000);
  const __m128i small =
      _mm_sub_epi32(_mm_castps_si128(_mm_add_ps(_mm_castsi128_ps(mag), _mm_castsi128_ps(half))), half);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(mag, 13), _mm_set1_epi32(1));
  const __m128i bias = _mm_set1_epi32(0xfff - 0x38000000);
  const __m128i normal = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(mag, bias), odd), 13);
  __m128i r = either(_mm_cmplt_epi32(mag, _mm_set1_epi32(0x38800000)), small, normal);
  r = either(_mm_cmpgt_epi32(mag, _mm_set1_epi32(0x477fefff)), _mm_set1_epi32(0x7c00), r);
  const __m128i nan = _mm_cmpgt_epi32(mag, _mm_set1_epi32(0x7f800000));
  const __m128i sign = _mm_slli_epi32(_mm_srai_epi32(u, 31), 15);
  return either(nan, _mm_set1_epi32(kNanF16), _mm_or_si128(r, sign));
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  const __m128i zero = _mm_setzero_si128();
  for (int i = 0; i < 2; ++i) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
    r.v[2 * i] = wide_of(_mm_unpacklo_epi16(x, zero));
    r.v[2 * i + 1] = wide_of(_mm_unpackhi_epi16(x, zero));
  }
}
FM_LANES void store16(const Lanes& a, Fp16* p) {
  for (int i = 0; i < 2; ++i)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * i),
                     _mm_packs_epi32(half_of(a.v[2 * i]), half_of(a.v[2 * i + 1])));
}

#elif defined(__ARM_NEON)

FM_LANES float32x4_t canonical(float32x4_t x) { return vbslq_f32(vceqq_f32(x, x), x, vdupq_n_f32(float_of(kNanF32))); }
FM_LANES uint16x4_t rounded(float32x4_t x) {
  const uint32x4_t u = vreinterpretq_u32_f32(canonical(x));
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  return vshrn_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd), 16);
}
FM_LANES void load16(const Bf16* p, Lanes& r) {
  for (int i = 0; i < 4; ++i)
    r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i), 16));
}
FM_LANES void store16(const Lanes& a, Bf16* p) {
  for (int i = 0; i < 4; ++i) vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, rounded(a.v[i]));
}
FM_LANES void load16(const Fp16* p, Lanes& r) {
  for (int i = 0; i < 4; ++i)
    r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p) + 4 * i)));
}
FM_LANES void store16(const Lanes& a, Fp16* p) {
  for (int i = 0; i < 4; ++i)
    vst1_u16(reinterpret_cast<uint16_t*>(p) + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(canonical(a.v[i]))));
}

#else

FM_LANES float canonical(float x) { return store<float>(x); }
template <class T> FM_LANES void load16(const T* p, Lanes& r) {
  for (int i = 0; i < 16; ++i) r.v[i] = load<float>(p[i]);
}
template <class T> FM_LANES void store16(const Lanes& a, T* p) {
  for (int i = 0; i < 16; ++i) p[i] = store<T>(a.v[i]);
}

#endif

FM_LANES void store16(const Lanes& a, float* p) {
  Lanes r;
  for (int i = 0; i < kParts; ++i) r.v[i] = canonical(a.v[i]);
  put16(r, p);
}

// Between the order of a storage type and the logical one; its own inverse.
template <class T> FM_LANES void reorder(const T*, Lanes&) {}
#if defined(__AVX2__)
FM_LANES void reorder(const Bf16*, Lanes& a) {
  const __m256 low = _mm256_permute2f128_ps(a.v[0], a.v[1], 0x20);
  a.v[1] = _mm256_permute2f128_ps(a.v[0], a.v[1], 0x31);
  a.v[0] = low;
}
#endif

}  // namespace
}  // namespace fastmerge
