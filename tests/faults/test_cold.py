"""Whole merges whose reads past the page cache fail: the same errors and the same bytes as through it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import fastmerge
from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint.past import SWITCH
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import FaultyIo, evict, names, raw, save


def numbers(n, seed):
    return "F32", (n,), np.random.default_rng(seed).standard_normal(n).astype("<f4").tobytes()


@pytest.fixture(params=["linear", "slerp"])
def recipe(request, tmp_path, monkeypatch):
    """A merge of two models on disk, none of which is in the page cache: read once, or kept for a second pass."""
    monkeypatch.delenv(SWITCH, raising=False)
    monkeypatch.setattr(_io, "_sleep", lambda _: None)
    paths = [tmp_path / name for name in "xy"]
    for seed, path in enumerate(paths):
        file = save(path, {"model.safetensors": {"a": numbers(3_000_001, seed), "b": numbers(90_001, seed + 7)}})
        file /= "model.safetensors"
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        file.write_bytes(raw(data[8 : 8 + size] + b" " * (-size % 8), data[8 + size :]))  # elements at even places
    evict(path / "model.safetensors" for path in paths)
    how = {"parameters": {"weight": 0.5}}
    if request.param == "slerp":
        how = {"parameters": {"t": 0.3}, "base_model": str(paths[0])}
    return {"merge_method": request.param, "models": [{"model": str(p)} for p in paths], **how}


def forget(recipe):
    """Takes the models out of the page cache."""
    evict(Path(m["model"]) / "model.safetensors" for m in recipe["models"])


class Failing:
    """The extension's primitive, but for its reads past the cache."""

    def __init__(self, past):
        self._real = _io.native()
        self._past = past
        self._lock = threading.Lock()
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def read_past(self, table, row, done):
        with self._lock:
            self.calls += 1
            return self._past(table, row, done)


def merged(recipe, out, monkeypatch, past=None, **how):
    with monkeypatch.context() as patch:
        if past is not None:
            io = Failing(past)
            patch.setattr(_io, "native", lambda: io)
        fastmerge.merge(recipe, out, device="cpu", backend="native", **how)
        assert past is None or io.calls
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTBLK, errno.EFAULT, errno.ENOMEM])
@pytest.mark.parametrize("after", [0, 5_000_000])
def test_a_refusal_in_the_middle_changes_no_byte(recipe, tmp_path, monkeypatch, code, after):
    refused = merged(recipe, tmp_path / "refused", monkeypatch, FaultyIo(fail=code, after=after).read_past)
    assert refused == merged(recipe, tmp_path / "out", monkeypatch)


def test_short_reads_and_passing_errors_change_no_byte(recipe, tmp_path, monkeypatch):
    short = merged(recipe, tmp_path / "short", monkeypatch, FaultyIo(3).read_past)
    forget(recipe)
    flaky = FaultyIo(fail=errno.EIO, after=5_000_000, times=2).read_past
    assert (
        short == merged(recipe, tmp_path / "flaky", monkeypatch, flaky) == merged(recipe, tmp_path / "o", monkeypatch)
    )


def test_a_bad_disk_is_an_error_with_its_place(recipe, tmp_path, monkeypatch):
    bad = FaultyIo(fail=errno.EIO, after=5_000_000).read_past
    with pytest.raises(CheckpointError, match=r"model.safetensors:\d+: read failed: Input/output error"):
        merged(recipe, tmp_path / "out", monkeypatch, bad)
    assert "out" not in names(tmp_path)
    resumed = merged(recipe, tmp_path / "out", monkeypatch, resume=True)
    forget(recipe)
    assert resumed == merged(recipe, tmp_path / "again", monkeypatch)


def test_a_file_that_shrinks_under_the_merge(recipe, tmp_path, monkeypatch):
    path = tmp_path / "y" / "model.safetensors"
    native = _io.native()

    def shrinking(table, row, done):
        os.truncate(path, 7_000_001)
        return native.read_past(table, row, done)

    with pytest.raises(CheckpointError, match=r"y/model.safetensors:\d+: the file shrank while being read"):
        merged(recipe, tmp_path / "out", monkeypatch, shrinking)
    assert "out" not in names(tmp_path)
