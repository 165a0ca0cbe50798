"""Input files: opened once, checked, shared."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from fastmerge.checkpoint import Checkpoint, Files
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
