// What the bindings ask of their arguments before a kernel sees them, where that needs nothing of Python. Violations
// become ValueError there.
#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

#include "replicate.h"

namespace fastmerge {

[[noreturn]] inline void fail(const std::string& what) { throw std::invalid_argument(what); }

inline void check_code(int64_t code, const char* name) {
  if (code < 0 || code > 3) fail(std::string(name) + ": expected a type code 0..3, got " + std::to_string(code));
}

// What a kernel asks of each segment.
struct Needs {
  int64_t parameters = -1;  // rows of the parameter tables; -1: none
  int64_t partials = -1;    // rows of the output partials; -1: none
  int out_code = -1;        // type of the output; -1: none
  bool by_row = false;      // parameter row and tiles go by row
  bool tiles = false;       // pieces start where a tile does
  int64_t base = 0;         // 1 where input 0 is a base, 2 where the last is a gradient as well: one more at least
  bool coded = false;       // inputs may be codes and scales
};

[[noreturn]] inline void fail_at(int64_t s, const std::string& what) {
  fail("table row " + std::to_string(s) + ": " + what);
}

inline int64_t tiles_of(const Segment& s, bool by_row) {
  if (!by_row) return (s.length + kTile - 1) / kTile;
  const int64_t whole = (s.row + kTile - 1) / kTile;
  int64_t tiles = 0, at = 0, left = s.row - s.e0 % s.row;
  if (s.e0 % s.row != 0) {
    at = left < s.length ? left : s.length;
    tiles += (at + kTile - 1) / kTile;
  }
  return tiles + (s.length - at) / s.row * whole + ((s.length - at) % s.row + kTile - 1) / kTile;
}

inline void check_round(int round_code) {
  if (round_code != -1) check_code(round_code, "round_code");
}

inline void check_word(int value, int most, const char* name) {
  if (value < 0 || value > most)
    fail(std::string(name) + ": expected 0.." + std::to_string(most) + ", got " + std::to_string(value));
}

// A coded input of a segment.
inline void check_coded(const Coded& c, const Segment& s, int64_t i) {
  const bool four = c.code == kInt4 || c.code == kE2M1;
  if (c.code < 0 || c.code > kE2M1 || c.height < 1 || c.columns < 1 || c.high < 1 || c.width < 1 || c.row < 0)
    fail_at(i, "a coded input of no such code, or sizes below 1");
  if (s.e0 < c.first || s.e0 + s.length > c.first + c.count || c.first < 0 || (four && c.first % 2))
    fail_at(i, "a coded input that begins or ends inside the piece");
  const int64_t across = (c.columns + c.width - 1) / c.width;
  const int64_t last = (c.first + c.count - 1) / c.columns;
  const int64_t rows = last / c.height * ((c.height + c.high - 1) / c.high) + last % c.height / c.high + 1 - c.row;
  const auto holds = [&](int64_t at, int64_t n, int64_t align) {
    return at >= static_cast<int64_t>(sizeof(Coded)) && n >= 0 && at <= c.nbytes - n && at % align == 0;
  };
  if (!holds(c.scales, 4 * rows * across, 4) || (c.zeros && !holds(c.zeros, 4 * rows * across, 4)) ||
      !holds(c.codes, four ? (c.count + 1) / 2 : c.count, 1))
    fail_at(i, "a coded input whose parts lie beside it");
}

inline void check(const Table& t, const Needs& needs) {
  if (t.inputs <= needs.base) fail("ins: expected at least " + std::to_string(needs.base + 1) + " inputs");
  for (int32_t i = 0; i < t.inputs; ++i)
    if (!needs.coded || t.codes[i] != kCoded) check_code(t.codes[i], "ins");
  if (needs.out_code >= 0) check_code(needs.out_code, "out_code");
  for (int64_t i = 0; i < t.segments; ++i) {
    const Segment& s = t[i];
    if (s.length < 0 || s.e0 < 0) fail_at(i, "length and e0 must not be negative");
    if (s.length == 0) continue;
    if (needs.by_row && s.row <= 0) fail_at(i, "expected a row length above 0, got " + std::to_string(s.row));
    for (int32_t e = 0; needs.out_code >= 0 && e < t.outputs; ++e)
      if (t.output(s, e) == 0 || t.output(s, e) % size_of(needs.out_code) != 0)
        fail_at(i, (t.outputs > 1 ? "address of output " + std::to_string(e) : std::string("the output address")) +
                       " is 0 or not aligned to its elements");
    for (int32_t m = 0; m < t.inputs; ++m) {
      if (s.in[m] == 0 || s.in[m] % (t.codes[m] == kCoded ? 8 : size_of(t.codes[m])) != 0)
        fail_at(i, "address of input " + std::to_string(m) + " is 0 or not aligned to its elements");
      if (t.codes[m] == kCoded) check_coded(*reinterpret_cast<const Coded*>(s.in[m]), s, i);
    }
    if (needs.parameters >= 0) {
      const int64_t last = s.group + (needs.by_row ? (s.e0 + s.length - 1) / s.row : 0);
      if (s.group < 0 || last >= needs.parameters)
        fail_at(i, "parameter row " + std::to_string(s.group < 0 ? s.group : last) + " of " +
                       std::to_string(needs.parameters));
    }
    if (needs.tiles && (needs.by_row ? s.e0 % s.row : s.e0) % kTile != 0)
      fail_at(i, "e0 " + std::to_string(s.e0) + " is not where a tile starts");
    if (needs.partials >= 0 && (s.stats < 0 || s.stats + tiles_of(s, needs.by_row) > needs.partials))
      fail_at(i, "partials rows " + std::to_string(s.stats) + ".. of " + std::to_string(needs.partials));
  }
}

// Blocks of a table whose pieces start where a tile does.
inline int64_t blocks_of(const Table& t) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < t.segments; ++i) blocks += blocks_of(t[i].length);
  return blocks;
}

