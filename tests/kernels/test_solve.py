"""What kernels/solve.py makes of sums, against the definitions in numpy, bit for bit.

In the interpreter, or with ``TRITON_INTERPRET=0`` for real on a GPU (and then with the mark ``gpu``).
"""

import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastmerge.errors import OutputError
from fastmerge.methods import angles, model_stock, slerp
from fastmerge.ops.consensus.rules import l1_factor
from tests.kernels_numpy import NumpyKernels

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
torch = pytest.importorskip("torch", reason="the Triton kernels need torch")

import triton.language as tl

from fastmerge.kernels import _angles, _call, solve
from fastmerge.kernels._angles import acos, atan, chord_angle, cos, sin
from fastmerge.kernels._jit import find
from fastmerge.kernels.solve import owner

if _call.INTERPRETED:
    DEVICE = "cpu"
else:
    pytestmark = pytest.mark.gpu
    DEVICE = "cuda"
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a CUDA device", allow_module_level=True)

BLOCK = 512
NONE = 2**62
EPSILON = slerp.EPSILON
WIDE = pytest.mark.parametrize("wide", [False, True], ids=["fp32", "fp64"])


def there(x):
    """A copy on the device."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


def launch(kernel, lanes, *args, block=BLOCK, **flags):
    """Runs a kernel over lanes; arrays travel, and come back as they are afterwards."""
    moved = [there(a) if isinstance(a, np.ndarray) else a for a in args]
    with np.errstate(all="ignore"):  # of the interpreter
        kernel[(-(-lanes // block),)](*moved, **flags, BLOCK=block, maxnreg=255, **_call.OPTIONS)
    return [m.cpu().numpy() if isinstance(m, torch.Tensor) else m for m in moved]


def bits(x):
    """As integers, where every NaN is the same."""
    x = np.where(np.isnan(x), np.array(np.nan, x.dtype), x)
    return x.view(f"i{x.itemsize}")


def unlike(got, want):
    """What differs, in words; nothing where all bits are the same."""
    assert got.dtype == want.dtype
    differ = np.argwhere(bits(got) != bits(want)).tolist()
    return f"{len(differ)} differ, first {differ[0]}: {got[tuple(differ[0])]!r}" if differ else ""


def narrow(x, wide):
    with np.errstate(all="ignore"):
        return x if wide else x.astype(np.float32)


def prefix(counts):
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def magnitudes(rng, shape, low=-12, high=12):
    """Numbers of both signs over many powers of ten."""
    return rng.normal(size=shape) * 10.0 ** rng.uniform(low, high, shape)


# ---- angles ----------------------------------------------------------------------------------------------


@triton.jit
def angle_kernel(out, x, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + lane, mask=lane < n, other=0.0)
    if OP == 0:
        y = sin(v)
    elif OP == 1:
        y = cos(v)
    elif OP == 2:
        y = atan(v)
    elif OP == 3:
        y = acos(v)
    else:
        y = chord_angle(v)
    tl.store(out + lane, y, mask=lane < n)


def near(*xs):
    """Numbers and their neighbours."""
    xs = np.array(xs, np.float64)
    return np.concatenate([xs, np.nextafter(xs, np.inf), np.nextafter(xs, -np.inf)])


WRONG = [np.nan, np.inf, -np.inf]
TINY = np.concatenate([[0.0, -0.0, 5e-324, -5e-324, 1e-310], 10.0 ** np.arange(-300, 0, 7.3)])
QUARTERS = np.arange(-40, 41) * (math.pi / 4)
ANGLES = np.concatenate([np.linspace(-20, 20, 9001), np.linspace(-6e6, 6e6, 4001), near(*QUARTERS), TINY, WRONG])


@pytest.mark.parametrize(
    ("op", "definition", "x"),
    [
        (0, angles.sin, ANGLES),
        (1, angles.cos, ANGLES),
        (2, angles.atan, np.concatenate([np.linspace(0, 1, 9001), TINY, [np.nan]])),
        (3, angles.acos, np.concatenate([np.linspace(-1.1, 1.1, 9001), near(-1, -0.5, 0, 0.5, 1), TINY, WRONG])),
        (4, angles.chord_angle, np.concatenate([np.linspace(-0.5, 4.5, 9001), near(0, 1, 2, 4), TINY, WRONG])),
    ],
    ids=["sin", "cos", "atan", "acos", "chord_angle"],
)
def test_angles(op, definition, x):
    with np.errstate(all="ignore"):
        want = definition(x)
    got, *_ = launch(angle_kernel, len(x), np.empty_like(x), x, len(x), block=4096, OP=op)
    assert unlike(got, want) == ""


def test_constants_are_those_of_the_host():
    assert _angles.SIN.value == angles._SIN
    assert _angles.ATAN.value == angles._ATAN
    assert _angles.PI_PARTS.value == angles._PI_PARTS
    assert (solve.SHORT.value, solve.SMALL.value) == (slerp.EPSILON, 1e-7)


# ---- fold ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["segments"])
def owner_kernel(out, prefix, at, segments: tl.int32, n, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + lane, owner(prefix, segments, tl.load(at + lane, mask=lane < n, other=0)), mask=lane < n)


@pytest.mark.parametrize(
    "counts", [[1], [5], [0, 3], [3, 0, 0], [0, 0, 2, 0, 1, 0], [1, 2, 3, 4, 5], [1] * 8, [0, 1] * 9 + [7]], ids=str
)
def test_owner(counts):
    at = np.arange(sum(counts), dtype=np.int64)
    got, *_ = launch(owner_kernel, len(at), np.full_like(at, -1), prefix(counts), at, len(counts), len(at), block=32)
    assert got.tolist() == np.repeat(np.arange(len(counts)), counts).tolist()


@triton.jit(do_not_specialize=["rows"])
def find_kernel(out, prefix, at, rows: tl.int32):
    pid = tl.program_id(0)
    tl.store(out + pid, find(prefix, rows, tl.load(at + pid)).to(tl.int64))


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 100, 1024, 1025, 20_000])
def test_find(rows):
    rng = np.random.default_rng(rows)
    counts = rng.choice([0, 0, 1, 2, 500], rows)
    counts[rng.integers(rows)] = 3
    before = prefix(counts)
    ends = np.concatenate([before[:-1], before[1:] - 1])
    at = np.unique(np.concatenate([ends[:20], ends[-20:], rng.integers(0, before[-1], 20)]).clip(0, before[-1] - 1))
    out = there(np.full_like(at, -1))
    find_kernel[(len(at),)](out, there(before), there(at), rows)
    assert out.cpu().numpy().tolist() == np.repeat(np.arange(rows), counts)[at].tolist()


@pytest.mark.parametrize("columns", [1, 3, 4])
def test_fold(columns):
    rng = np.random.default_rng(columns)
    counts = np.array([0, 1, 3, 0, 0, 2, 70, 1, 1, 2, 0])
    each = np.array([9, 17, 1, 0, 5, 16, 2, 33, 100, 0, 0])
    vectors, tiles = prefix(counts), prefix(counts * each)
    first = prefix(np.repeat(each, counts))
    partials = magnitudes(rng, (tiles[-1], columns))
    partials[rng.random(partials.shape) < 0.1] = -0.0
    partials[first[1] : first[3]] = -0.0  # whole vectors of it
    partials[first[3]] = [np.nan, np.inf, -np.inf, 1.0][:columns]
    partials[first[4] : first[6]] = 1e308  # overflow
    sums = np.full((vectors[-1], columns), 7.0)
    got, *_ = launch(solve.fold_kernel, sums.size, sums, partials, tiles, vectors, len(counts), C=columns, block=64)
    with np.errstate(all="ignore"):
        want = NumpyKernels().fold(partials, first)
    assert unlike(got, want) == ""
    assert not np.signbit(got[1:3]).any(), "minus zeros add up to plus zero"


# ---- slerp -----------------------------------------------------------------------------------------------


def pair(a, b):
    """The four sums of two vectors."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return [a @ a, a @ b, b @ b, (a - b) @ (a - b)]


