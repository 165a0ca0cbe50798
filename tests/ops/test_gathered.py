"""Columns, factors and exact splits against plain torch, in any runs, with and without the extension."""

import math
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from fastmerge.dtypes import BF16, F16, F32, F64
from fastmerge.ops import gathered, replicas
from fastmerge.ops.gathered import Columns, Part, Scaled
from fastmerge.ops.joined import Joined
from fastmerge.ops.low_rank import LowRank
from fastmerge.ops.made import Noise
from fastmerge.ops.replicas import Split
from fastmerge.ops.sources import Made, inputs_of, workspace
from fastmerge.philox import SPLIT, u16
from tests.ops.test_made import TORCH, bring, dtypes, memory, random, run, unlike

TILED = np.r_[np.arange(9), np.arange(9)]
UNEVEN = np.r_[np.arange(9), [3, 4, 4, 8, 0, 0, 0]]
MIXED = np.random.default_rng(0).permutation(UNEVEN)


def tensor(source):
    """A source as a whole tensor."""
    n = math.prod(source.shape)
    raw = torch.from_numpy(run(source, 0, n).view(f"i{source.dtype.size}").copy())
    return raw.view(TORCH[source.dtype]).reshape(source.shape)


def totals(made, index, axis, like):
    """Sums of replicas, without rounding."""
    out = np.empty(like.shape)
    parts = made.double().numpy()
    for i in np.ndindex(out.shape):
        row = parts[index == i[0], i[1]] if axis == 0 else parts[i[0], index == i[1]]
        out[i] = math.fsum(row)
    return torch.from_numpy(out)


@dtypes
def test_parts_are_runs(dtype):
    x = random((3, 4, 5), dtype)
    assert unlike(Part(memory(x), 20, (4, 5)), x[1]) == []


@dtypes
def test_joined_sources(dtype, monkeypatch):
    monkeypatch.setattr(gathered, "PANEL", 17)
    x, empty, y, z = random((3, 4, 5), dtype), random((0, 5), dtype), random((2, 5), F32, 1), random((7,), dtype, 2)
    whole = torch.cat([t.reshape(-1).to(torch.promote_types(x.dtype, torch.float32)) for t in (x, empty, y, z)])
    assert unlike(Joined((memory(x), memory(empty), memory(y), memory(z)), (77, 1)), whole.reshape(77, 1)) == []
    alike = Joined((Part(memory(x), 40, (4, 5)), Part(memory(x), 0, (20,))), (2, 4, 5))
    assert unlike(alike, x[[2, 0]]) == []


def test_one_expert_of_factors_that_hold_all():
    """Expert slowest in A and fastest in B, as peft has them."""
    experts, rank, rows, columns = 3, 2, 5, 4
    x = random((experts, rows, columns), BF16)
    a, b = random((experts * rank, columns), F32, 1), random((rows, rank * experts), F32, 2)
    matrices = [
        LowRank(
            Part(memory(x), e * rows * columns, (rows, columns)),
            Columns((memory(b),), np.arange(rank) * experts + e),
            Part(memory(a), e * rank * columns, (rank, columns)),
            0.5,
        )
        for e in range(experts)
    ]
    delta = torch.einsum("ore,eri->eoi", b.reshape(rows, rank, experts), a.reshape(experts, rank, columns))
    got = tensor(Joined(tuple(matrices), tuple(x.shape)))
    assert torch.allclose(got, x.float() + 0.5 * delta, rtol=1e-6, atol=1e-6)
    assert unlike(Joined(tuple(matrices), tuple(x.shape)), got) == []


@dtypes
def test_columns(dtype):
    x, y = random((13, 5), dtype), random((13, 4), dtype, seed=1)
    whole = torch.cat([x, y, torch.zeros(13, 1, dtype=x.dtype)], dim=1)
    for index in (
        UNEVEN,
        MIXED,
        np.r_[np.arange(9), [-1] * 5],
        np.arange(9)[::-1].copy(),
        np.arange(200) % 9,
        np.arange(3),
    ):
        source = Columns((memory(x), memory(y)), index)
        assert source.shape == (13, len(index))
        assert unlike(source, whole[:, index]) == []
        assert unlike(Columns((memory(whole[:, :9]),), index), whole[:, index]) == []


