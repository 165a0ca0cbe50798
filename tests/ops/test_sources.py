"""Sources that are made on their way into a slot: any run of elements, against numpy and torch on whole tensors."""

import ctypes

import numpy as np
import pytest
import torch

from fastmerge.dtypes import BF16, BY_NAME, F16, F32, F64
from fastmerge.ops.sources import Constant, LowRank, Memory, Noise, Rows, Wide, inputs_of
from fastmerge.philox import NOISE, normal

RUNS = [(0, None), (0, 1), (3, 5), (7, 40), (11, 13)]


def memory(t):
    """A tensor as a source; the tensor must be kept."""
    return Memory(t.data_ptr(), BY_NAME[str(t.dtype).removeprefix("torch.")], tuple(t.shape))


def bring(source, runs):
    for e0, n, address in runs.tolist():
        if isinstance(source, Memory):
            ctypes.memmove(address, source.address + e0 * source.dtype.size, n * source.dtype.size)
        else:
            source.fill(bring, e0, n, address)


def made(source, e0, n):
    """Elements ``e0 .. e0 + n``, between guards."""
    size = source.dtype.size
    raw = np.full((n + 2) * size, 0xDD, np.uint8)
    source.fill(bring, e0, n, raw.ctypes.data + size)
    assert set(raw[:size]) | set(raw[-size:]) == {0xDD}, "wrote beyond the run"
    kind = {F64: torch.float64, F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[source.dtype]
    return torch.from_numpy(raw[size:-size].copy()).view(kind)


def unlike(source, want):
    """Runs that differ from the whole tensor."""
    flat, wrong = want.reshape(-1), []
    for e0, n in [run for run in RUNS if run[0] < flat.numel()]:
        count = min(flat.numel() if n is None else n, flat.numel() - e0)
        got = made(source, e0, count)
        if not torch.equal(got.view(torch.uint8), flat[e0 : e0 + count].contiguous().view(torch.uint8)):
            wrong.append((e0, count))
    return wrong


@pytest.mark.parametrize("shape", [(9, 7), (9, 2, 3), (40,)])
def test_rows_in_any_order_with_gaps(shape):
    x = torch.randn(shape).bfloat16()
    index = np.array([3, 4, 5, -1, 0, 8, 8, -1, 2, 1])
    want = torch.stack([x[i] if i >= 0 else torch.zeros_like(x[0]) for i in index.tolist()])
    source = Rows(memory(x), index)
    assert source.shape == tuple(want.shape)
    assert unlike(source, want) == []


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_low_rank_update_in_the_order_of_ranks(dtype, transposed):
    base = torch.randn(9, 12).to(dtype)
    out, inner = (12, 9) if transposed else (9, 12)
    a, b = torch.randn(4, inner), torch.randn(out, 4).bfloat16()
    work = torch.float64 if dtype == torch.float64 else torch.float32
    update = torch.zeros(9, 12, dtype=work)
    for k in range(4):
        left, right = b[:, k].to(work), a[k].to(work)
        update = update + (right[:, None] * left if transposed else left[:, None] * right)
    want = base.to(work) + update * torch.tensor(0.37, dtype=work)
    source = LowRank(memory(base), memory(b), memory(a), 0.37, transposed)
    assert unlike(source, want) == []
    exact = base.double() + 0.37 * (b.double() @ a.double()).T.reshape(9, 12) if transposed else None
    assert exact is None or torch.allclose(want.double(), exact, atol=1e-5)
    assert inputs_of(source) == (source.base, source.b, source.a)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_8_bit_float_is_widened_exactly(name):
    x = torch.arange(256, dtype=torch.uint8).view(getattr(torch, name))
    want = x.float().bfloat16()
    want = torch.where(want.isnan(), torch.full_like(want, float("nan")), want)
    got = made(Wide(Memory(x.data_ptr(), BY_NAME[name], (256,))), 0, 256)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@pytest.mark.parametrize("dtype", [F64, F32, F16, BF16])
def test_constants_are_rounded_once(dtype):
    want = torch.full((5, 9), 0.1, dtype=torch.float64).to(getattr(torch, dtype.name))
    assert unlike(Constant(0.1, dtype, (5, 9)), want) == []


@pytest.mark.parametrize("dtype", [F32, F64])
def test_noise_follows_the_element(dtype):
    kind = np.float64 if dtype is F64 else np.float32
    want = torch.from_numpy(normal(77, 3, NOISE, 0, 45).astype(kind) * kind(0.02))
    assert unlike(Noise(77, 3, 0.02, dtype, (5, 9)), want) == []


def test_sources_nest():
    table = torch.randn(6, 8)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    inner = LowRank(memory(table), memory(b), memory(a), 0.5)
    whole = made(inner, 0, 48).reshape(6, 8)
    index = np.array([5, 0, -1, 1, 2])
    want = torch.stack([whole[i] if i >= 0 else torch.zeros(8) for i in index.tolist()])
    assert unlike(Rows(inner, index), want) == []