def pairs(rng):
    """Sums of pairs of vectors: what happens, what may happen at the edges, and what cannot."""
    a = rng.normal(size=8)
    found = [pair(a, a), pair(a, -a), pair(a, 3 * a), pair([1, 0], [0, 2]), pair(0 * a, a), pair(a, 0 * a)]
    found += [pair([0.0], [0.0]), [-0.0, -0.0, 0.0, 0.0]]
    # Cosines of exactly 1/4 and -1/4, and of 3/4 by the distance.
    found += [[1.0, 0.25, 1.0, 1.5], [4.0, -0.5, 1.0, 6.0], [1.0, 0.7, 1.0, 0.5], [1.0, 0.5, 1.0, 1.0]]
    found += [[1.0, np.nextafter(0.5, 1), 1.0, x] for x in (1.0, 0.0, -0.0, -1.0, 4.0, 8.0)]
    squares = near(EPSILON**2, EPSILON**2 * (1 + 2e-15), EPSILON**2 * (1 - 2e-15), float(np.float32(EPSILON)) ** 2)
    found += [[x, y * x, 1.0, 1.0] for x in squares for y in (0.3, 0.9)]
    found += [[1.0, 0.9, x, 0.1] for x in squares]
    for size in 10.0 ** np.arange(-9, 1):
        found.append(pair(a, a + size * rng.normal(size=8)))
        found.append(pair(a, -a + size * rng.normal(size=8)))
    for _ in range(60):
        found.append(pair(magnitudes(rng, 4, -6, 6), magnitudes(rng, 4, -6, 6)))
    wild = magnitudes(rng, (60, 4), -300, 300)
    wild[:, [0, 2]] = np.abs(wild[:, [0, 2]])
    return np.concatenate([np.array(found), wild])


