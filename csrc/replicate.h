// Expert replication: out_e = round(x + sigma_e * n_e) for every output e, with n_e standard normal; one whose sigma
// is 0 gets x itself, converted, or its very bytes where the types agree. First the arithmetic; then the walk of
// the CUDA kernel, which a host can take as well, and does in the tests.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace fastmerge {

// double where the input is fp64.
template <class T>
struct WorkOf {
  using type = float;
};
template <>
struct WorkOf<double> {
  using type = double;
};

// ---- the arithmetic ------------------------------------------------------------------------------------

// t + 16 as fp32, from the 15 bits t below 0x4b00, which are 2^23 + t: exact, and no conversion.
FM_HD float normal_place(uint32_t bits) { return float_of(bits) - 8388592.0f; }

// Exponent and four bits of the fraction, counted from those of 16.
FM_HD uint32_t normal_slot(float place) { return (bits_of(place) >> 19) - 0x830u; }

// The normal number; `sign` holds its sign in the top bit.
FM_HD float normal_on(NormalLine line, float place, uint32_t sign) {
  return float_of(bits_of(line.a + line.b * place) ^ (sign & 0x80000000u));
}

constexpr float kMostNormal = 8;  // no normal number is as large

// No input up to this magnitude makes an output of a type that is not finite, whatever the noise; -1 where any might.
FM_HD float safe_input(int32_t out_code, double most_sigma) {
  const float half = out_code == kF16 ? 0x1p14f : 0x1p126f;
  return kMostNormal * most_sigma <= half ? half : -1.0f;
}

template <class W>
FM_HD W noisy(W x, W sigma, float n) {
  return x + sigma * static_cast<W>(n);
}

// ---- the walk: eight elements, those of one Philox block, at a time -----------------------------------------

template <class T>
struct alignas(16) Eight {
  T v[8];
};

// Which of the eight exist: [lo, hi).
struct Span {
  int lo, hi;
};

// kFast: all of them, at an address aligned to 16 bytes, which then travel 128 bits at a time, past the caches, as
// nothing here is used twice.
template <bool kFast, class T>
FM_HD Eight<T> get8(int64_t address, const Span& span) {
  Eight<T> r;
#if defined(__CUDA_ARCH__)
  if constexpr (kFast) {
    for (int i = 0; i < static_cast<int>(sizeof r / 16); ++i)
      reinterpret_cast<uint4*>(r.v)[i] = __ldcs(reinterpret_cast<const uint4*>(address) + i);
  } else
#endif
    for (int j = 0; j < 8; ++j) r.v[j] = j >= span.lo && j < span.hi ? reinterpret_cast<const T*>(address)[j] : T{};
  return r;
}

template <bool kFast, class T>
FM_HD void put8(const Eight<T>& r, int64_t address, const Span& span) {
#if defined(__CUDA_ARCH__)
  if constexpr (kFast) {
    for (int i = 0; i < static_cast<int>(sizeof r / 16); ++i)
      __stcs(reinterpret_cast<uint4*>(address) + i, reinterpret_cast<const uint4*>(r.v)[i]);
  } else
#endif
    for (int j = 0; j < 8; ++j)
      if (j >= span.lo && j < span.hi) reinterpret_cast<T*>(address)[j] = r.v[j];
}

#if defined(__CUDA_ARCH__)
// Two values rounded by the hardware, the first one low: the bits of store<T> but for NaNs.
FM_HD uint32_t pair_of(float low, float high, const Bf16*) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
FM_HD uint32_t pair_of(float low, float high, const Fp16*) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// Values that are worth their registers: not computed anew for every output.
FM_HD void keep(float& x) { asm volatile("" : "+f"(x)); }
FM_HD void keep(double& x) { asm volatile("" : "+d"(x)); }
FM_HD void keep(uint32_t& x) { asm volatile("" : "+r"(x)); }
template <class T>
FM_HD void keep(const T*& x) {
  asm volatile("" : "+l"(x));
}
#else
template <class T>
FM_HD void keep(T&) {}
#endif

