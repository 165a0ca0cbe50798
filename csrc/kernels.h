// Every native kernel: its arguments, and the table of functions of one instruction set.
// Kernels get checked arguments (bindings.cpp validates them), run on the calling thread, allocate nothing
// that outlives the call and never fail. Each kernel source is compiled once per instruction set, into the
// namespace that FM_ISA names; everything in it apart from the entry points has internal linkage.
#pragma once

#include <cstdint>

#include "bits.h"

namespace fastmerge {

constexpr int64_t kTile = 65536;  // elements per tile of every ordered sum
constexpr int64_t kLanes = 2048;  // running sums inside a tile
constexpr int64_t kBlock = 1024;  // elements that a pass works on at a time: 4 KiB of fp32
constexpr int64_t kWords = kBlock / 32;
constexpr int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }
constexpr int64_t kHeader = 7;  // columns of a segment row before its input addresses

// One row of a segment table.
struct Segment {
  int64_t out;     // address, 0 for none
  int64_t length;  // elements
  int64_t e0;      // logical index of the first element in the whole tensor
  int64_t row;     // row length
  int64_t key;     // Philox key, as bits
  int64_t group;   // (first) parameter row
  int64_t stats;   // first row of this piece in the output partials
  int64_t in[1];   // addresses, as many as the table has inputs; then those of the outputs after the first
};

struct Table {
  const int64_t* data;
  int64_t segments;
  int32_t inputs;        // M; the delta kernels have the base at 0 and N = M - 1 models
  const int32_t* codes;  // element type of each input
  int32_t outputs = 1;   // E

  FM_MEMBER const Segment& operator[](int64_t s) const {
    return *reinterpret_cast<const Segment*>(data + s * (kHeader + inputs + outputs - 1));
  }
  // The address of output e.
  FM_MEMBER int64_t output(const Segment& s, int32_t e) const { return e == 0 ? s.out : s.in[inputs - 1 + e]; }
  // The work type is double exactly when an input is.
  __attribute__((always_inline)) bool wide() const {
    for (int32_t i = 0; i < inputs; ++i)
      if (codes[i] == kF64) return true;
    return false;
  }
};

struct CombineArgs {
  Table table;
  int32_t out_code;
  const double* coef;   // [P, M]
  const double* scale;  // [P, 2] lambda, div
  bool delta;
  bool per_row;        // parameter row = group + e / row
  int64_t* nonfinite;  // [S], added to
  bool far;            // the caches will not be asked for the results: they are written past them
  bool wide;           // computed in fp64, whatever the inputs are
};

struct KeepArgs;

struct GramArgs {
  Table table;
  double* partials;  // [R, columns]
  int64_t columns;
  bool delta;
  bool diff;
  bool per_row;                    // tiles restart at each row
  void* scratch;                   // gram_scratch() bytes, 64-byte aligned
  const KeepArgs* keep = nullptr;  // what is kept of deltas by variance; null for all
};
constexpr int64_t gram_scratch(int64_t inputs, int64_t columns, bool wide) {
  return (columns * kLanes + (inputs + 1) * 2048) * (wide ? 8 : 4);
}

// Products of a gradient, the last input, with x_i - x_0.
struct DotArgs {
  Table table;
  double* partials;  // [R, N], N = inputs - 2
  void* scratch;     // dot_scratch() bytes, 64-byte aligned
};
constexpr int64_t dot_scratch(int64_t inputs, bool wide) {
  return ((inputs - 2) * kLanes + 3 * kBlock) * (wide ? 8 : 4);
}

// Ordered fp64 sums of the row ranges [first[g], first[g + 1]) of partials.
struct FoldArgs {
  const double* partials;  // [R, columns]
  int64_t columns;
  const int64_t* first;  // [G + 1]
  int64_t groups;
  double* out;  // [G, columns]
};

// The deltas of N models, before any trim.
struct DeltaArgs {
  int32_t round_code;          // type code that deltas are rounded to, -1 for none
  bool drop;                   // Bernoulli drop by bern
  const int32_t* model_index;  // [N]
  const int32_t* bern;         // [P, N]
  // Elements are ranked by how much the models vary there, in place of each model's by its magnitude: one key, whose
  // ranks, brackets, thresholds and counts have a column for all models. Then nothing is rounded or dropped.
  bool variance = false;

