"""The threshold of what varies most: found in few passes, the same however the work is cut."""

import numpy as np
import pytest
import torch

from fastmerge.methods import get
from fastmerge.ops import blocks
from fastmerge.ops.segments import LENGTH
from fastmerge.ops.selection.select import ALL_TILES
from fastmerge.ops.selection.variance import Variance
from tests import oracle
from tests.kernels_numpy import NumpyKernels

SHARES = (0.1, 1.0, 0.5, 0.0)


class Counting(NumpyKernels):
    """Counts the elements that are read."""

    def __init__(self):
        self.read = 0

    def count(self, segments, *rest):
        self.read += int(segments.table[:, LENGTH].sum())
        super().count(segments, *rest)

    def delta_keys(self, segments, *rest):
        self.read += int(segments.table[:, LENGTH].sum())
        super().delta_keys(segments, *rest)


def tensors(shapes, *, lattice):
    """Three models; of a lattice many differences are equal, and a third of the elements do not vary."""
    ops = [oracle.op_of(get("sce"), {"select_topk": 0.3}, s, "fp32", name=f"t{i}") for i, s in enumerate(shapes)]
    inputs = [oracle.inputs_of(op, seed=i) for i, op in enumerate(ops)]
    if lattice:
        for base, *models in inputs:
            equal = torch.rand(base.shape, generator=torch.Generator().manual_seed(9)) < 0.3
            for x in models:
                x.copy_(torch.where(equal, models[0], base + ((x - base) * 1000).round() / 1000))
    return ops, inputs


def found(ops, inputs, shares, *, step=None):
    kernels = Counting()
    variance = Variance(ops, shares, kernels)
    every = oracle.cut(ops, step or 1 << 62)
    while not variance.done:
        due = variance.pieces()
        pieces = every if due is None else oracle.smaller(due, step)
        pieces = pieces[::-1] if step else pieces
        chunks = [pieces[i : i + 1] for i in range(len(pieces))] if step else [pieces]
        variance.advance([variance.statistics(s) for c in chunks for s in oracle.segments(ops, inputs, None, c)])
    return variance.keep, kernels.read


def stays(op, keep, group, keys):
    """Which elements a threshold and a cut leave, one by one."""
    thr, (tile, rank, _) = int(keep.thr[group, 0]), keep.cut[group, 0].tolist()
    kept, tied = [], 0
    for e, key in enumerate(keys.tolist()):
        here = e // 65536
        if key == thr and here == tile:
            tied += 1
            kept.append(tied <= rank)
        else:
            kept.append(key > thr or (key == thr and here < tile))
    assert len(kept) == op.spec.numel
    return np.array(kept)


@pytest.mark.parametrize("lattice", [False, True])
def test_it_is_the_share_of_what_varies(lattice):
    ops, inputs = tensors(((331, 401), (40, 50), (7, 9), (90,)), lattice=lattice)
    keep, _ = found(ops, inputs, SHARES)
    for group, (op, (_, *xs), share) in enumerate(zip(ops, inputs, SHARES, strict=True)):
        total = sum([(x - y) ** 2 for i, x in enumerate(xs) for y in xs[i + 1 :]]).reshape(-1)
        keys = blocks.keys(total)
        varying = int(np.count_nonzero(keys))
        assert (varying < 0.9 * op.spec.numel) == lattice
        rank = op.spec.numel if share == 1 else int(varying * share)
        assert np.array_equal(stays(op, keep, group, keys), blocks.top(keys, rank, "index", None))
    again, _ = found(ops, inputs, SHARES, step=1 << 16)
    assert np.array_equal(keep.thr, again.thr)
    assert np.array_equal(keep.cut, again.cut)


def test_two_passes_and_a_sample():
    """One that counts what varies, one that counts about a bracket."""
    ops, inputs = tensors(((700, 601),), lattice=False)
    _, read = found(ops, inputs, (0.1,))
    assert 2 * 700 * 601 < read < 2.1 * 700 * 601


def test_whole_tensors_in_one_call():
    ops, inputs = tensors(((120, 130), (7, 9), (331, 401)), lattice=True)
    wanted, _ = found(ops, inputs, SHARES[:3])
    variance = Variance(ops, SHARES[:3], oracle.FAST)
    (s,) = oracle.segments(ops, inputs, None, oracle.cut(ops, 1 << 62))
    variance.resident(s.pieces(s.table[:2]))
    assert not variance.done, "that was not everything"
    assert (variance.keep.cut[:, 0, 0] == ALL_TILES).all()
    variance.resident(s)
    while not variance.done:  # where a sample missed
        due = variance.pieces()
        some = oracle.segments(ops, inputs, None, oracle.cut(ops, 1 << 62) if due is None else due)
        variance.advance([variance.statistics(p) for p in some])
    assert np.array_equal(variance.keep.thr, wanted.thr)
    assert np.array_equal(variance.keep.cut, wanted.cut)