def test_columns_of_several_types_are_widened():
    x, noise = random((6, 5), BF16), Noise(3, 0, 0.5, F32, (6, 2))
    source = Columns((memory(x), noise), np.array([0, 5, 4, 6]))
    assert source.dtype is F32
    assert unlike(source, torch.cat([x.float(), tensor(noise)], dim=1)[:, [0, 5, 4, 6]]) == []


@dtypes
def test_factors(dtype):
    x = random((13, 9), dtype)
    work = torch.float64 if dtype is F64 else torch.float32
    for axis, n in ((0, 13), (1, 9)):
        f = np.linspace(0.3, 2, n)
        shape = (n, 1) if axis == 0 else (1, n)
        assert unlike(Scaled(memory(x), f, axis), x.to(work) * torch.from_numpy(f).to(work).reshape(shape)) == []
    f = np.linspace(0.3, 2, 13)
    want = ((1 + x[:, 0].double()) * torch.from_numpy(f) - 1).to(work)
    assert unlike(Scaled(memory(x[:, 0]), f, plus_one=True), want) == []


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("index", [TILED, UNEVEN, MIXED, np.arange(9)], ids=["tiled", "uneven", "mixed", "one"])
@pytest.mark.parametrize("axis", [0, 1])
@dtypes
def test_replicas_sum_to_the_original_without_rounding(dtype, axis, index, native, monkeypatch):
    if not native:
        monkeypatch.setattr(replicas, "_native", None)
    x = random((9, 40) if axis == 0 else (40, 9), dtype)
    x[3, 3], x[4, 2] = 0.0, 1e-42
    for even in (False, True):
        source = Split(memory(x), index, 77, axis, even)
        made = tensor(source)
        assert unlike(source, made) == []
        assert torch.equal(totals(made, index, axis, x), x.double())
        assert torch.equal(tensor(Split(memory(x), index, 77, axis, even)), made)
    assert len(index) == 9 or not torch.equal(tensor(Split(memory(x), index, 78, axis)), made)


def test_the_extension_splits_as_numpy_does(monkeypatch):
    for dtype in (BF16, F16, F32, F64):
        x = random((40, 9), dtype)
        x[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, 0.0])
        source = Split(memory(x), MIXED, 2**64 - 5)
        made = tensor(source)
        assert made[0][MIXED == 0].eq(math.inf).all()
        assert made[0][MIXED == 2].isnan().all()
        with monkeypatch.context() as without:
            without.setattr(replicas, "_native", None)
            assert unlike(source, made) == []


def test_shares_are_uniform_and_either_replica_gets_the_larger():
    x = torch.ones(4096, 8)
    made = tensor(Split(memory(x), np.r_[np.arange(8), np.arange(8)], 1))
    drawn = u16(1, 0, SPLIT, 0, 4096 * 4).view(np.int8).astype(np.float64).reshape(4096, 8)
    assert np.array_equal(made[:, :8].numpy(), (drawn + 128.5) / 256)
    assert abs(made[:, :8].mean() - 0.5) < 0.01
    thirds = tensor(Split(memory(x), np.arange(24) % 8, 1)).reshape(4096, 3, 8).mean(dim=(0, 2))
    assert (thirds - 1 / 3).abs().max() < 0.01


def test_consumers_are_split_differently_and_rows_too():
    x = torch.ones(2, 512).bfloat16()
    index = np.r_[np.arange(512), np.arange(512)]
    a, b = tensor(Split(memory(x), index, 1)), tensor(Split(memory(x), index, 2))
    assert (a != b).float().mean() > 0.9
    assert (a[0] != a[1]).float().mean() > 0.9


def test_workspace_is_what_is_taken():
    x = random((300, 700), BF16)
    index = np.arange(1400) % 700
    for source in (
        Columns((memory(x), Noise(1, 0, 1.0, F32, (300, 9))), np.arange(709)[::-1].copy()),
        Split(memory(x), index, 5),
        Split(memory(x), np.arange(900) % 300, 5, axis=0),
        Scaled(memory(x), np.ones(300)),
    ):
        assert isinstance(source, Made)
        assert len(inputs_of(source)) <= 2
        n = math.prod(source.shape)
        out = np.empty(n * source.dtype.size, np.uint8)
        source.fill(bring, 0, n, out.ctypes.data)
        tracemalloc.start()
        source.fill(bring, 0, n, out.ctypes.data)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= workspace(source) + sys.getsizeof(source)
