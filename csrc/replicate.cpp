// Expert replication on a CPU core: a block of the source is read and widened once, then written for every expert
// while it stays in the first-level cache.
#include "replicate.h"

#include "kernels.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

// y = x + sigma * normal(u) for whole steps of n elements.
template <class W>
void noisy_steps(const W* x, const uint16_t* u, W sigma, const NormalLine* lines, int64_t n, W* y) {
  FM_LOOP for (int64_t j = 0; j < (n & -kStep); ++j) {
    const uint32_t bits = u[j];
    const float place = normal_place(0x4b000000u | (bits & 0x7fffu));
    y[j] = noisy(x[j], sigma, normal_on(lines[normal_slot(place)], place, bits << 16));
  }
}

template <class W>
void source(const ReplicateArgs& a, const Source& s) {
  alignas(64) W x[kBlock], y[kBlock];
  alignas(64) uint16_t u[kBlock];
  const int64_t in_size = size_of(a.in_code), out_size = size_of(a.out_code);
  for (int64_t at = 0, n; at < s.length; at += n) {
    // All blocks but the first start where a counter does.
    const int64_t left = s.length - at, most = kBlock - ((s.e0 + at) & 7);
    n = left < most ? left : most;
    bool widened = false;
    for (int32_t i = 0; i < a.experts; ++i) {
      const Expert& e = s.experts[i];
      const W sigma = static_cast<W>(e.sigma);
      if (sigma == W(0) && a.in_code == a.out_code) {
        memcpy(reinterpret_cast<char*>(e.out) + at * out_size, reinterpret_cast<const char*>(s.in) + at * in_size,
               static_cast<size_t>(n * out_size));
        continue;
      }
      if (!widened) load_any(a.in_code, s.in, at, n, x);
      widened = true;
      if (sigma == W(0)) {
        store_any(a.out_code, e.out, at, n, x);
        continue;
      }
      random_block(static_cast<uint64_t>(s.key), static_cast<uint32_t>(e.number), kNoise, s.e0 + at, n, u);
      memset(u + n, 0, static_cast<size_t>(round_up(n) - n) * 2);
      noisy_steps(x, u, sigma, a.lines, round_up(n), y);
      store_any(a.out_code, e.out, at, n, y);
    }
  }
}

}  // namespace

void replicate(const ReplicateArgs& a) {
  for (int64_t i = 0; i < a.segments; ++i) a.in_code == kF64 ? source<double>(a, a[i]) : source<float>(a, a[i]);
}

}  // namespace FM_ISA
}  // namespace fastmerge