  int64_t columns(const Table& t) const { return variance ? 1 : t.inputs - 1; }
};

// What is kept of them, before anything is summed.
struct KeepArgs : DeltaArgs {
  bool trim;            // magnitude trim by thr and cut; by variance with it
  const uint64_t* thr;  // [P, N]
  const int64_t* cut;   // [P, N, 3] cut_tile, cut_rank, tie_T or -1
  // [blocks, N, kWords] what the drop keeps of the table's blocks in turn, one bit per element; l1 leaves it there for
  // consensus, which else draws again. Null: neither. Where they are given, l1 reads them too, whatever bern says.
  uint32_t* bits = nullptr;
  bool given = false;
  bool wide_sums = false;  // from what is kept on everything is fp64, whatever the task vectors are
};

struct DeltaKeysArgs {
  Table table;
  DeltaArgs deltas;
  void* out;  // uint32 (uint64 where the table is wide) [sum of lengths, N]
};

struct CountArgs {
  Table table;
  DeltaArgs deltas;
  const uint64_t* lo;  // [P, N]
  const uint64_t* hi;  // [P, N]
  int64_t* counts;     // [R, N, 4] #key > hi, #key == hi, #key == lo (0 where lo == hi), #lo < key < hi
  void* keys;          // uint32 (uint64 where the table is wide) [N, cap]
  int64_t* where;      // [N, cap, 2] group, e
  int64_t cap;
  int64_t* used;  // [N] may pass cap: from there on nothing is stored, only counted
};

// The k-th largest keys of whole tensors (e0 = 0). What is not settled keeps tied = 0.
struct KthArgs {
  Table table;
  DeltaArgs deltas;
  const int64_t* ranks;  // [P, N] k; nothing is asked where it is not inside 0 .. length
  uint64_t* thr;         // [P, N]
  int64_t* found;        // [P, N, 4] ties kept, ties, tile of the first that is not kept, kept ties in that tile
  void* scratch;         // kth_scratch() bytes, 64-byte aligned
};
// Keys that a query may list.
constexpr int64_t kth_listed(int64_t length) { return length / 16 + 4096; }

struct L1Args {
  Table table;
  KeepArgs keep;
  double* sums;  // [R, N, 2] |d|, |d| * keep
};

enum Elect : int32_t { kElectNone = 0, kElectMass = 1, kElectCount = 2 };
enum Zero : int32_t { kZeroPlus = 0, kZeroMajority = 1, kZeroBase = 2 };
enum Merge : int32_t { kMergeMean = 0, kMergeSum = 1, kMergeMax = 2 };

struct VotesArgs {
  Table table;
  KeepArgs keep;
  int32_t elect;
  bool split;
  const double* f;  // [P, N, 3] c, g, a
  int64_t* counts;  // [R, 2] #vote > 0, #vote < 0
};

struct ConsensusArgs {
  Table table;
  int32_t out_code;
  KeepArgs keep;
  int32_t elect;
  bool split;
  int32_t zero;
  int32_t merge;
  const double* f;      // [P, N, 3] c, g, a
  const double* scale;  // [P, 3] lambda, div, majority sign
  int64_t* nonfinite;   // [S], added to
};

// Of a base and a model: whole rows of a table of two inputs.
struct ImportanceArgs {
  Table table;
  double* divergence;  // [P] of rows: group + e / row, rounded to the work type
  void* out;           // float (double where the table is wide) [sum of lengths]
  void* scratch;       // 16 * importance_row() of the longest row bytes, 64-byte aligned
};
constexpr int64_t importance_row(int64_t n) { return (n + 7) & -8; }

struct FuseArgs {
  Table table;
  int32_t out_code;
  const double* divergence;  // [P]
  double least;              // importance from which on the model's element is taken
  int64_t* nonfinite;        // [S], added to
};

constexpr int32_t kNormalLines = 177;  // rows of fastmerge.philox.normal_lines

// |n| = a + b * (t + 16) for the ranks t of one slot.
struct alignas(8) NormalLine {
  float a, b;
};

constexpr double kMostSigma = 0x1p100;  // noise is finite, so that only a NaN gives a NaN