THRESHOLDS = [0.9995, 0.0, 1.0, 0.25, np.nextafter(0.25, 0), 0.75, np.nextafter(0.75, 0)]
POSITIONS = [0.35, 0.0, 1.0, 1.25, 0.5, -0.5, 1 / 3]


def solved(sums, vectors, numbers, wide, every):
    """Coefficients by the kernels, and the smallest bad vector."""
    count = len(vectors) - 1
    apart = np.zeros(count, np.int32)
    if every:
        apart, *_ = launch(solve.apart_kernel, len(sums), apart, sums, numbers, vectors, count)
    coef = np.full((len(sums), 2), 7, np.float64 if wide else np.float32)
    bad = np.array([NONE])
    coef, bad, *_ = launch(
        solve.slerp_kernel, len(sums), coef, bad, sums, numbers, vectors, count, apart, WIDE=wide, EVERY=every
    )
    return coef, int(bad[0])


@WIDE
def test_slerp(wide):
    sums = pairs(np.random.default_rng(0))
    each = len(sums)
    t, threshold = (x.ravel() for x in np.meshgrid([*POSITIONS[:4], 1 / 3], THRESHOLDS))
    few = np.random.default_rng(1).permutation(len(t))[:7]
    few[0] = np.flatnonzero((t == 1.25) & (threshold == 1.0))[0]
    t, threshold = np.append(t[few], POSITIONS), np.append(threshold[few], THRESHOLDS)
    numbers = np.stack([t, threshold], axis=1)
    counts = np.full(len(t), each)
    counts[[1, 6]] = 0, 3
    part = [sums[:n] for n in counts]
    got, bad = solved(np.concatenate(part), prefix(counts), numbers, wide, every=False)
    args = np.repeat(numbers, counts, axis=0)
    want = slerp.coefficients(np.concatenate(part), args[:, 0], args[:, 1], np.full(len(args), np.nan))
    assert unlike(got, narrow(want, wide)) == ""
    assert bad == NONE


