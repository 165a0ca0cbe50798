// Quantised weights: codes to values, the largest magnitudes of blocks, and values to codes. Rows lie wherever their
// addresses say; blocks are `width` columns wide, and what of them lies above each other is the caller's business.
#include <algorithm>

#include "coded.h"
#include "keep.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

using Floats = Pack<float>::V;
using Keys = Pack<float>::I;

template <int32_t kCode>
void dequantise_all(const DequantiseArgs& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const DequantiseRow& row = a.table[i];
    row_values<kCode>(reinterpret_cast<const uint8_t*>(row.codes), row.first, row.first, row.n, a.width,
                      reinterpret_cast<const float*>(row.scales), reinterpret_cast<const float*>(row.zeros),
                      reinterpret_cast<float*>(row.out));
  }
}

// The codes of values, and the values of these codes: nearest, ties to even, saturating. What is added and taken away
// again has a last place that is the result's.
struct Rounded {
  Keys code;
  Floats value;
};

template <int32_t kCode>
inline Rounded rounded(Floats x) {
  constexpr int kMantissa = kCode == kE4M3 ? 3 : 1;
  constexpr int32_t kBias = kCode == kE4M3 ? 120 : 126, kLast = (23 - kMantissa) << 23;  // 127 less the float's own
  constexpr int32_t kLeast = (kBias + 1) << 23;                                          // of its normal numbers
  const Floats top = Floats{} + (kCode == kE4M3 ? 448.0f : 6.0f);
  const Keys bits = reinterpret_cast<Keys>(x), magnitude = bits & Pack<float>::kMost, sign = bits ^ magnitude;
  Floats a = reinterpret_cast<Floats>(magnitude);
  a = select(a > top, top, a);
  Keys apart = reinterpret_cast<Keys>(a) & (255 << 23);
  apart = select(apart > kLeast, apart, Keys{} + kLeast) + kLast;
  const Floats sum = a + reinterpret_cast<Floats>(apart), value = sum - reinterpret_cast<Floats>(apart);
  const Keys normal = (reinterpret_cast<Keys>(value) >> (23 - kMantissa)) - (kBias << kMantissa);
  const Keys small = reinterpret_cast<Keys>(sum) - (kLeast + kLast);
  Keys code = select(reinterpret_cast<Keys>(value) < kLeast, small, normal);
  // A float8 keeps the sign of a zero, and a NaN; in four bits both are a plain 0.
  const Keys nan = Keys{} + (kCode == kE4M3 ? 0x7f : 0);
  code = select(x == x, code, nan);
  code |= kCode == kE4M3 ? (sign >> 24) & 128 : (x < Floats{}) & 8;
  return {code, reinterpret_cast<Floats>(reinterpret_cast<Keys>(value) | sign)};
}

// What codes are wrong by, in lanes.
struct Lost {
  static constexpr int kParts = static_cast<int>(kStep / kWidth<float>);
  Floats squares[kParts] = {}, errors[kParts] = {}, most[kParts] = {};

  void to(QuantiseError& e) const {
    for (int p = 0; p < kParts; ++p)
      for (int64_t l = 0; l < kWidth<float>; ++l) {
        e.squares += squares[p][l];
        e.errors += errors[p][l];
        e.most = std::max(e.most, static_cast<double>(most[p][l]));
      }
  }
};

// Codes of n values of one block. The last values that are no whole step have zeros behind them.
template <int32_t kCode, bool kDivide>
void round_run(const float* x, int64_t n, float factor, float scale, int32_t* codes, Lost& lost) {
  const Floats by = Floats{} + factor, back = Floats{} + scale;
  Lost sums = lost;
  const auto step = [&](const float* from, int32_t* to) {
    for (int p = 0; p < Lost::kParts; ++p) {
      const Floats v = get(from + p * kWidth<float>);
      const Rounded r = rounded<kCode>(kDivide ? v / by : v * by);
      memcpy(to + p * kWidth<float>, &r.code, sizeof r.code);
      const Floats d = r.value * back - v, far = masked(Keys{} + Pack<float>::kMost, d);
      sums.squares[p] = sums.squares[p] + v * v;
      sums.errors[p] = sums.errors[p] + d * d;
      sums.most[p] = select(far > sums.most[p], far, sums.most[p]);
    }
  };
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) step(x + j, codes + j);
  if (j < n) {
    float rest[kStep] = {};
    int32_t found[kStep];
    std::copy_n(x + j, n - j, rest);
    step(rest, found);
    std::copy_n(found, n - j, codes + j);
  }
  lost = sums;
}

