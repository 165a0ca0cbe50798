// Arrays of numpy as the kernels take them, checked.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <type_traits>

#include "checks.h"
#include "kernels.h"

namespace fastmerge {

namespace py = pybind11;

// The data of a C-contiguous array of T. shape: -1 stands for any size; `write` asks for a writable array.
template <class T>
T* data(const py::array& a, const char* name, std::initializer_list<int64_t> shape, bool write = false) {
  const char kind = std::is_floating_point_v<T> ? 'f' : std::is_signed_v<T> ? 'i' : 'u';
  const py::dtype type = a.dtype();
  if (type.kind() != kind || type.itemsize() != static_cast<py::ssize_t>(sizeof(T)))
    fail(std::string(name) + ": expected dtype " + py::str(py::dtype::of<T>()).cast<std::string>() + ", got " +
         py::str(type).cast<std::string>());
  bool fits = a.ndim() == static_cast<py::ssize_t>(shape.size());
  std::string want;
  for (int64_t i = 0, n = static_cast<int64_t>(shape.size()); i < n; ++i) {
    const int64_t expected = shape.begin()[i];
    if (fits && expected >= 0 && a.shape(i) != expected) fits = false;
    want += (i ? ", " : "") + (expected < 0 ? std::string("?") : std::to_string(expected));
  }
  if (!fits) {
    std::string got;
    for (py::ssize_t i = 0; i < a.ndim(); ++i) got += (i ? ", " : "") + std::to_string(a.shape(i));
    fail(std::string(name) + ": expected shape [" + want + "], got [" + got + "]");
  }
  if (!(a.flags() & py::array::c_style)) fail(std::string(name) + ": expected a C-contiguous array");
  if (write && !a.writeable()) fail(std::string(name) + ": expected a writable array");
  return const_cast<T*>(static_cast<const T*>(a.data()));
}

inline Table check_table(const py::array& table, const py::array& ins, const Needs& needs, int64_t outputs = 1) {
  Table t;
  t.codes = data<int32_t>(ins, "ins", {-1});
  t.inputs = static_cast<int32_t>(ins.shape(0));
  t.outputs = static_cast<int32_t>(outputs);
  t.data = data<int64_t>(table, "table", {-1, kHeader + t.inputs + outputs - 1});
  t.segments = table.shape(0);
  check(t, needs);
  return t;
}

}  // namespace fastmerge
