// Python objects from the header of a safetensors file, without a step of Python for each tensor.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>

namespace fastmerge {

// (where the first tensor starts in `raw`, its tensors, the end of the data), or None where the header is not written
// as programs write it; null with an exception set. A tensor is a `row` (a class of tuples of six): name, the type and
// shape that kind(tag, sizes, nbytes) gave, file, offset, and its bytes.
PyObject* header_rows(PyObject* raw, int64_t data_start, int file, PyObject* row, PyObject* kind);

}  // namespace fastmerge
