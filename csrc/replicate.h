// Expert replication: out_e = round(x + sigma_e * n_e) for every output e, with n_e standard normal; one whose sigma
// is 0 gets x itself, converted, or its very bytes where the types agree. First the arithmetic; then the walk of
// the CUDA kernel, which a host can take as well, and does in the tests.
#pragma once

#include <type_traits>

#include "kernels.h"

#if defined(__CUDA_ARCH__)
#define FM_UNROLL _Pragma("unroll")
#else
#define FM_UNROLL
#endif

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

template <class W>
FM_HD W noisy(W x, W sigma, float n) {
  return x + sigma * static_cast<W>(n);
}

// ---- eight elements, those of one Philox block ---------------------------------------------------------------

template <class T>
struct alignas(16) Eight {
  T v[8];
};

// Which of the eight exist: [lo, hi).
struct Span {
  int lo, hi;
};

// kFast: all of them, at an address aligned to 16 bytes, which then travel 128 bits at a time. Neither way is past the
// caches: seven experts of eight find the input in L2, and L2 gathers what is written into long runs.
template <bool kFast, class T>
FM_HD Eight<T> get8(int64_t address, const Span& span) {
  Eight<T> r;
#if defined(__CUDA_ARCH__)
  if constexpr (kFast) {
    for (int i = 0; i < static_cast<int>(sizeof r / 16); ++i)
      reinterpret_cast<uint4*>(r.v)[i] = __ldg(reinterpret_cast<const uint4*>(address) + i);
  } else
#endif
    for (int j = 0; j < 8; ++j) r.v[j] = j >= span.lo && j < span.hi ? reinterpret_cast<const T*>(address)[j] : T{};
  return r;
}

#if defined(__CUDA_ARCH__)
FM_HD void store16(int64_t address, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#endif

template <bool kFast, class T>
FM_HD void put8(const Eight<T>& r, int64_t address, const Span& span) {
#if defined(__CUDA_ARCH__)
  if constexpr (kFast) {
    for (int i = 0; i < static_cast<int>(sizeof r / 16); ++i)
      store16(address + 16 * i, reinterpret_cast<const uint4*>(r.v)[i]);
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

// The two values of a word, one instruction each: the bits of load<float> but for NaNs.
FM_HD void split(uint32_t w, float& low, float& high, const Bf16*) {
  low = float_of(w << 16), high = float_of(w & 0xffff0000u);
}
FM_HD void split(uint32_t w, float& low, float& high, const Fp16*) {
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(w));
}

// w * 0 + sum in both halves: NaN from a value that is not finite on, else 0 of either sign.
FM_HD void add_times_zero(uint32_t& sum, uint32_t w, const Bf16*) {
  asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(w), "r"(0));
}
FM_HD void add_times_zero(uint32_t& sum, uint32_t w, const Fp16*) {
  asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(w), "r"(0));
}
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

// Eight times load<W>. kFast: none is NaN.
template <bool kFast, class W, class T>
FM_HD void load8(const Eight<T>& r, W* x) {
#if defined(__CUDA_ARCH__)
  if constexpr (kFast && sizeof(T) == 2 && sizeof(W) == 4) {
    for (int j = 0; j < 4; ++j) split(reinterpret_cast<const uint32_t*>(r.v)[j], x[2 * j], x[2 * j + 1], r.v);
  } else
#endif
    for (int j = 0; j < 8; ++j) x[j] = load<W>(r.v[j]);
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

// Whether all of eight values are finite. Pairs take five instructions, one of them on the busiest units.
template <class T>
FM_HD bool finite8(const Eight<T>& r) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    uint32_t sum = 0;
    for (int j = 0; j < 4; ++j) add_times_zero(sum, reinterpret_cast<const uint32_t*>(r.v)[j], r.v);
    return (sum & 0x7fff7fffu) == 0;
  }
