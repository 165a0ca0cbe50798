// The random 16 bits of consecutive elements, 8 of each Philox counter. For kernel sources
// only (host). Everything has internal linkage.
#pragma once

#include <algorithm>

#include "bits.h"
#include "lanes.h"

namespace fastmerge {
namespace {

constexpr int64_t kDrawn = 128;  // elements whose bits are drawn together

// A word of which every lane of a vector has a copy.
#if defined(__AVX2__)
using Same = Word;
FM_LANES Same same(uint32_t x) { return _mm256_set1_epi32(static_cast<int32_t>(x)); }
#else
using Same = uint32_t;
FM_LANES Same same(uint32_t x) { return x; }
#endif

// What the counters of a block share. Of the four words only the first differs from counter to counter, and two rounds
// pass before all products depend on it: of twenty multiplications a counter takes eighteen.
struct Stream {
  Same keys[10][2];
  Same high2;  // round 0: x2 = hi(p0) ^ high2
  Same mix0;   // round 1: x0 = hi(p1) ^ mix0, x2 = lo(p0 of round 0) ^ mix2
  Same mix2;
  Same last3;  // round 2: x2 = hi(p0) ^ last3

  Stream(uint64_t key, uint32_t model, uint32_t op, uint32_t high) {
    const auto low = static_cast<uint32_t>(key), top = static_cast<uint32_t>(key >> 32);
    for (uint32_t r = 0; r < 10; ++r) {
      keys[r][0] = same(low + r * 0x9E3779B9u);
      keys[r][1] = same(top + r * 0xBB67AE85u);
    }
    uint32_t c[4] = {0, high, model, op};
    philox_round(c, low, top);
    const uint64_t product = static_cast<uint64_t>(0xD2511F53u) * c[0];
    high2 = same(op ^ top);
    mix0 = same(c[1] ^ (low + 0x9E3779B9u));
    mix2 = same(static_cast<uint32_t>(product >> 32) ^ (top + 0xBB67AE85u));
    last3 = same(static_cast<uint32_t>(product) ^ (top + 2 * 0xBB67AE85u));
  }
};

// Random bits of 32 elements, those of four counters.
#if defined(__AVX2__)

struct Drawn {
  Word low, high;  // the first two counters, the last two
};

FM_LANES void put32(const Drawn& d, uint16_t* to) {
  put<false>(to, d.low);
  put<false>(to + 16, d.high);
}

// One bit per element: whether its 16 bits are below t, 0 < t < 65536.
FM_LANES uint32_t below(const Drawn& d, uint32_t t) {
  const Word most = _mm256_set1_epi16(static_cast<int16_t>(t - 1));
  const Word low = _mm256_cmpeq_epi16(_mm256_min_epu16(d.low, most), d.low);
  const Word high = _mm256_cmpeq_epi16(_mm256_min_epu16(d.high, most), d.high);
  const Word bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

FM_LANES Word high_half(Word x) { return _mm256_srli_epi64(x, 32); }
FM_LANES Word times(Word x, uint32_t m) { return _mm256_mul_epu32(x, _mm256_set1_epi64x(m)); }

// Four words that are complete here: gcc, free to put off parts of a round, had more of them than registers, and drew
// 0.9 times as fast.
FM_LANES void settle(Word& a, Word& b, Word& c, Word& d) { __asm__("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d)); }

// Hands take(i, Drawn) those of elements 32 i .. 32 i + 31 from the counter `low` on, kDrawn and more until there are
// n; the counters of those n have the same high word, so the first product is a running sum. A word lives in the low
// half of a 64-bit lane; the multiplication reads only that half, so the other may hold anything. x1 and x3 wait for
// the next round with its key, so that a round takes five cycles; rounds wait for each other, and four sets of counters
// are 1.07 times as fast as two, though their words do not fit the registers (Zen 4, AVX2).
template <class Take>
FM_LANES void draw(const Stream& s, uint32_t low, int64_t n, Take take) {
  constexpr int kSets = kDrawn / 32;
  Word next = times(_mm256_add_epi32(_mm256_set1_epi64x(low), _mm256_setr_epi64x(0, 2, 1, 3)), 0xD2511F53u);
  for (int i = 0; 32 * i < n; i += kSets) {
    Word x0[kSets], x1[kSets], x2[kSets], x3[kSets];
    for (int n = 0; n < kSets; ++n) {
      const Word p = next;
      next = _mm256_add_epi64(next, _mm256_set1_epi64x(4 * int64_t{0xD2511F53u}));
      const Word q = times(_mm256_xor_si256(high_half(p), s.high2), 0xCD9E8D57u);
      x0[n] = _mm256_xor_si256(high_half(q), s.mix0);
      x1[n] = _mm256_xor_si256(q, s.keys[2][0]);
      x2[n] = _mm256_xor_si256(p, s.mix2);
    }
    for (int n = 0; n < kSets; ++n) {
      const Word p = times(x0[n], 0xD2511F53u), q = times(x2[n], 0xCD9E8D57u);
      x0[n] = _mm256_xor_si256(high_half(q), x1[n]);
      x1[n] = _mm256_xor_si256(q, s.keys[3][0]);
      x2[n] = _mm256_xor_si256(high_half(p), s.last3);
      x3[n] = _mm256_xor_si256(p, s.keys[3][1]);
      settle(x0[n], x1[n], x2[n], x3[n]);
    }
#pragma GCC unroll 6
    for (int r = 3; r < 9; ++r)
      for (int n = 0; n < kSets; ++n) {
        const Word p = times(x0[n], 0xD2511F53u), q = times(x2[n], 0xCD9E8D57u);
        x0[n] = _mm256_xor_si256(high_half(q), x1[n]);
        x2[n] = _mm256_xor_si256(high_half(p), x3[n]);
        x1[n] = _mm256_xor_si256(q, s.keys[r + 1][0]);
        x3[n] = _mm256_xor_si256(p, s.keys[r + 1][1]);
        settle(x0[n], x1[n], x2[n], x3[n]);
      }
    for (int n = 0; n < kSets; ++n) {
      const Word p = times(x0[n], 0xD2511F53u), q = times(x2[n], 0xCD9E8D57u), zero = _mm256_setzero_si256();
      const Word first = _mm256_xor_si256(_mm256_shuffle_epi32(q, 0xb1), _mm256_blend_epi32(x1[n], zero, 0xaa));
      const Word last = _mm256_xor_si256(_mm256_shuffle_epi32(p, 0xb1), _mm256_blend_epi32(x3[n], zero, 0xaa));
      take(i + n, Drawn{_mm256_unpacklo_epi64(first, last), _mm256_unpackhi_epi64(first, last)});
    }
  }
}

#else

struct Drawn {
  uint32_t words[16];
};

FM_LANES void put32(const Drawn& d, uint16_t* to) { memcpy(to, d.words, sizeof d.words); }

FM_LANES uint32_t below(const Drawn& d, uint32_t t) {
  uint16_t u[32];
  put32(d, u);
  uint32_t bits = 0;
  for (int j = 0; j < 32; ++j) bits |= (u[j] < t ? 1u : 0u) << j;
  return bits;
}

template <class Take>
FM_LANES void draw(const Stream& s, uint32_t low, int64_t n, Take take) {
  constexpr int kCounters = 64;
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int64_t from = 0; from < n; from += 8 * kCounters) {
    const int count = n - from < 8 * kCounters ? static_cast<int>((n - from + 63) / 64 * 8) : kCounters;
    const uint32_t first = low + static_cast<uint32_t>(from / 8);
    for (int i = 0; i < count; ++i) {
      const uint64_t p = static_cast<uint64_t>(0xD2511F53u) * (first + static_cast<uint32_t>(i));
      const uint64_t q = static_cast<uint64_t>(0xCD9E8D57u) * (static_cast<uint32_t>(p >> 32) ^ s.high2);
      uint32_t c[4] = {static_cast<uint32_t>(q >> 32) ^ s.mix0, static_cast<uint32_t>(q),
                       static_cast<uint32_t>(p) ^ s.mix2, 0};
      philox_round(c, s.keys[2][0], 0);
      c0[i] = c[0], c1[i] = c[1], c2[i] = c[2] ^ s.last3, c3[i] = c[3];
    }
    for (int r = 3; r < 10; ++r)
      for (int i = 0; i < count; ++i) {
        uint32_t c[4] = {c0[i], c1[i], c2[i], c3[i]};
        philox_round(c, s.keys[r][0], s.keys[r][1]);
        c0[i] = c[0], c1[i] = c[1], c2[i] = c[2], c3[i] = c[3];
      }
    for (int i = 0; i < count; i += 4) {
      Drawn d;
      for (int j = 0; j < 4; ++j) {
        uint32_t* w = d.words + 4 * j;
        w[0] = c0[i + j], w[1] = c1[i + j], w[2] = c2[i + j], w[3] = c3[i + j];
      }
      take(static_cast<int>(from / 32) + i / 4, d);
    }
  }
}

#endif

// How many counters from number `block` on have its high word.
inline uint64_t same_high(uint64_t block) { return (uint64_t{1} << 32) - (block & 0xffffffffu); }

// The 16 random bits of n elements from e0 on.
inline void random_block(uint64_t key, uint32_t model, uint32_t op, int64_t e0, int64_t n, uint16_t* out) {
  int64_t done = -(e0 & 7);  // elements of the first counter that come before e0 are dropped
  for (uint64_t block = static_cast<uint64_t>(e0) >> 3; done < n;) {
    const Stream stream(key, model, op, static_cast<uint32_t>(block >> 32));
    const int64_t end = std::min(n, done + 8 * static_cast<int64_t>(same_high(block)));
    for (int64_t some; done < end; done += some, block += static_cast<uint64_t>(some + 7) / 8) {
      some = done < 0 ? 0 : (end - done) & -kDrawn;
      uint16_t u[kDrawn], *words = some ? out + done : u;
      draw(stream, static_cast<uint32_t>(block), some ? some : kDrawn,
           [words](int i, const Drawn& d) { put32(d, words + 32 * i); });
      if (some) continue;
      some = std::min(kDrawn, end - done);
      const int64_t from = std::max<int64_t>(done, 0);
      memcpy(out + from, u + (from - done), static_cast<size_t>(done + some - from) * 2);
    }
  }
}

}  // namespace
}  // namespace fastmerge
