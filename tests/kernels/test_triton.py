"""Every Triton kernel against plain numpy, bit for bit: in the interpreter, or for real on a GPU.

With ``TRITON_INTERPRET=0`` the same tests run compiled kernels on ``cuda`` and carry the mark ``gpu``.
"""

import itertools

import numpy as np
import pytest

from fastmerge.ops.kernels import Brackets, Found
from fastmerge.philox import philox4x32, u16
from tests import keep_oracle as oracle
from tests.compare import differences
from tests.kernels.cases import Case, Elsewhere
from tests.kernels_numpy import NumpyKernels

pytest.importorskip("triton", reason="the Triton kernels need triton")
torch = pytest.importorskip("torch", reason="the Triton kernels need torch")


from fastmerge.kernels import TritonKernels, _call, _launch
from fastmerge.kernels._jit import philox

if _call.INTERPRETED:
    DEVICE = "cpu"
    TRITON = TritonKernels(DEVICE)
else:
    pytestmark = pytest.mark.gpu
    DEVICE = "cuda"
    if not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a CUDA device", allow_module_level=True)
    TRITON = Elsewhere(TritonKernels(DEVICE))
NUMPY = NumpyKernels()
MIXES = [(3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0), (3, 2, 1), (3, 0, 1, 2)]

MODES = [(0, False, 0, 0)] + [
    (elect, split, zero, merge)
    for elect, split, zero, merge in itertools.product((1, 2), (False, True), (0, 1, 2), (0, 1, 2))
    if not (elect == 2 and split)
]
KEEPS = ["nothing", "index", "drop", "drop+spread", "all", "never+index"]


@pytest.fixture(autouse=True)
def shipped_blocks(monkeypatch):
    """Blocks as on a GPU, unless a test wants fewer programs."""
    monkeypatch.setattr(_launch, "INTERPRETER_BLOCK", 2048)


def unlike_numpy(case, run, kernels=TRITON):
    """What differs in outputs and counters of a call on two backends; ``run`` is called with (kernels, segments)."""
    got, bad = case.written(lambda s: run(kernels, s))
    want, want_bad = case.written(lambda s: run(NUMPY, s))
    return differences([*got, bad], [*want, want_bad])


def apart(got, want):
    """What differs between two tables of sums, where every NaN is the same, and both zeros are."""
    got, want = (np.where(np.isnan(x), np.nan, x) + 0.0 for x in (got, want))
    return differences([got], [want])


# ---- combine ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", MIXES, ids=str)
@pytest.mark.parametrize("delta", [False, True])
def test_combine(codes, delta):
    case = Case(codes, out=[3, 2, 1, 0][len(codes) % 4 if delta else codes[0]], sizes=(1, 9, 2048 + 13))
    coef = case.rng.normal(0.4, 0.5, (3, len(codes)))
    scale = np.stack([case.rng.normal(1, 0.3, 3), [1.0, 3.0, 0.7]], axis=1)
    assert unlike_numpy(case, lambda k, s: k.combine(s, coef, scale, delta=delta, per_row=False)) == []


@pytest.mark.parametrize(("codes", "out"), [((1, 1, 1), 1), ((3, 1), 1), ((1, 1), 3)])
def test_combine_in_fp64(codes, out):
    case = Case(codes, out=out, sizes=(1, 9, 2048 + 13))
    coef = case.rng.normal(0.4, 0.5, (3, len(codes)))
    scale = np.array([[1.0, 1.0], [1.0, 3.0], [1.0, 0.7]])
    assert unlike_numpy(case, lambda k, s: k.combine(s, coef, scale, delta=False, per_row=False, wide=True)) == []


