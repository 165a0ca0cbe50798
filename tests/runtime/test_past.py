"""Merges of models that are on disk and not in the page cache."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

import fastmerge as fm
from fastmerge.checkpoint import io as _io
from fastmerge.checkpoint.past import LEAST, SWITCH
from fastmerge.commands.estimate import estimate
from fastmerge.errors import BudgetError
from fastmerge.runtime import placement
from fastmerge.runtime.devices import Buffer
from tests.checkpoint.shim import evict, raw, save


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
    evict(paths)
    for path in paths:
        path.read_bytes()
    return paths


PARAMETERS = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "ties": {"weight": 0.5, "density": 0.3},
    "dare_linear": {"weight": 0.5, "density": 0.4},
}


def recipe_of(models, method):
    paths = [str(p.parent) for p in models]
    base = {} if method == "linear" else {"base_model": paths[0]}
    listed = {"models": [{"model": p} for p in paths], "parameters": PARAMETERS[method]}
    return {"merge_method": method, "dtype": "bfloat16", **listed, **base}


def merged(models, out, method="linear", **how):
    merged.report = fm.merge(recipe_of(models, method), out, device="cpu", backend="native", **how)
    return (out / "model.safetensors").read_bytes()


SMALL = sum(len(t[2]) for t in TENSORS.values() if len(t[2]) < LEAST)
"""Bytes of the tensors that are always read through the cache."""


@pytest.mark.parametrize("method", PARAMETERS)
def test_a_cold_merge_reads_past_the_cache_and_gives_the_same_bytes(models, tmp_path, io, monkeypatch, method):
    models = models[:2] if method == "slerp" else models
    want = merged(models, tmp_path / "warm", method)
    assert io.past == 0, "what is resident is read from the cache"
    evict(models)
    assert merged(models, tmp_path / "cold", method) == want
    # The third model's elements are at odd places, where a slot cannot have them: they come through the cache.
    assert 2 * (BYTES - SMALL) - 8192 < io.past <= 2 * BYTES, "every large tensor, once, however many passes it takes"
    io.past = 0
    evict(models)
    monkeypatch.setenv(SWITCH, "0")
    assert merged(models, tmp_path / "off", method) == want
    assert io.past == 0


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_linear"])
def test_with_less_memory_than_a_tensor_a_part_of_it_is_read_twice(models, tmp_path, io, method):
    want = merged(models[:2], tmp_path / "warm", method)
    warm = merged.report.bytes_read
    past, twice = [], []
    for memory in ("24MB", "31MB", "1GB"):
        expected = estimate(fm.plan(recipe_of(models[:2], method)), memory=memory, device="cpu", backend="native")
        twice.append(expected["bytes_read_twice"])
        evict(models)
        io.past = 0
        assert merged(models[:2], tmp_path / f"cold{memory}", method, memory=memory) == want
        past.append(io.past)
    assert past[0] < past[1] < past[2]
    assert twice[0] > twice[1] > 0 == twice[2]
    assert merged.report.bytes_read < warm


def test_slots_without_room_for_blocks_give_the_same_bytes(models, tmp_path, io):
    want = merged(models, tmp_path / "warm")
    with pytest.raises(BudgetError) as caught:
        merged(models, tmp_path / "none", memory=1)
    least = int(re.search(r">= (\d+)", str(caught.value))[1])
    for memory in (least, least + 5000, least + 20_000, 3 * least):
        evict(models)
        assert merged(models, tmp_path / f"{memory}", memory=memory) == want


def test_workers_wait_for_the_disk_where_inputs_are_on_it_only(models, tmp_path, io, monkeypatch):
    monkeypatch.setattr(placement, "cores", lambda: 2)
    slots = []
    monkeypatch.setattr(Buffer, "allocate", lambda n, real=Buffer.allocate: slots.append(n) or real(n))
    want = merged(models, tmp_path / "warm")
    expected = estimate(fm.plan(recipe_of(models, "linear")), memory=None, device="cpu", backend="native")
    assert merged.report.devices == ("cpu",) * expected["workers_cached"]
    assert sum(slots) == expected["memory_cached"]
    evict(models[1:2])
    slots.clear()
    assert merged(models, tmp_path / "cold") == want
    assert merged.report.devices == ("cpu",) * expected["workers"]
    assert sum(slots) == expected["memory_slots"] == 2 * expected["memory_cached"]


def test_the_cache_stays_cold(models, tmp_path, io):
    evict(models)
    merged(models[:2], tmp_path / "out")
    for path in models[:2]:
        fd = os.open(path, os.O_RDONLY)
        pages = np.array([[fd, at, 0, 4096] for at in range(1 << 20, path.stat().st_size - 4096, 4096)])
        assert io.resident(pages).mean() < 0.1, "but for samples of its content"
        os.close(fd)
