"""Experts with relative noise and with units drawn anew: numpy, the definition, and the kernels in any pieces."""

import numpy as np
import pytest
import torch

import fastmerge as fm
from fastmerge.api.tensors import run
from fastmerge.dtypes import BY_NAME
from fastmerge.errors import OutputError
from fastmerge.keys import tensor_key
from fastmerge.methods.redraw import Redraw
from fastmerge.methods.replicate import Replicate
from fastmerge.ops.redraw import Units, chosen
from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.philox import NOISE, normal

KEY = tensor_key(3, "w")
EXPERTS = (0, 1, 5)


def made(method, x, out_dtype=None, backend="native", elements=TILE):
    """The experts of a tensor."""
    out_dtype = out_dtype or x.dtype
    stored, to = (BY_NAME[str(d).removeprefix("torch.")] for d in (x.dtype, out_dtype))
    outs = [torch.full(x.shape, 7.0, dtype=out_dtype) for _ in method.experts]
    spec = Spec(method, tuple(x.shape), (stored,), to)
    targets = tuple(Memory(t.data_ptr(), to, spec.shape) for t in outs)
    op = Op("w", spec, KEY, (Memory(x.data_ptr(), stored, spec.shape),), targets)
    run([op], torch.device("cpu"), backend, elements=elements)
    return outs


def same(a, b):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def tensor(shape=(300, 260), dtype=torch.bfloat16):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.3 + 0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_relative_noise_is_that_of_replicate_experts(dtype):
    x = tensor(dtype=dtype)
    method = Replicate(experts=EXPERTS, sigma=(0.0, 0.1, 0.1), relative=True)
    want = fm.replicate_experts(x, EXPERTS, noise=0.1, name="w", seed=3)
    for backend, elements in (("native", 1 << 20), ("native", TILE), ("reference", TILE)):
        assert same(made(method, x, backend=backend, elements=elements), want)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(
    ("dtype", "out"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("float16", "float16"), ("float64", "float32")],
)
def test_new_units_are_the_same_in_any_pieces(by_row, dtype, out):
    x = tensor(dtype=getattr(torch, dtype))
    units = Units(11, by_row, (0.0, 0.5, 0.25))
    method = Redraw(experts=EXPERTS, sigma=(0.0, 0.0, 0.1), relative=True, units=units)
    want = made(method, x, getattr(torch, out), "reference")
    for elements in (1 << 20, TILE):
        assert same(made(method, x, getattr(torch, out), elements=elements), want)


@pytest.mark.parametrize("by_row", [True, False])
def test_new_units_have_the_mean_and_the_deviation_of_the_old(by_row):
    x = tensor()
    units = Units(11, by_row, (0.0, 0.5, 0.25))
    clean, half, quarter = made(Redraw(experts=EXPERTS, sigma=(0.0,) * 3, units=units), x)
    assert same([clean], [x])
    for expert, ratio, got in ((1, 0.5, half), (5, 0.25, quarter)):
        new = torch.from_numpy(chosen(11, expert, x.shape[0 if by_row else 1], ratio))
        assert int(new.sum()) == int(ratio * len(new) + 0.5)
        where = (new[:, None] if by_row else new[None]).expand(x.shape)
        assert torch.equal(got[~where], x[~where])
        old = x[where].double()
        numbers = torch.from_numpy(normal(KEY, expert, NOISE, 0, x.numel())).reshape(x.shape)[where].double()
        want = old.mean() + old.std(correction=0) * numbers
        torch.testing.assert_close(got[where].double(), want, rtol=2**-8, atol=1e-6)


def test_relative_noise_needs_finite_weights():
    x = tensor()
    x[290, 7] = float("inf")
    relative = Replicate(experts=EXPERTS, sigma=(0.0, 0.1, 0.1), relative=True)
    with pytest.raises(OutputError, match="w: relative noise needs its root mean square"):
        made(relative, x)
    units = Redraw(experts=EXPERTS, sigma=(0.0,) * 3, units=Units(0, True, (1.0,) * 3))
    for backend in ("native", "reference"):
        with pytest.raises(OutputError, match="w: what is drawn anew needs a mean"):
            made(units, x, backend=backend)


def test_experts_choose_units_of_their_own():
    masks = np.stack([chosen(7, e, 1000, 0.5) for e in range(4)])
    assert (masks.sum(axis=1) == 500).all()
    apart = [(a ^ b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert min(apart) > 400
    assert max(apart) < 600
