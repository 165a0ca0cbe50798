"""Reads past the page cache: the same bytes as plain reads, the cache as it was, and every way in which they fail."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmerge.checkpoint import Checkpoint, Files, content, system
from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint.past import BEYOND, LEAST, SWITCH, in_cache, open_past
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import FaultyIo, PosixIo, primitives, save, tensor

SIZE = (9 << 20) + 1234
"""Of the file that is read: more than two requests, and its end is inside a block."""

BLOCK = 4096


@pytest.fixture(autouse=True)
def slept(monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(_io, "_sleep", naps.append)
    monkeypatch.delenv(SWITCH, raising=False)
    return naps


class Opened:
    """A file on disk with both of its descriptors."""

    def __init__(self, path):
        self.content = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
        path.write_bytes(self.content.tobytes())
        self.path = path
        self.fd = os.open(path, os.O_RDWR)
        os.fsync(self.fd)
        try:
            self.direct = open_past(self.fd)
        except OSError as error:
            os.close(self.fd)
            pytest.skip(f"files here are not read past the page cache: {error}")

    def evict(self, start=0, nbytes=0):
        os.posix_fadvise(self.fd, start, nbytes, os.POSIX_FADV_DONTNEED)

    def resident(self):
        """Which pages are in the cache."""
        pages = -(-SIZE // mmap.PAGESIZE)
        vec = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None)
        with mmap.mmap(self.fd, SIZE) as view:
            held = ctypes.c_char.from_buffer(view)
            assert libc.mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(SIZE), vec) == 0
            del held
        return [v & 1 for v in vec]

    def close(self):
        os.close(self.fd)
        os.close(self.direct)


@pytest.fixture
def file(tmp_path):
    opened = Opened(tmp_path / "file")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    opened = Opened(tmp_path_factory.mktemp("past") / "file")
    yield opened
    opened.close()


@pytest.fixture(params=primitives())
def primitive(request):
    return primitives()[request.param]


def laid(file, runs):
    """Memory with a row per run (offset, nbytes), each in blocks of its own; what is around them is 0xEE."""
    memory = np.full(sum(n for _, n in runs) + BLOCK * 3 * (len(runs) + 1), 0xEE, np.uint8)
    at = -(-memory.ctypes.data // BLOCK) * BLOCK + BLOCK
    rows = []
    for offset, n in runs:
        rows.append([file.fd, offset, file.direct, at + offset % BLOCK, n])
        at += (offset % BLOCK + n + BLOCK - 1) // BLOCK * BLOCK + BLOCK
    return memory, np.array(rows, np.int64).reshape(-1, 5)


def bytes_of(memory, rows):
    start = memory.ctypes.data
    return [memory[address - start : address - start + n] for *_, address, n in rows.tolist()]


def check(file, memory, rows):
    for got, (_, offset, _, _, n) in zip(bytes_of(memory, rows), rows.tolist(), strict=True):
        assert np.array_equal(got, file.content[offset : offset + n])
    ours = np.zeros(len(memory), bool)
    for _, _, _, address, n in rows.tolist():
        first, last = address // BLOCK * BLOCK, -(-(address + n) // BLOCK) * BLOCK
        ours[first - memory.ctypes.data : last - memory.ctypes.data] = True
    assert (memory[~ours] == 0xEE).all(), "bytes outside the blocks around the rows"


RUN = st.tuples(st.integers(0, SIZE - 1), st.sampled_from([1, 5000, 70_000, 3 << 20, SIZE])).map(
    lambda r: (r[0], min(r[1], SIZE - r[0]))
)
HOLES = st.lists(st.tuples(st.integers(0, SIZE // BLOCK), st.integers(1, 1500)), max_size=3)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RUN, min_size=1, max_size=4), st.sampled_from(["resident", "evicted", "holes"]), HOLES)
def test_equal_bytes_and_nothing_new_in_the_cache(shared, runs, state, holes):
    for name, io in primitives().items():
        if state == "evicted":
            shared.evict()
        else:
            shared.path.read_bytes()
            for first, pages in holes if state == "holes" else []:
                shared.evict(first * BLOCK, pages * BLOCK)
        before = shared.resident()
        memory, rows = laid(shared, runs)
        assert _io.read_past(io, rows, str) is None
        check(shared, memory, rows)
        # The kernel may take pages back at any time: what counts is that none came in.
        assert all(was or not now for was, now in zip(before, shared.resident(), strict=True)), name


def test_what_is_resident_is_known(file):
    io = primitives().get("native")
    if io is None:
        pytest.skip("no extension")
    file.path.read_bytes()
    rows = np.array(
        [[file.fd, 0, 0, SIZE], [file.fd, 5 << 20, 0, 10], [file.fd, 1 << 20, 0, 1 << 20], [file.fd, 5, 0, 0]]
    )
    assert io.resident(rows).tolist() == [1, 1, 1, 1]
    file.evict(4 << 20, 2 << 20)
    assert io.resident(rows).tolist() == [0, 0, 1, 1]
    assert io.resident(np.array([[-1, 0, 0, 9]])).tolist() == [1], "whoever does not know reads as ever"


class Holding(PosixIo):
    """A kernel whose page cache holds what is before and behind a range of every file."""

    def __init__(self, start, stop, *, tells=True):
        self.missing, self.tells, self.asked = range(start, stop), tells, []

    def resident(self, table):
        self.asked = [at for _, at, _, _ in table.tolist()]
        end = os.fstat(table[0, 0]).st_size
        return np.array([at not in self.missing and (at < end or not self.tells) for at in self.asked], np.int64)


def test_files_are_in_the_cache_but_for_a_sixteenth(file, tmp_path):
    small = tmp_path / "small"
    small.write_bytes(b"x" * 1000)
    for paths in ([file.path, small], [small, file.path]):
        assert in_cache(paths, Holding(SIZE // 2, SIZE * 36 // 64))
        assert not in_cache(paths, Holding(SIZE // 2, SIZE * 37 // 64)), "the small one is no half of both"
    assert not in_cache([small], Holding(0, 100))
    assert not in_cache([tmp_path / "none"]), "reading it will say so"
    assert in_cache([])


def test_a_kernel_that_does_not_tell_is_found_out(file):
    """Some call every page resident to those who may not write a file."""
    tells, silent = Holding(0, 0), Holding(0, 0, tells=False)
    assert in_cache([file.path], tells)
    assert not in_cache([file.path], silent)
    assert silent.asked == [*(SIZE * i // 128 for i in range(1, 128, 2)), SIZE + BEYOND]


def test_what_tells_contents_apart_brings_none_of_the_pages_that_are_looked_at(file):
    file.path.read_bytes()
    assert in_cache([file.path])
    file.evict()
    content.of([file.path])
    assert sum(file.resident()) > content.SAMPLES // 2
    assert not in_cache([file.path])
    fds = os.listdir("/proc/self/fd")  # noqa: PTH208  names only
    in_cache([file.path])
    assert os.listdir("/proc/self/fd") == fds  # noqa: PTH208  names only


@pytest.mark.parametrize("seed", range(5))
def test_short_and_interrupted_reads(seed, file):
    io = FaultyIo(seed)
    memory, rows = laid(file, [(5, 100), (4095, 90_000), (SIZE - 5000, 5000)])
    assert _io.read_past(io, rows, str) is None
    check(file, memory, rows)
    assert io.calls > 10


def test_rows_continue_from_where_they_stopped(file, primitive):
    for done in (0, 1, 4091, 4096, 70_000):
        memory, rows = laid(file, [(77, 5), (5, 80_000), (SIZE - 9, 9)])
        assert primitive.read_past(rows, 1, done) == (3, 0, 0)
        _, middle, last = bytes_of(memory, rows)
        assert np.array_equal(middle[done:], file.content[5 + done : 80_005])
        assert np.array_equal(last, file.content[-9:])
    assert primitive.read_past(rows, 3, 0) == (3, 0, 0)


def test_a_passing_error_is_tried_three_times(file, slept):
    memory, rows = laid(file, [(10, 60_000), (70_000, 40_000)])
    assert _io.read_past(FaultyIo(fail=errno.EIO, after=70_000, times=2), rows, str) is None
    check(file, memory, rows)
    assert len(slept) == 2
    with pytest.raises(CheckpointError, match=r"^f:80000: read failed: Input/output error"):
        _io.read_past(FaultyIo(fail=errno.EIO, after=70_000, times=3), rows, lambda _: "f")


class Refusing(PosixIo):
    """A filesystem that changes its mind after some bytes."""

    def __init__(self, code, after=0):
        self.faulty = FaultyIo(fail=code, after=after)
        self.calls = 0

    def read_past(self, table, row, done):
        self.calls += 1
        return self.faulty.read_past(table, row, done)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ESTALE, errno.EFAULT])
@pytest.mark.parametrize("after", [0, 70_000])
def test_a_refusal_goes_through_the_cache(code, after, file):
    memory, rows = laid(file, [(10, 60_000), (70_001, 40_000), (5, 3)])
    assert _io.read_past(Refusing(code, after), rows, str) == file.fd
    check(file, memory, rows)


def test_the_real_refusal_of_a_kernel(file, primitive):
    """An address that agrees with its offset in nothing."""
    memory, rows = laid(file, [(0, 70_000)])
    file.evict()
    rows[0, 3] += 1
    assert _io.read_past(primitive, rows, str) in (None, file.fd)
    assert np.array_equal(bytes_of(memory, rows)[0], file.content[:70_000])


@pytest.mark.parametrize("end", [5 << 20, (5 << 20) + 1, (8 << 20) + 4095, 100])
def test_a_file_that_shrinks(end, file, primitive):
    memory, rows = laid(file, [(50, 10), (77, SIZE - 77)])
    os.truncate(file.path, end)
    with pytest.raises(CheckpointError, match=f"^f:{end}: the file shrank while being read"):
        _io.read_past(primitive, rows, lambda _: "f")
    assert np.array_equal(bytes_of(memory, rows)[0], file.content[50:60])


def test_a_closed_descriptor_is_an_error(file, primitive):
    file.evict()
    _, rows = laid(file, [(0, 9)])
    rows[0, [0, 2]] = -1
    with pytest.raises(CheckpointError, match="Bad file descriptor"):
        _io.read_past(primitive, rows, str)


# Which files, and when no longer.


@pytest.fixture
def model(tmp_path, file):  # where the filesystem cannot, `file` skips
    return Checkpoint.open(save(tmp_path / "m", {"model.safetensors": {"a": tensor("U8", 300_000)}}))


def row(files, model, buffer):
    info = model.tensors["a"]
    at = -(-buffer.ctypes.data // BLOCK) * BLOCK + info.offset % BLOCK
    return np.array([[files.fd(0, info.file), info.offset, at, info.nbytes]])


def got(buffer, rows):
    return buffer[rows[0, 2] - buffer.ctypes.data :][:300_000].tobytes()


def test_files_that_refuse_are_asked_once(model):
    io = Refusing(errno.EINVAL)
    with Files([model], io) as files:
        for _ in range(3):
            buffer = np.zeros(320_000, np.uint8)
            rows = row(files, model, buffer)
            files.read_past(rows, files.cold(rows))
            assert got(buffer, rows) == tensor("U8", 300_000)[2]
            assert files.cold(rows) == [False]
    assert io.calls == 1


def test_cold_rows_are_large_ones(model):
    buffer = np.zeros(320_000, np.uint8)
    with Files([model], PosixIo()) as files:
        rows = row(files, model, buffer).repeat(2, 0)
        rows[1, 3] = LEAST - 1
        assert files.cold(rows) == [True, False]
        files.read_past(rows, [True, False])
        assert got(buffer, rows) == tensor("U8", 300_000)[2]


@pytest.mark.parametrize(
    "switch",
    [
        lambda patch: patch.setenv(SWITCH, "0"),
        lambda patch: patch.setattr(system, "filesystem", lambda fd: 0x01021994),  # tmpfs
        lambda patch: patch.setattr(system, "spare_descriptors", lambda n: n - 1),
    ],
)
def test_files_that_are_not_read_so(model, monkeypatch, switch):
    switch(monkeypatch)
    buffer = np.zeros(320_000, np.uint8)
    with Files([model], PosixIo()) as files:
        rows = row(files, model, buffer)
        assert files.cold(rows) == [False]
        files.read_past(rows, [True])
        assert got(buffer, rows) == tensor("U8", 300_000)[2]


def test_no_descriptor_is_left_or_inherited(model):
    def inherited():
        found = {}
        for fd in os.listdir("/proc/self/fd"):  # noqa: PTH208  names
            with contextlib.suppress(OSError):  # that of the list itself
                found[fd] = os.get_inheritable(int(fd))
        return found

    before = inherited()
    with Files([model], Refusing(errno.EINVAL)) as files:
        rows = row(files, model, np.zeros(320_000, np.uint8))
        files.read_past(rows, files.cold(rows))
        added = {fd: yes for fd, yes in inherited().items() if fd not in before}
        assert list(added.values()) == [False, False]
    assert inherited() == before
