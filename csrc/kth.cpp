// The k-th largest keys of whole tensors that are in memory, in one call: what ops/selection/select.py does over
// chunks.
//
// For each tensor a sample of scattered blocks gives every model a bracket of keys that probably holds its k-th; one
// count tells whether it does. Tensors of a mixture of experts have some 80,000 elements and there are 18,000 of
// them, so no pass of theirs may cost calls of numpy. What a bracket misses is left to the caller.
//
// The rules are those of ops/selection/brackets.py; its constants differ (few blocks of at least 256 elements, six
// standard deviations), because there a block costs Python and a miss reads a large tensor again, here only a pass in
// memory.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels.h"

namespace fastmerge {
namespace {

// Elements of a block of the sample, and of the whole sample: enough for the bracket to hold one in fifteen.
constexpr int64_t kPiece = 32, kShare = 64;
// Half width of a bracket in standard deviations of the sampled rank: one in 16,000 misses.
constexpr double kSigmas = 4.0;

template <class K>
struct Bracket {
  K lo, hi;
};

// Rows of the sample's segment table: blocks spread evenly and irregularly (by the golden ratio) over the tensor.
int64_t sample_rows(const Segment& s, const Table& t, int64_t blocks, int64_t* rows) {
  const int64_t width = kHeader + t.inputs;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = b * s.length / blocks, room = (b + 1) * s.length / blocks - first - kPiece + 1;
    const double golden = std::fmod(static_cast<double>(b) * 0.6180339887498949, 1.0);
    const int64_t at = first + static_cast<int64_t>(golden * static_cast<double>(room));
    int64_t* row = rows + b * width;
    std::copy_n(&s.out, width, row);
    auto& piece = *reinterpret_cast<Segment*>(row);
    piece.length = kPiece;
    piece.e0 = s.e0 + at;
    piece.group = 0;
    for (int32_t m = 0; m < t.inputs; ++m) piece.in[m] += at * size_of(t.codes[m]);
  }
  return blocks * kPiece;
}

// Keys of a sample by rank, without a sort: a histogram of the upper bits finds the bin that a rank lies in, and only
// its keys are partitioned. Partitioning all of them mispredicts five times as many branches: 71,000 for three models
// of 16,384 keys each, by valgrind's predictor.
template <class K>
class Ranked {
 public:
  Ranked(const K* keys, int64_t n, K* room) : keys_(keys), n_(n), room_(room) {
    for (int64_t j = 0; j < n; ++j) ++bins_[keys[j] >> kShift];
  }

  // The key that n - 1 - rank others are at least as large as.
  K at(int64_t rank) {
    K bin = 0;
    for (; rank >= bins_[bin]; ++bin) rank -= bins_[bin];
    if (bin != held_) {
      held_ = bin, some_ = 0;
      for (int64_t j = 0; j < n_; ++j) {
        room_[some_] = keys_[j];
        some_ += keys_[j] >> kShift == bin;
      }
    }
    std::nth_element(room_, room_ + rank, room_ + some_);
    return room_[rank];
  }

 private:
  static constexpr int kShift = sizeof(K) * 8 - 12;  // the top bit of a key is clear
  const K* keys_;
  int64_t n_;
  K* room_;  // keys of the bin held_, in any order
  K held_ = ~K(0);
  int64_t some_ = 0;
  int32_t bins_[2048] = {};
};

// The bracket of the k-th largest of n keys, from blocks of a sample in the order in which they were drawn.
template <class K>
Bracket<K> bracket_of(const K* drawn, int64_t stride, int64_t blocks, int64_t k, int64_t n, int64_t cap, K* keys,
                      K* room) {
  const int64_t m = blocks * kPiece;
  for (int64_t j = 0; j < m; ++j) keys[j] = drawn[j * stride];
  Ranked<K> ranked(keys, m, room);
  const double share = static_cast<double>(k) / static_cast<double>(n);
  const K pivot = ranked.at(m - 1 - static_cast<int64_t>(share * static_cast<double>(m - 1)));
  // Blocks of a tensor differ: the scatter of their shares of large keys, against that of independent draws, is the
  // design effect of cluster sampling.
  double sum = 0, squares = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int32_t large = 0;
    for (int64_t j = 0; j < kPiece; ++j) large += keys[b * kPiece + j] > pivot;
    const double part = static_cast<double>(large) / kPiece;
    sum += part;
    squares += part * part;
  }
  const double p = sum / static_cast<double>(blocks), alone = p * (1 - p) / kPiece;
  const double scatter = squares / static_cast<double>(blocks) - p * p;
  const double spread = alone > 0 && scatter > alone ? std::sqrt(scatter / alone) : 1.0;
  const double rank = share * static_cast<double>(m);
  // Nor wider than what the list has room for: half of 131,073 elements would be.
  const double most = 0.45 * static_cast<double>(m) * static_cast<double>(cap) / static_cast<double>(n);
  const double margin = std::min(kSigmas * spread * std::sqrt(rank * (1 - share)) + 2, most);
  const auto top = static_cast<int64_t>(std::floor(rank - margin)),
             bottom = static_cast<int64_t>(std::ceil(rank + margin));
  return {bottom <= m ? ranked.at(m - bottom) : K(0), top >= 1 ? ranked.at(m - top) : static_cast<K>(~K(0) >> 1)};
}

