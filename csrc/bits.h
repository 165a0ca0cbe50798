// The frozen arithmetic of single values: conversions, magnitude keys and the counter generator.
// Shared by every kernel, host and CUDA. Only functions with internal linkage live here, so that a copy
// compiled for one instruction set can never be picked by the linker for another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FM_HD static inline __host__ __device__
#define FM_MEMBER inline __host__ __device__
#else
#define FM_HD static inline __attribute__((always_inline, unused))
#define FM_MEMBER inline __attribute__((always_inline))
#endif

namespace fastmerge {

// Codes of element types, as fastmerge.dtypes numbers them; and of inputs that are codes and scales (Coded, kernels.h).
enum Code : int32_t { kF64 = 0, kF32 = 1, kF16 = 2, kBF16 = 3, kCoded = 4 };

// Storage of the two 16-bit types; fp32 and fp64 are stored as float and double.
struct Fp16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

constexpr uint16_t kNanBF16 = 0x7fc0, kNanF16 = 0x7e00;
constexpr uint32_t kNanF32 = 0x7fc00000u;
constexpr uint64_t kNanF64 = 0x7ff8000000000000ull;

// From the address of an element to that of the next: all elements of a coded input have the same.
FM_HD int64_t size_of(int32_t code) { return code == kF64 ? 8 : code == kF32 ? 4 : code == kCoded ? 0 : 2; }

FM_HD uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
FM_HD uint64_t bits_of(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u;
}
FM_HD float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
FM_HD double double_of(uint64_t u) {
  double x;
  memcpy(&x, &u, 8);
  return x;
}

// Magnitude key: orders |x| as an unsigned integer; NaNs come last.
FM_HD uint32_t key_of(float x) { return bits_of(x) & 0x7fffffffu; }
FM_HD uint64_t key_of(double x) { return bits_of(x) & 0x7fffffffffffffffull; }

// The unsigned integer type of the keys of a work type.
template <class W>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
};
template <class W>
using Key = typename KeyOf<W>::type;

// ---- loads: exact ------------------------------------------------------------------------------------

FM_HD float widen(float x) { return x; }
FM_HD float widen(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
FM_HD float widen(Fp16 x) {
  // Branch-free, and without denormal operands, which some cores handle in microcode.
  const uint32_t h = x.bits, mag = h & 0x7fffu;
  const uint32_t normal = (mag << 13) + (mag >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t small = bits_of(static_cast<float>(static_cast<int32_t>(mag)) * 0x1p-24f);
  return float_of((mag < 0x400u ? small : normal) | ((h & 0x8000u) << 16));
}

FM_HD double widen(double x) { return x; }  // stays fp64: an fp64 input makes the work type double

template <class W, class T>
FM_HD W load(T x) {
  return static_cast<W>(widen(x));
}

// ---- stores: one rounding to nearest even, NaN canonical ----------------------------------------------

FM_HD uint16_t bf16_bits(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t r = (u + ((u >> 16) & 1u) + 0x7fffu) >> 16;
  return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? kNanBF16 : r);
}

FM_HD uint16_t fp16_bits(float x) {
  const uint32_t u = bits_of(x), mag = u & 0x7fffffffu;
  // Below 2^-14 the addition of 0.5 rounds to a multiple of 2^-24, which is the result's last place.
  const uint32_t small = bits_of(float_of(mag) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  uint32_t r = mag < 0x38800000u ? small : normal;
  r = mag >= 0x477ff000u ? 0x7c00u : r;
  r = (r | ((u >> 16) & 0x8000u));
  return static_cast<uint16_t>(mag > 0x7f800000u ? kNanF16 : r);
}

// fp64 to fp32 rounded to odd: a later rounding to 16 bits then equals one rounding of the fp64 value.
FM_HD float odd_f32(double x) {
  const float f = static_cast<float>(x);
  const double back = static_cast<double>(f);
  uint32_t u = bits_of(f);
  const uint32_t above = key_of(back) > key_of(x) ? 1u : 0u;
  const uint32_t inexact = (back != x && x == x) ? 1u : 0u;
  u = inexact ? ((u - above) | 1u) : u;
  return float_of(u);
}

FM_HD void round_to(float x, Bf16& out) { out.bits = bf16_bits(x); }
FM_HD void round_to(float x, Fp16& out) { out.bits = fp16_bits(x); }
FM_HD void round_to(float x, float& out) { out = x == x ? x : float_of(kNanF32); }
FM_HD void round_to(float x, double& out) { out = x == x ? static_cast<double>(x) : double_of(kNanF64); }
FM_HD void round_to(double x, Bf16& out) { out.bits = bf16_bits(odd_f32(x)); }
FM_HD void round_to(double x, Fp16& out) { out.bits = fp16_bits(odd_f32(x)); }
FM_HD void round_to(double x, float& out) { out = x == x ? static_cast<float>(x) : float_of(kNanF32); }
FM_HD void round_to(double x, double& out) { out = x == x ? x : double_of(kNanF64); }

template <class T, class W>
FM_HD T store(W x) {
  T out;
  round_to(x, out);
  return out;
}

FM_HD bool is_finite(Bf16 x) { return (x.bits & 0x7f80u) != 0x7f80u; }
FM_HD bool is_finite(Fp16 x) { return (x.bits & 0x7c00u) != 0x7c00u; }
FM_HD bool is_finite(float x) { return key_of(x) < 0x7f800000u; }
FM_HD bool is_finite(double x) { return key_of(x) < 0x7ff0000000000000ull; }

// ---- Philox4x32-10 -------------------------------------------------------------------------------------

// op_tag values.
enum Op : uint32_t { kDrop = 0, kSpread = 1, kNoise = 2 };

FM_HD void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
#if defined(__CUDA_ARCH__)  // one wide multiplication each; of the other form nvcc makes two instructions
  const uint32_t l0 = 0xD2511F53u * c[0], h0 = __umulhi(0xD2511F53u, c[0]);
  const uint32_t l1 = 0xCD9E8D57u * c[2], h1 = __umulhi(0xCD9E8D57u, c[2]);
  c[0] = h1 ^ c[1] ^ k0;
  c[1] = l1;
  c[2] = h0 ^ c[3] ^ k1;
  c[3] = l0;
#else
  const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c[0];
  const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
  const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
  c[0] = n0;
  c[1] = static_cast<uint32_t>(p1);
  c[2] = n2;
  c[3] = static_cast<uint32_t>(p0);
#endif
}

FM_HD void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int r = 0; r < 10; ++r) {
    philox_round(c, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The 16 random bits of logical element e (design law L3).
FM_HD uint16_t philox_u16(uint64_t key, uint32_t model, uint32_t op, int64_t e) {
  const uint64_t block = static_cast<uint64_t>(e) >> 3;
  uint32_t c[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), model, op};
  philox4x32(c, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
  return static_cast<uint16_t>(c[(e >> 1) & 3] >> ((e & 1) * 16));
}

}  // namespace fastmerge