#endif
  bool finite = true;
  for (int j = 0; j < 8; ++j) finite &= is_finite(r.v[j]);
  return finite;
}

// Adds how many of the eight that exist are not finite to counter n, which other threads add to as well.
template <class T>
FM_HD void add_nonfinite(const Eight<T>& r, const Span& span, int64_t* counters, int64_t n) {
  int32_t bad = 0;
  for (int j = 0; j < 8; ++j) bad += j >= span.lo && j < span.hi && !is_finite(r.v[j]);
  if (bad == 0 || counters == nullptr) return;
#if defined(__CUDA_ARCH__)
  atomicAdd(reinterpret_cast<unsigned long long*>(counters + n), static_cast<unsigned long long>(bad));
#else
  counters[n] += bad;
#endif
}

// ---- the walk ------------------------------------------------------------------------------------------------
//
// An item is one expert of one tile. Items follow each other by tile, then by expert, then by group of tiles: 2 MB of
// one output are written before 2 MB of the next, and a group's input is read from memory once and then from L2. On an
// H100, copies of 0.48 GB to eight outputs were written at 2689 GB/s in groups of 2 MB (0.82 of a fill, where 8/9 is
// the limit), at 2570 in groups of 0.25 MB, at 2195 in groups of 16 MB, which L2 does not keep, and at 2508 where every
// program wrote all eight outputs.
//
// The grid is what the device holds at once, and programs draw item after item from a counter. A program per item, as
// in those copies, starts items in the same order, but with noise it would fill 23 KB of shared memory with the table
// of the normals for 16 KB of output. With a fixed stride a slow multiprocessor falls behind for good: 2 percent of 8
// GB are 160 MB, which L2 does not keep. In flight are 8.7 MB of copies (four programs on each of 132 multiprocessors;
// the copies above had 8.6) and 6.5 MB with noise (three).

constexpr int64_t kTileBytes = 16384;  // of one output: TILE_BYTES of fastmerge.ops.replicate
constexpr int32_t kGroup = 128;        // tiles

// Philox blocks of a tile.
FM_HD int32_t tile_of(int32_t out_code) { return static_cast<int32_t>(kTileBytes / (8 * size_of(out_code))); }

// Where an item is.
struct Place {
  int32_t start;  // first tile of the group
  int32_t tile;   // in the group
  int32_t output;

  // `by` items further; false where there are no more.
  FM_MEMBER bool advance(const ReplicateWalk& walk, int32_t outputs, int32_t by) {
    for (tile += by; start < walk.tiles; start += walk.group, output = 0) {
      const int32_t rest = walk.tiles - start, size = rest < walk.group ? rest : walk.group;
      for (; output < outputs; ++output, tile -= size)
        if (tile < size) return true;
    }
    return false;
  }
};

// One item: `count` Philox blocks of one expert, from number `first` on.
struct Item {
  int64_t n;  // segment
  int64_t first;
  int64_t in, out;                   // addresses of the first block's first element, which may lie before the segment
  int64_t left;                      // elements from there to the segment's end
  int32_t count;                     // 0: there is no item
  int32_t before;                    // elements of the first block that lie before the segment
  int32_t low, whole;                // the first block that can be fast, and how many can
  uint32_t number;                   // the expert's
  double sigma;                      // rounded to the work type
  alignas(16) uint32_t keys[10][2];  // of the rounds of Philox
};

// The segment that has tile t: the last one that starts at or before it.
FM_HD int64_t segment_of(const ReplicateWalk& walk, int64_t segments, int32_t t) {
  int64_t n = 0, end = segments;
  while (end - n > 1) {
    const int64_t middle = (n + end) / 2;
    if (walk.first[middle] <= t)
      n = middle;
    else
      end = middle;
  }
  return n;
}

FM_HD void set_keys(uint64_t key, uint32_t keys[10][2]) {
  for (uint32_t r = 0; r < 10; ++r) {
    keys[r][0] = static_cast<uint32_t>(key) + r * 0x9E3779B9u;
    keys[r][1] = static_cast<uint32_t>(key >> 32) + r * 0xBB67AE85u;
  }
}

