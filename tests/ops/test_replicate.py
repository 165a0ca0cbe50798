"""Expert replication: the reference against numpy, the CPU kernels against the reference, the public call."""

import itertools

import numpy as np
import pytest
import torch

import fastmerge as fm
from fastmerge import _native
from fastmerge.backends.native import NativeKernels
from fastmerge.dtypes import BY_CODE
from fastmerge.ops.replicate import Copies, first_tiles, reference, rows
from fastmerge.philox import NOISE, normal, normal_lines, tensor_key
from tests.backends.isas import ISAS, using
from tests.backends.test_native import TORCH, values
from tests.compare import differences
from tests.kernels_numpy import store, tile_sum, widen

PAIRS = [(i, o) for i in range(4) for o in range(4)]
KEY = tensor_key(3, "experts")
NUMBERS = [0, 1, 7, 2**32 - 1]
SIGMA = [0.0, 0.01, 2.5, 1e-3]


@pytest.fixture(params=ISAS)
def kernels(request):
    with using(request.param):
        yield NativeKernels()


def stored(code, n, seed=0):
    return values(code, n, np.random.default_rng(seed))


def tensor(x, code):
    return torch.from_numpy(x.copy()).view(TORCH[code])


def run(kernels, x, code, out_code, *, e0=0, numbers=NUMBERS, sigma=SIGMA, key=KEY, shift=0, pieces=None):
    """Experts of stored values, in buffers with sentinels, at ``shift`` elements from the start of a page."""
    kind = store(np.zeros(1), out_code).dtype
    buffers = [np.full(len(x) + 2 + shift, 113, kind) for _ in numbers]
    outs = [b[1 + shift : 1 + shift + len(x)] for b in buffers]
    table = []
    for low, high in pieces or [(0, len(x))]:
        source = np.array(
            [[x.ctypes.data + low * x.itemsize, high - low, e0 + low, key - 2**64 * (key >> 63)]], np.int64
        )
        places = np.array([[o.ctypes.data + low * o.itemsize for o in outs]], np.int64)
        table.append(rows(source, places, np.array(sigma), np.array(numbers)))
    kernels.replicate(Copies(np.concatenate(table), BY_CODE[code], BY_CODE[out_code]))
    for b, o in zip(buffers, outs, strict=True):
        assert set(b[: 1 + shift]) | {b[-1]} == {113}, "wrote beside an output"
        assert o.base is b
    return outs


def want(x, code, out_code, *, e0=0, numbers=NUMBERS, sigma=SIGMA, key=KEY):
    got = reference(tensor(x, code), numbers, sigma, key, BY_CODE[out_code], e0=e0)
    kind = store(np.zeros(1), out_code).dtype
    return [t.view(torch.uint8).numpy().view(kind) if len(x) else np.zeros(0, kind) for t in got]


@pytest.mark.parametrize(("code", "out_code"), PAIRS)
def test_reference_is_its_formula(code, out_code):
    x, e0 = stored(code, 3001), 2**35 - 5
    work = np.float64 if code == 0 else np.float32
    got = want(x, code, out_code, e0=e0)
    for expert, sigma, g in zip(NUMBERS, SIGMA, got, strict=True):
        wide = widen(x, code, work)
        with np.errstate(all="ignore"):
            if sigma:
                wide = wide + work(sigma) * normal(KEY, expert, NOISE, e0, len(x)).astype(work)
            expected = x if not sigma and code == out_code else store(wide, out_code)
        assert differences([g], [expected]) == [], expert


@pytest.mark.parametrize(("code", "out_code"), PAIRS)
def test_native_equals_the_reference(kernels, code, out_code):
    for n, e0, shift in [
        (0, 0, 0),
        (1, 7, 1),
        (15, 2**32 * 8 - 3, 0),
        (1023, 5, 3),
        (1024, 0, 0),
        (5000, 2**40 + 1, 1),
    ]:
        x = stored(code, n + 3, seed=n)[3:]
        got = run(kernels, x, code, out_code, e0=e0, shift=shift)
        assert differences(got, want(x, code, out_code, e0=e0)) == [], (n, e0, shift)


