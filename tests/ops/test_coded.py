"""Coded inputs in memory: their values are those of the source, whatever run of it they are."""

import numpy as np
import pytest
import torch

from fastmerge.ops.coded import Coded, fits, values_at
from fastmerge.ops.made import array
from fastmerge.ops.quantised import Coding, Dequantised
from tests.compare import bits
from tests.ops.test_made import bring, memory, run

SHAPES = [
    ("float8_e4m3fn", 2, 300, 200, (128, 128)),
    ("float8_e5m2", 1, 130, 513, (130, 513)),
    ("int8", 3, 40, 96, (1, 96)),
    ("int4", 1, 200, 256, (1, 32)),
    ("float4_e2m1fn", 2, 150, 352, (1, 32)),
]
"""Kinds of codes, matrices, rows, columns, blocks: rows of blocks that end early, blocks that are no whole steps."""


def weights(code, matrices, rows, columns, block, seed):
    """A quantised tensor of every code, NaN and infinity among them, with zero points where they are integers."""
    rng = np.random.default_rng(seed)
    coding = Coding(code, matrices, rows, columns, block)
    raw = torch.from_numpy(rng.integers(0, 256, (matrices, rows, columns // 2 if coding.four else columns), np.uint8))
    kinds = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8": torch.int8}
    scale = torch.from_numpy(np.exp2(rng.integers(-6, 6, (matrices, *coding.grid))).astype(np.float32))
    scale *= 1 + torch.from_numpy(rng.random(scale.shape, np.float32))
    zero = torch.from_numpy(rng.integers(-8, 8, scale.shape, np.int8)) if code.startswith("int") else None
    return Dequantised(
        memory(raw.view(kinds.get(code, torch.uint8))),
        memory(scale),
        coding,
        (matrices, rows, columns),
        zero=None if zero is None else memory(zero),
    )


def dense(source):
    """Its values in fp32."""
    return run(source, 0, int(np.prod(source.shape))).view(np.float32).copy()


def coded(source, e0, n):
    """The run as kernels take it, in memory that is no longer than it says."""
    packed = Coded(source)
    room = np.full(packed.room(e0, n) + 64, 0xDD, np.uint8)
    at = -room.ctypes.data % 64
    packed.fill(bring, np.array([[e0, n, room.ctypes.data + at]], np.int64))
    assert array(room.ctypes.data + at, 1, np.int64)[0] == packed.room(e0, n)
    assert (room[at + packed.room(e0, n) :] == 0xDD).all(), "written past its room"
    return room[at:]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_values_at_an_address(shape):
    source = weights(*shape, 0)
    want = dense(source)
    for e0, n in ((0, len(want)), (7, 1), (shape[3] - 1, 2), (1001, 4097), (len(want) - 3, 3)):
        room = coded(source, e0, n)
        assert np.array_equal(bits(values_at(room.ctypes.data, e0, n)), bits(want[e0 : e0 + n]))
        some = n // 3
        assert np.array_equal(bits(values_at(room.ctypes.data, e0 + some, n - some)), bits(want[e0 + some : e0 + n]))


def test_small_or_padded_tensors_stay_fp32():
    assert fits(weights(*SHAPES[0], 0), 0, 4096)
    assert not fits(weights("float8_e4m3fn", 1, 2, 3, (2, 3), 0), 0, 6)  # smaller than what leads to it
    odd = Dequantised(
        memory(torch.zeros(64, 128, dtype=torch.uint8)),
        memory(torch.ones(64, 1)),
        Coding("float4_e2m1fn", 1, 64, 255, (1, 255)),
        (64, 255),
    )
    assert not fits(odd, 0, 64 * 255)