@pytest.mark.parametrize("out", [0, 1, 2, 3])
@pytest.mark.parametrize("code", [0, 1])
def test_every_rounding(code, out):
    """Random bit patterns of the wide types, and the neighbourhoods of every tie of the narrow ones."""
    case = Case((code,), out=out, sizes=(8192,))
    x = case.data[0][0]
    x[:] = case.rng.integers(0, 2 ** (64 if code == 0 else 32), len(x), dtype=x.dtype)
    narrow = case.rng.integers(0, 2**16, 2048).astype(np.uint64)
    if code == 1:
        x[:2048] = (narrow << np.uint64(16)) + np.uint64(0x8000) + case.rng.integers(-1, 2, 2048).astype(np.uint64)
    else:
        with np.errstate(all="ignore"):
            x[:2048] = oracle.widen(narrow.astype(np.uint16), 3, np.float64).view(np.uint64)
            half = oracle.widen(narrow.astype(np.uint16), 2, np.float64)
            x[2048:4096] = (half * (1 + case.rng.choice([2.0**-11, 2.0**-12, 2.0**-52], 2048))).view(np.uint64)
        x[:2048] += case.rng.choice(np.array([0, 1 << 44, (1 << 44) + 1, (1 << 44) - 1], np.uint64), 2048)
    one = np.ones((1, 1))
    assert unlike_numpy(case, lambda k, s: k.combine(s, one, np.ones((1, 2)), delta=False, per_row=False)) == []


@pytest.mark.parametrize(("row", "shift"), [(7, 0), (2048, 0), (2052, 1)])
def test_combine_by_row(row, shift):
    case = Case((3, 3), sizes=(2 * row, 3 * row), row=row, shift=shift, e0=4 * row)
    coef = case.rng.normal(0.4, 0.5, (12, 2))
    scale = np.ones((12, 2))
    assert unlike_numpy(case, lambda k, s: k.combine(s, coef, scale, delta=True, per_row=True)) == []


def test_misaligned_and_empty():
    case = Case((3, 1, 3), out=1, sizes=(3000, 0, 1), shift=1)
    coef, scale = case.rng.normal(size=(3, 3)), np.ones((3, 2))
    assert unlike_numpy(case, lambda k, s: k.combine(s, coef, scale, delta=True, per_row=False)) == []
    case.segments.table = case.segments.table[:0]
    case.segments.nonfinite = np.zeros(0, np.int64)
    outs, _ = case.written(lambda s: TRITON.combine(s, coef, scale, delta=True, per_row=False))
    assert [set(x.tolist()) for x in outs] == [{0x7F81}, set(), {0x7F81}], "nothing to do, nothing written"


def test_data_elsewhere():
    """The copies that the tests make for a GPU, on the CPU; results into tensors of the device, without a copy back."""
    case = Case((3, 3), sizes=(2048 + 9, 3), shift=1)
    kernels = Elsewhere(TritonKernels(DEVICE))
    coef, scale = case.rng.normal(size=(2, 2)), np.ones((2, 2))
    assert unlike_numpy(case, lambda k, s: k.combine(s, coef, scale, delta=True, per_row=False), kernels) == []
    there = torch.zeros((2, 3), dtype=torch.float64, device=DEVICE)
    here = np.zeros((2, 3))
    kernels.gram(case.segments, there, delta=False, diff=False, per_row=False)
    NUMPY.gram(case.segments, here, delta=False, diff=False, per_row=False)
    assert apart(there.cpu().numpy(), here) == []


