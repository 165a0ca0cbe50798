// Codes to values, and inputs that are codes and scales: a block at a time becomes fp32 in the first-level cache, and
// kernels see that block as a piece of an fp32 tensor. For kernel sources only.
#pragma once

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "tile.h"

namespace fastmerge {
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

constexpr int64_t kChunk = 256;  // codes that are widened at a time

constexpr bool four(int64_t code) { return code == kInt4 || code == kE2M1; }

#if defined(__AVX2__)
// Values of 32 codes are bf16 numbers, whose halves are found as bytes: twice as fast as fp32 by fp32.
struct Halves {
  __m256i low, high;
};

FM_HD __m256i sixteen_bytes(uint64_t low, uint64_t high) {
  return _mm256_broadcastsi128_si256(_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)));
}

template <int32_t kCode>
Halves halves_of(const uint8_t* p);
template <>
inline __attribute__((always_inline)) Halves halves_of<kE4M3>(const uint8_t* p) {
  const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i mag = _mm256_and_si256(code, _mm256_set1_epi8(0x7f)),
                last = _mm256_cmpeq_epi8(mag, _mm256_set1_epi8(0x7f));
  const __m256i eighths = _mm256_cmpgt_epi8(_mm256_set1_epi8(8), mag);  // multiples of 2^-9
  const __m256i shifted = _mm256_and_si256(_mm256_srli_epi16(code, 4), _mm256_set1_epi8(7));
  __m256i high = _mm256_add_epi8(shifted, _mm256_set1_epi8(0x3c));
  __m256i low = _mm256_and_si256(_mm256_slli_epi16(code, 4), _mm256_set1_epi8(static_cast<char>(0xf0)));
  high = _mm256_blendv_epi8(high, _mm256_shuffle_epi8(sixteen_bytes(0x3c3c3c3c3b3b3b00, 0), mag), eighths);
  low = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(sixteen_bytes(0x60402000c0800000, 0), mag), eighths);
  high = _mm256_or_si256(high, mag & last);  // NaN: 0x7fc0
  low = _mm256_andnot_si256(_mm256_and_si256(last, _mm256_set1_epi8(0x30)), low);
  return {low, _mm256_or_si256(high, _mm256_andnot_si256(_mm256_set1_epi8(0x7f), code))};
}
template <>
inline __attribute__((always_inline)) Halves halves_of<kE2M1>(const uint8_t* p) {
  const __m128i two = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), mask = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(two, mask), second = _mm_and_si128(_mm_srli_epi16(two, 4), mask);
  const __m256i code = _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  const uint64_t high = 0x404040403f3f3f00, sign = 0x8080808080808080;
  return {_mm256_shuffle_epi8(sixteen_bytes(0xc0804000c0800000, 0xc0804000c0800000), code),
          _mm256_shuffle_epi8(sixteen_bytes(high, high | sign), code)};
}

FM_HD void scaled(Halves h, __m256 zero, __m256 scale, float* out) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i a = _mm256_unpacklo_epi8(h.low, h.high), b = _mm256_unpackhi_epi8(h.low, h.high);
  __m256 v[4] = {
      _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, a)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, a)),
      _mm256_castsi256_ps(_mm256_unpacklo_epi16(none, b)), _mm256_castsi256_ps(_mm256_unpackhi_epi16(none, b))};
  for (__m256& x : v) x = (x - zero) * scale;
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(v[0], v[1], 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(v[2], v[3], 0x20));
  _mm256_storeu_ps(out + 16, _mm256_permute2f128_ps(v[0], v[1], 0x31));
  _mm256_storeu_ps(out + 24, _mm256_permute2f128_ps(v[2], v[3], 0x31));
}
#endif

// Values of codes that were widened: compilers compare bytes as bytes, and then widen every mask.
template <int32_t kCode>
void widened_values(const uint32_t* codes, int64_t n, float zero, float scale, float* out) {
  FM_LOOP for (int64_t j = 0; j < n; ++j) out[j] = (value_of<kCode>(codes[j]) - zero) * scale;
}

// (value - zero) * scale of codes c .. c + n of an array.
template <int32_t kCode>
void values_of(const uint8_t* codes, int64_t c, int64_t n, float zero, float scale, float* out) {
#if defined(__AVX2__)
  if constexpr (kCode == kE4M3 || kCode == kE2M1) {
    const __m256 zeros = _mm256_set1_ps(zero), scales = _mm256_set1_ps(scale);
    for (; n >= 32 && (kCode == kE4M3 || c % 2 == 0); c += 32, n -= 32, out += 32)
      scaled(halves_of<kCode>(codes + (four(kCode) ? c / 2 : c)), zeros, scales, out);
  }
#endif
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
    widened_values<kCode>(wide, m, zero, scale, out);
    c += m, out += m;
  }
}

// The same of a run within a row: `column` is that of code c; scales and zeros (or null) are those of the row's blocks.
template <int32_t kCode>
void row_values(const uint8_t* codes, int64_t c, int64_t column, int64_t n, int64_t width, const float* scales,
                const float* zeros, float* out) {
  for (const int64_t stop = column + n; column < stop;) {
    const int64_t block = column / width, m = std::min((block + 1) * width, stop) - column;
    values_of<kCode>(codes, c, m, zeros ? zeros[block] : 0.0f, scales[block], out);
    c += m, column += m, out += m;
  }
}

