"""Importances, and merges by them, against plain numpy, on every instruction set."""

import numpy as np
import pytest

from fastmerge import _native
from fastmerge.backends.native import NativeKernels
from fastmerge.dtypes import BF16, F16, F32, F64
from fastmerge.ops.segments import Segments
from tests import keep_oracle
from tests.backends.isas import ISAS, using
from tests.kernels_numpy import NumpyKernels

TYPES = {0: F64, 1: F32, 2: F16, 3: BF16}
CODES = [(3, 3), (2, 2), (1, 1), (0, 0), (3, 1), (1, 0)]
SHAPES = [(1, 1), (3, 1), (5, 2), (7, 33), (2, 2047), (3, 2049), (2, 70_001), (1, 140_000)]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with using(request.param):
        yield request.param


def tensors(codes, kind):
    """Pairs of tensors, their table, and how many rows they have."""
    rng = np.random.default_rng(5)
    pairs = [keep_oracle.make(rng, rows * row, codes, kind) for rows, row in SHAPES]
    outs = [np.full(len(p[0]), 7, np.uint16) for p in pairs]
    parts, first = [], 0
    for (rows, row), tensors, out in zip(SHAPES, pairs, outs, strict=True):
        cuts = [row] if row > 2000 else []  # rows may be divided among pieces
        parts += [
            dict(tensors=tensors, start=a, stop=b, group=first, row=row, out=out)
            for a, b in keep_oracle.pieces(rows * row, cuts)
        ]
        first += rows
    table = keep_oracle.table(parts, 2)
    table[:, 3] = [p["row"] for p in parts]
    kinds = tuple(TYPES[c] for c in codes)
    return Segments(table, kinds, BF16, np.zeros(len(table), np.int64)), first, (pairs, outs)


@pytest.mark.parametrize("kind", ["normal", "equal", "two", "special"])
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_importances_and_merges(codes, kind):
    s, rows, (pairs, outs) = tensors(codes, kind)
    work = np.float64 if 0 in codes else np.float32
    found = []
    for kernels in (NativeKernels(), NumpyKernels()):
        divergence, importance = np.full(rows, 7.0), np.full(sum(len(p[0]) for p in pairs), 7, work)
        kernels.importance(s, divergence, importance)
        found.append((divergence, importance))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other, equal_nan=True)
    divergence, importance = found[0]
    if kind == "normal":
        assert (divergence[4:] > 0).all()
        assert np.isfinite(importance).all()
    for least in (float(np.nanmedian(importance)), 0.0, np.nan):
        merged = []
        for kernels in (NativeKernels(), NumpyKernels()):
            s.nonfinite[:] = 0
            kernels.fuse(s, divergence, least)
            merged.append([*(o.copy() for o in outs), s.nonfinite.copy()])
        for one, other in zip(*merged, strict=True):
            assert np.array_equal(one, other)


def test_wrong_arguments_are_refused():
    x = np.zeros((3, 64), np.float32)
    out = np.zeros(64, np.float32)

    def call(inputs=2, length=64, e0=0, row=8, rows=8, size=64, kind=np.float32):
        table = np.array([[0, length, e0, row, 0, 0, 0, *(v.ctypes.data for v in x[:inputs])]], np.int64)
        _native.importance(table, np.full(inputs, 1, np.int32), np.zeros(rows), np.zeros(size, kind))

    call()
    for wrong, said in (
        (dict(inputs=3), "expected 2 inputs, got 3"),
        (dict(inputs=1), "at least 2 inputs"),
        (dict(row=0), "row length above 0"),
        (dict(length=60, size=60), "whole rows"),
        (dict(e0=4, rows=9), "whole rows"),
        (dict(rows=7), "parameter row 7 of 7"),
        (dict(size=63), r"out: expected shape \[64\]"),
        (dict(kind=np.float64), "out: expected dtype"),
    ):
        with pytest.raises(ValueError, match=said):
            call(**wrong)
    table = np.array([[out.ctypes.data, 64, 0, 8, 0, 0, 0, x.ctypes.data, x.ctypes.data]], np.int64)
    ins, bad = np.full(2, 1, np.int32), np.zeros(1, np.int64)
    _native.fuse(table, ins, 1, np.zeros(8), 0.0, bad)
    with pytest.raises(ValueError, match="parameter row 7 of 7"):
        _native.fuse(table, ins, 1, np.zeros(7), 0.0, bad)
    with pytest.raises(ValueError, match="type code"):
        _native.fuse(table, ins, 9, np.zeros(8), 0.0, bad)
