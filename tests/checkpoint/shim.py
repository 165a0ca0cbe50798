"""The transfer primitive in plain Python, a faulty one around it, and small models on disk."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import json
import os
import random
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fastmerge.checkpoint import Layout, Writer, layout
from fastmerge.checkpoint.io import I64, Io, native
from fastmerge.checkpoint.past import open_past
from fastmerge.dtypes import BF16, BY_TAG, F32

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


class PosixIo:
    """What ``fastmerge._native`` does, through ``os``: the reference for it, and the base of faults."""

    def read_some(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        return self._walk(table, row, done, lambda r, at, n: os.preadv(r[0], [memory(r[2] + at, n)], r[1] + at))

    def resident(self, table: I64) -> I64:
        """Nothing ever is."""
        return np.zeros(len(table), np.int64)

    def read_past(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        def step(r: list[int], at: int, n: int) -> int:
            start = (r[1] + at) & -4096
            skip = r[1] + at - start
            got = os.preadv(r[2], [memory(r[3] + start - r[1], (skip + n + 4095) & -4096)], start)
            return min(max(got - skip, 0), n)

        return self._walk(table, row, done, step, "past")

    def write_some(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        return self._walk(table, row, done, lambda r, at, n: os.pwrite(r[0], memory(r[2] + at, n), r[1] + at))

    def copy_some(self, table: I64, row: int, done: int) -> tuple[int, int, int]:
        return self._walk(
            table, row, done, lambda r, at, n: os.copy_file_range(r[0], r[2], n, r[1] + at, r[3] + at), "copy"
        )

    def limit(self, kind: str, nbytes: int) -> int:
        """How much of the next transfer is allowed; raises OSError for a fault."""
        return nbytes

    def _walk(
        self, table: I64, row: int, done: int, step: Callable[[list[int], int, int], int], kind: str = "data"
    ) -> tuple[int, int, int]:
        rows = table.tolist()
        while row < len(rows):
            left = rows[row][-1] - done
            try:
                done += step(rows[row], done, self.limit(kind, left))
            except OSError as error:
                return row, done, error.errno or errno.EIO
            if done < rows[row][-1]:
                return row, done, 0
            row, done = row + 1, 0
        return row, 0, 0


class FaultyIo(PosixIo):
    """Short transfers, interrupted calls, and one scripted error.

    Args:
        seed: of the short transfers and interruptions; None for none.
        fail: errno that appears once ``after`` bytes have been allowed.
        times: how often it appears; None for ever.
    """

    def __init__(self, seed: int | None = None, *, fail: int = 0, after: int = 0, times: int | None = None) -> None:
        self.random = random.Random(seed) if seed is not None else None
        self.fail, self.after, self.times = fail, after, times
        self.moved = 0
        self.calls = 0

    def limit(self, kind: str, nbytes: int) -> int:
        self.calls += 1
        if self.fail and self.times != 0:
            if self.moved >= self.after:
                if self.times is not None:
                    self.times -= 1
                raise OSError(self.fail, os.strerror(self.fail))
            nbytes = min(nbytes, self.after - self.moved)
        if self.random is not None:
            if self.random.random() < 0.2:
                raise InterruptedError(errno.EINTR, "interrupted")
            nbytes = self.random.randint(1, nbytes)
        self.moved += nbytes
        return nbytes


def memory(address: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * nbytes).from_address(address)


def primitives() -> dict[str, Io]:
    """Every implementation that this machine has."""
    found: dict[str, Io] = {"posix": PosixIo()}
    if importlib.util.find_spec("fastmerge._native") is not None:
        found["native"] = native()
    return found


def file_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
    metadata: Mapping[str, str] | None = None,
    *,
    compact: bool = False,
) -> bytes:
    """A safetensors file from (dtype tag, shape, data), in the order given; ``compact`` is without spaces."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name, (tag, shape, data) in tensors.items():
        header[name] = {"dtype": tag, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":") if compact else None)
    return raw(text.encode(), b"".join(d for _, _, d in tensors.values()))


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def tensor(tag: str, *shape: int, seed: int = 0) -> tuple[str, tuple[int, ...], bytes]:
    nbytes = BY_TAG[tag].nbytes(int(np.prod(shape, dtype=np.int64)))
    assert nbytes >= 0
    return tag, shape, np.random.default_rng(seed).bytes(nbytes)


def save(
    directory: Path, shards: Mapping[str, Mapping[str, tuple[str, tuple[int, ...], bytes]]], *, index: bool = False
):
    """Writes a model directory: files, and an index over them if asked."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        (directory / name).write_bytes(file_bytes(tensors))
    if index:
        weight_map = {t: name for name, tensors in shards.items() for t in tensors}
        write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: Mapping[str, object]) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def example_layout(shards: int = 3, *, metadata: Mapping[str, str] | None = None) -> tuple[Layout, dict[str, bytes]]:
    """A small output of several shards with odd sizes, and the bytes of every tensor."""
    sizes = [(F32, (257, 5)), (BF16, (1000,)), (BF16, (3,)), (F32, ()), (BF16, (0, 4)), (BF16, (4097,)), (F32, (33,))]
    tensors = [(f"layer.{i}.weight", dtype, shape) for i, (dtype, shape) in enumerate(sizes)]
    plan = layout(tensors, shard_size=1e9 if shards == 1 else 5200, metadata=metadata or {})
    assert (len(plan.shards) > 1) == (shards > 1)
    return plan, {n: np.random.default_rng(i).bytes(plan.places[n].nbytes) for i, (n, _, _) in enumerate(tensors)}


def chunks(plan: Layout, data: Mapping[str, bytes], size: int = 1000) -> list[tuple[int, int, bytes]]:
    """The output's data as (shard, offset, bytes) in pieces."""
    return [
        (place.shard, place.offset + at, data[name][at : at + size])
        for name, place in plan.places.items()
        for at in range(0, place.nbytes, size)
    ]


def write(writer: Writer, pieces: Sequence[tuple[int, int, bytes]]) -> None:
    """Writes pieces in one call."""
    arrays = [np.frombuffer(p, np.uint8) for _, _, p in pieces]
    rows = [[s, o, a.ctypes.data, len(a)] for (s, o, _), a in zip(pieces, arrays, strict=True)]
    writer.write(np.array(rows, np.int64).reshape(-1, 4))


def names(directory: Path) -> list[str]:
    """What a directory holds."""
    return sorted(p.name for p in directory.iterdir())


def tree(directory: Path) -> dict[str, bytes]:
    """Every file of a directory with its content."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def expected(plan: Layout, data: Mapping[str, bytes], extras: Mapping[str, bytes]) -> dict[str, bytes]:
    """What :func:`tree` must say of a finished output."""
    files = {s.name: s.header + b"".join(data[t] for t in s.tensors) for s in plan.shards}
    if plan.index is not None:
        files["model.safetensors.index.json"] = plan.index
    return dict(sorted((files | dict(extras)).items()))


def evict(paths):
    """Takes files out of the page cache; skips the test where they are not read past it."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.close(open_past(fd))
        except OSError as error:
            pytest.skip(f"files here are not read past the page cache: {error}")
        finally:
            os.close(fd)
