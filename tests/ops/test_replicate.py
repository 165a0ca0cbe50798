"""Expert replication: the reference against numpy, the CPU kernels against the reference, the public call."""

import itertools

import numpy as np
import pytest
import torch

import fastmerge as fm
from fastmerge import _native
from fastmerge.backends.native import NativeKernels
from fastmerge.dtypes import BY_CODE
from fastmerge.keys import tensor_key
from fastmerge.ops.replicate import TILE_BYTES, ReplicateProgram, first_tiles, reference
from fastmerge.ops.segments import GROUP, Segments
from fastmerge.philox import NOISE, normal, normal_lines
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


def table_of(source, outs):
    """One row: ``source`` is (input address, length, e0, key), ``outs`` are the addresses of the outputs."""
    at, length, e0, key = source
    head = [outs[0], length, e0, length, key - 2**64 * (key >> 63), 0, 0]
    return np.array([[*head, at, *outs[1:]]], np.int64)


def run(kernels, x, code, out_code, *, e0=0, numbers=NUMBERS, sigma=SIGMA, key=KEY, shift=0, pieces=None):
    """Outputs of stored values, in buffers with sentinels, at ``shift`` elements from the start of a page."""
    kind = store(np.zeros(1), out_code).dtype
    buffers = [np.full(len(x) + 2 + shift, 113, kind) for _ in numbers]
    outs = [b[1 + shift : 1 + shift + len(x)] for b in buffers]
    pieces = pieces or [(0, len(x))]
    table = [
        table_of(
            (x.ctypes.data + low * x.itemsize, high - low, e0 + low, key),
            [o.ctypes.data + low * o.itemsize for o in outs],
        )
        for low, high in pieces
    ]
    bad = np.zeros(len(pieces), np.int64)
    segments = Segments(np.concatenate(table), (BY_CODE[code],), BY_CODE[out_code], bad)
    ReplicateProgram(kernels, np.array([sigma]), np.array(numbers)).apply(segments)
    for b, o in zip(buffers, outs, strict=True):
        assert set(b[: 1 + shift]) | {b[-1]} == {113}, "wrote beside an output"
        assert o.base is b
    counted = [sum(nonfinite(o[low:high], out_code) for o in outs) for low, high in pieces]
    assert bad.tolist() == counted, "counts of non-finite results"
    return outs


def nonfinite(x, code):
    return int((~np.isfinite(widen(x, code, np.float64))).sum())


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
        (2000, 2**32 * 8 - 512, 0),
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


def test_each_group_has_its_own_noise(kernels):
    x = [stored(1, n, seed=n) for n in (100, 7, 3000)]
    outs = [[np.zeros_like(a) for _ in NUMBERS] for a in x]
    table = np.concatenate(
        [table_of((a.ctypes.data, len(a), 0, KEY), [o.ctypes.data for o in to]) for a, to in zip(x, outs, strict=True)]
    )
    table[:, GROUP] = [2, 0, 2]
    sigma = np.array([SIGMA, [9.0] * 4, SIGMA[::-1]])
    segments = Segments(table, (BY_CODE[1],), BY_CODE[1])
    ReplicateProgram(kernels, sigma, np.array(NUMBERS)).apply(segments)
    for a, to, row in zip(x, outs, [2, 0, 2], strict=True):
        assert differences(to, want(a, 1, 1, sigma=sigma[row].tolist())) == []


@pytest.mark.parametrize("noise", [1e4, 1e5])
def test_what_overflows_is_counted(kernels, noise):
    x = np.linspace(-65_504, 65_504, 999).astype(np.float16).view(np.uint16)
    got = run(kernels, x, 2, 2, sigma=[0.0, noise, noise, 1.0])  # run compares the counts
    assert nonfinite(got[0], 2) == 0
    assert nonfinite(got[1], 2) > 0