// Eight times store<T>. kFast: none is NaN.
template <bool kFast, class T, class W>
FM_HD Eight<T> store8(const W* x) {
  Eight<T> r;
#if defined(__CUDA_ARCH__)
  if constexpr (kFast && sizeof(T) == 2 && sizeof(W) == 4) {
    for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(r.v)[j] = pair_of(x[2 * j], x[2 * j + 1], r.v);
  } else
#endif
    for (int j = 0; j < 8; ++j) r.v[j] = store<T>(x[j]);
  return r;
}

// The table as the host has it; replicate.cu has one for shared memory.
struct Lines {
  const NormalLine* lines;
  FM_MEMBER NormalLine operator()(float place) const { return lines[normal_slot(place)]; }
};

// The normal numbers of both halves of a word.
template <class Table>
FM_HD void normals(const Table& table, uint32_t word, float& low, float& high) {
  const uint32_t ranks = word & 0x7fff7fffu;
#if defined(__CUDA_ARCH__)
  const float a = normal_place(__byte_perm(ranks, 0x4b00u, 0x5410)),
              b = normal_place(__byte_perm(ranks, 0x4b00u, 0x5432));
#else
  const float a = normal_place(0x4b000000u | (ranks & 0xffffu)), b = normal_place(0x4b000000u | (ranks >> 16));
#endif
  low = normal_on(table(a), a, word << 16);
  high = normal_on(table(b), b, word);
}

// An entry of a table, which is in global memory and which no launch writes (an address that was kept tells neither).
#if defined(__CUDA_ARCH__)
FM_HD double constant(const double* p) { return __ldg(p); }
FM_HD int64_t constant(const int64_t* p) { return __ldg(reinterpret_cast<const long long*>(p)); }
#else
template <class T>
FM_HD T constant(const T* p) {
  return *p;
}
#endif

// Adds how many of the eight that exist are not finite, `times` over, to counter n, which other threads add to as well.
template <class T>
FM_HD void add_nonfinite(const Eight<T>& r, const Span& span, int64_t* counters, int64_t n, int32_t times) {
  int32_t bad = 0;
  for (int j = 0; j < 8; ++j) bad += j >= span.lo && j < span.hi && !is_finite(r.v[j]);
  if (bad == 0 || counters == nullptr) return;
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(counters + n), static_cast<unsigned long long>(bad * times));
#else
  counters[n] += bad * times;
#endif
}