@WIDE
def test_slerp_of_all_rows(wide):
    """Segments of parallel rows only, of some, of one alone, of none; rows without an arc are linear in any case."""
    rng = np.random.default_rng(2)
    a = rng.normal(size=8)
    close = [pair(a, a * x + 1e-6 * rng.normal(size=8)) for x in rng.uniform(0.5, 2, 40)]
    away = [pair(a, rng.normal(size=8)) for _ in range(40)]
    none = [pair(a, a), pair(a, -a), pair([1.0, 0], [2.0, 0])]
    some, one = close + away[:1], [[1.0, 0.25, 1.0, 1.5]]
    parts = [close, [], some, close[:1], away + none, [], none + close, one, none + away]
    parts.append(close[:9])  # lanes beyond the last vector must not count here
    counts = [len(p) for p in parts]
    sums = np.concatenate([np.array(p, np.float64).reshape(-1, 4) for p in parts])
    t = [0.35, 0.0, 0.5, 1.25, 0.5, 1.0, -0.5, 1 / 3, 0.9, 0.3]
    numbers = np.stack([t, [0.9995] * 7 + [0.25, 1.0, 0.9995]], axis=1)
    every = np.repeat(np.arange(len(parts)) + 0.0, counts)
    args = np.repeat(numbers, counts, axis=0)
    want = slerp.coefficients(sums, args[:, 0], args[:, 1], every)
    got, bad = solved(sums, prefix(counts), numbers, wide, every=True)
    assert unlike(got, narrow(want, wide)) == ""
    assert bad == NONE


def test_the_first_bad_vector_of_slerp():
    for value in WRONG:
        for column in range(4):
            sums = np.ones((2 * BLOCK + 3, 4))
            sums[[2 * BLOCK + 2, BLOCK + 5, BLOCK + 9], column] = value
            numbers = np.array([[0.5, 0.9]] * 3)
            _, bad = solved(sums, prefix([BLOCK, 0, BLOCK + 3]), numbers, wide=False, every=False)
            assert bad == BLOCK + 5, (value, column)


# ---- Model Stock -----------------------------------------------------------------------------------------


def offsets(rng, models):
    """Sums of N offsets: random ones of many sizes, parallel and opposite ones, zeros, poles, and impossible ones."""
    found = []
    for kind in range(90):
        d = magnitudes(rng, (models, 6), -5, 5) if kind % 2 else rng.normal(size=(models, 6))
        if kind % 5 == 1:
            d[1:] = d[0] * rng.choice([1.0, -1.0, 1 + 1e-7], (models - 1, 1))
        if kind % 7 == 3:
            d[rng.integers(models)] = 0.0
        if kind % 11 == 2:
            d *= 10.0 ** rng.uniform(-9, -3)
        g = d @ d.T
        found.append([g[i, j] for i in range(models) for j in range(i, models)])
    columns = [(i, j) for i in range(models) for j in range(i, models)]

    def equal(c):
        return [1.0 if i == j else c for i, j in columns]

    pole = -1 / (models - 1)
    below = [x / (models - 1) for x in near(1e-6, float(np.float32(1e-6)), -1e-6, 0.0)]
    found += [equal(pole + x) for x in below]
    found += [equal(c) for c in (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, -1.5, 5e-324, -5e-324)]
    alone = np.zeros(len(columns))
    alone[1] = -5e-324  # a mean that rounds to -0
    found += [alone, -alone]
    wild = magnitudes(rng, (40, len(columns)), -300, 300)
    for n, (i, j) in enumerate(columns):
        wild[:, n] = np.abs(wild[:, n]) if i == j else wild[:, n]
    return np.concatenate([np.array(found), wild])


