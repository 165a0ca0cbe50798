"""Rows of several sources, and means of rows, beside plain torch in fp64."""

import numpy as np
import pytest
import torch

from fastmerge.dtypes import BF16, F32, F64
from fastmerge.ops.made import BLOCK, Rows, load
from fastmerge.ops.means import Mean, Means
from fastmerge.ops.sources import Made, inputs_of
from tests.ops.test_made import bring, memory

B, F, H, D = torch.bfloat16, torch.float32, torch.float16, torch.float64


def tensors(types, width):
    g = torch.Generator().manual_seed(width)
    return [torch.randn(n, width, generator=g, dtype=D).to(t) for n, t in zip((50, 70, 9), types, strict=True)]


def table(seed):
    g = np.random.default_rng(seed)
    return np.stack([g.integers(-1, 50, 30), g.integers(-1, 70, 30), g.integers(0, 9, 30)], axis=1)


def mean(xs, rows):
    """Of each row of the table, in fp64."""
    return torch.stack(
        [torch.stack([x[i].double() for x, i in zip(xs, row, strict=True) if i >= 0]).mean(0) for row in rows]
    )


@pytest.mark.parametrize("width", [1, 3, 64, 9001])
@pytest.mark.parametrize("types", [(B, B, B), (B, F, H), (B, D, B)], ids=str)
def test_rows_of_several_sources_and_of_their_means(types, width):
    xs = tensors(types, width)
    wide = torch.float64 if D in types else torch.float32
    means = Means(tuple(map(memory, xs)), table(0))
    want = mean(xs, table(0)).to(wide)
    assert torch.equal(torch.from_numpy(load(bring, means, 0, 30 * width)).reshape(30, width), want)
    index = np.random.default_rng(1).integers(-1, 159, 200)
    rows = Rows((*means.sources, means), index)
    assert (rows.dtype, rows.shape) == (F64 if D in types else F32, (200, width))
    every = torch.cat([x.to(wide) for x in xs] + [want, torch.zeros(1, width, dtype=wide)])[torch.from_numpy(index)]
    n = 200 * width
    for e0, count in ((0, n), (n // 3, n // 2), (n - 1, 1)):
        got = torch.from_numpy(load(bring, rows, e0, count))
        assert torch.equal(got, every.reshape(-1)[e0 : e0 + count]), "in parts and over the edge of a block"
    assert n > 6 * BLOCK or width < 9001


def test_sources_of_one_type_keep_it():
    xs = tensors((B, B, B), 5)
    rows = Rows(tuple(map(memory, xs)), np.array([128, 50, -1, 0, 1]))
    assert rows.dtype is BF16
    got = torch.from_numpy(load(bring, rows, 0, 25)).reshape(5, 5)
    assert torch.equal(got, torch.stack([xs[2][8], xs[1][0], torch.zeros(5), xs[0][0], xs[0][1]]).float())


@pytest.mark.parametrize("width", [3000, 5, 7])
def test_rows_that_lie_close_are_read_together(width):
    """Others are read one by one; rows cut at either end as well."""
    x = torch.arange(200 * width, dtype=torch.float32).reshape(200, width)
    index = np.random.default_rng(0).integers(-1, 200, 40)
    want = torch.cat([x, torch.zeros(1, width)])[torch.from_numpy(index)].reshape(-1)
    calls = []

    def counted(source, runs):
        calls.extend(runs.tolist())
        bring(source, runs)

    n = 40 * width - 2
    got = np.empty(n, np.float32)
    Rows((memory(x),), index).fill(counted, 1, n, got.ctypes.data)
    assert np.array_equal(got, want[1 : n + 1].numpy())
    assert (len(calls) > 30) is (width == 3000), "as far apart as that, nothing between them is read"


def test_what_is_made_is_made_once_where_its_rows_follow_each_other():
    """Means between rows that are simply there: one piece of work for all, not one for each."""
    (x, *_) = tensors((B, B, B), 4)
    asked = []

    class Watched(Means):
        def fill(self, bring, e0, n, address):
            asked.append((e0, n))
            super().fill(bring, e0, n, address)

    means = Watched((memory(x),), np.arange(6)[:, None])
    rows = Rows((memory(x), means), np.array([0, 50, 3, 51, 2, 52, -1, 53]))
    got = torch.from_numpy(load(bring, rows, 0, 32)).reshape(8, 4)
    assert torch.equal(got[1::2], x[:4].float())
    assert asked == [(0, 16)]


def test_the_mean_of_all_rows():
    xs = tensors((B, F, H), 300)
    gaps = Rows((memory(xs[1]),), np.array([5, -1, 7, 69, -1]))
    for source, rows, count in ((memory(xs[1]), xs[1], 70), (gaps, xs[1][[5, 7, 69]], 3)):
        one = Mean(source, count)
        want = (rows.double().sum(0) / count).float().numpy()
        assert np.array_equal(load(bring, one, 0, 300), want)
        assert np.array_equal(load(bring, one, 299, 1), want[299:])
    assert isinstance(one, Made)
    assert one.shape == (1, 300)
    assert inputs_of(one) == (memory(xs[1]),)