// Of one input and E outputs, which overlap neither it nor each other. The CUDA kernel takes the same, with the
// device's addresses.
struct ReplicateArgs {
  Table table;
  int32_t out_code;
  const double* sigma;      // [P, E] 0 .. kMostSigma, rounded once to the work type
  const int64_t* numbers;   // [E] 0 .. 2^32 - 1: model_index of the counter
  const NormalLine* lines;  // [kNormalLines]
  int64_t* nonfinite;       // [S], added to; or null
};

constexpr int64_t kMostItems = 1 << 30;  // of a launch: tiles times outputs

// Where a launch's tiles lie: `tile` Philox blocks each, those of segment s from first[s] on (first [S + 1]). `group`
// tiles are written for one expert before the next.
struct ReplicateWalk {
  const int64_t* first;
  int32_t tiles;
  int32_t tile;
  int32_t group;
  int32_t* drawn;  // items that programs took after their first: 0 when the launch starts
};

// How far two streams of values are apart.
struct Apart {
  int64_t differ, nonfinite;  // pairs of unequal values; pairs with a NaN or infinity
  double most;                // largest |x - y|
  double xx, xy, yy, dd;      // sums of products, and of (x - y)^2
};

// A replica of each of n numbers, of which the rest stays: fastmerge/ops/replicas.py.
struct PeelArgs {
  void* x;              // fp32, or fp64 where the type is
  void* replica;        // the same
  const int8_t* drawn;  // random
  double share;
  int64_t n;
  int32_t code;  // the type that holds the numbers, and shall hold their parts
};

constexpr int64_t kStrip = 64;  // columns of a low-rank product that are worked on at a time

// y = x + s (B A), in fp32.
struct LowRankArgs {
  float* out;          // [rows, columns]
  const float* left;   // [rows, rank] of B
  const float* right;  // [rank, columns] of A, rows `stride` apart
  int64_t x;           // address of [rows, columns] of type `code`, no fp64
  float scale;
  int64_t rows, columns, rank, stride;  // rank >= 1
  int32_t code;
  float* strip;  // room for rank * kStrip numbers, 64-byte aligned
};

// Quantised weights: what a code is of. Those of 4 bits lie two in a byte, the first one low.
enum Quantised : int32_t { kE4M3, kE5M2, kInt8, kInt4, kE2M1 };

// What the address of a coded input leads to; scales, zeros and codes follow it. Logical indices say which elements are
// read, so that all pieces of a run share it.
struct Coded {
  int64_t nbytes;        // of all of it
  int64_t first, count;  // elements that are there, as logical indices; codes of 4 bits begin with an even one
  int64_t scales, zeros,
      codes;                // bytes from here on: fp32 of every block, of rows of blocks from `row` on; zeros 0 for
  int64_t row;              // none; codes without gaps
  int64_t height, columns;  // of a matrix
  int64_t high, width;      // of a block
  int64_t code;
};

// Elements first .. first + n of a row of codes, which starts at `codes`: (value - zero) * scale, in fp32.
struct DequantiseRow {
  int64_t codes, first, n;
  int64_t scales, zeros;  // addresses of fp32, one per block of the row; zeros 0 for none
  int64_t out;
};
struct DequantiseArgs {
  const DequantiseRow* table;
  int64_t rows;
  int64_t width;  // columns of a block
  int32_t code;
};

// The largest magnitude of each block of a row, and of what `out` has of it already.
struct LargestRow {
  int64_t x, n, out;
};
struct LargestArgs {
  const LargestRow* table;
  int64_t rows;
  int64_t width;
};