@WIDE
@pytest.mark.parametrize(
    ("models", "angle", "clamp"),
    [(2, False, False), (2, True, True), (3, False, True), (3, True, False), (5, False, False), (5, True, True)],
)
def test_model_stock(models, angle, clamp, wide):
    some = offsets(np.random.default_rng(models), models)
    floors = np.array([[1e-6], [0.5], [0.0], [1.0], [1e-12]])
    counts = [len(some), 0, len(some), 40, len(some)]
    sums = np.concatenate([some[-n:] if n else some[:0] for n in counts])
    scale = np.full((len(sums), 2), 7, np.float64 if wide else np.float32)
    flags = dict(N=models, ANGLE=angle, CLAMP=clamp, WIDE=wide)
    got, bad, *_ = launch(
        solve.model_stock_kernel, len(sums), scale, np.array([NONE]), sums, floors, prefix(counts), 5, **flags
    )
    ends = prefix(counts)
    parts = zip(ends[:-1], ends[1:], floors[:, 0], strict=True)
    want = np.full((len(sums), 2), float(models))
    want[:, 0] = np.concatenate([model_stock.ratio(sums[i:j], models, angle, clamp, floor) for i, j, floor in parts])
    assert unlike(got, narrow(want, wide)) == ""
    assert bad[0] == NONE


def test_the_first_bad_vector_of_model_stock():
    flags = dict(N=3, ANGLE=False, CLAMP=True, WIDE=True)
    for value in WRONG:
        for column in range(6):
            sums = np.ones((BLOCK + 30, 6))
            sums[[BLOCK + 7, BLOCK + 29], column] = value
            args = np.zeros((len(sums), 2)), np.array([NONE]), sums, np.zeros((2, 1)), prefix([0, len(sums)]), 2
            _, bad, *_ = launch(solve.model_stock_kernel, len(sums), *args, **flags)
            assert bad[0] == BLOCK + 7, (value, column)


# ---- consensus -------------------------------------------------------------------------------------------


