"""Sources against plain numpy and torch, in any runs: what an element is depends on its index alone."""

import ctypes
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmerge.dtypes import BF16, BY_NAME, F16, F32, F64
from fastmerge.ops import low_rank as updates
from fastmerge.ops import row_lengths
from fastmerge.ops.gathered import Columns, Part
from fastmerge.ops.joined import Joined
from fastmerge.ops.low_rank import LowRank
from fastmerge.ops.made import Constant, Noise, Rows, Wide, load
from fastmerge.ops.row_lengths import ColumnLengths, RowLengths
from fastmerge.ops.sources import Made, Memory, inputs_of, workspace
from fastmerge.philox import NOISE, normal
from tests.compare import bits, differences

TORCH = {d: getattr(torch, d.name) for d in (BF16, F16, F32, F64)}
KEEP = []


def memory(t):
    """A tensor as a source; it stays alive."""
    t = t.contiguous()
    KEEP.append(t)
    name = str(t.dtype).removeprefix("torch.")
    return Memory(t.data_ptr(), BY_NAME[name], tuple(t.shape))


def bring(source, runs):
    """What the store does for sources in memory."""
    for e0, n, address in runs.tolist():
        if isinstance(source, Memory):
            size = source.dtype.size
            ctypes.memmove(address, source.address + e0 * size, n * size)
        else:
            source.fill(bring, e0, n, address)


def run(source, e0, n, guard=16):
    """Elements of a source as its bits, with a look at what lies beside them."""
    size = source.dtype.size
    room = np.full(n * size + 2 * guard, 0xDD, np.uint8)
    source.fill(bring, e0, n, room.ctypes.data + guard)
    assert (room[:guard] == 0xDD).all(), "written before the run"
    assert (room[len(room) - guard :] == 0xDD).all(), "written past the run"
    return room[guard : len(room) - guard].view(f"u{size}")


def random(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64).to(TORCH[dtype])


def unlike(source, want):
    """Where runs of a source differ from a whole tensor: cut at random, some of them empty, in any order."""
    want = bits(want)
    rng = np.random.default_rng(len(want))
    ends = np.unique(np.concatenate([[0, len(want)], rng.integers(0, len(want) + 1, 6)]))
    found = [
        f"{a} .. {b}"
        for a, b in rng.permutation(np.stack([ends[:-1], ends[1:]], axis=1)).tolist()
        if not np.array_equal(run(source, a, b - a), want[a:b])
    ]
    return found + [e for e in ends.tolist() if len(run(source, e, 0))]


dtypes = pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=lambda d: d.name)


@dtypes
@pytest.mark.parametrize("shape", [(9, 4), (7,), (5, 3, 2), (1, 1), (4, 0)])
def test_rows(dtype, shape):
    x = random(shape, dtype)
    rng = np.random.default_rng(len(shape))
    for length in (0, 1, 3, 40):
        index = rng.integers(-1, shape[0], length)
        index[: length // 3] = np.arange(length // 3) % shape[0]  # runs of neighbours
        want = torch.stack(
            [x[i] if i >= 0 else torch.zeros(shape[1:], dtype=x.dtype) for i in index.tolist()] or [x[:0]]
        )
        source = Rows((memory(x),), index)
        assert source.shape == (length, *shape[1:])
        assert source.dtype is dtype
        assert unlike(source, want) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1, 5), max_size=12), st.integers(1, 4), st.data())
def test_any_run_of_any_rows(index, width, data):
    x = torch.arange(6 * width, dtype=torch.float32).reshape(6, width) + 1
    want = np.concatenate([x[i].numpy() if i >= 0 else np.zeros(width, np.float32) for i in index] or [np.empty(0)])
    e0 = data.draw(st.integers(0, len(want)))
    n = data.draw(st.integers(0, len(want) - e0))
    calls = []

    def counted(source, runs):
        calls.extend(runs.tolist())
        bring(source, runs)

    out = np.full(n, -1, np.float32)
    Rows((memory(x),), np.array(index, np.int64)).fill(counted, e0, n, out.ctypes.data)
    assert out.tolist() == want[e0 : e0 + n].tolist()
    # No more reads than there are breaks in the order of the rows, and rows cut at the ends.
    rows = [i for i in range(len(index)) if (i + 1) * width > e0 and i * width < e0 + n and n]
    breaks = [i for i in rows if index[i] >= 0 and (i == rows[0] or index[i - 1] < 0 or index[i] != index[i - 1] + 1)]
    assert len(calls) <= len(breaks) + 2


def low_rank(x, b, a, scale, *, transposed):
    """Every operation rounded once, in the order of ranks."""
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    update = torch.zeros(b.shape[0], a.shape[1], dtype=kind)
    for k in range(a.shape[0]):
        update = update + b[:, k, None].to(kind) * a[None, k].to(kind)
    update = update * torch.tensor(scale, dtype=torch.float64).to(kind)
    return x.to(kind) + (update.T if transposed else update)


