// The Python module fastmerge._native: checks every argument, releases the GIL, runs on the calling thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "arrays.h"
#include "checks.h"
#include "header.h"
#include "kept.h"
#include "kernels.h"

namespace py = pybind11;
using namespace fastmerge;

namespace {

template <class Args>
void run(void (*kernel)(const Args&), const Args& args) {
  py::gil_scoped_release release;
  const PlainFloat plain;
  kernel(args);
}

// ---- combine, gram, dot, fold --------------------------------------------------------------------------------

void combine(const py::array& table, const py::array& ins, int out_code, const py::array& coef, const py::array& scale,
             bool delta, bool per_row, const py::array& nonfinite, bool far, bool wide) {
  const int64_t parameters = coef.ndim() == 2 ? coef.shape(0) : 0;
  Needs needs;
  needs.parameters = parameters, needs.out_code = out_code, needs.by_row = per_row, needs.coded = true;
  check_code(out_code, "out_code");
  CombineArgs a;
  a.table = check_table(table, ins, needs);
  a.coef = data<double>(coef, "coef", {parameters, a.table.inputs});
  a.scale = data<double>(scale, "scale", {parameters, 2});
  a.out_code = out_code, a.delta = delta, a.per_row = per_row;
  a.nonfinite = data<int64_t>(nonfinite, "nonfinite", {a.table.segments}, true);
  a.far = far, a.wide = wide;
  run(kernels().combine, a);
}

// thr: None, or what variance keeps of the deltas.
void gram_of(const py::array& table, const py::array& ins, const py::array& partials, bool delta, bool diff,
             bool per_row, const Keep* keep) {
  GramArgs a;
  Needs needs;
  needs.partials = partials.ndim() == 2 ? partials.shape(0) : 0;
  needs.by_row = per_row, needs.tiles = true, needs.base = delta ? 1 : 0, needs.coded = true;
  if (keep) needs.parameters = keep->deltas.parameters();
  a.table = check_table(table, ins, needs);
  const KeepArgs kept = keep ? keep->checked(a.table) : KeepArgs{};
  a.keep = keep ? &kept : nullptr;
  const int64_t m = a.table.inputs - (delta ? 1 : 0);
  if (diff && m < 2) fail("diff: expected at least 2 vectors, got " + std::to_string(m));
  a.columns = m * (m + 1) / 2 + (diff ? 1 : 0);
  a.partials = data<double>(partials, "partials", {-1, a.columns}, true);
  a.delta = delta, a.diff = diff, a.per_row = per_row;
  const Scratch scratch = scratch_of(gram_scratch(a.table.inputs, a.columns, a.table.wide()));
  a.scratch = scratch.get();
  run(kernels().gram, a);
}

void gram(const py::array& table, const py::array& ins, const py::array& partials, bool delta, bool diff,
          bool per_row) {
  gram_of(table, ins, partials, delta, diff, per_row, nullptr);
}

// Of what variance keeps of the deltas.
void gram_kept(const py::array& table, const py::array& ins, const py::array& partials, const py::array& model_index,
               const py::array& bern, const py::array& thr, const py::array& cut) {
  const Keep keep{{-1, false, model_index, bern, true}, true, thr, cut};
  gram_of(table, ins, partials, true, false, false, &keep);
}

void dot(const py::array& table, const py::array& ins, const py::array& partials) {
  DotArgs a;
  Needs needs;
  needs.partials = partials.ndim() == 2 ? partials.shape(0) : 0, needs.tiles = true, needs.base = 2;
  a.table = check_table(table, ins, needs);
  a.partials = data<double>(partials, "partials", {-1, a.table.inputs - 2}, true);
  const Scratch scratch = scratch_of(dot_scratch(a.table.inputs, a.table.wide()));
  a.scratch = scratch.get();
  run(kernels().dot, a);
}

py::array_t<double> fold(const py::array& partials, const py::array& first) {
  FoldArgs a;
  a.partials = data<double>(partials, "partials", {-1, -1});
  a.columns = partials.shape(1);
  a.first = data<int64_t>(first, "first", {-1});
  a.groups = first.shape(0) - 1;
  check_ranges(a.first, a.groups, partials.shape(0));
  py::array_t<double> out({a.groups, a.columns});
  a.out = out.mutable_data();
  run(kernels().fold, a);
  return out;
}

// ---- select and consensus ---------------------------------------------------------------------------------

void delta_keys(const py::array& table, const py::array& ins, int round_code, bool drop, const py::array& model_index,
                const py::array& bern, const py::array& out, bool variance) {
  const Deltas deltas{round_code, drop, model_index, bern, variance};
  Needs needs;
  needs.parameters = deltas.parameters(), needs.base = 1, needs.coded = true;
  DeltaKeysArgs a;
  a.table = check_table(table, ins, needs);
  a.deltas = deltas.checked(a.table.inputs - 1);
  const int64_t n = a.deltas.columns(a.table);
  int64_t total = 0;
  for (int64_t s = 0; s < a.table.segments; ++s) total += a.table[s].length;
  a.out = keys_data(out, "out", {total, n}, a.table.wide());
  run(kernels().delta_keys, a);
}

void count(const py::array& table, const py::array& ins, int round_code, bool drop, const py::array& model_index,
           const py::array& bern, const py::array& lo, const py::array& hi, const py::array& counts,
           const py::array& keys, const py::array& where, const py::array& used, bool variance) {
  const Deltas deltas{round_code, drop, model_index, bern, variance};
  Needs needs;
  needs.parameters = deltas.parameters(), needs.tiles = true, needs.base = 1, needs.coded = true;
  needs.partials = counts.ndim() == 3 ? counts.shape(0) : 0;
  CountArgs a;
  a.table = check_table(table, ins, needs);
  a.deltas = deltas.checked(a.table.inputs - 1);
  const int64_t n = a.deltas.columns(a.table), p = needs.parameters;
  a.lo = data<uint64_t>(lo, "lo", {p, n}), a.hi = data<uint64_t>(hi, "hi", {p, n});
  a.counts = data<int64_t>(counts, "counts", {-1, n, 4}, true);
  a.cap = keys.ndim() == 2 ? keys.shape(1) : 0;
  a.keys = keys_data(keys, "keys", {n, a.cap}, a.table.wide());
  a.where = data<int64_t>(where, "where", {n, a.cap, 2}, true);
  a.used = data<int64_t>(used, "used", {n}, true);
  run(kernels().count, a);
}

void find_kth(const py::array& table, const py::array& ins, int round_code, bool drop, const py::array& model_index,
              const py::array& bern, const py::array& ranks, const py::array& thr, const py::array& found,
              bool variance) {
  const Deltas deltas{round_code, drop, model_index, bern, variance};
  Needs needs;
  needs.parameters = deltas.parameters(), needs.base = 1, needs.coded = true;
  KthArgs a;
  a.table = check_table(table, ins, needs);
  a.deltas = deltas.checked(a.table.inputs - 1);
  const int64_t n = a.deltas.columns(a.table), p = needs.parameters;
  a.ranks = data<int64_t>(ranks, "ranks", {p, n});
  a.thr = data<uint64_t>(thr, "thr", {p, n}, true);
  a.found = data<int64_t>(found, "found", {p, n, 4}, true);
  const Scratch scratch = scratch_of(kth_scratch(longest_whole(a.table), a.table.inputs, a.table.wide()));
  a.scratch = scratch.get();
  run(kth, a);
}

void l1(const py::array& table, const py::array& ins, int round_code, bool drop, bool trim,
        const py::array& model_index, const py::array& bern, const py::array& thr, const py::array& cut,
        const py::array& sums, const py::object& bits, bool given, bool wide_sums) {
  const Keep keep{{round_code, drop, model_index, bern}, trim, thr, cut};
  Needs needs;
  needs.parameters = keep.deltas.parameters(), needs.tiles = true, needs.base = 1, needs.coded = true;
  needs.partials = sums.ndim() == 3 ? sums.shape(0) : 0;
  L1Args a;
  a.table = check_table(table, ins, needs);
  a.keep = keep.checked(a.table);
  a.keep.bits = bits_data(bits, a.table, !given), a.keep.given = given, a.keep.wide_sums = wide_sums;
  a.sums = data<double>(sums, "sums", {-1, a.table.inputs - 1, 2}, true);
  run(kernels().l1, a);
}

void votes(const py::array& table, const py::array& ins, int round_code, bool drop, bool trim,
           const py::array& model_index, const py::array& bern, const py::array& thr, const py::array& cut, int elect,
           bool split, const py::array& f, const py::array& counts, bool wide_sums) {
  const Keep keep{{round_code, drop, model_index, bern}, trim, thr, cut};
  check_word(elect, 2, "elect");
  Needs needs;
  needs.parameters = keep.deltas.parameters(), needs.tiles = true, needs.base = 1, needs.coded = true;
  needs.partials = counts.ndim() == 2 ? counts.shape(0) : 0;
  VotesArgs a;
  a.table = check_table(table, ins, needs);
  a.keep = keep.checked(a.table);
  a.keep.wide_sums = wide_sums;
  a.elect = elect, a.split = split;
  a.f = data<double>(f, "f", {needs.parameters, a.table.inputs - 1, 3});
  a.counts = data<int64_t>(counts, "counts", {-1, 2}, true);
  run(kernels().votes, a);
}

void consensus(const py::array& table, const py::array& ins, int out_code, int round_code, bool drop, bool trim,
               const py::array& model_index, const py::array& bern, const py::array& thr, const py::array& cut,
               int elect, bool split, int zero, int merge, const py::array& f, const py::array& scale,
               const py::array& nonfinite, const py::object& bits, bool wide_sums, bool variance) {
  const Keep keep{{round_code, drop, model_index, bern, variance}, trim, thr, cut};
  check_code(out_code, "out_code");
  check_word(elect, 2, "elect");
  check_word(zero, 2, "zero");
  check_word(merge, 2, "merge");
  Needs needs;
  needs.parameters = keep.deltas.parameters(), needs.tiles = trim || !bits.is_none(), needs.base = 1,
  needs.out_code = out_code, needs.coded = true;
  ConsensusArgs a;
  a.table = check_table(table, ins, needs);
  a.out_code = out_code;
  a.keep = keep.checked(a.table);
  a.keep.bits = bits_data(bits, a.table, false), a.keep.wide_sums = wide_sums;
  a.elect = elect, a.split = split, a.zero = zero, a.merge = merge;
  a.f = data<double>(f, "f", {needs.parameters, a.table.inputs - 1, 3});
  a.scale = data<double>(scale, "scale", {needs.parameters, 3});
  a.nonfinite = data<int64_t>(nonfinite, "nonfinite", {a.table.segments}, true);
  run(kernels().consensus, a);
}

// ---- importance ---------------------------------------------------------------------------------------------

void importance(const py::array& table, const py::array& ins, const py::array& divergence, const py::array& out) {
  Needs needs;
  needs.parameters = divergence.ndim() == 1 ? divergence.shape(0) : 0;
  needs.by_row = true, needs.base = 1, needs.coded = true;
  ImportanceArgs a;
  a.table = check_table(table, ins, needs);
  const Scratch scratch = scratch_of(16 * importance_row(check_rows(a.table)));
  a.scratch = scratch.get();
  a.divergence = data<double>(divergence, "divergence", {-1}, true);
  int64_t total = 0;
  for (int64_t s = 0; s < a.table.segments; ++s) total += a.table[s].length;
  a.out = a.table.wide() ? static_cast<void*>(data<double>(out, "out", {total}, true))
                         : static_cast<void*>(data<float>(out, "out", {total}, true));
  run(kernels().importance, a);
}

void fuse(const py::array& table, const py::array& ins, int out_code, const py::array& divergence, double least,
          const py::array& nonfinite) {
  Needs needs;
  needs.parameters = divergence.ndim() == 1 ? divergence.shape(0) : 0, needs.out_code = out_code;
  needs.by_row = true, needs.base = 1, needs.coded = true;
  check_code(out_code, "out_code");
  FuseArgs a;
  a.table = check_table(table, ins, needs);
  check_rows(a.table);
  a.out_code = out_code, a.least = least;
  a.divergence = data<double>(divergence, "divergence", {-1});
  a.nonfinite = data<int64_t>(nonfinite, "nonfinite", {a.table.segments}, true);
  run(kernels().fuse, a);
}

// ---- replicate ----------------------------------------------------------------------------------------------

ReplicateArgs replicate_args(const py::array& table, const py::array& ins, int out_code, const py::array& sigma,
                             const py::array& numbers) {
  ReplicateArgs a;
  a.numbers = data<int64_t>(numbers, "numbers", {-1});
  const int64_t outputs = numbers.shape(0);
  if (outputs < 1 || outputs > INT32_MAX) fail("numbers: expected one per output, got " + std::to_string(outputs));
  a.sigma = data<double>(sigma, "sigma", {-1, outputs});
  Needs needs;
  needs.parameters = sigma.shape(0), needs.out_code = out_code;
  check_code(out_code, "out_code");
  data<int32_t>(ins, "ins", {1});
  a.table = check_table(table, ins, needs, outputs);
  a.out_code = out_code;
  check(a);
  return a;
}

void replicate(const py::array& table, const py::array& ins, int out_code, const py::array& sigma,
               const py::array& numbers, const py::array& lines, const py::array& nonfinite) {
  ReplicateArgs a = replicate_args(table, ins, out_code, sigma, numbers);
  a.lines = reinterpret_cast<const NormalLine*>(data<float>(lines, "lines", {kNormalLines, 2}));
  a.nonfinite = data<int64_t>(nonfinite, "nonfinite", {nonfinite.size() ? a.table.segments : 0}, true);
  if (nonfinite.size() == 0) a.nonfinite = nullptr;
  run(kernels().replicate, a);
}

#if defined(FASTMERGE_HAS_CUDA)
// `there`: address of table, first, sigma, numbers, lines and a zero on the device, one after the other.
int cuda_launch(int device, int64_t stream, const py::array& table, const py::array& ins, int out_code,
                const py::array& sigma, const py::array& numbers, const py::array& first, int64_t there,
                int64_t nonfinite) {
  ReplicateArgs a = replicate_args(table, ins, out_code, sigma, numbers);
  ReplicateWalk walk = {data<int64_t>(first, "first", {a.table.segments + 1}), 0, tile_of(out_code), kGroup, nullptr};
  walk.tiles = check(a.table, walk);
  if (device < 0 || there == 0) fail("device or there: not a device's address");
  const bool random = any_noise(a);
  a.table.data = reinterpret_cast<const int64_t*>(there);
  walk.first = a.table.data + table.size();
  a.sigma = reinterpret_cast<const double*>(walk.first + first.size());
  a.numbers = reinterpret_cast<const int64_t*>(a.sigma + sigma.size());
  a.lines = reinterpret_cast<const NormalLine*>(a.numbers + numbers.size());
  walk.drawn = reinterpret_cast<int32_t*>(const_cast<NormalLine*>(a.lines + kNormalLines));
  a.nonfinite = reinterpret_cast<int64_t*>(nonfinite);
  py::gil_scoped_release release;
  return walk.tiles ? cuda_replicate(device, stream, a, walk, random) : 0;
}
#endif

// ---- values -------------------------------------------------------------------------------------------------

py::array_t<uint16_t> philox_lanes(uint64_t key, uint32_t model, uint32_t op, int64_t e0, int64_t n) {
  if (e0 < 0 || n < 0) fail("e0 and n must not be negative");
  py::array_t<uint16_t> out(n);
  uint16_t* p = out.mutable_data();
  py::gil_scoped_release release;
  kernels().philox(key, model, op, e0, n, p);
  return out;
}

py::array_t<uint32_t> philox_words(const py::array& counter, const py::array& key) {
  const uint32_t* c = data<uint32_t>(counter, "counter", {4});
  const uint32_t* k = data<uint32_t>(key, "key", {2});
  py::array_t<uint32_t> out(4, c);
  philox4x32(out.mutable_data(), k[0], k[1]);
  return out;
}

// ---- transfers, headers and the rest --------------------------------------------------------------------------

using Transfer = int (*)(const int64_t*, int64_t, int64_t&, int64_t&);

template <Transfer kTransfer, int kColumns>
py::tuple transfer(const py::array& table, int64_t row, int64_t done) {
  const int64_t* t = data<int64_t>(table, "table", {-1, kColumns});
  const int64_t rows = table.shape(0);
  if (row < 0 || row > rows || done < 0) fail("row and done: outside the table");
  for (int64_t i = row; i < rows; ++i)
    if (t[i * kColumns + kColumns - 1] < 0) fail_at(i, "nbytes must not be negative");
  const int error = [&] {
    py::gil_scoped_release release;
    return kTransfer(t, rows, row, done);
  }();
  return py::make_tuple(row, done, error);
}

py::array_t<int64_t> resident(const py::array& table) {
  const int64_t* t = data<int64_t>(table, "table", {-1, 4});
  py::array_t<int64_t> flags(table.shape(0));
  int64_t* out = flags.mutable_data();
  py::gil_scoped_release release;
  find_resident(t, flags.shape(0), out);
  return flags;
}

py::object read_rows(const py::bytes& raw, int64_t start, int file, const py::type& row, const py::function& kind) {
  if (PyObject* made = header_rows(raw.ptr(), start, file, row.ptr(), kind.ptr()))
    return py::reinterpret_steal<py::object>(made);
  throw py::error_already_set();
}

void set_isa(const std::string& name) {
  if (!use_isa(name.c_str())) fail("isa " + name + ": not built, or this machine cannot run it");
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels and file transfers of fastmerge; see fastmerge/_native.pyi.";
  if (const char* wanted = std::getenv("FASTMERGE_ISA"); wanted && !use_isa(wanted))
    throw py::import_error(std::string("FASTMERGE_ISA=") + wanted + ": not built, or this machine cannot run it");
  using py::arg;
  m.def("combine", combine, arg("table"), arg("ins"), arg("out_code"), arg("coef"), arg("scale"), arg("delta"),
        arg("per_row"), arg("nonfinite"), arg("far") = false, arg("wide") = false);
  m.def("gram", gram, arg("table"), arg("ins"), arg("partials"), arg("delta"), arg("diff"), arg("per_row"));
  m.def("gram_kept", gram_kept, arg("table"), arg("ins"), arg("partials"), arg("model_index"), arg("bern"), arg("thr"),
        arg("cut"));
  m.def("dot", dot, arg("table"), arg("ins"), arg("partials"));
  m.def("fold", fold, arg("partials"), arg("first"));
  m.def("delta_keys", delta_keys, arg("table"), arg("ins"), arg("round_code"), arg("drop"), arg("model_index"),
        arg("bern"), arg("out"), arg("variance") = false);
  m.def("count", count, arg("table"), arg("ins"), arg("round_code"), arg("drop"), arg("model_index"), arg("bern"),
        arg("lo"), arg("hi"), arg("counts"), arg("keys"), arg("where"), arg("used"), arg("variance") = false);
  m.def("kth", find_kth, arg("table"), arg("ins"), arg("round_code"), arg("drop"), arg("model_index"), arg("bern"),
        arg("ranks"), arg("thr"), arg("found"), arg("variance") = false);
  m.def("l1", l1, arg("table"), arg("ins"), arg("round_code"), arg("drop"), arg("trim"), arg("model_index"),
        arg("bern"), arg("thr"), arg("cut"), arg("sums"), arg("bits") = py::none(), arg("given") = false,
        arg("wide_sums") = false);
  m.def("votes", votes, arg("table"), arg("ins"), arg("round_code"), arg("drop"), arg("trim"), arg("model_index"),
        arg("bern"), arg("thr"), arg("cut"), arg("elect"), arg("split"), arg("f"), arg("counts"),
        arg("wide_sums") = false);
  m.def("consensus", consensus, arg("table"), arg("ins"), arg("out_code"), arg("round_code"), arg("drop"), arg("trim"),
        arg("model_index"), arg("bern"), arg("thr"), arg("cut"), arg("elect"), arg("split"), arg("zero"), arg("merge"),
        arg("f"), arg("scale"), arg("nonfinite"), arg("bits") = py::none(), arg("wide_sums") = false,
        arg("variance") = false);
  m.def("importance", importance, arg("table"), arg("ins"), arg("divergence"), arg("out"));
  m.def("fuse", fuse, arg("table"), arg("ins"), arg("out_code"), arg("divergence"), arg("least"), arg("nonfinite"));
  m.def("replicate", replicate, arg("table"), arg("ins"), arg("out_code"), arg("sigma"), arg("numbers"), arg("lines"),
        arg("nonfinite"));
#if defined(FASTMERGE_HAS_CUDA)
  m.def("cuda_replicate", cuda_launch, arg("device"), arg("stream"), arg("table"), arg("ins"), arg("out_code"),
        arg("sigma"), arg("numbers"), arg("first"), arg("there"), arg("nonfinite"));
  m.def("cuda_error", cuda_error, arg("status"));
#endif
  m.def("philox_u16", philox_lanes, arg("key"), arg("model"), arg("op"), arg("e0"), arg("n"));
  m.def("philox4x32", philox_words, arg("counter"), arg("key"));
  using free = py::call_guard<py::gil_scoped_release>;
  m.def("count_nonfinite", count_nonfinite, arg("address"), arg("n"), arg("code"), free());
  m.def("apart", apart, arg("x"), arg("x_code"), arg("y"), arg("y_code"), arg("n"), free());
  m.def("low_rank", low_rank, arg("out"), arg("left"), arg("right"), arg("x"), arg("scale"), arg("rows"),
        arg("columns"), arg("rank"), arg("stride"), arg("code"), free());
  m.def("peel", peel, arg("x"), arg("replica"), arg("drawn"), arg("share"), arg("n"), arg("code"), free());
  m.def("dequantise", dequantise, arg("table"), arg("rows"), arg("width"), arg("code"), free());
  m.def("largest", largest, arg("table"), arg("rows"), arg("width"), free());
  m.def("quantise", quantise, arg("table"), arg("rows"), arg("width"), arg("code"), arg("divide"), free());
  m.def("read_some", transfer<read_some, 4>, arg("table"), arg("row"), arg("done"));
  m.def("write_some", transfer<write_some, 4>, arg("table"), arg("row"), arg("done"));
  m.def("copy_some", transfer<copy_some, 5>, arg("table"), arg("row"), arg("done"));
  m.def("move_some", transfer<move_some, 3>, arg("table"), arg("row"), arg("done"));
  m.def("resident", resident, arg("table"));
  m.def("read_past", transfer<read_past, 5>, arg("table"), arg("row"), arg("done"));
  m.def("header_rows", read_rows, arg("raw"), arg("data_start"), arg("file"), arg("row"), arg("kind"));
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", set_isa, arg("name"));
  m.def("has_cuda", [m] { return py::hasattr(m, "cuda_replicate"); });
}