// The most elements of a segment, all of which must be whole tensors.
inline int64_t longest_whole(const Table& t) {
  int64_t longest = 0;
  for (int64_t i = 0; i < t.segments; ++i) {
    if (t[i].e0 != 0) fail_at(i, "expected a whole tensor, e0 is " + std::to_string(t[i].e0));
    longest = std::max(longest, t[i].length);
  }
  return longest;
}

// A table of whole rows of a base and a model; the longest row.
inline int64_t check_rows(const Table& t) {
  if (t.inputs != 2) fail("ins: expected 2 inputs, got " + std::to_string(t.inputs));
  int64_t longest = 0;
  for (int64_t i = 0; i < t.segments; ++i) {
    if (t[i].length == 0) continue;
    if (t[i].e0 % t[i].row || t[i].length % t[i].row) fail_at(i, "expected whole rows");
    longest = std::max(longest, t[i].row);
  }
  return longest;
}

// A kernel's memory for one call.
struct Freed {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<void, Freed>;
inline Scratch scratch_of(int64_t bytes) {
  return Scratch(::operator new(static_cast<size_t>(bytes), std::align_val_t(64)));
}

// Row ranges [first[g], first[g + 1]) of `rows` rows.
inline void check_ranges(const int64_t* first, int64_t groups, int64_t rows) {
  if (groups < 0) fail("first: expected at least one entry");
  for (int64_t g = 0; g <= groups; ++g)
    if (first[g] < (g ? first[g - 1] : 0) || first[g] > rows)
      fail("first: entry " + std::to_string(g) + " is " + std::to_string(first[g]) + ", not ascending within 0.." +
           std::to_string(rows));
}

// What the table alone does not tell: the sigma of every output of every segment, and the outputs' numbers.
inline void check(const ReplicateArgs& a) {
  const Table& t = a.table;
  for (int32_t e = 0; e < t.outputs; ++e)
    if (a.numbers[e] < 0 || a.numbers[e] > 0xffffffffll)
      fail("numbers: expected 0..2^32 - 1, got " + std::to_string(a.numbers[e]));
  for (int64_t i = 0; i < t.segments; ++i)
    for (int32_t e = 0; t[i].length && e < t.outputs; ++e) {
      const double sigma = a.sigma[t[i].group * t.outputs + e];
      if (!(sigma >= 0 && sigma <= kMostSigma))
        fail_at(i, "sigma of output " + std::to_string(e) + ": expected 0..2^100, got " + std::to_string(sigma));
    }
}

// The tiles of a walk, which must be those of the table.
inline int32_t check(const Table& t, const ReplicateWalk& walk) {
  int64_t tiles = 0;
  for (int64_t i = 0; i <= t.segments; ++i) {
    if (walk.first[i] != tiles) fail("first: expected " + std::to_string(tiles) + " at " + std::to_string(i));
    if (i == t.segments || t[i].length == 0) continue;
    const int64_t blocks = ((t[i].e0 + t[i].length - 1) >> 3) - (t[i].e0 >> 3) + 1;
    tiles += (blocks + walk.tile - 1) / walk.tile;
  }
  if (tiles > kMostItems / t.outputs) fail("first: more than 2^30 items");
  return static_cast<int32_t>(tiles);
}

// Whether any output has noise, in the work type.
inline bool any_noise(const ReplicateArgs& a) {
  const Table& t = a.table;
  double most = 0;
  for (int64_t i = 0; i < t.segments; ++i)
    for (int32_t e = 0; t[i].length && e < t.outputs; ++e) most = std::max(most, a.sigma[t[i].group * t.outputs + e]);
  return (t.wide() ? most : static_cast<float>(most)) != 0;
}

// Kernels on streams of values, which ask for no more than this.
inline void check_stream(int64_t address, int64_t n, int64_t code, const char* name) {
  check_code(code, name);
  if (n < 0 || (n > 0 && (address == 0 || address % size_of(code) != 0)))
    fail("address: 0 or not aligned to its elements, or n below 0");
}

inline int64_t count_nonfinite(int64_t address, int64_t n, int code) {
  check_stream(address, n, code, "code");
  return kernels().count_nonfinite(reinterpret_cast<const void*>(address), n, code);
}

inline std::tuple<int64_t, int64_t, double, double, double, double, double> apart(int64_t x, int x_code, int64_t y,
                                                                                  int y_code, int64_t n) {
  check_stream(x, n, x_code, "x_code");
  check_stream(y, n, y_code, "y_code");
  const Apart a = kernels().apart(x, x_code, y, y_code, n);
  return {a.differ, a.nonfinite, a.most, a.xx, a.xy, a.yy, a.dd};
}

// Addresses of fp32 (fp64 for fp64) x and replica, and of random bytes.
inline void peel(int64_t x, int64_t replica, int64_t drawn, double share, int64_t n, int code) {
  check_code(code, "code");
  if (n < 0 || (n && (!x || !replica || !drawn))) fail("x, replica or drawn: no address");
  const PlainFloat plain;
  kernels().peel({reinterpret_cast<void*>(x), reinterpret_cast<void*>(replica), reinterpret_cast<const int8_t*>(drawn),
                  share, n, code});
}

inline void low_rank(int64_t out, int64_t left, int64_t right, int64_t x, double scale, int64_t rows, int64_t columns,
                     int64_t rank, int64_t stride, int code) {
  check_code(code, "code");
  if (code == kF64) fail("code: fp64 has no place in a sum of fp32");
  if (rows < 0 || columns < 0 || rank < 1 || stride < columns) fail("sizes: expected rank >= 1 and stride >= columns");
  const Scratch strip = scratch_of(rank * kStrip * static_cast<int64_t>(sizeof(float)));
  const PlainFloat plain;
  kernels().low_rank({reinterpret_cast<float*>(out), reinterpret_cast<const float*>(left),
                      reinterpret_cast<const float*>(right), x, static_cast<float>(scale), rows, columns, rank, stride,
                      code, static_cast<float*>(strip.get())});
}

// Rows of a table of addresses.
template <class Row>
const Row* rows_of(int64_t table, int64_t rows, int64_t width) {
  if (rows < 0 || (rows && !table)) fail("table: no address");
  if (width < 1) fail("width: expected at least 1, got " + std::to_string(width));
  const Row* row = reinterpret_cast<const Row*>(table);
  for (int64_t i = 0; i < rows; ++i)
    if (row[i].n < 0) fail_at(i, "n must not be negative");
  return row;
}

inline void dequantise(int64_t table, int64_t rows, int64_t width, int code) {
  const DequantiseRow* row = rows_of<DequantiseRow>(table, rows, width);
  check_word(code, kE2M1, "code");
  for (int64_t i = 0; i < rows; ++i)
    if (row[i].first < 0 || !row[i].codes || !row[i].scales || !row[i].out)
      fail_at(i, "first is below 0, or no address");
  const PlainFloat plain;
  kernels().dequantise({row, rows, width, code});
}

inline void largest(int64_t table, int64_t rows, int64_t width) {
  const LargestRow* row = rows_of<LargestRow>(table, rows, width);
  for (int64_t i = 0; i < rows; ++i)
    if (!row[i].x || !row[i].out) fail_at(i, "no address");
  kernels().largest({row, rows, width});
}

inline std::tuple<double, double, double> quantise(int64_t table, int64_t rows, int64_t width, int code, bool divide) {
  const QuantiseRow* row = rows_of<QuantiseRow>(table, rows, width);
  if (code != kE4M3 && code != kE2M1) fail("code: expected that of float8_e4m3fn or float4_e2m1fn");
  for (int64_t i = 0; i < rows; ++i) {
    if (!row[i].x || !row[i].factors || !row[i].scales || !row[i].codes) fail_at(i, "no address");
    if (code == kE2M1 && (row[i].n % 2 || width % 2)) fail_at(i, "expected blocks and rows of pairs");
  }
  const PlainFloat plain;
  QuantiseError error{};
  kernels().quantise({row, rows, width, code, divide, &error});
  return {error.squares, error.errors, error.most};
}

}  // namespace fastmerge