def test_malformed_tables_are_refused():
    x, lines = np.zeros(8, np.float32), normal_lines()
    at, out = x.ctypes.data, np.zeros(8, np.float32).ctypes.data
    good = {
        "table": table_of((at, 8, 0, 0), [out, out + 64]), "ins": np.array([1], np.int32), "out_code": 1,
        "sigma": np.array([[0.1, 0.2]]), "numbers": np.array([1, 2]), "lines": lines,
        "nonfinite": np.zeros(1, np.int64),
    }  # fmt: skip

    def row(source=(at, 8, 0, 0), places=(out, out + 64), group=0):
        table = table_of(source, places)
        table[:, GROUP] = group
        return {"table": table}

    bad = [
        (row((at, -1, 0, 0)), "length"), (row((at, 8, -1, 0)), "e0"), (row((0, 8, 0, 0)), "address of input 0"),
        (row((at + 2, 8, 0, 0)), "address of input 0"), (row(places=(0, out)), "address of output 0"),
        (row(places=(out, 0)), "address of output 1"), (row(places=(out, out + 2)), "address of output 1"),
        (row(group=1), "parameter row 1 of 1"), (row(group=-1), "parameter row -1"),
        (row(places=(out,)), "table: expected shape"), (row(places=(out,) * 3), "table: expected shape"),
        ({"table": good["table"].astype(np.int32)}, "table: expected dtype"),
        ({"sigma": np.array([[-1.0, 0]])}, "sigma of output 0"),
        ({"sigma": np.array([[0, np.nan]])}, "sigma of output 1"),
        ({"sigma": np.array([[0, 1e38]])}, "sigma of output 1"),
        ({"sigma": np.array([0.1, 0.2])}, "sigma: expected shape"),
        ({"sigma": np.array([[0.1]])}, "sigma: expected shape"), ({"sigma": np.zeros((0, 2))}, "parameter row 0 of 0"),
        ({"numbers": np.array([1, -1])}, "numbers"), ({"numbers": np.array([1, 2**32])}, "numbers"),
        ({"numbers": np.zeros(0, np.int64), "sigma": np.zeros((1, 0))}, "numbers"),
        ({"ins": np.array([4], np.int32)}, "code"), ({"ins": np.array([1, 1], np.int32)}, "ins: expected shape"),
        ({"out_code": -1}, "code"), ({"out_code": 4}, "code"), ({"lines": lines[:100].copy()}, "lines"),
        ({"nonfinite": np.zeros(2, np.int64)}, "nonfinite"),
    ]  # fmt: skip
    for change, word in bad:
        with pytest.raises(ValueError, match=word):
            _native.replicate(**{**good, **change})
    _native.replicate(**{**good, **row((0, 0, 0, 0), (0, 0))})  # nothing to do, so no address is needed
    assert good["nonfinite"] == 0


@pytest.mark.skipif(not _native.has_cuda(), reason="built without CUDA")
def test_walks_are_checked_before_a_launch():
    x = np.zeros(100, np.float32)
    at = x.ctypes.data
    table = np.concatenate([table_of((at, 100, 3, 0), [at, at]), table_of((at, 0, 0, 0), [at, at])])
    assert first_tiles(table, 4).tolist() == [0, 4, 4]  # elements 3 .. 102: 13 blocks of Philox
    first = first_tiles(table, TILE_BYTES // 32)
    args = table, np.array([1], np.int32), 1, np.array([[0.0, 0.1]]), np.arange(2)
    for wrong in (first + 1, first[:2].copy(), np.array([0, 4, 4]), np.array([0, 1, 2])):
        with pytest.raises(ValueError, match="first"):
            _native.cuda_replicate(0, 0, *args, wrong, 8, 0)
    for device, there in ((-1, 8), (0, 0)):
        with pytest.raises(ValueError, match="device"):
            _native.cuda_replicate(device, 0, *args, first, there, 0)
    long = table[:1].copy()
    long[0, 1] = 2**43
    first = first_tiles(long, TILE_BYTES // 32)
    with pytest.raises(ValueError, match="items"):
        _native.cuda_replicate(0, 0, long, *args[1:], first, 8, 0)
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