// Where the first tie that is not kept lies: its tile, and how many ties before it are in the same tile.
void cut_by_tile(const int64_t* counts, int64_t stride, int64_t keep, int64_t* cut) {
  int64_t tile = 0;
  for (; keep >= *counts; counts += stride, ++tile) keep -= *counts;
  cut[0] = tile;
  cut[1] = keep;
}

template <class K>
void cut_by_list(const K* keys, const int64_t* where, int64_t used, K at, int64_t keep, int64_t* cut) {
  cut[0] = 0;
  for (int64_t j = 0; j < used; ++j) {
    if (keys[j] != at) continue;
    const int64_t tile = where[2 * j + 1] / kTile;
    if (tile != cut[0]) cut[0] = tile, cut[1] = 0;
    if (keep-- == 0) return;
    ++cut[1];
  }
}

// The k-th of keys that may be put in any order, and which of its ties are kept.
template <class K>
void partition(K* keys, int64_t n, int64_t k, uint64_t& thr, int64_t* found) {
  std::nth_element(keys, keys + (n - k), keys + n);
  const K at = keys[n - k];
  int64_t larger = 0, tied = 0;
  for (int64_t j = 0; j < n; ++j) larger += keys[j] > at, tied += keys[j] == at;
  thr = at;
  found[0] = k - larger;
  found[1] = tied;
}

// Answers one query from its counts, if they allow; else leaves tied at 0.
template <class K>
void answer(const int64_t* counts, int64_t stride, int64_t tiles, Bracket<K> b, const K* keys, const int64_t* where,
            int64_t listed, int64_t k, K* sorted, uint64_t& thr, int64_t* found) {
  int64_t sum[4] = {};
  for (int64_t t = 0; t < tiles; ++t)
    for (int c = 0; c < 4; ++c) sum[c] += counts[t * stride + c];
  const int64_t above = sum[0], at_hi = sum[1], at_lo = sum[2], inside = sum[3];
  if (above < k && k <= above + at_hi) {
    thr = b.hi;
    found[0] = k - above;
    found[1] = at_hi;
    if (found[0] < at_hi) cut_by_tile(counts + 1, stride, found[0], found + 2);
  } else if (above + at_hi < k && k <= above + at_hi + inside && inside <= listed) {
    const int64_t rank = k - above - at_hi;
    std::copy_n(keys, inside, sorted);
    partition(sorted, inside, rank, thr, found);
    if (found[0] < found[1]) cut_by_list(keys, where, inside, static_cast<K>(thr), found[0], found + 2);
  } else if (above + at_hi + inside < k && k <= above + at_hi + inside + at_lo) {
    thr = b.lo;
    found[0] = k - above - at_hi - inside;
    found[1] = at_lo;
    if (found[0] < at_lo) cut_by_tile(counts + 2, stride, found[0], found + 2);
  }
}

template <class K>
struct Scratch {
  int64_t *rows, *counts, *where, *used;
  uint64_t *lo, *hi;
  K *drawn, *keys, *sorted;
};

// Where the blocks of a sample would be half of a tensor, all of it is taken.
constexpr int64_t kWhole = 64 * 2 * kPiece;
static_assert(kWhole <= kTile);

int64_t sample_blocks(int64_t n) { return std::min<int64_t>(512, std::max<int64_t>(64, n / kShare / kPiece)); }

