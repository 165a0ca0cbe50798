// importance of the elements of a model beside a base, |x - b| KL(softmax x || softmax b) by rows, and the merge that
// takes over those that reach a threshold.
//
// Divergences are in fp64 from +, -, *, / and powers of two only, as fastmerge/methods/exponentials.py has them: libm
// differs between machines. Vectors are the compiler's own, so that every instruction set computes the same.
#include <algorithm>
#include <limits>

#include "coded.h"
#include "keep.h"

namespace fastmerge {
namespace FM_ISA {
namespace {

using V = Pack<double>::V;
using I = Pack<double>::I;
constexpr int64_t kWide = kWidth<double>;

constexpr double kAbsent = 1e-8;  // added to probabilities
constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLn2Parts[] = {0.6931471803691238, 1.9082149292705877e-10};
constexpr double kHalfRoot = 0.707106781186547524400844362105;  // of one half
constexpr double kRound = 0x1.8p52;                             // what is added to it becomes an integer in its bits
constexpr int kExp = 14, kLog = 13;

struct Series {
  double exp[kExp], log[kLog];
};
constexpr Series series() {
  Series s{};
  double factorial = 1;
  for (int i = 0; i < kExp; ++i) s.exp[i] = 1 / (factorial *= i ? i : 1);
  for (int i = 0; i < kLog; ++i) s.log[i] = 2.0 / (2 * i + 1);
  return s;
}
constexpr Series kSeries = series();

// The exponential of numbers that are not above 0.
inline V exp_of(V x) {
  x = select(x < V{} - 745.0, V{} - 745.0, x);
  const V shifted = x / kLn2 + kRound, turns = shifted - kRound;
  const V rest = x - turns * kLn2Parts[0] - turns * kLn2Parts[1];
  V total = V{} + kSeries.exp[kExp - 1];
  for (int i = kExp - 1; i-- > 0;) total = total * rest + kSeries.exp[i];
  // Times 2^(turns + 64), which is a normal number, then less: rounded once where the result is not.
  const I power = (reinterpret_cast<I>(shifted) + (1023 + 64)) << 52;
  return total * reinterpret_cast<V>(power) * 0x1p-64;
}

// The natural logarithm of normal positive numbers; of a NaN it is one.
inline V log_of(V x) {
  const I bits = reinterpret_cast<I>(x);
  V part = reinterpret_cast<V>((bits & 0x000fffffffffffff) | 0x3fe0000000000000);
  // The biased exponent as a number: it becomes the last bits of 2^52.
  V power = reinterpret_cast<V>((bits >> 52) | 0x4330000000000000) - (0x1p52 + 1022);
  const I low = part < V{} + kHalfRoot;
  part = select(low, part + part, part);
  power = power - masked(low, V{} + 1.0);
  const V s = (part - 1.0) / (part + 1.0), square = s * s;
  V total = V{} + kSeries.log[kLog - 1];
  for (int i = kLog - 1; i-- > 0;) total = total * square + kSeries.log[i];
  return select(x == x, power * kLn2Parts[0] + (power * kLn2Parts[1] + total * s), x);
}

// The sum of n numbers in the written order; lanes that nothing is added to stay +0, and are left out of the folds.
double ordered_sum(const double* x, int64_t n) {
  alignas(64) double lane[kLanes];
  double total = 0;
  for (int64_t start = 0; start < n; start += kTile) {
    const int64_t stop = std::min(n, start + kTile);
    int64_t width = 1;
    while (width < std::min(stop - start, kLanes)) width *= 2;
    std::fill_n(lane, width, 0.0);
    for (int64_t at = start; at < stop; at += kLanes) {
      const double* some = x + at;
      const int64_t m = std::min(kLanes, stop - at);
      FM_LOOP for (int64_t j = 0; j < m; ++j) lane[j] = lane[j] + some[j];
    }
    for (int64_t half = width / 2; half > 0; half /= 2)
      FM_LOOP for (int64_t j = 0; j < half; ++j) lane[j] = lane[j] + lane[j + half];
    total = total + lane[0];
  }
  return total;
}

// Softmax of elements [at, at + n) of an input, plus kAbsent. Works on whole vectors, for which p has room.
template <class W>
void probabilities(const Table& t, const Segment& s, int i, int64_t at, int64_t n, double* p) {
  alignas(64) W x[kBlock];
  for (int64_t j = 0; j < n; j += kBlock) {
    const int64_t m = std::min(kBlock, n - j);
    load_input(t, s, i, at + j, m, x);
    for (int64_t l = 0; l < m; ++l) p[j + l] = x[l];
  }
  const int64_t whole = (n + kWide - 1) / kWide * kWide;
  for (int64_t j = n; j < whole; ++j) p[j] = p[0];
  V most = get(p);
  for (int64_t j = kWide; j < whole; j += kWide) most = select(get(p + j) > most, get(p + j), most);
  double largest = most[0];
  for (int64_t l = 1; l < kWide; ++l) largest = most[l] > largest ? most[l] : largest;
  for (int64_t j = 0; j < whole; j += kWide) put(p + j, exp_of(get(p + j) - largest));
  const double sum = ordered_sum(p, n);
  for (int64_t j = 0; j < whole; j += kWide) put(p + j, get(p + j) / sum + kAbsent);
}

// The divergence of a row of n elements, rounded to the work type. A NaN anywhere makes it one, whatever the largest
// number was found to be.
template <class W>
W divergence(const Table& t, const Segment& s, int64_t at, int64_t n, double* scratch) {
  double *q = scratch, *p = scratch + importance_row(n);
  probabilities<W>(t, s, 0, at, n, q);
  probabilities<W>(t, s, 1, at, n, p);
  for (int64_t j = 0; j < n; j += kWide) put(p + j, get(p + j) * log_of(get(p + j) / get(q + j)));
  return store<W>(ordered_sum(p, n));
}

// Calls each(at, n, row) for blocks of a segment that lie within one row.
template <class Each>
void in_rows(const Segment& s, const Each& each) {
  for (int64_t at = 0, n; at < s.length; at += n) {
    const int64_t e = s.e0 + at;
    n = std::min({kBlock, s.row - e % s.row, s.length - at});
    each(at, n, s.group + e / s.row);
  }
}

template <class W>
void importance_all(const ImportanceArgs& a) {
  auto* out = static_cast<W*>(a.out);
  alignas(64) W base[kBlock], x[kBlock];
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    for (int64_t at = 0; at < s.length; at += s.row)
      a.divergence[s.group + (s.e0 + at) / s.row] =
          divergence<W>(a.table, s, at, s.row, static_cast<double*>(a.scratch));
    in_rows(s, [&](int64_t at, int64_t n, int64_t row) {
      const W by = static_cast<W>(a.divergence[row]);
      load_input(a.table, s, 0, at, n, base);
      load_input(a.table, s, 1, at, n, x);
      W* to = out + at;
      FM_LOOP for (int64_t j = 0; j < n; ++j) {
        const W d = x[j] - base[j];
        to[j] = store<W>((d < 0 ? -d : d) * by);
      }
    });
    out += s.length;
  }
}

template <class W>
void fuse_all(const FuseArgs& a) {
  const W least = static_cast<W>(a.least);
  alignas(64) W base[kBlock], x[kBlock], out[kBlock];
  for (int64_t r = 0; r < a.table.segments; ++r) {
    const Segment& s = a.table[r];
    in_rows(s, [&](int64_t at, int64_t n, int64_t row) {
      const W by = static_cast<W>(a.divergence[row]);
      load_input(a.table, s, 0, at, n, base);
      load_input(a.table, s, 1, at, n, x);
      FM_LOOP for (int64_t j = 0; j < n; ++j) {
        const W d = x[j] - base[j];
        out[j] = base[j] + d * ((d < 0 ? -d : d) * by >= least ? W(1) : W(0));
      }
      a.nonfinite[r] += store_any(a.out_code, s.out, at, n, out);
    });
  }
}

}  // namespace

void importance(const ImportanceArgs& a) { a.table.wide() ? importance_all<double>(a) : importance_all<float>(a); }

void fuse(const FuseArgs& a) { a.table.wide() ? fuse_all<double>(a) : fuse_all<float>(a); }

}  // namespace FM_ISA
}  // namespace fastmerge