template <int32_t kCode>
void decode_as(const Coded& in, int64_t e, int64_t n, float* out) {
  const char* here = reinterpret_cast<const char*>(&in);
  const auto* codes = reinterpret_cast<const uint8_t*>(here + in.codes);
  const int64_t across = (in.columns + in.width - 1) / in.width, down = (in.height + in.high - 1) / in.high;
  for (const int64_t stop = e + n; e < stop;) {
    const int64_t row = e / in.columns, column = e % in.columns, m = std::min(in.columns - column, stop - e);
    const int64_t at = 4 * across * (row / in.height * down + row % in.height / in.high - in.row);
    row_values<kCode>(codes, e - in.first, column, m, in.width, reinterpret_cast<const float*>(here + in.scales + at),
                      in.zeros ? reinterpret_cast<const float*>(here + in.zeros + at) : nullptr, out);
    e += m, out += m;
  }
}

// Elements e .. e + n of a coded input.
__attribute__((noinline, unused)) void decode(const Coded& in, int64_t e, int64_t n, float* out) {
  switch (in.code) {
    case kE4M3:
      return decode_as<kE4M3>(in, e, n, out);
    case kE5M2:
      return decode_as<kE5M2>(in, e, n, out);
    case kInt8:
      return decode_as<kInt8>(in, e, n, out);
    case kInt4:
      return decode_as<kInt4>(in, e, n, out);
    default:
      return decode_as<kE2M1>(in, e, n, out);
  }
}

// load_any of n <= kBlock elements of any input of a segment.
template <class W>
void load_input(const Table& t, const Segment& s, int i, int64_t at, int64_t n, W* dst) {
  if (t.codes[i] != kCoded) return load_any(t.codes[i], s.in[i], at, n, dst);
  alignas(64) float values[kBlock];
  decode(*reinterpret_cast<const Coded*>(s.in[i]), s.e0 + at, n, values);
  load_block(values, n, dst);
}

// Blocks of a table's segments, in which inputs that are coded are fp32, and with them what fp32 holds exactly: then
// all inputs are of one type. So are results of 16 bits until a block of them is stored. Where nothing is coded, the
// segments themselves.
class Stage {
 public:
  explicit Stage(const Table& t, int32_t out_code = kF32) : table_(t), given_(t.codes), out_code_(out_code) {
    used_ = std::find(t.codes, t.codes + t.inputs, int32_t{kCoded}) != t.codes + t.inputs;
    if (!used_) return;
    const size_t inputs = static_cast<size_t>(t.inputs);
    through_ = !t.wide() && size_of(out_code) == 2;
    row_.reset(new int64_t[columns_of(t)]);
    codes_.reset(new int32_t[inputs]);
    memory_.reset(new float[(inputs + 1) * kApart + 16]);
    values_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) / sizeof(float);
    for (size_t i = 0; i < inputs; ++i) codes_[i] = t.codes[i] == kF64 ? kF64 : kF32;
    table_.codes = codes_.get();
  }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;

  bool used() const { return used_; }
  // The table and the output with the types that blocks have.
  const Table& table() const { return table_; }
  int32_t out_code() const { return through_ ? int32_t{kF32} : out_code_; }

  // The segment for whoever works on elements [at, at + n) of it, n <= kBlock; `model` >= 0: on the base and that model
  // only. Holds until the next one is asked for.
  const Segment& block(const Segment& s, int64_t at, int64_t n, int32_t model = -1) {
    if (!used_) return s;
    auto& row = *reinterpret_cast<Segment*>(row_.get());
    std::copy_n(&s.out, columns_of(table_), row_.get());
    if (through_) row.out = place(table_.inputs, at);
    for (int32_t i = 0; i < table_.inputs; ++i) {
      if (given_[i] == kF64 || (model >= 0 && i != 0 && i != model + 1)) continue;
      float* to = values_ + i * kApart;
      if (given_[i] == kCoded)
        decode(*reinterpret_cast<const Coded*>(s.in[i]), s.e0 + at, n, to);
      else
        load_any(given_[i], s.in[i], at, n, to);
      row.in[i] = place(i, at);
    }
    return row;
  }

  // Ends a block whose results are written, `bad` of them not finite: how many of those that the segment gets are not.
  int64_t stored(const Segment& s, int64_t at, int64_t n, int64_t bad) const {
    return through_ ? store_any(out_code_, s.out, at, n, values_ + table_.inputs * kApart) : bad;
  }

 private:
  static constexpr int64_t kApart = kBlock + 16;  // streams 4 KiB apart would share cache sets
  static size_t columns_of(const Table& t) { return static_cast<size_t>(kHeader + t.inputs + t.outputs - 1); }
  // The address from which element `at` is the first of a buffer.
  int64_t place(int32_t i, int64_t at) const {
    return reinterpret_cast<int64_t>(values_ + i * kApart) - at * static_cast<int64_t>(sizeof(float));
  }

  Table table_;
  const int32_t* given_;
  int32_t out_code_;
  bool used_, through_ = false;
  float* values_ = nullptr;  // of every input, and results
  std::unique_ptr<int64_t[]> row_;
  std::unique_ptr<int32_t[]> codes_;
  std::unique_ptr<float[]> memory_;
};

}  // namespace
}  // namespace fastmerge
