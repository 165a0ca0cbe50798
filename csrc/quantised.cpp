// Quantised weights: codes to values, the largest magnitudes of blocks, and values to codes. Rows lie wherever their
// addresses say; blocks are `width` columns wide, and what of them lies above each other is the caller's business.
#include <algorithm>

#include "kernels.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

// The value of a code. The fields of a small float, moved to those of fp32, lack the difference of the biases; what is
// below its normal numbers is a multiple of its last place. Without denormal operands, which some cores handle in
// microcode.
template <int32_t kCode>
FM_HD float value_of(uint32_t code) {
  if (kCode == kInt8) return static_cast<float>(static_cast<int32_t>(static_cast<int8_t>(code)));
  if (kCode == kInt4) return static_cast<float>(static_cast<int32_t>(code) - 8);
  constexpr int32_t kMantissa = kCode == kE4M3 ? 3 : kCode == kE5M2 ? 2 : 1;
  constexpr uint32_t kBias = kCode == kE4M3 ? 120 : kCode == kE5M2 ? 112 : 126;  // 127 less the float's own
  constexpr float kLast = kCode == kE4M3 ? 0x1p-9f : kCode == kE5M2 ? 0x1p-16f : 0.5f;
  constexpr uint32_t kSign = kCode == kE2M1 ? 8 : 128;
  const uint32_t mag = code & (kSign - 1), sign = (code & kSign) << (kCode == kE2M1 ? 28 : 24);
  const uint32_t normal = (mag << (23 - kMantissa)) + (kBias << 23);
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(mag)) * kLast);
  uint32_t bits = mag < (1u << kMantissa) ? small : normal;
  if (kCode == kE4M3) bits = mag == 0x7fu ? 0x7fc00000u : bits;
  if (kCode == kE5M2) bits = mag > 0x7cu ? 0x7fc00000u : mag == 0x7cu ? 0x7f800000u : bits;
  return float_of(bits | sign);
}

// The code of a value: nearest, ties to even, saturating; NaN where there is one.
template <int32_t kCode>
FM_HD uint32_t code_of(float x) {
  const uint32_t sign = bits_of(x) >> 31;
  if (kCode == kE2M1) {
    const float a = float_of(bits_of(x) & 0x7fffffffu);
    const uint32_t mag = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5);
    return mag | (x < 0 ? 8u : 0u);
  }
  const float a = std::min(float_of(bits_of(x) & 0x7fffffffu), 448.0f);
  const uint32_t mag = bits_of(a);
  // Below 2^-6 the addition of 2^14 rounds to a multiple of 2^-9, which is the result's last place.
  const uint32_t small = bits_of(a + 0x1p14f) - 0x46800000u;
  const uint32_t normal = ((mag + 0x7ffffu + ((mag >> 20) & 1u)) >> 20) - 960u;
  const uint32_t r = mag < 0x3c800000u ? small : normal;
  return (x == x ? r : 0x7fu) | (sign << 7);
}

constexpr int64_t kChunk = 256;  // codes that are widened at a time

constexpr bool four(int32_t code) { return code == kInt4 || code == kE2M1; }

// Values of codes that were widened: compilers compare bytes as bytes, and then widen every mask.
template <int32_t kCode>
void values_of(const uint32_t* codes, int64_t n, float zero, float scale, float* out) {
  FM_LOOP for (int64_t j = 0; j < n; ++j) out[j] = (value_of<kCode>(codes[j]) - zero) * scale;
}