template <class In, class Out>
FM_HD void set_item(const ReplicateArgs& a, const ReplicateWalk& walk, const Place& place, Item& p) {
  const int32_t t = place.start + place.tile;
  p.n = segment_of(walk, a.table.segments, t);
  const Segment& s = a.table[p.n];
  const int64_t e0 = s.e0, first = (e0 >> 3) + (t - walk.first[p.n]) * walk.tile, at = 8 * first - e0;
  const int64_t in = s.in[0] + at * static_cast<int64_t>(sizeof(In));
  const int64_t out = a.table.output(s, place.output) + at * static_cast<int64_t>(sizeof(Out));
  const int64_t left = s.length - at, touched = (left + 7) >> 3, whole = left >> 3;
  const int32_t count = static_cast<int32_t>(touched < walk.tile ? touched : walk.tile);
  const int32_t low = at < 0, high = whole < count ? static_cast<int32_t>(whole) : count;
  const bool fast = (in | out) % 16 == 0 && first >> 32 == (first + count) >> 32;  // blocks differ in one word
  p.first = first, p.in = in, p.out = out, p.left = left, p.count = count;
  p.before = low ? static_cast<int32_t>(-at) : 0;
  p.low = low, p.whole = fast && high > low ? high - low : 0;
  p.number = static_cast<uint32_t>(a.numbers[place.output]);
  p.sigma = static_cast<typename WorkOf<In>::type>(a.sigma[s.group * a.table.outputs + place.output]);
  set_keys(static_cast<uint64_t>(s.key), p.keys);
}

// ---- an item -------------------------------------------------------------------------------------------------

// Without noise.
template <bool kFast, class Out, class In>
FM_HD Eight<Out> clean8(const Eight<In>& raw) {
  if constexpr (std::is_same_v<In, Out>) {
    return raw;
  } else {
    typename WorkOf<In>::type x[8];
    load8<kFast>(raw, x);
    return store8<kFast, Out>(x);
  }
}

// With the noise of block `low` of the blocks that have `high` in common.
template <bool kFast, class Out, class In, class W, class Table>
FM_HD Eight<Out> noisy8(const Eight<In>& raw, const uint32_t keys[10][2], uint32_t low, uint32_t high, uint32_t number,
                        W sigma, const Table& table) {
  uint32_t c[4] = {low, high, number, kNoise};
  for (int r = 0; r < 10; ++r) philox_round(c, keys[r][0], keys[r][1]);
  W x[8];
  load8<kFast>(raw, x);
  for (int j = 0; j < 4; ++j) {
    float first, second;
    normals(table, c[j], first, second);
    x[2 * j] = noisy(x[2 * j], sigma, first);
    x[2 * j + 1] = noisy(x[2 * j + 1], sigma, second);
  }
  return store8<kFast, Out>(x);
}

FM_HD uint32_t high_of(int64_t block) { return static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32); }

// A block that is not whole, or not aligned, or whose results are not all finite: a NaN needs the careful conversion,
// and what is not finite is counted.
template <class In, class Out, bool kRandom, class Table>
FM_HD void careful8(const ReplicateArgs& a, const Item& p, int32_t i, const Table& table) {
  using W = typename WorkOf<In>::type;
  const int64_t block = p.first + i, at = 8 * static_cast<int64_t>(i), rest = p.left - at;
  const Span span = {i == 0 ? p.before : 0, rest < 8 ? static_cast<int>(rest) : 8};
  const Eight<In> raw = get8<false, In>(p.in + at * static_cast<int64_t>(sizeof(In)), span);
  Eight<Out> made;
  if (kRandom && p.sigma != 0)
    made = noisy8<false, Out>(raw, p.keys, static_cast<uint32_t>(block), high_of(block), p.number,
                              static_cast<W>(p.sigma), table);
  else
    made = clean8<false, Out>(raw);
  put8<false>(made, p.out + at * static_cast<int64_t>(sizeof(Out)), span);
  add_nonfinite(made, span, a.nonfinite, p.n);
}

