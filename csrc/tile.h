// Blocks of values that stay in the first-level cache: conversion from and to storage.
// For kernel sources only (host). Everything has internal linkage.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "lanes.h"
#include "random.h"

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

constexpr int64_t kStep = 16;  // blocks are computed in whole steps, so that no loop has a remainder

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

}  // namespace
}  // namespace fastmerge