template <int32_t kCode>
void values_of(const uint8_t* codes, int64_t c, int64_t n, float zero, float scale, float* out) {
  uint32_t wide[kChunk];
  for (const int64_t stop = c + n; c < stop;) {
    const int64_t m = std::min(stop - c, kChunk - c % 2);
    if (four(kCode)) {
      if (c % 2) wide[0] = codes[c / 2] >> 4;
      uint32_t* even = wide + c % 2;
      const uint8_t* p = codes + (c + 1) / 2;
      const int64_t left = m - c % 2;
      FM_LOOP for (int64_t j = 0; j < left / 2; ++j) {
        even[2 * j] = p[j] & 15u;
        even[2 * j + 1] = p[j] >> 4;
      }
      if (left % 2) even[left - 1] = p[left / 2] & 15u;
    } else {
      FM_LOOP for (int64_t j = 0; j < m; ++j) wide[j] = codes[c + j];
    }
    values_of<kCode>(wide, m, zero, scale, out);
    c += m, out += m;
  }
}

template <int32_t kCode>
void dequantise_all(const DequantiseArgs& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const DequantiseRow& row = a.table[i];
    const float* scales = reinterpret_cast<const float*>(row.scales);
    const float* zeros = reinterpret_cast<const float*>(row.zeros);
    float* out = reinterpret_cast<float*>(row.out);
    for (int64_t at = row.first, stop = row.first + row.n; at < stop;) {
      const int64_t block = at / a.width, end = std::min((block + 1) * a.width, stop);
      values_of<kCode>(reinterpret_cast<const uint8_t*>(row.codes), at, end - at, zeros ? zeros[block] : 0.0f,
                       scales[block], out + (at - row.first));
      at = end;
    }
  }
}

// One block of a row: codes, and what they are wrong by.
template <int32_t kCode, bool kDivide>
void codes_of(const float* x, int64_t n, float factor, float scale, uint8_t* codes, QuantiseError& error) {
  float squares[kStep] = {}, errors[kStep] = {}, most[kStep] = {};
  uint32_t apart[kChunk];
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = std::min(kChunk, n - i);
    FM_LOOP for (int64_t j = 0; j < m; ++j) {
      const float scaled = kDivide ? x[i + j] / factor : x[i + j] * factor;
      apart[j] = code_of<kCode>(scaled);
    }
    int64_t j = 0;
    for (; j + kStep <= m; j += kStep) {
      FM_LOOP for (int64_t l = 0; l < kStep; ++l) {
        const float v = x[i + j + l], d = value_of<kCode>(apart[j + l]) * scale - v, far = d < 0 ? -d : d;
        squares[l] += v * v;
        errors[l] += d * d;
        most[l] = far > most[l] ? far : most[l];
      }
    }
    for (; j < m; ++j) {
      const float v = x[i + j], d = value_of<kCode>(apart[j]) * scale - v;
      squares[0] += v * v;
      errors[0] += d * d;
      most[0] = std::max(most[0], d < 0 ? -d : d);
    }
    if (four(kCode)) {
      FM_LOOP for (j = 0; j < m / 2; ++j) {
        codes[i / 2 + j] = static_cast<uint8_t>(apart[2 * j] | (apart[2 * j + 1] << 4));
      }
    } else {
      FM_LOOP for (j = 0; j < m; ++j) codes[i + j] = static_cast<uint8_t>(apart[j]);
    }
  }
  for (int64_t l = 0; l < kStep; ++l) {
    error.squares += squares[l];
    error.errors += errors[l];
    error.most = std::max(error.most, static_cast<double>(most[l]));
  }
}

template <int32_t kCode, bool kDivide>
void quantise_all(const QuantiseArgs& a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    const QuantiseRow& row = a.table[i];
    const float* x = reinterpret_cast<const float*>(row.x);
    const float* factors = reinterpret_cast<const float*>(row.factors);
    const float* scales = reinterpret_cast<const float*>(row.scales);
    uint8_t* codes = reinterpret_cast<uint8_t*>(row.codes);
    for (int64_t block = 0, at = 0; at < row.n; ++block, at += a.width) {
      codes_of<kCode, kDivide>(x + at, std::min(a.width, row.n - at), factors[block], scales[block],
                               codes + (four(kCode) ? at / 2 : at), *a.error);
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