# ---- sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "sizes", "delta", "diff", "shift"),
    [
        ((3, 3), (65_536 + 2048, 5), False, True, 0),
        ((2, 2, 2), (4097,), True, False, 0),
        ((1, 0), (2048,), False, True, 0),
        ((3,) * 6, (2048,), True, True, 0),  # 15 + 1 columns: two launches
        ((1, 3, 3), (2050,), True, False, 1),
    ],
)
def test_gram(codes, sizes, delta, diff, shift):
    case = Case(codes, sizes=sizes, shift=shift)
    k = len(codes) - delta
    got = np.full((case.tiles, k * (k + 1) // 2 + diff), 7.0)
    want = got.copy()
    TRITON.gram(case.segments, got, delta=delta, diff=diff, per_row=False)
    NUMPY.gram(case.segments, want, delta=delta, diff=diff, per_row=False)
    assert apart(got, want) == []


@pytest.mark.parametrize(
    ("codes", "sizes", "shift"),
    [
        ((3, 3, 3, 3), (65_536 + 2048, 0, 5), 0),
        ((2, 2, 2), (4097,), 0),
        ((1, 3, 3, 1), (2050,), 1),
        ((1, 0, 1), (2048,), 0),
        ((3,) * 11, (2048, 9), 0),  # nine models: two launches
    ],
)
def test_dot(codes, sizes, shift):
    case = Case(codes, sizes=sizes, shift=shift)
    got, want = np.full((2, case.tiles, len(codes) - 2), 7.0)
    TRITON.dot(case.segments, got)
    NUMPY.dot(case.segments, want)
    assert apart(got, want) == []


@pytest.mark.parametrize("row", [3, 2048, 65_536 + 8])
def test_gram_by_row(row):
    case = Case((3, 3), sizes=(2 * row, row), row=row)
    got = np.full((case.tiles, 3), 7.0)
    want = got.copy()
    TRITON.gram(case.segments, got, delta=False, diff=False, per_row=True)
    NUMPY.gram(case.segments, want, delta=False, diff=False, per_row=True)
    assert apart(got, want) == []


@pytest.mark.parametrize(
    "first", [[0, 0, 1, 20, 40], [0, 40], [0, 25, 25, 40], range(41), [0, 1, 3, *range(4, 41)]], ids=str
)
def test_fold(first):
    rng = np.random.default_rng(0)
    partials = rng.normal(size=(40, 19)) * np.exp(8 * rng.normal(size=(40, 19)))
    partials[:, 0] = -0.0
    partials[5, 1], partials[6, 2:4], partials[7, 3] = np.nan, np.inf, -np.inf
    first = np.array(first, np.int64)
    want = NUMPY.fold(partials, first)
    got = TRITON.fold(partials, first)
    assert not np.signbit([got[:, 0], want[:, 0]]).any(), "sums begin with +0"
    assert apart(got, want) == []
    assert TRITON.fold(np.zeros((0, 3)), np.array([0], np.int64)).shape == (0, 3)


@pytest.mark.parametrize(
    ("codes", "keep", "sizes"),
    [
        ((3, 3, 3), "index", (2048, 9)),
        ((1, 3), "drop+spread", (2100,)),
        ((1, 1, 1), "drop wide", (5000, 9)),
        ((0,) + (3,) * 5, "all", (2048,)),
    ],
)
def test_l1(codes, keep, sizes):
    case = Case(codes, sizes=sizes)
    args = case.keep_args(keep)
    got, want = np.full((2, case.tiles, case.n, 2), 7.0)
    TRITON.l1(case.segments, args, got)
    NUMPY.l1(case.segments, args, want)
    assert apart(got, want) == []


# ---- random lanes, keys and counts -------------------------------------------------------------------------


@pytest.mark.parametrize("e0", [0, 8, 5, 2**31 - 8, 2**32 + 3, 2**40 + 16])
def test_random_lanes_follow_the_element(e0):
    """The drop of DARE at far away elements, in the aligned and in the odd kernel."""
    case = Case((1, 1), out=1, sizes=(2048 + 7,), e0=e0, kinds=["normal"])
    args = case.delta_args(drop=True)
    args.bernoulli[:] = 30_000
    got, want = np.zeros((2, 2055, 1), np.uint32)
    TRITON.delta_keys(case.segments, args, got)
    NUMPY.delta_keys(case.segments, args, want)
    assert np.array_equal(got, want)
    key = int(case.segments.table[0, 4]) % 2**64
    kept = u16(key, int(args.models[0]), 0, e0, 2055) < 30_000
    assert np.array_equal(got[:, 0] != 0, kept)


def test_known_answers_of_philox():
    """Random123's vectors through the kernels' own call: counter (lo, hi, model, op) and 64-bit key."""
    import triton
    import triton.language as tl

    @triton.jit
    def words(out, counter, key):
        lo, hi = tl.load(counter + tl.arange(0, 1)), tl.load(counter + 1 + tl.arange(0, 1))
        c2, c3 = tl.load(counter + 2 + tl.arange(0, 1)), tl.load(counter + 3 + tl.arange(0, 1))
        w0, w1, w2, w3 = philox(tl.load(key), lo.to(tl.uint32), hi.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32))
        tl.store(out + tl.arange(0, 1), w0.to(tl.int64))
        tl.store(out + 1 + tl.arange(0, 1), w1.to(tl.int64))
        tl.store(out + 2 + tl.arange(0, 1), w2.to(tl.int64))
        tl.store(out + 3 + tl.arange(0, 1), w3.to(tl.int64))

    for counter, key in [
        ([0, 0, 0, 0], [0, 0]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]),
    ]:
        out = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        whole = np.array([key[0] | key[1] << 32], np.uint64).view(np.int64)
        words[(1,)](out, torch.tensor(counter, device=DEVICE), torch.from_numpy(whole).to(DEVICE))
        assert [int(v) % 2**32 for v in out] == philox4x32(counter, key).tolist()


