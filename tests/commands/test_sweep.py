"""Verify reads every byte once: the checksums and counts of whatever layout, past the page cache, and its errors."""

from __future__ import annotations

import errno
import json
import os
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash

import fastmerge
from fastmerge.checkpoint import Checkpoint
from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint.past import LEAST, SWITCH
from fastmerge.commands import sweep as sweeping
from fastmerge.commands.sweep import Range, sweep
from fastmerge.commands.verify import verify
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import FaultyIo, evict, file_bytes, raw, save, tensor

NAME = "model.safetensors"
TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def opened_as(fd):
    return Path(f"/proc/self/fd/{fd}").readlink()


class Counting:
    """The extension's primitive; knows what was read, and what of it past the page cache."""

    def __init__(self, real):
        self._real = real
        self.reads = []
        self.past = 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _note(self, table, row, done, moving):
        for fd, offset, nbytes in table[row:, [0, 1, -1]].tolist():
            self.reads.append((opened_as(fd), offset + done, nbytes - done))
            self.past += moving * (nbytes - done)
            done = 0

    def read_some(self, table, row, done):
        self._note(table, row, done, 0)
        return self._real.read_some(table, row, done)

    def read_past(self, table, row, done):
        self._note(table, row, done, 1)
        return self._real.read_past(table, row, done)

    def times(self, path):
        """How often each byte of a file was read."""
        found = np.zeros(path.stat().st_size, np.int64)
        for name, offset, nbytes in self.reads:
            if name == path:
                found[offset : offset + nbytes] += 1
        return found


@pytest.fixture
def io(monkeypatch):
    counting = Counting(_io.native())
    monkeypatch.setattr(_io, "native", lambda: counting)
    monkeypatch.setattr(_io, "_sleep", lambda _: None)
    monkeypatch.delenv(SWITCH, raising=False)
    return counting


def nonfinite(tag, data):
    """How many values of a tensor are NaN or infinite, by numpy."""
    if tag == "BF16":
        values = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    elif tag in TYPES:
        values = np.frombuffer(data, TYPES[tag])
    else:
        return 0
    return int((~np.isfinite(values)).sum())


def planted(tag, n, seed):
    """Random bytes, whose every fourth element is all ones: NaN."""
    _, shape, data = tensor(tag, n, seed=seed)
    values = np.frombuffer(data, np.uint8).copy()
    if tag == "BF16" or tag in TYPES:
        values.reshape(n, -1)[::4] = 0xFF
    return tag, shape, values.tobytes()


TENSORS = {
    "a": planted("BF16", 1501, 1),
    "b": planted("F64", 97, 2),
    "codes": tensor("F4", 34, seed=3),
    "bytes": tensor("U8", 13, seed=4),  # what follows is at odd places
    "c": planted("F32", 333, 5),
    "empty": ("F32", (0,), b""),
    "one": planted("F16", 1, 6),
    "scalar": ("F64", (), np.float64(np.inf).tobytes()),
    "d": planted("BF16", 700, 7),
}


def model(directory, odd=0):
    """A model whose data starts at an odd place, if asked."""
    directory.mkdir()
    data = file_bytes(TENSORS)
    size = int.from_bytes(data[:8], "little")
    (directory / NAME).write_bytes(raw(data[8 : 8 + size] + b" " * odd, data[8 + size :]))
    return directory


def layouts(size, seed):
    """Ranges of a file: next to each other and with gaps, or anywhere, over each other and empty."""
    rng = random.Random(seed)
    if seed == 0:
        return []
    cuts = sorted(rng.sample(range(size + 1), 40))
    if seed % 2:
        return [Range(NAME, a, b - a) for a, b in pairwise(cuts) if rng.random() < 0.8]
    ranges = [Range(NAME, a, rng.choice([0, 1, 3, 100, 900])) for a in cuts]
    return [r._replace(nbytes=min(r.nbytes, size - r.offset)) for r in ranges] + [Range(NAME, 0, size)]


@pytest.mark.parametrize("block", [7, 100, 1001, 8 << 20])
@pytest.mark.parametrize("odd", [0, 3])
@pytest.mark.parametrize("seed", range(5))
def test_checksums_and_counts_are_those_of_the_bytes(tmp_path, io, monkeypatch, block, odd, seed):
    monkeypatch.setattr(sweeping, "BLOCK", block)
    path = model(tmp_path / "m", odd) / NAME
    data = path.read_bytes()
    ranges = layouts(len(data), seed)
    opened = Checkpoint.open(path.parent)
    found = sweep(opened, {NAME: opened.files[0]}, ranges)
    assert found.checksums == [xxhash.xxh3_64_hexdigest(data[r.offset : r.end]) for r in ranges]
    assert {n: found.nonfinite[n] for n in TENSORS} == {
        n: nonfinite(tag, some) for n, (tag, _, some) in TENSORS.items()
    }
    assert max(n for _, _, n in io.reads) <= block
    times = io.times(path)[8 + int.from_bytes(data[:8], "little") :]
    if seed % 2 or not seed:
        assert set(times.tolist()) == {1}, "ranges that are not over each other cost no read of their own"
    assert times.min() >= 1
    assert found.unread == {}