@WIDE
@pytest.mark.parametrize("models", [1, 3])
def test_rescale(models, wide):
    rng = np.random.default_rng(models)
    edges = near(1e-7, float(np.float32(1e-7)), 0.0, 1.0)
    edges = np.append(edges, [-0.0, 1e300, 1e-300, 5e-324, np.inf, np.nan])
    table = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
    table = np.concatenate([table, np.abs(magnitudes(rng, (90, 2)))])
    sums = table[rng.permutation(len(table))[: len(table) // models * models]].reshape(-1, models, 2)
    weights = magnitudes(rng, sums.shape[:2], -3, 3)
    weights[0, 0] = -0.0
    f = rng.normal(size=(*weights.shape, 3)).astype(np.float64 if wide else np.float32)
    want, worst = f.copy(), []
    for i, (before, after) in enumerate(sums.reshape(-1, 2).tolist()):
        s, m = divmod(i, models)
        with np.errstate(all="ignore"):
            try:
                factor = l1_factor(before, after, "")
            except OutputError:
                worst.append(i)
                factor = np.float64(before) / np.float64(after)
            want[s, m, [0, 2]] = weights[s, m] * factor, factor
    got, bad, *_ = launch(
        solve.rescale_kernel, weights.size, f, np.array([NONE]), sums, weights, weights.size, WIDE=wide
    )
    assert unlike(got, want) == ""
    assert bad[0] == worst[0]


def test_no_rescale_of_sums_that_are_too_small():
    sums = np.array([[[1e-8, np.inf], [np.nan, 0.0]], [[1.0, 2.0], [np.inf, 1e-9]]])
    f, bad, *_ = launch(
        solve.rescale_kernel, 4, np.zeros((2, 2, 3)), np.array([NONE]), sums, np.full((2, 2), 3.0), 4, WIDE=True
    )
    assert f.tolist() == [[[3, 0, 1], [3, 0, 1]], [[1.5, 0, 0.5], [3, 0, 1]]]
    assert bad[0] == NONE


@WIDE
def test_majority(wide):
    rng = np.random.default_rng(0)
    sizes = [1, 1, 40, 0, 3, 0, 0, 2, 1, 300, 1]
    sets = [1, 2, 1, 0, 1, 1, 3, 2]  # segments of each
    tiles, first = prefix(sizes), prefix(sets)
    counts = rng.integers(0, 2**40, (tiles[-1], 2))
    counts[tiles[4] : tiles[5]] = [[5, 3], [1, 2], [1, 2]]  # a tie
    counts[tiles[9] : tiles[10], 0] = 2**62 // 300  # sums need 64 bits
    scale = rng.normal(size=(len(sizes), 3)).astype(np.float64 if wide else np.float32)
    want = scale.copy()
    for g in range(len(sets)):
        part = counts[tiles[first[g]] : tiles[first[g + 1]]]
        want[first[g] : first[g + 1], 2] = 1.0 if int((part[:, 0] - part[:, 1]).sum()) > 0 else -1.0
    got, *_ = launch(solve.majority_kernel, len(sets) * 16, scale, counts, tiles, first, block=16, WIDE=wide)
    assert unlike(got, want) == ""
    assert set(want[:, 2].tolist()) == {1.0, -1.0}


# ---- compiled --------------------------------------------------------------------------------------------


SCRIPT = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastmerge.kernels import solve

KERNELS = {
    "fold_kernel": ({"C": 4}, "*fp64 *fp64 *i64 *i64 i32"),
    "slerp_kernel": ({"WIDE": False, "EVERY": True}, "*fp32 *i64 *fp64 *fp64 *i64 i32 *i32"),
    "model_stock_kernel": (
        {"N": 3, "ANGLE": True, "CLAMP": True, "WIDE": False}, "*fp32 *i64 *fp64 *fp64 *i64 i32"
    ),
    "rescale_kernel": ({"WIDE": False}, "*fp32 *i64 *fp64 *fp64 i64"),
}
for name, (flags, types) in KERNELS.items():
    fn = getattr(solve, name)
    flags |= {"BLOCK": 128}
    types = types.split() + ["constexpr"] * len(flags)
    source = ASTSource(fn, dict(zip(fn.arg_names, types, strict=True)), flags)
    options = {"enable_fp_fusion": False, "maxnreg": 255}
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    print("KERNEL", name, kernel.asm["ptx"])
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="compiles without a GPU")
def test_compiled_code():
    """No contraction, no approximation, and all constants in full (Triton makes fp32 of some)."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(Path(__file__).parents[2])]))
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    code = dict(part.split(" ", 1) for part in done.stdout.split("KERNEL ")[1:])
    assert len(code) == 4
    for name, ptx in code.items():
        assert [w for w in ("fma.", ".approx", "div.full", ".ftz") if w in ptx] == [], name
        # The smaller of two magnitudes is below a limit: no zero, no NaN can tell.
        assert name == "rescale_kernel" or not [w for w in ("min.f64", "max.f64") if w in ptx], name

    def holds(name, *numbers):
        """Which numbers are not in the code; -c x + d is d - c x for the compiler, and the same."""
        words = [{"0d" + struct.pack(">d", x).hex().upper() for x in (c, -c)} for c in numbers]
        return [c for c, both in zip(numbers, words, strict=True) if not any(w in code[name] for w in both)]

    sine = (*angles._SIN, *angles._PI_PARTS, math.pi, 1.5 * 2**52)
    assert holds("slerp_kernel", *sine, *angles._ATAN, math.pi / 2, EPSILON) == []
    assert holds("model_stock_kernel", *sine, *angles._ATAN, math.pi / 2, 1e-6) == []
    assert holds("rescale_kernel", 1e-7) == []
    for name in ("slerp_kernel", "model_stock_kernel"):
        assert "sqrt.rn.f64" in code[name]
        assert "div.rn.f64" in code[name]
