// Kernels on behalf of a test: what tests/backends/arm64.py compiles for arm64 and asks over a pipe.
//
// A question is the kernel's name, its arguments in the order of fastmerge/_native.pyi (a number, or an array's address
// and its first two sizes) and the memory that they point into, which lies at kArena in both questions and answers.
#include <sys/mman.h>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/checks.h"

using namespace fastmerge;

namespace {

constexpr int64_t kArena = int64_t{1} << 40, kArenaBytes = int64_t{1} << 30;

struct Question {
  char name[16];
  int64_t values, bytes;
};

struct Answer {
  int64_t results[7];
};

class Arguments {
 public:
  explicit Arguments(const int64_t* first) : next_(first) {}

  int64_t number() { return *next_++; }
  int32_t word() { return static_cast<int32_t>(number()); }
  bool flag() { return number() != 0; }
  double real() {
    const int64_t bits = number();
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  template <class T>
  T* address() {
    return reinterpret_cast<T*>(number());
  }
  template <class T>
  T* array(int64_t* rows = nullptr, int64_t* columns = nullptr) {
    T* data = reinterpret_cast<T*>(number());
    const int64_t sizes[2] = {number(), number()};
    if (rows) *rows = sizes[0];
    if (columns) *columns = sizes[1];
    return sizes[0] ? data : nullptr;
  }
  Table table() {
    Table t;
    int64_t columns, inputs;
    t.data = array<int64_t>(&t.segments, &columns);
    t.codes = array<int32_t>(&inputs);
    t.inputs = static_cast<int32_t>(inputs);
    t.outputs = static_cast<int32_t>(columns - kHeader - inputs + 1);
    return t;
  }
  DeltaArgs deltas() { return {word(), flag(), array<int32_t>(), array<int32_t>()}; }
  KeepArgs keep() {
    KeepArgs k;
    k.round_code = word(), k.drop = flag(), k.trim = flag();
    k.model_index = array<int32_t>(), k.bern = array<int32_t>();
    k.thr = array<uint64_t>(), k.cut = array<int64_t>();
    return k;
  }

 private:
  const int64_t* next_;
};

void gram(Arguments& a) {
  GramArgs g{};
  g.table = a.table();
  g.partials = a.array<double>(nullptr, &g.columns);
  g.delta = a.flag(), g.diff = a.flag(), g.per_row = a.flag();
  const Scratch scratch = scratch_of(gram_scratch(g.table.inputs, g.columns, g.table.wide()));
  g.scratch = scratch.get();
  kernels().gram(g);
}

void gram_kept(Arguments& a) {
  GramArgs g{};
  g.table = a.table();
  g.partials = a.array<double>(nullptr, &g.columns);
  g.delta = true;
  KeepArgs k;
  k.round_code = -1, k.drop = false, k.trim = k.variance = true;
  k.model_index = a.array<int32_t>(), k.bern = a.array<int32_t>();
  k.thr = a.array<uint64_t>(), k.cut = a.array<int64_t>();
  g.keep = &k;
  const Scratch scratch = scratch_of(gram_scratch(g.table.inputs, g.columns, g.table.wide()));
  g.scratch = scratch.get();
  kernels().gram(g);
}

void importance(Arguments& a) {
  ImportanceArgs i{a.table(), a.array<double>(), a.array<void>(), nullptr};
  const Scratch scratch = scratch_of(16 * importance_row(check_rows(i.table)));
  i.scratch = scratch.get();
  kernels().importance(i);
}

void dot(Arguments& a) {
  DotArgs d{};
  d.table = a.table();
  d.partials = a.array<double>();
  const Scratch scratch = scratch_of(dot_scratch(d.table.inputs, d.table.wide()));
  d.scratch = scratch.get();
  kernels().dot(d);
}

void fold(Arguments& a) {
  FoldArgs f{};
  f.partials = a.array<double>(nullptr, &f.columns);
  f.first = a.array<int64_t>(&f.groups);
  --f.groups;
  f.out = a.array<double>();
  kernels().fold(f);
}

void delta_keys(Arguments& a) {
  DeltaKeysArgs d{a.table(), a.deltas(), a.array<void>()};
  d.deltas.variance = a.flag();
  kernels().delta_keys(d);
}

void consensus(Arguments& a) {
  ConsensusArgs c{a.table(), a.word(), a.keep(),          a.word(),          a.flag(),
                  a.word(),  a.word(), a.array<double>(), a.array<double>(), a.array<int64_t>()};
  c.keep.wide_sums = a.flag(), c.keep.variance = a.flag();
  kernels().consensus(c);
}

void l1(Arguments& a) {
  L1Args l{a.table(), a.keep(), a.array<double>()};
  l.keep.given = a.flag(), l.keep.wide_sums = a.flag();
  kernels().l1(l);
}

void votes(Arguments& a) {
  VotesArgs v{a.table(), a.keep(), a.word(), a.flag(), a.array<double>(), a.array<int64_t>()};
  v.keep.wide_sums = a.flag();
  kernels().votes(v);
}

void count(Arguments& a) {
  CountArgs c{};
  c.table = a.table(), c.deltas = a.deltas();
  c.lo = a.array<uint64_t>(), c.hi = a.array<uint64_t>(), c.counts = a.array<int64_t>();
  c.keys = a.array<void>(nullptr, &c.cap);
  c.where = a.array<int64_t>(), c.used = a.array<int64_t>();
  c.deltas.variance = a.flag();
  kernels().count(c);
}

void find_kth(Arguments& a) {
  KthArgs k{a.table(), a.deltas(), a.array<int64_t>(), a.array<uint64_t>(), a.array<int64_t>(), nullptr};
  k.deltas.variance = a.flag();
  const Scratch scratch = scratch_of(kth_scratch(longest_whole(k.table), k.table.inputs, k.table.wide()));
  k.scratch = scratch.get();
  kth(k);
}

void philox(Arguments& a) {
  const int64_t key = a.number(), model = a.number(), op = a.number(), e0 = a.number(), n = a.number();
  kernels().philox(static_cast<uint64_t>(key), static_cast<uint32_t>(model), static_cast<uint32_t>(op), e0, n,
                   a.array<uint16_t>());
}

using Transfer = int (*)(const int64_t*, int64_t, int64_t&, int64_t&);

void transfer(Transfer run, Arguments& a, Answer& answer) {
  int64_t rows, *to = answer.results;
  const int64_t* table = a.array<int64_t>(&rows);
  to[0] = a.number(), to[1] = a.number();
  to[2] = run(table, rows, to[0], to[1]);
}

// False where no kernel has this name.
bool run(const char* name, Arguments a, Answer& answer) {
  const PlainFloat plain;
  const Kernels& k = kernels();
  const auto is = [name](const char* other) { return !std::strcmp(name, other); };
  if (is("combine"))
    k.combine({a.table(), a.word(), a.array<double>(), a.array<double>(), a.flag(), a.flag(), a.array<int64_t>(),
               a.flag(), a.flag()});
  else if (is("gram"))
    gram(a);
  else if (is("gram_kept"))
    gram_kept(a);
  else if (is("importance"))
    importance(a);
  else if (is("fuse"))
    k.fuse({a.table(), a.word(), a.array<double>(), a.real(), a.array<int64_t>()});
  else if (is("dot"))
    dot(a);
  else if (is("fold"))
    fold(a);
  else if (is("delta_keys"))
    delta_keys(a);
  else if (is("count"))
    count(a);
  else if (is("kth"))
    find_kth(a);
  else if (is("l1"))
    l1(a);
  else if (is("votes"))
    votes(a);
  else if (is("consensus"))
    consensus(a);
  else if (is("replicate"))
    k.replicate(
        {a.table(), a.word(), a.array<double>(), a.array<int64_t>(), a.array<NormalLine>(), a.array<int64_t>()});
  else if (is("philox_u16"))
    philox(a);
  else if (is("count_nonfinite")) {
    const int64_t address = a.number(), n = a.number();
    answer.results[0] = k.count_nonfinite(reinterpret_cast<const void*>(address), n, a.word());
  } else if (is("apart")) {
    const int64_t x = a.number(), x_code = a.number(), y = a.number(), y_code = a.number();
    const Apart found = k.apart(x, static_cast<int32_t>(x_code), y, static_cast<int32_t>(y_code), a.number());
    static_assert(sizeof found == sizeof answer.results, "seven numbers");
    std::memcpy(answer.results, &found, sizeof found);
  } else if (is("low_rank")) {
    LowRankArgs b;
    b.out = a.address<float>(), b.left = a.address<const float>(), b.right = a.address<const float>();
    b.x = a.number(), b.scale = static_cast<float>(a.real());
    b.rows = a.number(), b.columns = a.number(), b.rank = a.number(), b.stride = a.number(), b.code = a.word();
    const Scratch strip = scratch_of(b.rank * kStrip * static_cast<int64_t>(sizeof(float)));
    b.strip = static_cast<float*>(strip.get());
    k.low_rank(b);
  } else if (is("dequantise")) {
    DequantiseArgs d{};
    d.table = a.array<const DequantiseRow>(&d.rows), d.width = a.number(), d.code = a.word();
    k.dequantise(d);
  } else if (is("largest")) {
    LargestArgs l{};
    l.table = a.array<const LargestRow>(&l.rows), l.width = a.number();
    k.largest(l);
  } else if (is("quantise")) {
    QuantiseError error{};
    QuantiseArgs q{};
    q.table = a.array<const QuantiseRow>(&q.rows), q.width = a.number(), q.code = a.word(), q.divide = a.flag();
    q.error = &error;
    k.quantise(q);
    std::memcpy(answer.results, &error, sizeof error);
  } else if (is("peel"))
    k.peel({a.address<void>(), a.address<void>(), a.address<const int8_t>(), a.real(), a.number(), a.word()});
  else if (is("read_some"))
    transfer(read_some, a, answer);
  else if (is("write_some"))
    transfer(write_some, a, answer);
  else if (is("read_past"))
    transfer(read_past, a, answer);
  else
    return false;
  return true;
}

}  // namespace

int main() {
  void* arena = mmap(reinterpret_cast<void*>(kArena), kArenaBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (arena != reinterpret_cast<void*>(kArena)) return 1;
  const auto get = [](void* to, int64_t n) {
    return std::fread(to, 1, static_cast<size_t>(n), stdin) == static_cast<size_t>(n);
  };
  for (Question q; get(&q, sizeof q);) {
    std::vector<int64_t> values(static_cast<size_t>(q.values));
    if (q.bytes > kArenaBytes || !get(values.data(), 8 * q.values) || !get(arena, q.bytes)) return 2;
    Answer answer{};
    if (!run(q.name, Arguments(values.data()), answer)) return 3;
    std::fwrite(&answer, sizeof answer, 1, stdout);
    std::fwrite(arena, 1, static_cast<size_t>(q.bytes), stdout);
    std::fflush(stdout);
  }
  return 0;
}