def test_pieces_and_subsets_of_experts_change_nothing(kernels):
    x = stored(3, 9001)
    whole = run(kernels, x, 3, 3, e0=11)
    cuts = [0, 1, 8, 13, 1024, 1029, 1029, 4096, 9001]
    assert differences(run(kernels, x, 3, 3, e0=11, pieces=list(itertools.pairwise(cuts))), whole) == []
    for i, expert in enumerate(NUMBERS):
        assert differences(run(kernels, x, 3, 3, e0=11, numbers=[expert], sigma=[SIGMA[i]]), [whole[i]]) == [], expert


def test_experts_and_tensors_differ(kernels):
    x = np.zeros(65_536, np.float32)
    draws = run(kernels, x, 1, 1, numbers=[0, 1, 2], sigma=[1.0] * 3)
    draws += run(kernels, x, 1, 1, numbers=[0], sigma=[1.0], key=KEY + 1)
    table = np.corrcoef(np.stack(draws))
    assert np.abs(table - np.eye(4)).max() < 0.02
    for d in draws:
        assert abs(d.mean()) < 0.02
        assert abs(d.std() - 1) < 0.02


def test_a_sigma_that_rounds_to_zero_copies_bytes(kernels):
    x = np.arange(65_536, dtype=np.uint16)  # every pattern, all NaNs among them
    for sigma in (0.0, 1e-60):
        assert differences(run(kernels, x, 3, 3, numbers=[4], sigma=[sigma]), [x]) == []
        assert differences(run(kernels, x, 2, 2, numbers=[4], sigma=[sigma]), [x]) == []
    assert not np.array_equal(run(kernels, x, 3, 3, numbers=[4], sigma=[1.0])[0], x)


def test_malformed_tables_are_refused():
    x, lines = np.zeros(8, np.float32), normal_lines()
    at, out = x.ctypes.data, np.zeros(8, np.float32).ctypes.data

    def table(source=(at, 8, 0, 0), place=out, sigma=0.1, expert=1):
        return rows(np.array([source]), np.array([[place]]), np.array([sigma]), np.array([expert]))

    bad = [
        (table((at, -1, 0, 0)), "length"), (table((at, 8, -1, 0)), "e0"), (table((0, 8, 0, 0)), "input address"),
        (table((at + 2, 8, 0, 0)), "input address"), (table(place=0), "output address of expert 0"),
        (table(sigma=-1.0), "sigma"), (table(sigma=np.nan), "sigma"), (table(sigma=1e38), "sigma"),
        (table(expert=-1), "number"), (table(expert=2**32), "number"), (table()[:, :6].copy(), "columns"),
        (table()[:, :4].copy(), "columns"), (table().astype(np.int32), "dtype"),
    ]  # fmt: skip
    for t, word in bad:
        with pytest.raises(ValueError, match=word):
            _native.replicate(t, 1, 1, lines)
    for args in ((table(), 4, 1, lines), (table(), 1, -1, lines), (table(), 1, 1, lines[:100].copy())):
        with pytest.raises(ValueError, match="code|lines"):
            _native.replicate(*args)
    _native.replicate(table((0, 0, 0, 0), place=0), 1, 1, lines)  # nothing to do, so no address is needed


@pytest.mark.skipif(not _native.has_cuda(), reason="built without CUDA")
def test_walks_are_checked_before_a_launch():
    x = np.zeros(100, np.float32)
    source = np.array([[x.ctypes.data, 100, 3, 0], [x.ctypes.data, 0, 0, 0]], np.int64)
    table = rows(source, np.full((2, 2), x.ctypes.data), np.array([0.0, 0.1]), np.arange(2))
    first = first_tiles(table, 4)
    assert first.tolist() == [0, 4, 4]  # elements 3 .. 102: 13 blocks of Philox
    for wrong in (first + 1, first[:2].copy(), np.array([0, 3, 3]), np.array([0, 4, 5])):
        with pytest.raises(ValueError, match="first"):
            _native.cuda_replicate(0, 0, table, 1, 1, wrong, 4, 8)
    for device, blocks, there in ((-1, 4, 8), (0, 4, 0), (0, 0, 8)):
        with pytest.raises(ValueError, match="device|blocks"):
            _native.cuda_replicate(device, 0, table, 1, 1, first, blocks, there)
    assert "driver" in _native.cuda_error(35)