def large(seed):
    """Weights of 3 MB, and a few small ones, of ordinary values."""
    rng = np.random.default_rng(seed)
    shapes = {"a": 300_001, "b": 7, "c": 450_000, "d": 33}
    return {n: ("F32", (size,), rng.normal(size=size).astype("<f4").tobytes()) for n, size in shapes.items()}


@pytest.fixture
def out(tmp_path, monkeypatch):
    """An output of two shards on a disk whose files are read past the page cache."""
    monkeypatch.delenv(SWITCH, raising=False)
    paths = [save(tmp_path / n, {NAME: large(seed)}) for seed, n in enumerate("xy")]
    recipe = {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 0.5}} for p in paths]}
    fastmerge.merge(recipe, tmp_path / "out", device="cpu", shard_size=2_000_000)
    return tmp_path / "out"


def shards(out):
    return sorted(out.glob("*.safetensors"))


def once(io, out, found):
    """Whether a good output was read from end to end, every byte of every tensor once."""
    data = [io.times(p)[8 + int.from_bytes(p.read_bytes()[:8], "little") :] for p in shards(out)]
    return found.ok and found.checked == found.nbytes == sum(map(len, data)) and all((d == 1).all() for d in data)


@pytest.mark.parametrize("block", [100_001, 8 << 20])
def test_a_cold_output_is_read_once_past_the_cache_and_stays_cold(out, io, monkeypatch, block):
    monkeypatch.setattr(sweeping, "BLOCK", block)
    paths = shards(out)
    assert len(paths) == 2
    evict(paths)
    found = verify(out)
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        pages = np.array([[fd, at, 0, 4096] for at in range(1 << 20, path.stat().st_size - 4096, 4096)]).reshape(-1, 4)
        assert len(pages) > 20
        assert io.resident(pages).mean() < 0.1, "but for what reading its header brought"
        os.close(fd)
    assert io.past > found.nbytes - 4 * LEAST
    assert once(io, out, found)


def test_a_warm_output_is_read_once_from_the_cache(out, io):
    for path in shards(out):
        path.read_bytes()
    found = verify(out)
    assert io.past == 0
    assert once(io, out, found)


def test_an_output_is_read_once_where_nothing_goes_past_the_cache(out, io, monkeypatch):
    evict(shards(out))
    monkeypatch.setenv(SWITCH, "0")
    found = verify(out)
    assert io.past == 0
    assert once(io, out, found)


@pytest.mark.parametrize("seed", range(3))
def test_short_and_interrupted_reads_change_nothing(out, monkeypatch, seed):
    monkeypatch.setattr(_io, "native", lambda: FaultyIo(seed))
    found = verify(out)
    assert found.ok, found.problems
    assert found.checked == found.nbytes
    path = shards(out)[1]
    data = bytearray(path.read_bytes())
    data[-2:] = b"\xff\xff"
    path.write_bytes(data)
    found = verify(out)
    assert list(found.nonfinite.values()) == [1]
    assert len(found.problems) == 1
    assert "differ from what the merge wrote" in found.problems[0]


def test_a_shard_that_cannot_be_read_is_an_error(out, monkeypatch):
    monkeypatch.setattr(_io, "_sleep", lambda _: None)
    monkeypatch.setattr(_io, "native", lambda: FaultyIo(fail=errno.EIO, after=1_000_000))
    with pytest.raises(CheckpointError, match=rf"{NAME[:5]}.*safetensors:\d+: read failed: Input/output error"):
        verify(out)


def test_a_shard_that_shrinks_or_is_replaced_is_an_error(tmp_path, io):
    path = model(tmp_path / "m") / NAME
    opened = Checkpoint.open(path.parent)
    real = io.read_some

    def cut(*arguments):
        os.truncate(path, path.stat().st_size - 9)
        return real(*arguments)

    io.read_some = cut
    with pytest.raises(CheckpointError, match=r"model.safetensors:\d+: the file shrank while being read"):
        sweep(opened, {}, [])
    with pytest.raises(CheckpointError, match="changed or replaced after its header was read"):
        sweep(opened, {}, [])


def test_a_file_that_is_no_shard_and_cannot_be_read_is_a_problem(out, io):
    other = out / "notes"
    other.write_bytes(b"x" * 5000)
    report = out / "merge_report.json"
    facts = json.loads(report.read_text())
    sum_of = xxhash.xxh3_64_hexdigest
    facts["details"]["checksums"] += [
        ["notes", 10, 100, sum_of(b"x" * 100)],
        ["notes", 3000, 2000, sum_of(b"x" * 2000)],
        ["notes", 3500, 100, "another"],
        ["notes", 5000, 0, sum_of(b"")],
        ["notes", 5000, 0, "another"],
    ]
    report.write_text(json.dumps(facts))
    assert [p for p in verify(out).problems if p.startswith("notes")] == [
        "notes: bytes 3500 to 3600 differ from what the merge wrote",
        "notes: bytes 5000 to 5000 differ from what the merge wrote",
    ]
    real = io.read_some

    def failing(table, row, done):
        if opened_as(table[row, 0]) == other:
            return row, done, errno.EIO
        return real(table, row, done)

    io.read_some = failing
    problems = [p for p in verify(out).problems if p.startswith("notes")]
    assert len(problems) == 4
    assert all("cannot be read: " in p and "Input/output error" in p for p in problems[:3])
