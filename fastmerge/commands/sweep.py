"""One read of a model's files for all that wants their bytes: the checksums of ranges, and NaN and Inf of tensors.

What is not in the page cache is read past it and does not enter it: a cold verify of 3.2 GB takes 0.2 s of system time
in place of 2.1, and leaves the cache as it was.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import xxhash

from fastmerge import _native
from fastmerge.checkpoint import Checkpoint, Files, ShardFile, TensorInfo, system
from fastmerge.errors import CheckpointError
from fastmerge.runtime.devices import Buffer, cores
from fastmerge.runtime.workers import each

BLOCK = 8 << 20
"""Most bytes of a read; each thread has memory for one."""

PAGE = 4096
"""Reads past the cache need memory and file to agree on their place in so many bytes."""


class Range(NamedTuple):
    """Bytes of a file whose checksum is wanted; the file by name."""

    file: str
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


class Part(NamedTuple):
    """Consecutive bytes of a file, which one thread reads.

    Attributes:
        file, begin, end: which bytes.
        ranges: (position, range) of those that lie in it; none reaches over another.
        counts: whether NaN and Inf are counted there.
    """

    file: int
    begin: int
    end: int
    ranges: Sequence[tuple[int, Range]]
    counts: bool


class Swept(NamedTuple):
    """What a sweep found.

    Attributes:
        nonfinite: NaN and Inf values by tensor, where there are any.
        checksums: xxh3_64 of each range, in hex.
        unread: by position, why a range of a file that is no shard could not be read.
    """

    nonfinite: Counter[str]
    checksums: list[str]
    unread: dict[int, str]


def sweep(model: Checkpoint, files: Mapping[str, ShardFile], ranges: Sequence[Range]) -> Swept:
    """Reads every byte of every tensor once, and takes the checksums of ranges on the way.

    A range that reaches over an earlier one, as a resumed merge may have recorded, is read on its own.

    Args:
        model: whose tensors.
        files: those of the ranges, by name: shards or not.
        ranges: inside these files.

    Raises:
        CheckpointError: a shard cannot be read, shrank or was replaced.
    """
    numbers = {file.identity: i for i, file in enumerate(model.files)}
    every = list(model.files)
    for file in files.values():
        if numbers.setdefault(file.identity, len(every)) == len(every):
            every.append(file)
    asked: list[list[tuple[int, Range]]] = [[] for _ in every]
    for position, r in enumerate(ranges):
        if r.nbytes:
            asked[numbers[files[r.file].identity]].append((position, r))
    found = Swept(Counter(), [xxhash.xxh3_64_hexdigest(b"")] * len(ranges), {})
    edges: defaultdict[str, list[tuple[int, bytes]]] = defaultdict(list)
    with Files([replace(model, files=tuple(every))]) as opened:
        sweeping = _Sweep(opened, model, asked, found)
        threads = max(1, min(cores(), len(sweeping.parts)))
        for counts in each(sweeping.work, range(threads), threads=threads, name="verify"):
            found.nonfinite.update(counts.nonfinite)
            for name, offset, some in counts.edges:
                edges[name].append((offset, some))
    for name, pieces in edges.items():
        data = np.frombuffer(b"".join(some for _, some in sorted(pieces)), np.uint8).copy()
        found.nonfinite[name] += _count(model.tensors[name], data.ctypes.data, len(data))
    return found


class _Counts:
    """NaN and Inf of what one thread reads.

    Attributes:
        nonfinite: by tensor.
        edges: (tensor, offset, bytes) of elements that an end of a read cut; they are counted once all is read.
    """

    def __init__(self) -> None:
        self.nonfinite: Counter[str] = Counter()
        self.edges: list[tuple[str, int, bytes]] = []

    def add(self, info: TensorInfo, begin: int, data: memoryview, address: int) -> None:
        """Counts the elements of a tensor in ``data``, file bytes from ``begin`` on, which stand at the address."""
        low, high = max(info.offset, begin), min(info.offset + info.nbytes, begin + len(data))
        size = info.dtype.size
        first = min(low + (info.offset - low) % size, high)
        last = max(high - (high - info.offset) % size, first)
        for a, b in ((low, first), (last, high)):
            if a < b:
                self.edges.append((info.name, a, bytes(data[a - begin : b - begin])))
        found = _count(info, address + first - begin, last - first)
        if found:
            self.nonfinite[info.name] += found


class _Sweep:
    """What the threads share: parts that are left, and checksums that are known."""

    def __init__(self, files: Files, model: Checkpoint, asked: Sequence[list[tuple[int, Range]]], found: Swept) -> None:
        self._files = files
        self._shards = len(model.files)
        self._found = found
        self._tensors: list[list[TensorInfo]] = [[] for _ in asked]
        for info in model.tensors.values():  # in the order of files and bytes
            if info.nbytes:
                self._tensors[info.file].append(info)
        self._starts = [[info.offset for info in infos] for infos in self._tensors]
        self.parts = deque(part for i, mine in enumerate(asked) for part in _parts(i, self._tensors[i], mine))

    def work(self, _: int) -> _Counts:
        """Reads parts until none is left."""
        buffer = Buffer.allocate(BLOCK + 2 * PAGE)
        counts = _Counts()
        while True:
            try:
                part = self.parts.popleft()
            except IndexError:
                return counts
            try:
                self._read(part, buffer, counts)
            except CheckpointError as error:
                if part.file < self._shards:
                    self.parts.clear()
                    raise
                self._found.unread.update((position, str(error)) for position, _ in part.ranges)

    def _read(self, part: Part, buffer: Buffer, counts: _Counts) -> None:
        fd = self._files.fd(0, part.file)
        # No read is much shorter than the others: below 64 KiB they would go through the page cache.
        nbytes = part.end - part.begin
        step = -(-nbytes // -(-nbytes // BLOCK))
        digest = xxhash.xxh3_64()
        left = deque(part.ranges)
        for begin in range(part.begin, part.end, step):
            end = min(begin + step, part.end)
            address = buffer.address + begin % PAGE
            row = np.array([[fd, begin, address, end - begin]], np.int64)
            self._files.read_past(row, self._files.cold(row))
            data = system.view(address, end - begin)
            while left and left[0][1].offset < end:
                position, r = left[0]
                digest.update(data[max(r.offset - begin, 0) : r.end - begin])
                if r.end > end:
                    break
                self._found.checksums[position] = digest.hexdigest()
                digest.reset()
                left.popleft()
            if part.counts:
                for info in self._within(part.file, begin, end):
                    counts.add(info, begin, data, address)

    def _within(self, file: int, begin: int, end: int) -> Iterator[TensorInfo]:
        """Tensors of floats with bytes in a part of a file, in their order."""
        starts, infos = self._starts[file], self._tensors[file]
        for i in range(max(bisect_right(starts, begin) - 1, 0), bisect_left(starts, end)):
            if infos[i].dtype.mergeable and infos[i].offset + infos[i].nbytes > begin:
                yield infos[i]


def _count(info: TensorInfo, address: int, nbytes: int) -> int:
    """NaN and Inf of whole elements, which are moved down to where elements may be: over bytes that are done with."""
    size = info.dtype.size
    if odd := address % size:
        ctypes.memmove(address - odd, address, nbytes)
    return _native.count_nonfinite(address - odd, nbytes // size, info.dtype.code)


def _parts(file: int, infos: Sequence[TensorInfo], ranges: Sequence[tuple[int, Range]]) -> Iterator[Part]:
    """Cuts what is to be read of a file where no range is, into parts of a block or more."""
    mine: list[tuple[int, Range]] = []
    for position, r in sorted(ranges, key=lambda entry: entry[1].offset):
        if mine and r.offset < mine[-1][1].end:
            yield Part(file, r.offset, r.end, [(position, r)], counts=False)
        else:
            mine.append((position, r))
    extents = [(infos[0].offset, infos[-1].offset + infos[-1].nbytes)] if infos else []
    extents += [(mine[0][1].offset, mine[-1][1].end)] if mine else []
    if not extents:
        return
    start = reach = min(begin for begin, _ in extents)
    end = max(stop for _, stop in extents)
    first = 0
    for k, offset in enumerate([*(r.offset for _, r in mine), end]):
        while (cut := max(reach, start + BLOCK)) <= min(offset, end - BLOCK // 2):
            yield Part(file, start, cut, mine[first:k], counts=True)
            start, first = cut, k
        if k < len(mine):
            reach = mine[k][1].end
    yield Part(file, start, end, mine[first:], counts=True)