# ---- the public call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TORCH.values(), ids=str)
def test_replicate_experts(dtype):
    torch.manual_seed(0)
    x = (torch.randn(257, 300) * 0.02).to(dtype)
    got = fm.replicate_experts(x, 4, noise=0.1, name="w", seed=5)
    assert torch.equal(got[0], x)
    rms = x.double().pow(2).mean().sqrt().item()
    for t in got[1:]:
        assert (t.shape, t.dtype) == (x.shape, dtype)
        assert (t.double() - x.double()).std().item() == pytest.approx(0.1 * rms, rel=0.02)
    for backend in ("native", "reference"):
        for a, b in zip(fm.replicate_experts(x, 4, noise=0.1, name="w", seed=5, backend=backend), got, strict=True):
            assert torch.equal(a, b)
    some = fm.replicate_experts(x, [2, 0], noise=0.1, name="w", seed=5, first_clean=False)
    assert torch.equal(some[0], got[2])
    assert not torch.equal(some[1], x)
    other = fm.replicate_experts(x, 2, noise=0.1, name="v", seed=5)
    assert not torch.equal(other[1], got[1])


def test_relative_noise_uses_the_ordered_sum():
    x = torch.randn(3, 70_000)
    flat = x.numpy().reshape(-1)
    total = sum(tile_sum(flat[i : i + 65_536] ** 2) for i in range(0, len(flat), 65_536))
    sigma = 0.5 * float(np.sqrt(total / len(flat)))
    got = fm.replicate_experts(x, [1], noise=0.5, name="w")
    want = fm.replicate_experts(x, [1], noise=sigma, mode="absolute", name="w")
    assert torch.equal(got[0], want[0])


def test_outputs_views_and_small_shapes():
    x = torch.randn(6, 10)
    stack = torch.full((3, 10, 6), float("nan"), dtype=torch.float16)
    got = fm.replicate_experts(x.T, 3, noise=1.0, out_dtype=torch.float16, out=stack)
    assert got[1].data_ptr() == stack[1].data_ptr()
    assert torch.equal(stack, torch.stack(fm.replicate_experts(x.T.contiguous(), 3, noise=1.0)).half())
    for shape in [(), (0,), (3, 0), (1,)]:
        y = torch.ones(shape)
        got = fm.replicate_experts(y, 2, noise=0.5)
        assert [t.shape for t in got] == [y.shape] * 2
        assert torch.equal(got[0], y)


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"experts": 0}, fm.RecipeError, "experts"),
        ({"experts": [1, -1]}, fm.RecipeError, "experts"),
        ({"experts": 1.5}, fm.RecipeError, "experts"),
        ({"noise": -0.1}, fm.RecipeError, "noise"),
        ({"noise": float("nan")}, fm.RecipeError, "noise"),
        ({"noise": 2.0**100}, fm.RecipeError, "noise of standard"),
        ({"mode": "relativ"}, fm.RecipeError, "mode"),
        ({"seed": 2**63}, fm.RecipeError, "seed"),
        ({"out_dtype": torch.int8}, fm.ShapeError, "out_dtype"),
        ({"tensor": torch.zeros(4, dtype=torch.int64)}, fm.ShapeError, "tensor"),
        ({"tensor": torch.tensor([1.0, float("inf")])}, fm.RecipeError, "finite"),
        ({"out": [torch.zeros(4)]}, fm.ShapeError, "2 tensors"),
        ({"out": torch.zeros(2, 5)}, fm.ShapeError, "out"),
        ({"out": torch.zeros(2, 4).double()}, fm.ShapeError, "out"),
        ({"out": torch.zeros(4, 2).T}, fm.ShapeError, "not contiguous"),
        ({"out": [torch.zeros(4)] * 2}, fm.ShapeError, "overlap"),
        ({"backend": "triton"}, fm.BackendUnavailable, "triton"),
    ],
)
def test_mistakes_are_named(arguments, error, word):
    given = {"tensor": torch.full((4,), 3.0), "experts": 2, "noise": 0.1, **arguments}
    with pytest.raises(error, match=word):
        fm.replicate_experts(given.pop("tensor"), given.pop("experts"), **given)


def test_the_input_is_not_an_output():
    x = torch.zeros(8)
    with pytest.raises(fm.ShapeError, match="overlap"):
        fm.replicate_experts(x[:4], 1, out=[x[2:6]])
    assert not x.any()