// Carves the scratch memory, or, from address 0, says how much of it a tensor of n elements needs.
template <class K>
int64_t carve(void* memory, int64_t n, int64_t inputs, Scratch<K>& s) {
  const int64_t models = inputs - 1, blocks = sample_blocks(n), tiles = (n + kTile - 1) / kTile, cap = kth_listed(n);
  auto at = reinterpret_cast<uintptr_t>(memory);
  const auto take = [&at](auto*& p, int64_t count) {
    p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(at);
    at += (static_cast<uintptr_t>(count) * sizeof *p + 63) & ~uintptr_t{63};
  };
  take(s.rows, blocks * (kHeader + inputs));
  take(s.counts, tiles * models * 4);
  take(s.where, models * cap * 2);
  take(s.used, models);
  take(s.lo, models);
  take(s.hi, models);
  take(s.drawn, std::max(blocks * kPiece, std::min(n, kWhole)) * models);
  take(s.keys, models * cap);
  take(s.sorted, std::max(std::max(cap, blocks * kPiece), std::min(n, kWhole)));
  return static_cast<int64_t>(at - reinterpret_cast<uintptr_t>(memory));
}

template <class K>
void kth_tensor(const KthArgs& a, const Segment& s) {
  const Table& t = a.table;
  const int64_t models = a.deltas.columns(t), n = s.length, p = s.group * models, blocks = sample_blocks(n),
                cap = kth_listed(n);
  const int64_t* k = a.ranks + p;
  if (std::none_of(k, k + models, [n](int64_t r) { return 0 < r && r < n; })) return;
  Scratch<K> w;
  carve(a.scratch, n, t.inputs, w);
  DeltaArgs deltas = a.deltas;
  if (!deltas.variance) deltas.bern += p;
  std::copy_n(&s.out, kHeader + t.inputs, w.rows);
  auto& whole = *reinterpret_cast<Segment*>(w.rows);
  whole.group = whole.stats = 0;
  const Table one{w.rows, 1, t.inputs, t.codes};
  if (n < kWhole) {
    kernels().delta_keys(DeltaKeysArgs{one, deltas, w.drawn});
    for (int64_t i = 0; i < models; ++i) {
      if (k[i] <= 0 || k[i] >= n) continue;
      for (int64_t j = 0; j < n; ++j) w.sorted[j] = w.drawn[j * models + i];
      int64_t* found = a.found + 4 * (p + i);
      partition(w.sorted, n, k[i], a.thr[p + i], found);
      found[2] = 0, found[3] = found[0];  // all of it is one tile
    }
    return;
  }
  sample_rows(s, t, blocks, w.rows);
  const Table pieces{w.rows, blocks, t.inputs, t.codes};
  kernels().delta_keys(DeltaKeysArgs{pieces, deltas, w.drawn});
  Bracket<K> never{static_cast<K>(~K(0)), static_cast<K>(~K(0))};
  for (int64_t i = 0; i < models; ++i) {
    const bool asked = 0 < k[i] && k[i] < n;
    const Bracket<K> b =
        asked ? bracket_of(w.drawn + i, models, blocks, k[i], n, cap, w.keys + i * cap, w.sorted) : never;
    w.lo[i] = b.lo, w.hi[i] = b.hi, w.used[i] = 0;
  }
  std::copy_n(&s.out, kHeader + t.inputs, w.rows);
  whole.group = whole.stats = 0;
  kernels().count(CountArgs{one, deltas, w.lo, w.hi, w.counts, w.keys, w.where, cap, w.used});
  for (int64_t i = 0; i < models; ++i)
    if (0 < k[i] && k[i] < n)
      answer(w.counts + 4 * i, 4 * models, (n + kTile - 1) / kTile, Bracket<K>{K(w.lo[i]), K(w.hi[i])},
             w.keys + i * cap, w.where + 2 * i * cap, std::min(cap, w.used[i]), k[i], w.sorted, a.thr[p + i],
             a.found + 4 * (p + i));
}

}  // namespace

int64_t kth_scratch(int64_t longest, int32_t inputs, bool wide) {
  Scratch<uint64_t> w;
  Scratch<uint32_t> f;
  return wide ? carve(nullptr, longest, inputs, w) : carve(nullptr, longest, inputs, f);
}

void kth(const KthArgs& a) {
  for (int64_t r = 0; r < a.table.segments; ++r)
    a.table.wide() ? kth_tensor<uint64_t>(a, a.table[r]) : kth_tensor<uint32_t>(a, a.table[r]);
}

}  // namespace fastmerge
