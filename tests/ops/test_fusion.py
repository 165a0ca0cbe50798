"""Outliers of importances, and what the merge by them takes beside the slot."""

import tracemalloc

import numpy as np
import pytest
import torch

from fastmerge.methods import get
from fastmerge.ops.fusion import outlying
from tests import oracle


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outliers_by_sorting_everything(dtype):
    rng = np.random.default_rng(0)
    for n in (*range(1, 12), 100, 4099):
        for kind in ("smooth", "tied", "signed", "odd"):
            x = rng.normal(0, 1, n).astype(dtype)
            if kind != "signed":
                x = np.abs(x)
            if kind == "tied":
                x = np.round(x, 1)
            if kind == "odd":
                x[rng.random(n) < 0.3] = rng.choice([np.nan, np.inf, 0.0])
            ordered = np.sort(x)  # NaNs last
            a, b, c = (ordered[int(q * (n - 1))] for q in (0.25, 0.5, 0.75))
            with np.errstate(all="ignore"):
                wanted = b + dtype(1.5) * (c - a)
            assert np.array_equal(dtype(outlying(x)), wanted, equal_nan=True), (n, kind)
            assert np.array_equal(np.sort(x), ordered, equal_nan=True)


def test_outliers_of_many_lengths():
    """A place that is one off is right by chance, but for one length in a hundred."""
    rng = np.random.default_rng(0)
    for n in range(2000, 2600):
        x = rng.normal(size=n).astype(np.float32)
        a, b, c = (np.sort(x)[int(q * (n - 1))] for q in (0.25, 0.5, 0.75))
        assert outlying(x) == b + np.float32(1.5) * (c - a), n


@pytest.mark.parametrize("types", ["bf16", "fp64"])
def test_it_holds_importances_and_nothing_else_as_large(types):
    method = get("arcee_fusion")
    op = oracle.op_of(method, {}, (600, 700), types)
    inputs = [oracle.inputs_of(op)]
    out = torch.empty(op.spec.shape, dtype=inputs[0][0].dtype)
    (s,) = oracle.segments([op], inputs, [out], oracle.cut([op], 1 << 62))
    program = method.program([op], oracle.FAST)
    tracemalloc.start()
    program.apply(s)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.9 * op.spec.workspace <= peak <= op.spec.workspace + 100_000


def test_pieces_are_refused():
    op = oracle.op_of(get("arcee_fusion"), {}, (300, 400), "fp32")
    inputs = [oracle.inputs_of(op)]
    (s,) = oracle.segments([op], inputs, [torch.empty(300, 400)], np.array([[0, 0, 400]]))
    with pytest.raises(ValueError, match="expected a whole tensor, got 400 of 120000"):
        get("arcee_fusion").program([op], oracle.FAST).apply(s)
