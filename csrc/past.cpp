// Reads past the page cache: what is resident is taken from there, everything else by O_DIRECT straight into place,
// several pieces in flight. Policy (retries, what a short read means) belongs to the caller.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <system_error>
#include <thread>
#include <vector>

#include "kernels.h"

namespace fastmerge {
namespace {

constexpr int64_t kBlock = 4096;     // what O_DIRECT asks of offset, address and length on every disk
constexpr int64_t kPiece = 4 << 20;  // bytes per request
constexpr int64_t kInFlight = 8;     // requests of one call at a time
constexpr int kColumns = 5;          // fd, offset, direct fd, address, nbytes
constexpr long kCachestat = 451;     // Linux 6.5; the same number everywhere, unknown to older headers

// One request, from the start of a block on.
struct Piece {
  int64_t row, at, want, size;  // file bytes [at, at + want) are asked for; size is whole blocks
  char* to;
  int fd, direct;
  int64_t got = 0;
  int error = 0;

  bool short_of_it() const { return got < want; }
};

#if defined(__linux__)
// Whether every page is in the cache, by a mapping that is never touched.
bool mapped(int fd, int64_t first, int64_t pages, int64_t page) {
  const size_t length = static_cast<size_t>(pages * page);
  void* map = mmap(nullptr, length, PROT_READ, MAP_SHARED, fd, first * page);
  if (map == MAP_FAILED) return true;
  std::vector<unsigned char> vec(static_cast<size_t>(pages));
  const bool known = mincore(map, length, vec.data()) == 0;
  munmap(map, length);
  return !known || std::all_of(vec.begin(), vec.end(), [](unsigned char v) { return v & 1; });
}
#endif

// Whether every page of a range is in the cache; where the kernel does not tell, yes. No page is read for it:
// preadv2 with RWF_NOWAIT would start readahead.
bool resident(int fd, int64_t offset, int64_t nbytes) {
#if defined(__linux__)
  static const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t first = offset / page, pages = (offset + nbytes - 1) / page - first + 1;
  const uint64_t range[2] = {static_cast<uint64_t>(first * page), static_cast<uint64_t>(pages * page)};
  uint64_t found[5] = {};  // pages: cached, dirty, in writeback, evicted, recently evicted
  if (syscall(kCachestat, fd, range, found, 0) == 0) return found[0] >= static_cast<uint64_t>(pages);
  return mapped(fd, first, pages, page);
#else
  (void)fd, (void)offset, (void)nbytes;
  return true;
#endif
}

void fetch(Piece& p) {
  const bool here = resident(p.fd, p.at, p.want);
  const int64_t got = here ? pread(p.fd, p.to, static_cast<size_t>(p.want), p.at)
                           : pread(p.direct, p.to, static_cast<size_t>(p.size), p.at);
  if (got < 0) p.error = errno;
  p.got = std::clamp<int64_t>(got, 0, p.want);
}

std::vector<Piece> cut(const int64_t* table, int64_t rows, int64_t row, int64_t done) {
  std::vector<Piece> pieces;
  for (; row < rows; ++row, done = 0) {
    const int64_t* r = table + row * kColumns;
    const int64_t end = r[1] + r[4];
    for (int64_t at = (r[1] + done) & -kBlock; r[1] + done < end && at < end; at += kPiece) {
      const int64_t want = std::min(kPiece, end - at);
      pieces.push_back({row, at, want, (want + kBlock - 1) & -kBlock, reinterpret_cast<char*>(r[3]) + (at - r[1]),
                        static_cast<int>(r[0]), static_cast<int>(r[2])});
    }
  }
  return pieces;
}

// All pieces, or those before and beside the first that falls short.
void fetch_all(std::vector<Piece>& pieces) {
  const int64_t n = static_cast<int64_t>(pieces.size());
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    for (int64_t i; !failed && (i = next++) < n;) {
      fetch(pieces[static_cast<size_t>(i)]);
      if (pieces[static_cast<size_t>(i)].short_of_it()) failed = true;
    }
  };
  std::vector<std::thread> helpers;
  try {
    while (static_cast<int64_t>(helpers.size()) + 1 < std::min(n, kInFlight)) helpers.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads: fewer in flight
  }
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void find_resident(const int64_t* table, int64_t rows, int64_t* flags) {
  for (int64_t i = 0; i < rows; ++i)
    flags[i] = table[i * 4 + 3] <= 0 || resident(table[i * 4], table[i * 4 + 1], table[i * 4 + 3]);
}

int read_past(const int64_t* table, int64_t rows, int64_t& row, int64_t& done) {
  std::vector<Piece> pieces = cut(table, rows, row, done);
  fetch_all(pieces);
  for (const Piece& p : pieces) {
    if (!p.short_of_it()) continue;
    const int64_t here = p.at + p.got - table[p.row * kColumns + 1];
    done = std::max(p.row == row ? done : 0, here);
    row = p.row;
    return p.error;
  }
  row = rows;
  done = 0;
  return 0;
}

}  // namespace fastmerge
