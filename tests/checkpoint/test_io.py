"""The policy around the primitive, on every primitive that there is."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from fastmerge.checkpoint import io as _io
from fastmerge.errors import CheckpointError, OutputError
from tests.checkpoint.shim import FaultyIo, PosixIo, primitives


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(_io, "_sleep", naps.append)
    return naps


@pytest.fixture(params=primitives())
def primitive(request):
    return primitives()[request.param]


@pytest.fixture
def file(tmp_path):
    content = np.random.default_rng(0).bytes(100_000)
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    yield fd, content
    os.close(fd)


def plan(fd, sizes, base):
    rows, at = [], 0
    for size in sizes:
        rows.append([fd, at, base + at, size])
        at += size
    return np.array(rows, np.int64).reshape(-1, 4)


def test_reads_writes_and_copies(primitive, file, tmp_path):
    fd, content = file
    buffer = np.zeros(100_000, np.uint8)
    table = plan(fd, [1, 0, 4095, 70_000, 25_904], buffer.ctypes.data)
    _io.read(primitive, table, str)
    assert buffer.tobytes() == content
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        table[:, 0] = out
        _io.write(primitive, table, str)
        assert os.pread(out, 200_000, 0) == content
        rest = _io.copy(primitive, np.array([[fd, 10, out, 100_000, 500], [fd, 0, out, 100_500, 0]]), str)
        assert len(rest) == 0
        assert os.pread(out, 1000, 100_000) == content[10:510]
    finally:
        os.close(out)
    _io.read(primitive, np.zeros((0, 4), np.int64), str)


def test_the_primitives_agree_step_by_step(file):
    fd, _ = file
    for table, row, done in (
        (plan(fd, [10, 99_990, 5], 0), 0, 0),
        (plan(fd, [10, 200_000], 0), 1, 7),
        (plan(-1, [10], 0), 0, 3),
    ):
        answers = []
        for io in primitives().values():
            buffer = np.zeros(300_000, np.uint8)
            there = table.copy()
            there[:, 2] += buffer.ctypes.data
            answers.append((io.read_some(there, row, done), buffer.tobytes()))
        assert all(a == answers[0] for a in answers)


@pytest.mark.parametrize("seed", range(5))
def test_short_and_interrupted_transfers(seed, file, tmp_path):
    fd, content = file
    io = FaultyIo(seed)
    buffer = np.zeros(100_000, np.uint8)
    _io.read(io, plan(fd, [50, 99_950], buffer.ctypes.data), str)
    assert buffer.tobytes() == content
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        _io.write(io, plan(out, [99_000, 1000], buffer.ctypes.data), str)
        assert len(_io.copy(io, np.array([[fd, 0, out, 100_000, 100_000]]), str)) == 0
        assert os.pread(out, 300_000, 0) == content * 2
    finally:
        os.close(out)
    assert io.calls > 10


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_passing_errors_are_tried_three_times(code, file, slept):
    fd, content = file
    buffer = np.zeros(100_000, np.uint8)
    table = plan(fd, [60_000, 40_000], buffer.ctypes.data)
    recovered: list[int] = []
    _io.read(FaultyIo(fail=code, after=70_000, times=2), table, str, recovered.append)
    assert buffer.tobytes() == content
    assert len(slept) == 2
    assert slept[1] > slept[0]
    assert recovered == ([fd, fd] if code == errno.ESTALE else [])
    with pytest.raises(CheckpointError, match=rf"^file-{fd}:70000: read failed: {os.strerror(code)}"):
        _io.read(FaultyIo(fail=code, after=70_000, times=3), table, lambda fd: f"file-{fd}")


def test_other_errors_are_not_tried_again(file, slept):
    fd, _ = file
    with pytest.raises(CheckpointError, match="Permission denied"):
        _io.read(FaultyIo(fail=errno.EACCES), plan(fd, [5], 0), str)
    assert slept == []


def test_the_end_of_the_file_is_an_error(primitive, file):
    fd, _ = file
    buffer = np.zeros(110_000, np.uint8)
    with pytest.raises(CheckpointError, match="f:100000: the file shrank while being read"):
        _io.read(primitive, plan(fd, [90_000, 20_000], buffer.ctypes.data), lambda _: "f")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_how_much_did_not_fit(code, file):
    fd, _ = file
    buffer = np.zeros(1000, np.uint8)
    io = FaultyIo(fail=code, after=300)
    with pytest.raises(OutputError, match=f"f:300: {os.strerror(code)}: at least 700 more bytes"):
        _io.write(io, plan(fd, [200, 800], buffer.ctypes.data), lambda _: "f")


def test_a_write_that_never_advances_ends():
    class Stuck(PosixIo):
        def write_some(self, table, row, done):
            return row, done, 0

    with pytest.raises(OutputError, match="nothing was written"):
        _io.write(Stuck(), plan(1, [5], 0), str)


def test_copy_hands_over_what_the_kernel_cannot(file):
    fd, _ = file
    table = np.array([[fd, 0, fd, 200_000, 50], [fd, 100, fd, 300_000, 50]])
    rest = _io.copy(FaultyIo(fail=errno.EXDEV, after=70), table, str)
    assert rest.tolist() == [[fd, 120, fd, 300_020, 30]]
    assert _io.copy(PosixIo(), np.array([[fd, 500_000, fd, 0, 50]]), str).tolist() == [[fd, 500_000, fd, 0, 50]]
    with pytest.raises(OutputError, match="bytes are needed"):
        _io.copy(FaultyIo(fail=errno.ENOSPC), table, str)


def test_long_rows_are_cut_to_one_call():
    table = np.array([[3, 5, 7, (2 << 30) + 1], [3, 0, 0, 0], [3, 1, 2, 3]])
    one = 1 << 30
    assert _io.rows(table).tolist() == [
        [3, 5, 7, one],
        [3, 5 + one, 7 + one, one],
        [3, 5 + 2 * one, 7 + 2 * one, 1],
        [3, 1, 2, 3],
    ]
    assert _io.rows(np.array([[3, 5, 4, 9, one + 2]])).tolist() == [[3, 5, 4, 9, one], [3, 5 + one, 4, 9 + one, 2]]