@pytest.mark.parametrize(
    ("codes", "drop", "round_code"), [((3, 3, 2), False, -1), ((1, 3), True, 3), ((0, 1), False, 2)]
)
def test_delta_keys(codes, drop, round_code):
    case = Case(codes, sizes=(2, 2048 + 20))
    args = case.delta_args(round_code=round_code, drop=drop)
    kind = np.uint64 if 0 in codes else np.uint32
    got, want = np.zeros((2, 2070, case.n), kind)
    TRITON.delta_keys(case.segments, args, got)
    NUMPY.delta_keys(case.segments, args, want)
    assert np.array_equal(got, np.minimum(want, kind(0x7FF8000000000000 if 0 in codes else 0x7FC00000)))


@pytest.mark.parametrize(
    ("codes", "drop", "sizes", "cap", "kinds"),
    [
        ((3, 3, 3), False, (65_536 + 2048, 300), 4096, ["normal", "zeros"]),
        ((1, 2), True, (5000,), 40, ["normal"]),
        ((0, 3), False, (2048,), 500, ["normal"]),
        ((3, 3, 1), False, (2048, 2048, 9), 2048, ["nans", "special", "nans"]),
        ((0, 3), False, (2048, 2048), 2048, ["nans", "special"]),
    ],
)
def test_count(codes, drop, sizes, cap, kinds):
    case = Case(codes, sizes=sizes, kinds=kinds)
    args = case.delta_args(drop=drop)
    lo, hi = np.zeros((2, case.groups, case.n), np.uint64)
    for g, keys in enumerate(case.sorted_keys(args)):
        for i, k in enumerate(keys):
            lo[g, i], hi[g, i] = k[int(0.78 * len(k))], k[int(0.8 * len(k))]
    lo[0, 0] = min(lo[0, 0] + np.uint64(1), hi[0, 0])  # the key just below occurs
    hi[-1, 0] = 2**63 - 1 if "nans" in kinds else hi[-1, 0]  # above every key
    found = []
    for kernels in (TRITON, NUMPY):
        counts = np.full((case.tiles, case.n, 4), -1, np.int64)
        keys = np.zeros((case.n, cap), np.uint64 if 0 in codes else np.uint32)
        where, used = np.zeros((case.n, cap, 2), np.int64), np.zeros(case.n, np.int64)
        kernels.count(case.segments, args, Brackets(lo, hi), Found(counts, keys, where, used))
        found.append((counts, used, keys, where))
    (counts, used, keys, where), (want_counts, want_used, want_keys, want_where) = found
    assert np.array_equal(counts, want_counts)
    assert np.array_equal(used, want_used)
    for i, n in enumerate(used):
        if n <= cap:  # the order of a list is not part of the contract, nor is which keys fit
            assert _listed(keys[i, :n], where[i, :n]) == _listed(want_keys[i, :n], want_where[i, :n])