@dtypes
@pytest.mark.parametrize("factor", [F32, BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 7, 3), (1, 9, 1), (8, 1, 2), (33, 20, 8)])
def test_low_rank(dtype, factor, transposed, rows, columns, rank):
    x = random((columns, rows) if transposed else (rows, columns), dtype)
    b, a = random((rows, rank), factor, 1), random((rank, columns), factor, 2)
    source = LowRank(memory(x), memory(b), memory(a), 0.3, transposed)
    want = low_rank(x, b, a, 0.3, transposed=transposed)
    assert source.shape == tuple(x.shape)
    assert TORCH[source.dtype] == want.dtype
    assert unlike(source, want) == []
    exact = x.double() + 0.3 * ((b.double() @ a.double()).T if transposed else b.double() @ a.double())
    assert torch.allclose(want.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [F16, F64], ids=lambda d: d.name)
@pytest.mark.parametrize("panel", [5, 40, 1000])
def test_a_low_rank_update_without_the_kernel_has_the_same_bits(dtype, transposed, panel, monkeypatch):
    x, a, b = random((13, 31), dtype), random((9, 31), F32, 1), random((13, 9), F32, 2)
    x[0, :2], a[:, 0], b[1] = -0.0, float("nan"), -0.0
    if transposed:
        a, b = b.T.contiguous(), a.T.contiguous()
    source = LowRank(memory(x), memory(b), memory(a), -1.5, transposed)
    kind = np.float64 if source.dtype is F64 else np.float32
    monkeypatch.setattr(updates, "PANEL", panel)
    want = run(source, 0, x.numel()).view(kind)
    monkeypatch.setitem(sys.modules, "fastmerge._native", None)
    got = run(source, 0, x.numel()).view(kind)
    nan = np.isnan(want)
    assert nan.any()
    assert not nan.all()
    assert np.array_equal(nan, np.isnan(got))
    assert np.array_equal(want[~nan].view(np.uint8), got[~nan].view(np.uint8))
    assert np.array_equal(np.nan_to_num(want[40:]), np.nan_to_num(run(source, 40, x.numel() - 40).view(kind)))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_eight_bit_floats_are_bfloat16_of_the_same_value(kind):
    every = torch.arange(256, dtype=torch.uint8).view(kind).reshape(16, 16)
    source = Wide(memory(every))
    assert (source.dtype, source.shape) == (BF16, (16, 16))
    got = torch.from_numpy(run(source, 0, 256).view(np.int16).copy()).view(torch.bfloat16)
    want = every.reshape(-1).to(torch.bfloat16)
    finite = ~want.isnan()
    assert torch.equal(got[finite].view(torch.int16), want[finite].view(torch.int16)), "signed zeros too"
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(want[finite].double(), every.reshape(-1).double()[finite]), "exact"
    assert (got[~finite].view(torch.int16) & 0x7FFF == 0x7FC0).all(), "the canonical NaN"
    assert unlike(source, got) == []


@dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 0.1, -1e-3, 65504.0, 1e-40, 3.0e38, -1e300, float("nan")])
def test_constants_are_rounded_once(dtype, value):
    want = torch.full((3, 5), value, dtype=torch.float64).to(TORCH[dtype])
    assert unlike(Constant(value, dtype, (3, 5)), want) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_constants_between_two_numbers_are_rounded_once(sign):
    """A value that is just above the middle of two bfloat16 numbers, and at the middle of two once it is fp32."""
    between = sign * (1.0 + 2**-8 + 2**-40)
    (got,) = set(run(Constant(between, BF16, (4,)), 0, 4).tolist())
    assert got == 0x3F81 | (0x8000 if sign < 0 else 0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_noise_is_a_function_of_key_index_and_element(dtype):
    shape, kind = (9, 117), {F32: np.float32, F64: np.float64}[dtype]
    source = Noise(key=7 << 40, index=3, sigma=0.1, dtype=dtype, shape=shape)
    want = normal(7 << 40, 3, NOISE, 0, 9 * 117).astype(kind) * kind(0.1)
    assert unlike(source, want) == []
    assert abs(want.std() - 0.1) < 0.01
    for other in (Noise(1, 3, 0.1, dtype, shape), Noise(7 << 40, 2, 0.1, dtype, shape)):
        assert not np.array_equal(run(other, 0, 1053), run(source, 0, 1053))


@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_source_takes_while_it_is_made_is_what_it_says(transposed):
    rows, columns, rank = 3000, 300, 64
    low, wide = random((rank, columns), BF16), torch.zeros(rows, columns, dtype=torch.uint8).view(torch.float8_e5m2)
    b = random((rows, rank), BF16)
    x = memory(wide) if not transposed else memory(wide.T.contiguous())
    every = [
        LowRank(Wide(x), memory(b), memory(low), 0.5, transposed),
        Wide(x),
        Rows((Wide(x),), np.arange(x.shape[0])[::-1].copy()),
        Noise(1, 2, 0.5, F64, (rows, columns)),
        Constant(1.0, F32, (rows, columns)),
    ]
    whole, shape = every[0], every[0].shape
    expert = LowRank(Part(Wide(x), 0, shape), Columns((memory(b),), np.arange(rank)), memory(low), 1.0, transposed)
    every += [
        ColumnLengths(whole, memory(random(shape[1:], F32))),
        Joined((Wide(x), whole), (2, *shape)),
        Joined((expert,), shape),
    ]
    for source in every:
        if not isinstance(source, ColumnLengths):
            run(source, 0, 10)  # tables that are made once
        out = np.empty(rows * columns * source.dtype.size, np.uint8)
        tracemalloc.start()
        source.fill(bring, 0, rows * columns, out.ctypes.data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= workspace(source) + 100_000, source
        assert workspace(source) < 24_000_000, "not a multiple of the tensor"


def test_sources_nest():
    x, b, a = random((6, 4), BF16), random((6, 2), F32, 1), random((2, 4), F32, 2)
    index = np.array([5, -1, 0, 1, 1])
    tuned = LowRank(memory(x), memory(b), memory(a), 0.5)
    picked = Rows((tuned,), index)
    whole = low_rank(x, b, a, 0.5, transposed=False)
    want = torch.where(torch.from_numpy(index >= 0)[:, None], whole[index.clip(0)], torch.zeros(()))
    assert picked.dtype is F32
    assert unlike(picked, want) == []
    narrow = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    wide = LowRank(Wide(memory(narrow)), memory(b), Rows((memory(a),), np.array([1, 0])), 0.5)
    assert unlike(wide, low_rank(narrow.to(torch.bfloat16), b, a[[1, 0]], 0.5, transposed=False)) == []
    noisy = Rows((Noise(1, 0, 1.0, F32, (6, 4)),), index)
    assert unlike(noisy, np.where(index[:, None] < 0, 0, normal(1, 0, NOISE, 0, 24).reshape(6, 4)[index])) == []
    assert [s.shape for s in inputs_of(picked)] == [(6, 4), (6, 2), (2, 4)]
    assert len(inputs_of(wide)) == 3
    assert inputs_of(noisy) == inputs_of(Constant(1.0, F32, (2,))) == ()


def test_what_is_made_says_so():
    x = memory(torch.zeros(2, 2))
    every = [
        Rows((x,), np.zeros(1, np.int64)),
        LowRank(x, x, x, 1.0),
        Wide(x),
        Constant(0.0, F32, ()),
        Noise(0, 0, 1, F32, ()),
    ]
    assert all(isinstance(source, Made) for source in every)
    assert not isinstance(x, Made)


def test_loading_is_exact():
    for dtype in (BF16, F16, F32, F64):
        x = random((40,), dtype)
        got = load(bring, memory(x), 3, 20)
        assert differences([got], [x[3:23].to(torch.float64 if dtype is F64 else torch.float32).numpy()]) == []


@pytest.mark.parametrize("width", [1, 5, 2048, 5000])
def test_rows_of_given_lengths(monkeypatch, width):
    monkeypatch.setattr(row_lengths, "PANEL", 6000)
    v, m = random((7, width), F32), random((7,), BF16, 1)
    factor = (m.double() / v.double().square().sum(1).sqrt()).float()
    assert unlike(RowLengths(memory(v), memory(m)), v * factor[:, None]) == []


def test_rows_of_given_lengths_in_fp64():
    v, m = random((7, 5000), F64), random((7,), F32, 1)
    source = RowLengths(memory(v), memory(m))
    got = torch.from_numpy(run(source, 0, 35_000).view(np.float64)).reshape(7, 5000)
    assert torch.allclose(got.norm(dim=1), m.double().abs(), rtol=1e-14)
    assert unlike(source, got) == []


def test_a_row_without_a_direction_is_nan():
    v = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    got = run(RowLengths(memory(v), memory(torch.tensor([10.0, 1.0]))), 0, 4).view(np.float32)
    assert got.tolist()[:2] == [6.0, 8.0]
    assert np.isnan(got[2:]).all()


@pytest.mark.parametrize("shape", [(9, 700), (301, 3), (1, 50), (64, 1)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=lambda d: d.name)
def test_columns_of_given_lengths(shape, dtype, monkeypatch):
    monkeypatch.setattr(row_lengths, "PANEL", 900)
    v, m = random(shape, dtype), random(shape[1:], BF16, 1)
    squares = torch.zeros(shape[1], dtype=torch.float64)
    for row in v.double():
        squares += row * row
    # torch's own root of fp64 is not always the nearest number.
    factor = (m.double() / torch.from_numpy(np.sqrt(squares.numpy()))).to(v.dtype)
    assert unlike(ColumnLengths(memory(v), memory(m)), v * factor) == []


def test_lengths_of_columns_take_the_tensor_once():
    v, m = random((50, 40), F32), random((40,), F32, 1)
    source, read = ColumnLengths(memory(v), memory(m)), []

    def counted(one, runs):
        read.append(runs[:, 1].sum())
        bring(one, runs)

    out = np.empty(2000, np.float32)
    for e0 in range(0, 2000, 100):
        source.fill(counted, e0, 100, out[e0:].ctypes.data)
    assert sum(read) == 2000 + 40 + 2000