template <int32_t kCode, bool kDivide>
void round_block(const float* x, int64_t n, float factor, float scale, int32_t* codes, Lost& lost) {
  // A division by a power of two is a multiplication, whose inverse is exact.
  const uint32_t bits = bits_of(factor);
  if (kDivide && (bits & 0x807fffffu) == 0 && bits >= (1u << 23) && bits <= (253u << 23))
    return round_run<kCode, false>(x, n, float_of((254u << 23) - bits), scale, codes, lost);
  round_run<kCode, kDivide>(x, n, factor, scale, codes, lost);
}

template <int32_t kCode, bool kDivide>
void quantise_all(const QuantiseArgs& a) {
  int32_t apart[kBlock];  // codes that wait for their bytes, which may lie where values are
  for (int64_t i = 0; i < a.rows; ++i) {
    const QuantiseRow& row = a.table[i];
    const float* x = reinterpret_cast<const float*>(row.x);
    const float* factors = reinterpret_cast<const float*>(row.factors);
    const float* scales = reinterpret_cast<const float*>(row.scales);
    uint8_t* codes = reinterpret_cast<uint8_t*>(row.codes);
    for (int64_t at = 0; at < row.n;) {
      const int64_t stop = std::min(at + kBlock, row.n), n = stop - at;
      Lost lost;
      for (int64_t done = 0, m; done < n; done += m, at += m) {
        const int64_t block = at / a.width;
        m = std::min((block + 1) * a.width, stop) - at;
        round_block<kCode, kDivide>(x + at, m, factors[block], scales[block], apart + done, lost);
      }
      lost.to(*a.error);
      if (four(kCode)) {
        FM_LOOP for (int64_t j = 0; j < n / 2; ++j) codes[j] =
            static_cast<uint8_t>(apart[2 * j] | (apart[2 * j + 1] << 4));
      } else {
        FM_LOOP for (int64_t j = 0; j < n; ++j) codes[j] = static_cast<uint8_t>(apart[j]);
      }
      codes += four(kCode) ? n / 2 : n;
    }
  }
}

}  // namespace

void dequantise(const DequantiseArgs& a) {
  switch (a.code) {
    case kE4M3:
      return dequantise_all<kE4M3>(a);
    case kE5M2:
      return dequantise_all<kE5M2>(a);
    case kInt8:
      return dequantise_all<kInt8>(a);
    case kInt4:
      return dequantise_all<kInt4>(a);
    default:
      return dequantise_all<kE2M1>(a);
  }
}

void largest(const LargestArgs& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const LargestRow& row = a.table[i];
    const float* x = reinterpret_cast<const float*>(row.x);
    float* out = reinterpret_cast<float*>(row.out);
    for (int64_t block = 0, at = 0; at < row.n; ++block, at += a.width) {
      const int64_t n = std::min(a.width, row.n - at);
      // As integers the magnitudes of floats are in the same order, NaN above all.
      uint32_t lanes[kStep] = {};
      int64_t j = 0;
      for (; j + kStep <= n; j += kStep) {
        FM_LOOP for (int64_t l = 0; l < kStep; ++l) {
          const uint32_t mag = bits_of(x[at + j + l]) & 0x7fffffffu;
          lanes[l] = mag > lanes[l] ? mag : lanes[l];
        }
      }
      uint32_t most = bits_of(out[block]);
      for (; j < n; ++j) most = std::max(most, bits_of(x[at + j]) & 0x7fffffffu);
      for (int64_t l = 0; l < kStep; ++l) most = std::max(most, lanes[l]);
      out[block] = float_of(most);
    }
  }
}

void quantise(const QuantiseArgs& a) {
  if (a.code == kE4M3) return a.divide ? quantise_all<kE4M3, true>(a) : quantise_all<kE4M3, false>(a);
  return a.divide ? quantise_all<kE2M1, true>(a) : quantise_all<kE2M1, false>(a);
}

}  // namespace FM_ISA
}  // namespace fastmerge
