// Blocks of values that stay in the first-level cache: conversion from and to storage, and random lanes.
// For kernel sources only (host). Everything has internal linkage.
#pragma once

#include <cstddef>

#include "bits.h"
#include "lanes.h"

#ifndef FM_ISA
#error "kernel sources are compiled with FM_ISA set to the namespace of their instruction set"
#endif

// A loop whose iterations do not depend on each other (input and output may be the same buffer, never overlap
// otherwise): lets the compiler vectorise without run-time overlap checks.
#if defined(__clang__)
#define FM_LOOP _Pragma("clang loop vectorize(assume_safety)")
#else
#define FM_LOOP _Pragma("GCC ivdep")
#endif

namespace fastmerge {
namespace {

constexpr int64_t kBlock = 1024;  // elements of a block: 4 KiB of fp32
constexpr int64_t kStep = 16;     // blocks are computed in whole steps, so that no loop has a remainder

inline int64_t round_up(int64_t n) { return (n + kStep - 1) & -kStep; }

// n elements at src where that is a whole number of steps, else a copy in `stage` that may be read beyond n.
template <class T>
inline const T* whole_steps(const T* src, int64_t n, T* stage) {
  if (n % kStep == 0) return src;
  memcpy(stage, src, static_cast<size_t>(n) * sizeof(T));
  memset(stage + n, 0, static_cast<size_t>(round_up(n) - n) * sizeof(T));
  return stage;
}

template <class T, class W>
inline void widen_steps(const T* src, int64_t n, W* dst) {
  FM_LOOP for (int64_t j = 0; j < (n & -kStep); ++j) dst[j] = load<W>(src[j]);
}

template <class T>
inline void widen_steps(const T* src, int64_t n, float* dst) {
  for (int64_t j = 0; j < n; j += kStep) {
    Lanes a;
    load16(src + j, a);
    logical(src, a);
    put16(a, dst + j);
  }
}
inline void widen_steps(const double* src, int64_t n, float* dst) {  // never asked for: fp64 inputs widen to fp64
  for (int64_t j = 0; j < n; ++j) dst[j] = static_cast<float>(src[j]);
}

// Widens n <= kBlock elements; dst has room for whole steps, and what lies beyond n becomes 0.
template <class T, class W>
inline void load_block(const T* src, int64_t n, W* dst) {
  T stage[kBlock];
  widen_steps(whole_steps(src, n, stage), round_up(n), dst);
}

// The same from elements `offset` on of an array of storage type `code`.
template <class W>
inline void load_any(int32_t code, int64_t address, int64_t offset, int64_t n, W* dst) {
  switch (code) {
    case kBF16:
      return load_block(reinterpret_cast<const Bf16*>(address) + offset, n, dst);
    case kF16:
      return load_block(reinterpret_cast<const Fp16*>(address) + offset, n, dst);
    case kF32:
      return load_block(reinterpret_cast<const float*>(address) + offset, n, dst);
    default:
      return load_block(reinterpret_cast<const double*>(address) + offset, n, dst);
  }
}

template <size_t kBytes>
struct UnsignedOf {
  using type = uint16_t;
};
template <>
struct UnsignedOf<4> {
  using type = uint32_t;
};
template <>
struct UnsignedOf<8> {
  using type = uint64_t;
};

template <class T>
inline int64_t nonfinite_block(const T* p, int64_t n) {
  int64_t bad = 0;
  for (int64_t i = 0; i < n; i += 16384) {  // short runs may be counted in narrow lanes
    const int64_t m = n - i < 16384 ? n - i : 16384;
    typename UnsignedOf<sizeof(T)>::type some = 0;
    for (int64_t j = 0; j < m; ++j) some = static_cast<decltype(some)>(some + !is_finite(p[i + j]));
    bad += static_cast<int64_t>(some);
  }
  return bad;
}

// Rounds n <= kBlock values (whole steps) to storage; returns how many results are not finite.
template <class T, class W>
inline int64_t round_steps(const W* src, int64_t n, T* dst) {
  FM_LOOP for (int64_t j = 0; j < (n & -kStep); ++j) dst[j] = store<T>(src[j]);
  return nonfinite_block(dst, n);
}

template <class T>
inline int64_t round_steps(const float* src, int64_t n, T* dst) {
  Peak peak;
  clear(peak);
  for (int64_t j = 0; j < n; j += kStep) {
    Lanes a;
    load16(src + j, a);
    stored(dst, a);
    store16(canonical(a), dst + j, peak);
  }
  return all_finite(peak, dst) ? 0 : nonfinite_block(dst, n);
}
inline int64_t round_steps(const float* src, int64_t n, double* dst) {
  FM_LOOP for (int64_t j = 0; j < (n & -kStep); ++j) dst[j] = store<double>(src[j]);
  return nonfinite_block(dst, n);
}

// The same for any n <= kBlock (src readable in whole steps).
template <class T, class W>
inline int64_t store_block(const W* src, int64_t n, T* dst) {
  if (n % kStep == 0) return round_steps(src, n, dst);
  T stage[kBlock];
  round_steps(src, round_up(n), stage);
  memcpy(dst, stage, static_cast<size_t>(n) * sizeof(T));
  return nonfinite_block(dst, n);
}

template <class W>
inline int64_t store_any(int32_t code, int64_t address, int64_t offset, int64_t n, const W* src) {
  switch (code) {
    case kBF16:
      return store_block(src, n, reinterpret_cast<Bf16*>(address) + offset);
    case kF16:
      return store_block(src, n, reinterpret_cast<Fp16*>(address) + offset);
    case kF32:
      return store_block(src, n, reinterpret_cast<float*>(address) + offset);
    default:
      return store_block(src, n, reinterpret_cast<double*>(address) + offset);
  }
}

constexpr int kCounters = 64;  // Philox blocks computed together, 8 elements each

// The words of kCounters consecutive Philox blocks, in order.
#if defined(__AVX2__)
inline void philox_words(uint64_t key, uint32_t model, uint32_t op, uint64_t block, uint32_t* words) {
  // A word lives in the low half of a 64-bit lane; the multiply reads only that half, so the other may hold anything.
  __m256i keys[10][2];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int r = 0; r < 10; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    keys[r][0] = _mm256_set1_epi64x(k0);
    keys[r][1] = _mm256_set1_epi64x(k1);
  }
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53u), m1 = _mm256_set1_epi64x(0xCD9E8D57u);
  constexpr int kSets = 2, kPerSet = 4;
  for (int i = 0; i < kCounters; i += kSets * kPerSet) {
    __m256i x0[kSets], x1[kSets], x2[kSets], x3[kSets];
    for (int s = 0; s < kSets; ++s) {
      const auto first = static_cast<int64_t>(block + static_cast<uint64_t>(i + s * kPerSet));
      x0[s] = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 1, 2, 3));
      x1[s] = _mm256_srli_epi64(x0[s], 32);
      x2[s] = _mm256_set1_epi64x(model);
      x3[s] = _mm256_set1_epi64x(op);
    }
    for (int r = 0; r < 10; ++r) {
      for (int s = 0; s < kSets; ++s) {
        const __m256i p0 = _mm256_mul_epu32(x0[s], m0), p1 = _mm256_mul_epu32(x2[s], m1);
        x0[s] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), x1[s]), keys[r][0]);
        x2[s] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), x3[s]), keys[r][1]);
        x1[s] = p1;
        x3[s] = p0;
      }
    }
    for (int s = 0; s < kSets; ++s) {
      const __m256i low = _mm256_blend_epi32(x0[s], _mm256_slli_epi64(x1[s], 32), 0xaa);
      const __m256i high = _mm256_blend_epi32(x2[s], _mm256_slli_epi64(x3[s], 32), 0xaa);
      const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
      auto* to = reinterpret_cast<__m256i*>(words + 4 * (i + s * kPerSet));
      _mm256_storeu_si256(to, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}
#else
inline void philox_words(uint64_t key, uint32_t model, uint32_t op, uint64_t block, uint32_t* words) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    const uint64_t b = block + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(b);
    c1[i] = static_cast<uint32_t>(b >> 32);
    c2[i] = model;
    c3[i] = op;
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int r = 0; r < 10; ++r, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kCounters; ++i) {
      uint32_t c[4] = {c0[i], c1[i], c2[i], c3[i]};
      philox_round(c, k0, k1);
      c0[i] = c[0], c1[i] = c[1], c2[i] = c[2], c3[i] = c[3];
    }
  }
  for (int i = 0; i < kCounters; ++i)
    words[4 * i] = c0[i], words[4 * i + 1] = c1[i], words[4 * i + 2] = c2[i], words[4 * i + 3] = c3[i];
}
#endif

// The 16 random bits of n <= kBlock elements from e0 on.
inline void random_block(uint64_t key, uint32_t model, uint32_t op, int64_t e0, int64_t n, uint16_t* out) {
  int64_t done = -(e0 & 7);  // elements of the first counter that come before e0 are dropped
  for (uint64_t block = static_cast<uint64_t>(e0) >> 3; done < n; block += kCounters, done += 8 * kCounters) {
    alignas(32) uint32_t words[4 * kCounters];
    philox_words(key, model, op, block, words);
    const int64_t skip = done < 0 ? -done : 0, to = done + skip;
    const int64_t room = 8 * kCounters - skip, want = n - to;
    memcpy(out + to, reinterpret_cast<const uint16_t*>(words) + skip,
           static_cast<size_t>(room < want ? room : want) * 2);
  }
}

}  // namespace
}  // namespace fastmerge
