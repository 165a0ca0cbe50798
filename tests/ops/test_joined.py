"""Sources laid out anew: every run of them is what numpy makes of the whole."""

import numpy as np
import pytest

from fastmerge.dtypes import BF16, F32
from fastmerge.ops import joined
from fastmerge.ops.gathered import Part
from fastmerge.ops.joined import Joined, Transposed
from fastmerge.ops.sources import Memory, workspace
from tests.ops.test_picked import BRING, cuts, filled, weights


@pytest.mark.parametrize("shapes", [[(3, 4)], [(2, 3), (4, 3), (1, 3)], [(5,), (0,), (7,)], [(2, 2, 2), (3,)]])
def test_sources_end_to_end(shapes):
    values, sources = zip(*[weights(*shape) for shape in shapes], strict=True)
    expected = np.concatenate([v.reshape(-1) for v in values])
    made = Joined(sources, expected.shape)
    for _ in range(5):
        assert np.array_equal(filled(made, np.uint16, cuts(expected.size)), expected)


def test_one_source_of_another_type_widens_all(monkeypatch):
    monkeypatch.setattr(joined, "PANEL", 4)
    short, a = weights(3, 5)
    wide = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    made = Joined((a, Memory(wide.ctypes.data, F32, wide.shape)), (5, 5))
    expected = np.concatenate([(short.astype(np.uint32) << 16).view(np.float32), wide])
    assert made.dtype is F32
    assert workspace(made) > workspace(Joined((a, a), (6, 5))) == 0
    assert np.array_equal(filled(made, np.float32, [1, 14, 16, 24]).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("shape", [(7, 9), (1, 6), (6, 1), (40, 3)])
@pytest.mark.parametrize("panel", [1, 50, 1 << 20])
def test_rows_for_columns(shape, panel, monkeypatch):
    monkeypatch.setattr(joined, "PANEL", panel)
    values, source = weights(*shape)
    made = Transposed(source)
    assert made.shape == shape[::-1]
    for _ in range(3):
        assert np.array_equal(filled(made, np.uint16, cuts(values.size)), values.T)


def test_a_stack_turned_expert_by_expert():
    values, source = weights(3, 4, 5)
    parts = [Transposed(Part(source, 20 * e, (4, 5))) for e in range(3)]
    made = Joined(tuple(parts), (3, 5, 4))
    assert np.array_equal(filled(made, np.uint16, cuts(60)), values.transpose(0, 2, 1))


def test_only_the_columns_of_a_run_are_read():
    values, source = weights(8, 100)
    read = []

    def bring(of, runs):
        read.extend(runs[:, 1].tolist())
        BRING(of, runs)

    out = np.zeros(16, np.uint16)
    Transposed(source).fill(bring, 8 * 3, 16, out.ctypes.data)
    assert np.array_equal(out.reshape(2, 8), values[:, 3:5].T)
    assert read == [2] * 8
    assert source.dtype is BF16
