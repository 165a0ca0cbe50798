// Expert replication on a CPU core: the source is read once, and written for every expert while it stays in cache.
#include "replicate.h"

#include "kernels.h"
#include "lanes.h"
#include "tile.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

constexpr int64_t kRun = 8 * kBlock;    // elements that go to every expert before the next ones are read
constexpr int64_t kFarBytes = 8 << 20;  // outputs that no cache could hold are written past it
constexpr size_t kLine = 64;            // bytes

// Copies bytes; kFar: past the caches, which saves the reading of what is overwritten. (memcpy changes at a few
// kilobytes to an instruction that is slow in the cache of some processors.)
template <bool kFar>
void copy(char* to, const char* from, size_t n) {
  size_t i = kFar ? -reinterpret_cast<uintptr_t>(to) % kLine : 0;
  i = i < n ? i : n;
  memcpy(to, from, i);
  for (; i + kLine <= n; i += kLine)
    for (size_t j = 0; j < kLine; j += sizeof(Word)) {
      Word w;
      memcpy(&w, from + i + j, sizeof w);
      put<kFar>(to + i + j, w);
    }
  memcpy(to + i, from + i, n - i);
}

// y = x + sigma * normal(u) for whole steps of n elements.
template <class W>
void noisy_steps(const W* x, const uint16_t* u, W sigma, const NormalLine* lines, int64_t n, W* y) {
  FM_LOOP for (int64_t j = 0; j < (n & -kStep); ++j) {
    const uint32_t bits = u[j];
    const float place = normal_place(0x4b000000u | (bits & 0x7fffu));
    y[j] = noisy(x[j], sigma, normal_on(lines[normal_slot(place)], place, bits << 16));
  }
}

// n <= kBlock elements from `at` on, for all experts that are not mere copies.
template <class W>
void block(const ReplicateArgs& a, const Source& s, int64_t at, int64_t n) {
  alignas(64) W x[kBlock], y[kBlock];
  alignas(64) uint16_t u[kBlock];
  load_any(a.in_code, s.in, at, n, x);
  for (int32_t i = 0; i < a.experts; ++i) {
    const Expert& e = s.experts[i];
    const W sigma = static_cast<W>(e.sigma);
    if (sigma != W(0)) {
      random_block(static_cast<uint64_t>(s.key), static_cast<uint32_t>(e.number), kNoise, s.e0 + at, n, u);
      memset(u + n, 0, static_cast<size_t>(round_up(n) - n) * 2);
      noisy_steps(x, u, sigma, a.lines, round_up(n), y);
      store_any(a.out_code, e.out, at, n, y);
    } else if (a.in_code != a.out_code) {
      store_any(a.out_code, e.out, at, n, x);
    }
  }
}

template <class W>
void source(const ReplicateArgs& a, const Source& s) {
  const int64_t size = size_of(a.in_code);
  const bool far = s.length * size >= kFarBytes;
  int32_t copies = 0;
  for (int32_t i = 0; i < a.experts; ++i)
    copies += a.in_code == a.out_code && static_cast<W>(s.experts[i].sigma) == W(0);
  for (int64_t at = 0, n; at < s.length; at += n) {
    n = s.length - at < kRun ? s.length - at : kRun;
    for (int32_t i = 0; copies && i < a.experts; ++i)
      if (static_cast<W>(s.experts[i].sigma) == W(0))
        (far ? copy<true> : copy<false>)(reinterpret_cast<char*>(s.experts[i].out + at * size),
                                         reinterpret_cast<const char*>(s.in + at * size),
                                         static_cast<size_t>(n * size));
    // All blocks but the first start where a counter does.
    for (int64_t j = 0, m; copies < a.experts && j < n; j += m) {
      m = kBlock - ((s.e0 + at + j) & 7);
      m = n - j < m ? n - j : m;
      block<W>(a, s, at + j, m);
    }
  }
  if (far) streamed();
}

}  // namespace

void replicate(const ReplicateArgs& a) {
  for (int64_t i = 0; i < a.segments; ++i) a.in_code == kF64 ? source<double>(a, a[i]) : source<float>(a, a[i]);
}

}  // namespace FM_ISA
}  // namespace fastmerge
