"""Input files: opened once, checked, shared."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastmerge.checkpoint import Checkpoint, Files, system
from fastmerge.checkpoint import io as _io
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import FaultyIo, PosixIo, primitives, save, tensor


@pytest.fixture
def model(tmp_path):
    return Checkpoint.open(save(tmp_path / "m", {"model.safetensors": {"a": tensor("BF16", 100)}}))


def row(files, model, buffer, name="a"):
    info = model.tensors[name]
    return np.array([[files.fd(0, info.file), info.offset, buffer.ctypes.data, info.nbytes]])


@pytest.mark.parametrize("name", primitives())
def test_reads(model, name):
    buffer = np.zeros(200, np.uint8)
    with Files([model, model], primitives()[name]) as files:
        assert files.fd(0, 0) == files.fd(1, 0)
        files.read(row(files, model, buffer))
    assert buffer.tobytes() == tensor("BF16", 100)[2]
    with pytest.raises(ValueError, match="closed"):
        files.fd(0, 0)


def test_a_stale_handle_is_opened_again(model, monkeypatch):
    monkeypatch.setattr(_io, "_sleep", lambda _: None)
    buffer = np.zeros(200, np.uint8)
    with Files([model], FaultyIo(fail=errno.ESTALE, after=50, times=1)) as files:
        fd = files.fd(0, 0)
        files.read(row(files, model, buffer))
        assert files.fd(0, 0) == fd
        assert not os.get_inheritable(fd)
    assert buffer.tobytes() == tensor("BF16", 100)[2]


def test_a_file_that_was_replaced_is_not_opened(model):
    path = model.files[0].path
    path.with_suffix(".new").write_bytes(path.read_bytes())
    path.with_suffix(".new").rename(path)
    with Files([model], PosixIo()) as files, pytest.raises(CheckpointError, match="changed or replaced"):
        files.fd(0, 0)
    path.unlink()
    with Files([model], PosixIo()) as files, pytest.raises(CheckpointError, match="cannot open"):
        files.fd(0, 0)


def test_more_files_than_the_soft_limit(tmp_path):
    shards = {f"model-{i + 1:05d}-of-00040.safetensors": {f"t{i}": tensor("U8", 1)} for i in range(40)}
    model = Checkpoint.open(save(tmp_path, shards))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = len(list(Path("/proc/self/fd").iterdir())) + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, limits[1]))
    try:
        with Files([model], PosixIo()) as files:
            assert len({files.fd(0, i) for i in range(40)}) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# More files than a process may open at all.


@pytest.fixture
def many(tmp_path):
    shards = {f"model-{i + 1:05d}-of-00012.safetensors": {f"t{i}": tensor("U8", 50, seed=i)} for i in range(12)}
    return Checkpoint.open(save(tmp_path, shards))


def rows_of(files, model, buffer):
    return np.array(
        [
            [files.fd(0, info.file), info.offset, buffer.ctypes.data + 50 * i, 50]
            for i, info in enumerate(model.tensors.values())
        ]
    )


def open_files(model):
    paths = {str(f.path) for f in model.files}
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return [p for p in found if p in paths]


@pytest.mark.parametrize("spare", [0, 1, 3, 11, 12])
def test_a_bounded_pool_reads_the_same(many, monkeypatch, spare):
    monkeypatch.setattr(system, "spare_descriptors", lambda _: spare)
    buffer = np.zeros(600, np.uint8)
    with Files([many], PosixIo()) as files:
        files.read(rows_of(files, many, buffer))
        assert len(open_files(many)) <= max(spare, 1)
    assert buffer.tobytes() == b"".join(tensor("U8", 50, seed=i)[2] for i in range(12))
    assert open_files(many) == []


def test_a_file_in_use_is_not_closed_for_another(many, monkeypatch):
    """Eight threads over two descriptors: every call sees its own file."""
    monkeypatch.setattr(system, "spare_descriptors", lambda _: 2)
    wrong, most = [], []

    def work(files, start):
        for i in range(60):
            n = (start * 5 + i) % 12
            table = np.array([[files.fd(0, n), 0, 0, 0]])
            files.use(table, lambda rows, n=n: look(rows, n))

    def look(rows, n):
        fd = int(rows[0, 0])
        with files._lock:  # a listing is no snapshot: what is closed and opened meanwhile would count twice
            most.append(len(open_files(many)))
        if Path(f"/proc/self/fd/{fd}").readlink() != many.files[n].path:
            wrong.append(n)

    with Files([many], PosixIo()) as files:
        threads = [threading.Thread(target=work, args=(files, k)) for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(30)
        assert not any(t.is_alive() for t in threads)
    assert wrong == []
    assert max(most) <= 2


def test_an_error_gives_the_descriptor_back(many, monkeypatch):
    monkeypatch.setattr(system, "spare_descriptors", lambda _: 1)
    buffer = np.zeros(600, np.uint8)
    with Files([many], PosixIo()) as files:
        rows = rows_of(files, many, buffer)
        os.truncate(many.files[3].path, 10)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="changed or replaced"):
                files.read(rows)
        files.read(rows[5:7])
    assert buffer[250:350].tobytes() == tensor("U8", 50, seed=5)[2] + tensor("U8", 50, seed=6)[2]


@pytest.mark.parametrize(
    ("soft", "hard", "spare", "then"),
    [
        (10**6, 10**6, 100, 10**6),
        (-1, -1, 100, -1),
        (40, -1, 100, 50 + 100 + system.RESERVE),
        (40, 4096, 100, 50 + 100 + system.RESERVE),
        (40, 90, 90 - 50 - system.RESERVE, 90),
        (60, 60, 0, 60),
    ],
)
def test_spare_descriptors(monkeypatch, soft, hard, spare, then):
    limits = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(None), new))
    monkeypatch.setattr(os, "listdir", lambda _: ["1"] * 50)
    assert system.spare_descriptors(100) == spare
    assert limits == [then, hard]


@pytest.mark.parametrize("good", [0, 1])
def test_a_file_that_cannot_be_looked_at_is_named(model, monkeypatch, good):
    real, calls = os.fstat, []

    def fstat(fd):
        calls.append(fd)
        if len(calls) > good:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(fd)

    with Files([model], PosixIo()) as files:
        monkeypatch.setattr(os, "fstat", fstat)
        with pytest.raises(CheckpointError) as caught:
            files.fd(0, 0)
        monkeypatch.undo()
    assert str(caught.value).startswith(f"{model.files[0].path}: cannot ")


def test_a_merge_of_more_files_than_the_hard_limit(tmp_path):
    """In a process of its own: 70 shards of two models, and 64 descriptors in all."""
    for m in "ab":
        shards = {
            f"model-{i + 1:05d}-of-00070.safetensors": {f"layers.{i}.w": ("F32", (4,), bytes([i] * 16))}
            for i in range(70)
        }
        save(tmp_path / m, shards)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "import fastmerge\n"
        "for method in ('linear', 'passthrough'):\n"
        "    models = [{'model': m, 'parameters': {'weight': 1}} for m in sys.argv[1:3]]\n"
        "    if method == 'passthrough': models = [{'model': sys.argv[1]}]\n"
        "    fastmerge.merge({'merge_method': method, 'models': models}, f'{sys.argv[3]}/{method}', device='cpu')\n"
    )
    words = [sys.executable, "-c", code, *(str(tmp_path / m) for m in "ab"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for method in ("linear", "passthrough"):
        merged = Checkpoint.open(tmp_path / method)
        data = (tmp_path / method / "model.safetensors").read_bytes()
        for i in range(70):
            info = merged.tensors[f"layers.{i}.w"]
            assert data[info.offset : info.offset + 16] == bytes([i] * 16)
