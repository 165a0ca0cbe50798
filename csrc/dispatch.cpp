// Chooses the kernels of the best instruction set that this machine runs, once, or as FASTMERGE_ISA says.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastmerge {
namespace {

#define FM_TABLE(isa)                                                                                            \
  Kernels {                                                                                                      \
    #isa, isa::combine, isa::gram, isa::dot, isa::fold, isa::delta_keys, isa::count, isa::l1, isa::votes,        \
        isa::consensus, isa::philox, isa::count_nonfinite, isa::apart, isa::replicate, isa::peel, isa::low_rank, \
        isa::dequantise, isa::largest, isa::quantise, isa::importance, isa::fuse                                 \
  }

#if defined(__aarch64__)
const Kernels kTables[] = {FM_TABLE(neon)};
#elif defined(__x86_64__)
const Kernels kTables[] = {FM_TABLE(baseline), FM_TABLE(v3), FM_TABLE(v4)};
#else
const Kernels kTables[] = {FM_TABLE(baseline)};
#endif

bool runs_here(const char* name) {
#if defined(__x86_64__)
  // The builtins also ask whether the system saves the wide registers.
  if (!std::strcmp(name, "v3") || !std::strcmp(name, "v4")) {
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
          __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
          __builtin_cpu_supports("movbe")))
      return false;
  }
  if (!std::strcmp(name, "v4")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#else
  (void)name;
#endif
  return true;
}

const Kernels* find(const char* name) {
  for (const Kernels& k : kTables)
    if (!std::strcmp(k.name, name)) return runs_here(name) ? &k : nullptr;
  return nullptr;
}

const Kernels* best() {
  if (const char* name = std::getenv("FASTMERGE_ISA"))
    if (const Kernels* k = find(name)) return k;
  const Kernels* k = kTables;
  for (const Kernels& t : kTables)
    if (runs_here(t.name)) k = &t;
  return k;
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (!k) current.store(k = best(), std::memory_order_release);
  return *k;
}

bool use_isa(const char* name) {
  const Kernels* k = find(name);
  if (k) current.store(k, std::memory_order_release);
  return k != nullptr;
}

#if defined(__x86_64__)
PlainFloat::PlainFloat() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
PlainFloat::~PlainFloat() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
PlainFloat::PlainFloat() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
}
PlainFloat::~PlainFloat() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }
#else
PlainFloat::PlainFloat() : saved_(0) {}
PlainFloat::~PlainFloat() = default;
#endif

}  // namespace fastmerge
