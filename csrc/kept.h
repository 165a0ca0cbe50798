// What is kept of deltas, as Python gives it, checked.
#pragma once

#include "arrays.h"

namespace fastmerge {

struct Deltas {
  int round_code;
  bool drop;
  const py::array &model_index, &bern;
  bool variance = false;

  int64_t parameters() const { return bern.ndim() == 2 ? bern.shape(0) : 0; }
  DeltaArgs checked(int64_t n) const {
    check_round(round_code);
    if (variance && (drop || round_code != -1)) fail("variance: expected no drop and no rounding of deltas");
    return {round_code, drop, data<int32_t>(model_index, "model_index", {n}),
            data<int32_t>(bern, "bern", {parameters(), n}), variance};
  }
};

struct Keep {
  Deltas deltas;
  bool trim;
  const py::array &thr, &cut;

  KeepArgs checked(const Table& t) const {
    const DeltaArgs d = deltas.checked(t.inputs - 1);
    const int64_t p = deltas.parameters(), n = d.columns(t);
    const KeepArgs k{d, trim, data<uint64_t>(thr, "thr", {p, n}), data<int64_t>(cut, "cut", {p, n, 3})};
    if (d.variance && !trim) fail("variance: expected a trim");
    for (int64_t i = 0; d.variance && i < p; ++i)
      if (k.cut[3 * i + 2] >= 0) fail("variance: expected ties that are cut, not thinned");
    return k;
  }
};

// An array of keys: uint64 where the table is wide, else uint32.
inline void* keys_data(const py::array& keys, const char* name, std::initializer_list<int64_t> shape, bool wide) {
  return wide ? static_cast<void*>(data<uint64_t>(keys, name, shape, true))
              : static_cast<void*>(data<uint32_t>(keys, name, shape, true));
}

// Room for what the drop keeps of a table's blocks; None: there is none.
inline uint32_t* bits_data(const py::object& bits, const Table& t, bool write) {
  if (bits.is_none()) return nullptr;
  if (!py::isinstance<py::array>(bits)) fail("bits: expected an array");
  return data<uint32_t>(py::array(bits), "bits", {blocks_of(t), t.inputs - 1, kWords}, write);
}

}  // namespace fastmerge
