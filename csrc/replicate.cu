// Expert replication on a CUDA device. A call launches one kernel on the caller's stream and returns a status: it
// allocates nothing, waits for nothing, and reads nothing but device memory that the caller filled.
#include <cuda_runtime.h>

#include "replicate.h"

namespace fastmerge {
namespace {

constexpr int kThreads = 256;
constexpr int kCopies = 16;  // of the table in shared memory: the lanes of half a warp read from banks of their own

// Programs that a multiprocessor should hold, so that nothing spills: 64 registers for copies, with 64 KB of them in
// flight; with noise 80, or 128, which fp64 needs.
template <class In, class Out, bool kRandom>
constexpr int kResident = !kRandom                              ? 4
                          : sizeof(In) == 8 || sizeof(Out) == 8 ? 2
                                                                : 3;

extern __shared__ NormalLine copies[];

// The table in shared memory, at 128 bytes per slot. Two instructions make an address, as the mask comes before the
// shift, which then takes the addition with it; the compiler would turn them round and need three.
struct Copies {
  uint32_t base;  // address of the thread's copy of slot -0x830
  __device__ NormalLine operator()(float place) const {
    uint32_t slot;
    asm("and.b32 %0, %1, 0xfff80000;" : "=r"(slot) : "r"(bits_of(place)));
    NormalLine line;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(line.a), "=f"(line.b) : "r"((slot >> 12) + base));
    return line;
  }
};

// The item `by` further on. One thread finds it, from the table, and tells the others.
template <class In, class Out>
__device__ void next_item(const ReplicateArgs& a, const ReplicateWalk& walk, Place& place, int32_t by, Item& item) {
  Place there = place;
  if (there.advance(walk, a.table.outputs, by))
    set_item<In, Out>(a, walk, there, item);
  else
    item.count = 0;
  place = there;
}

using Kernel = void (*)(ReplicateArgs, ReplicateWalk);

template <class In, class Out, bool kRandom>
__global__ void __launch_bounds__(kThreads, kResident<In, Out, kRandom>)
    replicate_kernel(const ReplicateArgs a, const ReplicateWalk walk) {
  static_assert(sizeof(NormalLine) * kCopies == 128);
  if (kRandom) {
    for (int i = threadIdx.x; i < kNormalLines * kCopies; i += kThreads) copies[i] = a.lines[i / kCopies];
    __syncthreads();
  }
  const Copies table = {static_cast<uint32_t>(__cvta_generic_to_shared(copies)) + threadIdx.x % kCopies * 8 -
                        (0x830u << 7)};
  __shared__ Item items[2];
  __shared__ Place place;
  const bool leads = threadIdx.x == 0;
  int32_t drawn = static_cast<int32_t>(blockIdx.x);
  if (leads) {
    place = {0, 0, 0};
    next_item<In, Out>(a, walk, place, drawn, items[0]);
  }
  __syncthreads();
  for (int turn = 0; items[turn].count != 0; turn ^= 1) {
    int32_t next;  // comes while the item is made: nothing waits for it
    if (leads) next = atomicAdd(walk.drawn, 1);
    replicate_item<In, Out, kRandom>(a, items[turn], threadIdx.x, kThreads,
                                     static_cast<int>(kTileBytes / (8 * sizeof(Out) * kThreads)), table);
    if (leads) {
      next += static_cast<int32_t>(gridDim.x);
      next_item<In, Out>(a, walk, place, next - drawn, items[turn ^ 1]);
      drawn = next;
    }
    __syncthreads();
  }
}

template <class In, class Out>
Kernel kernel_of(bool random) {
  return random ? replicate_kernel<In, Out, true> : replicate_kernel<In, Out, false>;
}

template <class In>
Kernel kernel_of(int32_t out_code, bool random) {
  switch (out_code) {
    case kBF16:
      return kernel_of<In, Bf16>(random);
    case kF16:
      return kernel_of<In, Fp16>(random);
    case kF32:
      return kernel_of<In, float>(random);
    default:
      return kernel_of<In, double>(random);
  }
}

Kernel kernel_of(const ReplicateArgs& a, bool random) {
  switch (a.table.codes[0]) {
    case kBF16:
      return kernel_of<Bf16>(a.out_code, random);
    case kF16:
      return kernel_of<Fp16>(a.out_code, random);
    case kF32:
      return kernel_of<float>(a.out_code, random);
    default:
      return kernel_of<double>(a.out_code, random);
  }
}

// As many programs as the device holds at once; each draws item after item.
cudaError_t launch(int device, cudaStream_t stream, ReplicateArgs a, ReplicateWalk walk, bool random) {
  const Kernel kernel = kernel_of(a, random);
  const size_t shared = random ? sizeof(NormalLine) * kNormalLines * kCopies : 0;
  int processors = 0, each = 0;
  if (const cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  if (const cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared)) return e;
  const int64_t most = static_cast<int64_t>(processors) * (each > 0 ? each : 1);
  const int64_t items = static_cast<int64_t>(walk.tiles) * a.table.outputs;
  void* arguments[] = {&a, &walk};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(items < most ? items : most)), dim3(kThreads), arguments, shared,
                          stream);
}

}  // namespace

int cuda_replicate(int device, int64_t stream, const ReplicateArgs& a, const ReplicateWalk& walk, bool random) {
  int before = 0;
  cudaError_t status = cudaGetDevice(&before);
  if (status == cudaSuccess && before != device) status = cudaSetDevice(device);
  if (status == cudaSuccess) {
    status = launch(device, reinterpret_cast<cudaStream_t>(stream), a, walk, random);
    if (before != device) {
      const cudaError_t back = cudaSetDevice(before);
      if (status == cudaSuccess) status = back;
    }
  }
  if (status != cudaSuccess) cudaGetLastError();  // the caller has the status; leave none behind
  return status;
}

const char* cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace fastmerge