def _listed(keys, where):
    """Keys with group and tile, sorted: what of a list is used."""
    return sorted(zip(keys.tolist(), where[:, 0].tolist(), (where[:, 1] // 65_536).tolist(), strict=True))


@pytest.mark.parametrize(
    ("codes", "drop", "round_code", "sizes", "kinds"),
    [
        ((3, 3, 3), False, -1, (2048, 300, 7), ["normal", "zeros", "two"]),
        ((1, 2), True, 3, (5000, 1), ["normal"]),
        ((0, 3), False, -1, (2048,), ["special"]),
        ((3, 3, 1), False, -1, (1500, 9), ["nans", "special"]),
        ((3, 3), False, -1, (16_384, 16_385), ["two", "normal"]),
    ],
)
def test_kth(codes, drop, round_code, sizes, kinds):
    """Thresholds and ties of whole small tensors; what is too large for one program stays open."""
    case = Case(codes, sizes=sizes, kinds=kinds)
    args = case.delta_args(round_code=round_code, drop=drop)
    ranks = np.array([[max(0, n * (i + 1) // 5) for i in range(case.n)] for n in sizes], np.int64)
    ranks[0, 0] = sizes[0]  # keeps everything: nothing is asked
    got, want = (
        (np.zeros((case.groups, case.n), np.uint64), np.zeros((case.groups, case.n, 4), np.int64)) for _ in range(2)
    )
    TRITON.kth(case.segments, args, ranks, *got)
    NUMPY.kth(case.segments, args, ranks, *want)
    some = np.array(sizes) <= (8192 if 0 in codes else 16_384)
    nan = 0x7FF8000000000000 if 0 in codes else 0x7FC00000
    assert np.array_equal(got[0][some], np.minimum(want[0][some], np.uint64(nan)))
    assert np.array_equal(got[1][some][:, :, :2], want[1][some][:, :, :2])
    cut = some[:, None] & (want[1][:, :, 0] < want[1][:, :, 1])  # where the cut is inside the ties
    assert np.array_equal(got[1][cut], want[1][cut])
    assert not got[1][~some].any()


# ---- consensus -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode(mode):
    i = MODES.index(mode)
    codes, keep = MIXES[i % len(MIXES)], KEEPS[(i + i // len(KEEPS)) % len(KEEPS)]
    case = Case(codes, out=[3, 2, 1, 0][i % 4], sizes=(9, 2048 + 8), seed=i)
    args = case.keep_args(keep, round_code=[-1, 3, 2][i % 3]), case.rules(*mode)
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_with_sums_in_fp64(mode):
    i = MODES.index(mode)
    case = Case([(1, 1, 1), (3, 1, 2), (1,) * 10][i % 3], out=1, sizes=(9, 2048 + 8), seed=i)
    args = case.keep_args(KEEPS[i % len(KEEPS)] + " wide"), case.rules(*mode)
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []


@pytest.mark.parametrize("codes", [(1, 1, 1), (3, 3, 3), (0, 3, 1)], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_zeros_and_nans_of_the_largest(codes, shift):
    """An H100 gave -0 for a base of -0 and negative deltas: a minimum of floats puts -0 below +0."""
    odd = [-0.0, 0.0, 1.0, -1.0, 1e-40, -1e-40, np.inf, -np.inf, np.nan]
    case = Case(codes, out=codes[0], sizes=(2048 + 9,), shift=shift)
    values = np.resize(np.array(list(itertools.product(odd[:2] + odd[6:], odd, odd))), (2048 + 9, 3))
    with np.errstate(all="ignore"):
        for x, column, code in zip(case.data[0], values.T, codes, strict=True):
            x[:] = oracle.stored(column, code)
    for weights in ((1.0, 1.0), (0.5, -1.0), (0.0, -0.0)):
        args = case.keep_args("all"), case.rules(1, False, 0, 2)
        args[1].votes.factors[:, :, 0] = weights
        assert unlike_numpy(case, lambda k, s, args=args: k.consensus(s, *args)) == []


@pytest.mark.parametrize("out", [2, 3])
@pytest.mark.parametrize("shift", [0, 3])
def test_nans_of_16_bits_are_canonical(out, shift):
    """Of fp64 an H100 kept sign and payload, and of two in neighbouring slots it missed one, uncounted."""
    case = Case((0, 1, 0), out=out, sizes=(2048, 2048 + 4), shift=shift, kinds=["special"])
    case.data[0][0][::3] = oracle.stored(np.array([-np.inf]), 0)
    nan = np.array([0xFFF8000000000001, 0x7FF0000000000001], np.uint64).view(case.data[0][2].dtype)
    case.data[1][2][1408:1536] = np.resize(nan, 128)
    coef, scale = np.ones((2, 3)), np.ones((2, 2))
    assert unlike_numpy(case, lambda k, s: k.combine(s, coef, scale, delta=True, per_row=False)) == []
    (first, second), counts = case.written(lambda s: TRITON.combine(s, coef, scale, delta=True, per_row=False))
    nan16, infinity = {2: (0x7E00, 0x7C00), 3: (0x7FC0, 0x7F80)}[out]
    for x, count in zip((first, second), counts - 5, strict=True):
        size = x & 0x7FFF
        assert set(x[size > infinity].tolist()) <= {nan16}
        assert count == int((size >= infinity).sum()) > 100


@pytest.mark.parametrize("keep", KEEPS)
def test_every_keep(keep):
    case = Case((3, 3, 3), sizes=(1000, 2056), kinds=["two", "special"])
    args = case.keep_args(keep), case.rules(1, False)
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []


@pytest.mark.parametrize("models", [1, 3, 9])
@pytest.mark.parametrize("code", [3, 0])
def test_gates_that_vanish_cancel_or_overflow(models, code):
    """Sums of gates that are 0, subnormal or infinite; with nine models they are no longer read from a table."""
    case = Case((3, *(code,) * models), out=1, sizes=(2056, 2056), kinds=["normal", "special"])
    args = case.keep_args("all"), case.rules(1, False)
    f, scale = args[1].votes.factors, args[1].scale
    f[0, :, 1] = np.resize([1e-45, -1e-45, 1e-42], models)
    f[1, :, 1] = np.resize([3e38, 3e38, -3e38, 1.0], models)
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []
    f[:, :, 1], scale[:] = f[0, 0, 1], scale[0]  # equal rows share one
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("split", [False, True])
def test_votes_that_cancel(split, zero):
    """Two models apart by few values and of opposite weights: many sums of votes are zero, of values that are not."""
    case = Case((3, 3, 3), sizes=(1000, 2056), kinds=["two"])
    args = case.keep_args("nothing"), case.rules(1, split, zero)
    f, scale = args[1].votes.factors, args[1].scale
    f[:, :, 2 if split else 0] = [1.0, -1.0]
    scale[:, 2] = [-1.0, 1.0]
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []


def test_tie_cuts_across_tiles(monkeypatch):
    """Data that is nearly all ties, cut in the second of three tiles, with the pieces given out of order."""
    monkeypatch.setattr(_launch, "INTERPRETER_BLOCK", 16_384)
    case = Case((3, 3, 3), sizes=(2 * 65_536 + 5000,), kinds=["two"])
    args = case.keep_args("index"), case.rules(1, False)
    args[0].cut[0, :, :] = [(1, 20_000, -1), (1, 3, -1)]
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []
    want = case.outs[0].copy()
    s = case.segments
    whole = s.table[0].copy()
    pieces = []
    for start, stop in [(131_072, 136_072), (0, 65_536), (65_536, 131_072)]:
        row = whole.copy()
        row[1], row[2] = stop - start, start
        row[[0, 7, 8, 9]] += 2 * start
        pieces.append(row)
    s.table, s.nonfinite = np.stack(pieces), np.zeros(3, np.int64)
    case.outs[0][:] = 0
    TRITON.consensus(s, *args)
    assert differences(case.outs, [want]) == []


@pytest.mark.parametrize("keep", ["all", "above"])
def test_ties_that_are_all_kept_or_all_lost(keep):
    """Cuts at tile 2**62, and at tile 0 and rank 0, as tensors behind the cut of a whole model have them."""
    case = Case((3, 3, 3), sizes=(1000, 2056, 4096), kinds=["two"])
    args = case.keep_args(keep), case.rules(1, False)
    assert unlike_numpy(case, lambda k, s: k.consensus(s, *args)) == []


@pytest.mark.parametrize("wide", ["", " wide"])
@pytest.mark.parametrize(("elect", "split"), [(1, False), (1, True), (2, False)])
def test_votes(elect, split, wide):
    case = Case((3, 1, 3), sizes=(2048, 77))
    args = case.keep_args("drop+index" + wide), case.rules(elect, split).votes
    got, want = np.full((2, case.tiles, 2), -1, np.int64)
    TRITON.votes(case.segments, *args, got)
    NUMPY.votes(case.segments, *args, want)
    assert np.array_equal(got, want)