// One Philox block of a segment for every output. With kFast it must be whole, every address aligned, and false is
// returned, and nothing written, where an input is beyond a.safe: a NaN needs the careful conversion, and results that
// are not finite are counted.
template <class In, class Out, bool kRandom, bool kFast, class Table>
FM_HD bool replicate8(const ReplicateArgs& a, int64_t n, int64_t block, const Table& table) {
  using W = typename WorkOf<In>::type;
  constexpr bool kCopies = std::is_same_v<In, Out>;  // where there is no noise
  const Segment& s = a.table[n];
  const int64_t at = 8 * block - s.e0, left = s.length - at;  // relative to the segment's first element
  const Span span = {at < 0 ? static_cast<int>(-at) : 0, left < 8 ? static_cast<int>(left) : 8};
  const Eight<In> raw = get8<kFast, In>(s.in[0] + at * static_cast<int64_t>(sizeof(In)), span);
  W x[8];
  bool safe = true;
  for (int j = 0; j < 8; ++j) {
    x[j] = load<W>(raw.v[j]);
    safe &= kCopies && !kRandom ? is_finite(raw.v[j]) : x[j] <= a.safe && -x[j] <= a.safe;
    if (kRandom && kFast) keep(x[j]);
  }
  if (kFast && !safe) return false;
  uint32_t keys[10][2];
  for (int r = 0; kRandom && r < 10; ++r) {
    const uint64_t key = static_cast<uint64_t>(s.key);
    keys[r][0] = static_cast<uint32_t>(key) + static_cast<uint32_t>(r) * 0x9E3779B9u;
    keys[r][1] = static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(r) * 0xBB67AE85u;
    if (kFast) keep(keys[r][0]), keep(keys[r][1]);
  }
  const auto clean = [&]() -> Eight<Out> {  // an output without noise
    if constexpr (kCopies)
      return raw;
    else
      return store8<kFast, Out>(x);
  };
  const double* sigmas = a.sigma + s.group * a.table.outputs;
  const int64_t *numbers = a.numbers, *places = s.in;
  constexpr bool kKept = kFast || !kRandom;  // elsewhere the compiler would make the loop twice
  if (kKept) keep(sigmas), keep(numbers), keep(places);
  int64_t place = s.out;
#if defined(__CUDA_ARCH__)
#pragma unroll 1
#endif
  for (uint32_t e = 0, outputs = static_cast<uint32_t>(a.table.outputs);;) {
    const int64_t to = place + at * static_cast<int64_t>(sizeof(Out));
    const W sigma = kRandom ? static_cast<W>(constant(sigmas + e)) : W(0);
    if (sigma != W(0)) {
      uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32),
                       static_cast<uint32_t>(constant(numbers + e)), kNoise};
      for (int r = 0; r < 10; ++r) philox_round(c, keys[r][0], keys[r][1]);
      W y[8];
      for (int j = 0; j < 4; ++j) {
        float low, high;
        normals(table, c[j], low, high);
        y[2 * j] = noisy(x[2 * j], sigma, low);
        y[2 * j + 1] = noisy(x[2 * j + 1], sigma, high);
      }
      const Eight<Out> made = store8<kFast, Out>(y);
      put8<kFast>(made, to, span);
      if (!kFast) add_nonfinite(made, span, a.nonfinite, n, 1);
    } else {
      const Eight<Out> made = clean();
      put8<kFast>(made, to, span);
      if (!kFast && kRandom) add_nonfinite(made, span, a.nonfinite, n, 1);
    }
    if (++e >= outputs) break;
    place = kKept ? constant(places + e) : places[e];
  }
  if (!kFast && !kRandom) add_nonfinite(clean(), span, a.nonfinite, n, a.table.outputs);
  return true;
}

// Thread `thread` of `threads` in tile `t`.
template <class In, class Out, bool kRandom, class Table>
FM_HD void replicate_tile(const ReplicateArgs& a, const ReplicateWalk& walk, int64_t t, int thread, int threads,
                          const Table& table) {
  int64_t n = 0, end = a.table.segments;  // the last segment that starts at or before t is the one that has it
  while (end - n > 1) {
    const int64_t middle = (n + end) / 2;
    if (walk.first[middle] <= t)
      n = middle;
    else
      end = middle;
  }
  const Segment& s = a.table[n];
  int64_t odd = s.in[0] - s.e0 * static_cast<int64_t>(sizeof(In));
  for (int32_t e = 0; e < a.table.outputs; ++e) odd |= a.table.output(s, e) - s.e0 * static_cast<int64_t>(sizeof(Out));
  const bool aligned = odd % 16 == 0;
  const int64_t from = (s.e0 >> 3) + (t - walk.first[n]) * walk.tile, last = (s.e0 + s.length - 1) >> 3;
  const int64_t stop = last < from + walk.tile ? last + 1 : from + walk.tile;
  for (int64_t block = from + thread; block < stop; block += threads) {
    const bool fast = aligned && 8 * block >= s.e0 && 8 * block + 8 <= s.e0 + s.length;
    if (!fast || !replicate8<In, Out, kRandom, true>(a, n, block, table))
      replicate8<In, Out, kRandom, false>(a, n, block, table);
  }
}

}  // namespace fastmerge
