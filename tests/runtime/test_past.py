"""Merges of models that are on disk and not in the page cache."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

import fastmerge as fm
from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint.past import SWITCH, open_past
from fastmerge.errors import BudgetError
from tests.checkpoint.shim import raw, save


def numbers(seed, *shape):
    """A BF16 tensor of ordinary values."""
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return "BF16", shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


SHAPES = {"a": (33, 7), "b": (1100, 1001), "c": (5,), "d": (40, 1000), "e": (2300, 1001)}
TENSORS = {name: numbers(i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
BYTES = sum(len(t[2]) for t in TENSORS.values())


class Counting:
    """The extension's primitive; knows how many bytes were to be read past the page cache."""

    def __init__(self, real):
        self._real = real
        self.past = 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def read_past(self, table, row, done):
        self.past += int(table[row:, 4].sum()) - done
        return self._real.read_past(table, row, done)


@pytest.fixture
def io(monkeypatch):
    counting = Counting(_io.native())
    monkeypatch.setattr(_io, "native", lambda: counting)
    monkeypatch.delenv(SWITCH, raising=False)
    return counting


@pytest.fixture
def models(tmp_path):
    """Two models whose tensors are at different places of a block, and a third whose are at odd ones."""
    paths = [save(tmp_path / m, {"model.safetensors": dict(TENSORS)}) / "model.safetensors" for m in "xyz"]
    for i, path in enumerate(paths):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        odd = (i == 2) + size % 2
        path.write_bytes(raw(data[8 : 8 + size] + b" " * (1000 * i + odd), data[8 + size :]))
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        try:
            os.close(open_past(fd))
        except OSError as error:
            pytest.skip(f"files here are not read past the page cache: {error}")
        finally:
            os.close(fd)
    return paths


def evict(paths):
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def merged(models, out, method="linear", **how):
    paths = [str(p.parent) for p in models]
    recipe = {"merge_method": method, "dtype": "bfloat16", "models": [{"model": p} for p in paths]}
    recipe |= (
        {"base_model": paths[0], "parameters": {"t": 0.3}} if method == "slerp" else {"parameters": {"weight": 0.5}}
    )
    fm.merge(recipe, out, device="cpu", backend="native", **how)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_cold_merge_reads_past_the_cache_and_gives_the_same_bytes(models, tmp_path, io, monkeypatch, method):
    models = models if method == "linear" else models[:2]
    want = merged(models, tmp_path / "warm", method)
    assert io.past == 0, "what is resident is read from the cache"
    evict(models)
    assert merged(models, tmp_path / "cold", method) == want
    once = 2 * BYTES if method == "linear" else 2 * (BYTES - len(TENSORS["e"][2]))
    assert 0.9 * once < io.past <= once, "all large tensors that are read once and have their elements at even places"
    io.past = 0
    evict(models)
    monkeypatch.setenv(SWITCH, "0")
    assert merged(models, tmp_path / "off", method) == want
    assert io.past == 0


def test_slots_without_room_for_blocks_give_the_same_bytes(models, tmp_path, io):
    want = merged(models, tmp_path / "warm")
    with pytest.raises(BudgetError) as caught:
        merged(models, tmp_path / "none", memory=1)
    least = int(re.search(r">= (\d+)", str(caught.value))[1])
    for memory in (least, least + 5000, least + 20_000, 3 * least):
        evict(models)
        assert merged(models, tmp_path / f"{memory}", memory=memory) == want


def test_the_cache_stays_cold(models, tmp_path, io):
    evict(models)
    merged(models[:2], tmp_path / "out")
    for path in models[:2]:
        fd = os.open(path, os.O_RDONLY)
        pages = np.array([[fd, at, 0, 4096] for at in range(1 << 20, path.stat().st_size - 4096, 4096)])
        assert io.resident(pages).mean() < 0.1, "but for samples of its content"
        os.close(fd)