// The fast blocks of a thread: of p.whole, number `thread` and every `threads`-th from there on, `each` at most.
// Returns those that careful8 has to do, as bits. A device's are unrolled.
template <class In, class Out>
FM_HD uint32_t clean_run(const Item& p, int thread, int threads, int each) {
  constexpr int kDeep = 8 / sizeof(In);  // blocks that are read before the first is written: 64 bytes in flight
  constexpr int64_t kIn = 8 * sizeof(In), kOut = 8 * sizeof(Out);
  const int32_t some = p.whole - thread;
  const int64_t from = p.in + (p.low + thread) * kIn, to = p.out + (p.low + thread) * kOut;
  uint32_t left = 0;
  FM_UNROLL for (int k = 0; k < each; k += kDeep) {
    Eight<In> raw[kDeep];
    FM_UNROLL for (int j = k; j < k + kDeep; ++j) if (j < each && j * threads < some) raw[j - k] =
        get8<true, In>(from + j * threads * kIn, {0, 8});
    FM_UNROLL for (int j = k; j < k + kDeep; ++j) {
      if (j >= each || j * threads >= some) break;
      const Eight<Out> made = clean8<true, Out>(raw[j - k]);
      if (finite8(made))
        put8<true>(made, to + j * threads * kOut, {0, 8});
      else
        left |= 1u << j;
    }
  }
  return left;
}
template <class In, class Out, class Table>
FM_HD uint32_t noisy_run(const Item& p, int thread, int threads, int each, const Table& table) {
  using W = typename WorkOf<In>::type;
  constexpr int64_t kIn = 8 * sizeof(In), kOut = 8 * sizeof(Out);
  uint32_t keys[10][2];
  for (int r = 0; r < 10; ++r) keys[r][0] = p.keys[r][0], keys[r][1] = p.keys[r][1];
  const int32_t some = p.whole - thread;
  const int64_t from = p.in + (p.low + thread) * kIn, to = p.out + (p.low + thread) * kOut;
  const uint32_t low = static_cast<uint32_t>(p.first) + static_cast<uint32_t>(p.low + thread);
  const uint32_t high = high_of(p.first), number = p.number;
  const W sigma = static_cast<W>(p.sigma);
  uint32_t left = 0;
  FM_UNROLL for (int k = 0; k < each; ++k) {
    if (k * threads >= some) break;
    const Eight<In> raw = get8<true, In>(from + k * threads * kIn, {0, 8});
    const uint32_t block = low + static_cast<uint32_t>(k * threads);
    const Eight<Out> made = noisy8<true, Out>(raw, keys, block, high, number, sigma, table);
    if (finite8(made))
      put8<true>(made, to + k * threads * kOut, {0, 8});
    else
      left |= 1u << k;
  }
  return left;
}

// Thread `thread` of `threads`; a tile has `each` blocks for every one.
template <class In, class Out, bool kRandom, class Table>
FM_HD void replicate_item(const ReplicateArgs& a, const Item& p, int thread, int threads, int each,
                          const Table& table) {
  uint32_t left = kRandom && p.sigma != 0 ? noisy_run<In, Out>(p, thread, threads, each, table)
                                          : clean_run<In, Out>(p, thread, threads, each);
  for (int32_t fast = p.low + thread, edge = thread, at;;) {
    if (left != 0) {
      const bool mine = left & 1;
      at = fast, fast += threads, left >>= 1;
      if (!mine) continue;
    } else {
      if (edge >= p.count - p.whole) break;
      at = edge < p.low ? edge : edge + p.whole;
      edge += threads;
    }
    careful8<In, Out, kRandom>(a, p, at, table);
  }
}

}  // namespace fastmerge