// The codes of x * factor (or x / factor), nearest, ties to even, saturating; and how far code * scale is from x.
struct QuantiseRow {
  int64_t x, n, factors, scales, codes;
};
struct QuantiseError {
  double squares, errors, most;  // sums of x^2 and of the error's; its largest magnitude
};
struct QuantiseArgs {
  const QuantiseRow* table;
  int64_t rows;
  int64_t width;  // even for codes of 4 bits
  int32_t code;   // kE4M3 or kE2M1
  bool divide;
  QuantiseError* error;  // added to
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  void (*combine)(const CombineArgs&);
  void (*gram)(const GramArgs&);
  void (*dot)(const DotArgs&);
  void (*fold)(const FoldArgs&);
  void (*delta_keys)(const DeltaKeysArgs&);
  void (*count)(const CountArgs&);
  void (*l1)(const L1Args&);
  void (*votes)(const VotesArgs&);
  void (*consensus)(const ConsensusArgs&);
  void (*philox)(uint64_t key, uint32_t model, uint32_t op, int64_t e0, int64_t n, uint16_t* out);
  int64_t (*count_nonfinite)(const void* data, int64_t n, int32_t code);
  Apart (*apart)(int64_t x, int32_t x_code, int64_t y, int32_t y_code, int64_t n);
  void (*replicate)(const ReplicateArgs&);
  void (*peel)(const PeelArgs&);
  void (*low_rank)(const LowRankArgs&);
  void (*dequantise)(const DequantiseArgs&);
  void (*largest)(const LargestArgs&);
  void (*quantise)(const QuantiseArgs&);
  void (*importance)(const ImportanceArgs&);
  void (*fuse)(const FuseArgs&);
};

#define FM_DECLARE_KERNELS(isa)                                                                 \
  namespace isa {                                                                               \
  void combine(const CombineArgs&);                                                             \
  void gram(const GramArgs&);                                                                   \
  void dot(const DotArgs&);                                                                     \
  void fold(const FoldArgs&);                                                                   \
  void delta_keys(const DeltaKeysArgs&);                                                        \
  void count(const CountArgs&);                                                                 \
  void l1(const L1Args&);                                                                       \
  void votes(const VotesArgs&);                                                                 \
  void consensus(const ConsensusArgs&);                                                         \
  void philox(uint64_t key, uint32_t model, uint32_t op, int64_t e0, int64_t n, uint16_t* out); \
  int64_t count_nonfinite(const void* data, int64_t n, int32_t code);                           \
  Apart apart(int64_t x, int32_t x_code, int64_t y, int32_t y_code, int64_t n);                 \
  void replicate(const ReplicateArgs&);                                                         \
  void peel(const PeelArgs&);                                                                   \
  void low_rank(const LowRankArgs&);                                                            \
  void dequantise(const DequantiseArgs&);                                                       \
  void largest(const LargestArgs&);                                                             \
  void quantise(const QuantiseArgs&);                                                           \
  void importance(const ImportanceArgs&);                                                       \
  void fuse(const FuseArgs&);                                                                   \
  }

#if defined(__aarch64__)
FM_DECLARE_KERNELS(neon)
#else
FM_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
FM_DECLARE_KERNELS(v3)
FM_DECLARE_KERNELS(v4)
#endif
#endif

// The table in use (dispatch.cpp); use_isa() returns false where this build or machine cannot run that one.
const Kernels& kernels();
bool use_isa(const char* name);

#if defined(FASTMERGE_HAS_CUDA)
// replicate.cu: launches on a stream of a device; all of a's and walk's addresses are the device's. `random`: whether
// any sigma is not 0. Returns a status of the CUDA runtime, 0 for success, which cuda_error() puts in words.
int cuda_replicate(int device, int64_t stream, const ReplicateArgs& a, const ReplicateWalk& walk, bool random);
const char* cuda_error(int status);
#endif

// Built of the table's delta_keys and count, once for every instruction set.
void kth(const KthArgs&);
int64_t kth_scratch(int64_t longest, int32_t inputs, bool wide);

// Default floating-point control (round to nearest, no flush to zero) for the life of the object: another
// library in the process may have changed the thread's.
class PlainFloat {
 public:
  PlainFloat();
  ~PlainFloat();
  PlainFloat(const PlainFloat&) = delete;
  PlainFloat& operator=(const PlainFloat&) = delete;

 private:
  uint64_t saved_;
};

// Batched file transfers (io.cpp); see bindings.cpp for the tables. Each returns 0 or the errno it stopped at,
// and leaves row and done where it stopped.
int read_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done);
int write_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done);
int copy_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done);
int move_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done);

// Past the page cache (past.cpp). Which rows (fd, offset, address, nbytes) are in the cache as a whole; and rows
// (fd, offset, direct fd, address, nbytes), with the blocks around them, otherwise as read_some.
void find_resident(const int64_t* table, int64_t rows, int64_t* flags);
int read_past(const int64_t* table, int64_t rows, int64_t& row, int64_t& done);

}  // namespace fastmerge
