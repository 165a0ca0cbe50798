// Expert replication on a CUDA device. A call launches one kernel on the caller's stream and returns a status: it
// allocates nothing, waits for nothing, and reads nothing but device memory that the caller filled.
#include <cuda_runtime.h>

#include "replicate.h"

namespace fastmerge {
namespace {

constexpr int kThreads = 256;
constexpr int kCopies = 16;  // of the table in shared memory: the lanes of half a warp read from banks of their own

// Programs that a multiprocessor should hold: 80 registers, or 128, which fp64 needs; with either nothing spills.
template <class In, class Out>
constexpr int kResident = sizeof(In) == 8 || sizeof(Out) == 8 ? 2 : 3;

// The table in shared memory.
struct Copies {
  const char* base;
  uint32_t lane;  // bytes
  FM_MEMBER NormalLine operator()(float place) const {
    const uint32_t at = ((bits_of(place) >> 12) & ~127u) | lane;  // 128 bytes per slot
    return *reinterpret_cast<const NormalLine*>(base + (at - (0x830u << 7)));
  }
};

using Kernel = void (*)(ReplicateArgs, ReplicateWalk);

template <class In, class Out, bool kRandom>
__global__ void __launch_bounds__(kThreads, kResident<In, Out>)
    replicate_kernel(const ReplicateArgs a, const ReplicateWalk walk) {
  static_assert(sizeof(NormalLine) * kCopies == 128);
  extern __shared__ NormalLine copies[];
  if (kRandom) {
    for (int i = threadIdx.x; i < kNormalLines * kCopies; i += kThreads) copies[i] = a.lines[i / kCopies];
    __syncthreads();
  }
  const Copies table = {reinterpret_cast<const char*>(copies), threadIdx.x % kCopies * 8};
  for (int64_t t = blockIdx.x; t < walk.tiles; t += gridDim.x)
    replicate_tile<In, Out, kRandom>(a, walk, t, threadIdx.x, kThreads, table);
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

// As many programs as the device holds at once; each takes every so many tiles.
cudaError_t launch(int device, cudaStream_t stream, ReplicateArgs a, ReplicateWalk walk, bool random) {
  const Kernel kernel = kernel_of(a, random);
  const size_t shared = random ? sizeof(NormalLine) * kNormalLines * kCopies : 0;
  int processors = 0, each = 0;
  if (const cudaError_t e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return e;
  if (const cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared)) return e;
  const int64_t most = static_cast<int64_t>(processors) * (each > 0 ? each : 1);
  void* arguments[] = {&a, &walk};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(walk.tiles < most ? walk.tiles : most)), dim3(kThreads), arguments,
                          shared, stream);
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
