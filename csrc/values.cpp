// Kernels on single streams of values: the counter generator, the count of values that are not finite, replicas whose
// sum is exact, and how far two streams are apart.
#include "kernels.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {

void philox(uint64_t key, uint32_t model, uint32_t op, int64_t e0, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += kBlock)
    random_block(key, model, op, e0 + i, n - i < kBlock ? n - i : kBlock, out + i);
}

int64_t count_nonfinite(const void* data, int64_t n, int32_t code) {
  switch (code) {
    case kBF16:
      return nonfinite_block(static_cast<const Bf16*>(data), n);
    case kF16:
      return nonfinite_block(static_cast<const Fp16*>(data), n);
    case kF32:
      return nonfinite_block(static_cast<const float*>(data), n);
    default:
      return nonfinite_block(static_cast<const double*>(data), n);
  }
}

namespace {

// A number in the type that a code says, as it is here: bf16 towards zero, which keeps it in x / 2 .. x as well.
template <int32_t kCode>
FM_HD float part_of(float x) {
  if (kCode == kBF16) return float_of(bits_of(x) & 0xffff0000u);
  if (kCode != kF16) return x;
  Fp16 h;
  round_to(x, h);
  return widen(h);
}
template <int32_t kCode>
FM_HD double part_of(double x) {
  return x;
}

template <int32_t kCode, class T>
void peel_all(const PeelArgs& a) {
  T* __restrict__ x = static_cast<T*>(a.x);
  T* __restrict__ replica = static_cast<T*>(a.replica);
  const T share = static_cast<T>(a.share);
  FM_LOOP for (int64_t i = 0; i < a.n; ++i) {
    const T s = (static_cast<T>(a.drawn[i]) + static_cast<T>(128.5)) * share, other = 1 - s, w = x[i];
    const bool small = s < static_cast<T>(0.5);
    const T part = part_of<kCode>((small ? other : s) * w), rest = w - part;
    const bool finite = w - w == 0;
    const T mine = small ? rest : part, left = small ? part : rest;
    replica[i] = finite ? mine : w;
    x[i] = finite ? left : w;
  }
}

}  // namespace

void peel(const PeelArgs& a) {
  switch (a.code) {
    case kBF16:
      return peel_all<kBF16, float>(a);
    case kF16:
      return peel_all<kF16, float>(a);
    case kF32:
      return peel_all<kF32, float>(a);
    default:
      return peel_all<kF64, double>(a);
  }
}

// Pairs of which one is NaN or infinite count as such, and enter no sum. Lane j adds elements j, j + kWide, ... in
// fp64.
Apart apart(int64_t x, int32_t x_code, int64_t y, int32_t y_code, int64_t n) {
  constexpr int64_t kWide = 256;
  double a[kWide], b[kWide];
  double differ[kWide] = {}, odd[kWide] = {}, most[kWide] = {}, xx[kWide] = {}, xy[kWide] = {}, yy[kWide] = {},
         dd[kWide] = {};
  for (int64_t i = 0; i < n; i += kWide) {
    const int64_t m = n - i < kWide ? n - i : kWide;
    load_any(x_code, x, i, m, a);
    load_any(y_code, y, i, m, b);
    FM_LOOP for (int64_t j = 0; j < round_up(m); ++j) {
      const double p = a[j], q = b[j], d = p - q;
      const bool finite = d - d == 0;
      const double e = finite ? d : 0, u = finite ? p : 0, v = finite ? q : 0, far = e < 0 ? -e : e;
      differ[j] += (p == q) | ((p != p) & (q != q)) ? 0.0 : 1.0;
      odd[j] += finite ? 0.0 : 1.0;
      most[j] = far > most[j] ? far : most[j];
      xx[j] += u * u;
      xy[j] += u * v;
      yy[j] += v * v;
      dd[j] += e * e;
    }
  }
  Apart out{};
  for (int64_t j = 0; j < kWide; ++j) {
    out.differ += static_cast<int64_t>(differ[j]);
    out.nonfinite += static_cast<int64_t>(odd[j]);
    out.most = most[j] > out.most ? most[j] : out.most;
    out.xx += xx[j];
    out.xy += xy[j];
    out.yy += yy[j];
    out.dd += dd[j];
  }
  return out;
}

}  // namespace FM_ISA
}  // namespace fastmerge
