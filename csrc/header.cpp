// The header of a safetensors file as programs write it: compact JSON, metadata first, then the tensors in the order
// of their bytes, names in plain ASCII. Anything else is left to the JSON parser, which also says what is wrong.
#include "header.h"

#include <memory>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fastmerge {
namespace {

using std::string_view;

struct Reader {
  string_view text;
  size_t at = 0;

  bool take(string_view word) {
    if (text.compare(at, word.size(), word) != 0) return false;
    at += word.size();
    return true;
  }
  bool next(char c) const { return at < text.size() && text[at] == c; }
  template <class Good>
  string_view run(Good good) {
    const size_t first = at;
    while (at < text.size() && good(text[at])) ++at;
    return text.substr(first, at - first);
  }
  // Eighteen digits at most, so that sums stay far from 63 bits; no leading zero.
  bool number(int64_t& out) {
    const string_view digits = run([](char c) { return c >= '0' && c <= '9'; });
    if (digits.empty() || digits.size() > 18 || (digits[0] == '0' && digits.size() > 1)) return false;
    out = 0;
    for (const char c : digits) out = out * 10 + (c - '0');
    return true;
  }
  // A flat object of strings, up to and with its closing brace; what is in it is for the JSON parser.
  bool flat() {
    for (bool text_open = false; at < text.size(); ++at) {
      const char c = text[at];
      if (text_open && c == '\\') {
        ++at;
      } else if (c == '"') {
        text_open = !text_open;
      } else if (!text_open && c == '{') {
        return false;
      } else if (!text_open && c == '}') {
        ++at;
        return true;
      }
    }
    return false;
  }
};

bool digit_or_comma(char c) { return (c >= '0' && c <= '9') || c == ','; }
bool of_tag(char c) { return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool of_name(char c) { return c >= ' ' && c <= '~' && c != '"' && c != '\\'; }

struct Kind {
  string_view tag, sizes;
  int64_t nbytes;
};

struct Columns {
  size_t head = 0;  // where the first tensor starts
  std::vector<string_view> names;
  std::vector<int32_t> kinds;  // of each tensor, in `table`
  std::vector<int64_t> begins;
  std::vector<Kind> table;
  int64_t end = 0;  // of the last tensor
};

bool read_columns(string_view text, Columns& out) {
  constexpr size_t kMaxName = 512;
  Reader in{text};
  if (!in.take("{")) return false;
  if (in.take("\"__metadata__\":{") && !(in.flat() && in.take(","))) return false;
  out.head = in.at;
  std::unordered_map<string_view, int32_t> known;
  string_view before;
  int32_t kind = -1;
  do {
    int64_t begin, end;
    if (!in.take("\"")) return false;
    const string_view name = in.run(of_name);
    if (name.empty() || name.size() > kMaxName || name == "__metadata__") return false;
    if (!in.take("\":{\"dtype\":\"")) return false;
    const size_t first = in.at;
    const string_view tag = in.run(of_tag);
    if (!in.take("\",\"shape\":[")) return false;
    const string_view sizes = in.run(digit_or_comma);
    const string_view both = text.substr(first, in.at - first);
    if (!in.take("],\"data_offsets\":[") || !in.number(begin) || !in.take(",") || !in.number(end) || !in.take("]}"))
      return false;
    if (begin != out.end || end < begin) return false;
    if (both != before || kind < 0) {
      const auto found = known.emplace(both, static_cast<int32_t>(out.table.size()));
      if (found.second) out.table.push_back({tag, sizes, end - begin});
      kind = found.first->second, before = both;
    }
    if (out.table[kind].nbytes != end - begin) return false;
    out.names.push_back(name), out.kinds.push_back(kind), out.begins.push_back(begin);
    out.end = end;
  } while (in.take(","));
  if (!in.take("}")) return false;
  in.run([](char c) { return c == ' '; });
  return in.at == text.size();
}

struct Drop {
  void operator()(PyObject* o) const { Py_XDECREF(o); }
};
using Owned = std::unique_ptr<PyObject, Drop>;

// The kinds as the caller makes them: (dtype, shape, nbytes) each; null with an exception set.
Owned made_kinds(const std::vector<Kind>& table, PyObject* make) {
  Owned kinds(PyList_New(static_cast<Py_ssize_t>(table.size())));
  for (size_t i = 0; kinds && i < table.size(); ++i) {
    const Kind& k = table[i];
    PyObject* made =
        PyObject_CallFunction(make, "s#s#L", k.tag.data(), static_cast<Py_ssize_t>(k.tag.size()), k.sizes.data(),
                              static_cast<Py_ssize_t>(k.sizes.size()), static_cast<long long>(k.nbytes));
    if (made != nullptr && !(PyTuple_CheckExact(made) && PyTuple_GET_SIZE(made) == 3)) {
      Py_DECREF(made);
      PyErr_SetString(PyExc_TypeError, "kind: expected a tuple of three");
      made = nullptr;
    }
    if (made == nullptr) return nullptr;
    PyList_SET_ITEM(kinds.get(), static_cast<Py_ssize_t>(i), made);
  }
  return kinds;
}

}  // namespace

PyObject* header_rows(PyObject* raw, int64_t data_start, int file, PyObject* row, PyObject* kind) {
  constexpr Py_ssize_t kFields = 6;
  const auto type = reinterpret_cast<PyTypeObject*>(row);
  if (!PyType_IsSubtype(type, &PyTuple_Type)) {
    PyErr_SetString(PyExc_TypeError, "row: expected a tuple's class");
    return nullptr;
  }
  Columns found;
  if (!read_columns({PyBytes_AS_STRING(raw), static_cast<size_t>(PyBytes_GET_SIZE(raw))}, found)) Py_RETURN_NONE;
  const auto n = static_cast<Py_ssize_t>(found.names.size());
  const Owned kinds = made_kinds(found.table, kind), number(PyLong_FromLong(file)), rows(PyList_New(n));
  if (!kinds || !number || !rows) return nullptr;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* made = type->tp_alloc(type, kFields);
    if (made == nullptr) return nullptr;
    PyList_SET_ITEM(rows.get(), i, made);
    const string_view name = found.names[i];
    PyObject* of = PyList_GET_ITEM(kinds.get(), found.kinds[i]);
    PyObject* const fields[kFields] = {
        PyUnicode_DecodeASCII(name.data(), static_cast<Py_ssize_t>(name.size()), nullptr),
        Py_NewRef(PyTuple_GET_ITEM(of, 0)),
        Py_NewRef(PyTuple_GET_ITEM(of, 1)),
        Py_NewRef(number.get()),
        PyLong_FromLongLong(data_start + found.begins[i]),
        Py_NewRef(PyTuple_GET_ITEM(of, 2))};
    for (Py_ssize_t f = 0; f < kFields; ++f) PyTuple_SET_ITEM(made, f, fields[f]);
    if (fields[0] == nullptr || fields[4] == nullptr) return nullptr;
  }
  return Py_BuildValue("nOL", static_cast<Py_ssize_t>(found.head), rows.get(), static_cast<long long>(found.end));
}

}  // namespace fastmerge
