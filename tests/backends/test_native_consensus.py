"""The native consensus and its votes against plain numpy, bit by bit, on every instruction set."""

import itertools

import numpy as np
import pytest

from fastmerge import _native
from tests import keep_oracle as oracle
from tests.backends.isas import ISAS, using
from tests.compare import differences

DTYPES = [(3, 3, 3, 3), (2, 2, 2), (1, 1, 1, 1), (0, 0, 0), (3, 2, 1), (1, 0, 3), (3, 3)]
OUTS = [3, 2, 1, 0]
KINDS = ["normal", "zeros", "equal", "two", "special", "nans"]
SIZES = [1, 9, 1025, 65_537, 140_003, 70_000]
SHORT = [1, 9, 1025, 66_003, 2048, 4111]
"""One of two tiles, for what is tried with every other thing; the kinds of data take turns at them."""
KEEPS = ["all", "drop", "index", "spread", "drop+index"]

# elect, split, zero, merge
MODES = [(0, False, 0, 0)] + [
    (elect, split, zero, merge)
    for elect, split, zero, merge in itertools.product((1, 2), (False, True), (0, 1, 2), (0, 1, 2))
    if not (elect == 2 and split)
]


def turned(i):
    """The kinds of data from another one on."""
    return KINDS[i % len(KINDS) :] + KINDS[: i % len(KINDS)]


@pytest.fixture(autouse=True)
def restore():
    with using(_native.isa()):
        yield


class Case:
    """Some tensors with their parameters, the expected results, and calls of the kernels on any pieces."""

    def __init__(self, seed, codes, out, keep, mode, kinds=KINDS, sizes=SIZES, round_code=-1, e0=0):
        rng = np.random.default_rng(seed)
        self.codes, self.out_code, self.mode, self.round_code, self.e0 = codes, out, mode, round_code, e0
        self.drop, self.trim = "drop" in keep, "index" in keep or "spread" in keep
        n, g = len(codes) - 1, len(sizes)
        self.groups = [oracle.make(rng, s, codes, kinds[i % len(kinds)]) for i, s in enumerate(sizes)]
        self.index = rng.permutation(n).astype(np.int32)
        self.bern = rng.choice([0, 1, 20_000, 60_000, 65_536], (g, n), p=[0.05, 0.05, 0.4, 0.4, 0.1]).astype(np.int32)
        self.f = rng.normal(0.4, 0.5, (g, n, 3))
        self.f[rng.random((g, n, 3)) < 0.15] = 0.0
        self.scale = np.stack(
            [rng.normal(1, 0.3, g), rng.choice([1.0, 2.5, 3.0], g), rng.choice([-1.0, 0.0, 1.0], g)], 1
        )
        self.thr, self.cut = np.zeros((g, n), np.uint64), np.zeros((g, n, 3), np.int64)
        self.keys = [int(k) for k in rng.integers(0, 2**64, g, np.uint64)]
        self.bases, self.kept = [], []
        for i, tensors in enumerate(self.groups):
            base, ds = oracle.deltas(tensors, codes, round_code)
            for j, delta in enumerate(ds):
                t = self.bern[i, j] if self.drop else 65_536
                ordered = np.sort(oracle.keys(oracle.dropped(delta, self.keys[i], int(self.index[j]), t, e0)))
                self.thr[i, j] = ordered[int(rng.choice([0.0, 0.5, 0.8, 0.999]) * len(delta))]
                tile = e0 // oracle.TILE + rng.integers(0, 4)
                tie = [0, 1, 30_000, 65_536][rng.integers(4)] if keep == "spread" else -1
                self.cut[i, j] = [[tile, rng.integers(0, 2000), tie], [2**62, 0, tie], [tile, 30_000, tie]][
                    rng.integers(3)
                ]
            p = {"drop": self.drop, "trim": self.trim, "index": self.index}
            p |= {"bern": self.bern[i], "thr": self.thr[i], "cut": self.cut[i]}
            self.bases.append(base)
            self.kept.append(oracle.kept(ds, p, self.keys[i], e0))

    def keep_args(self):
        return self.round_code, self.drop, self.trim, self.index, self.bern, self.thr, self.cut

    def expected(self):
        return [
            oracle.stored(oracle.consensus(b, k, *self.mode, self.f[i], self.scale[i]), self.out_code)
            for i, (b, k) in enumerate(zip(self.bases, self.kept, strict=True))
        ]

    def parts(self, cuts=()):
        return [
            {"tensors": t, "start": a, "stop": b, "e0": self.e0, "key": self.keys[g], "group": g}
            for g, t in enumerate(self.groups)
            for a, b in oracle.pieces(len(t[0]), cuts)
        ]

    def run(self, cuts=(), batch=None, shuffle=None):
        """Outputs per tensor and the number of values that are not finite."""
        outs = [np.full(len(t[0]), 0x7F81, oracle.STORAGE[self.out_code]) for t in self.groups]
        parts = [{**p, "out": outs[p["group"]]} for p in self.parts(cuts)]
        if shuffle is not None:
            parts = [parts[i] for i in np.random.default_rng(shuffle).permutation(len(parts))]
        elect, split, zero, merge = self.mode
        bad = 0
        batch = batch or max(1, len(parts))
        for at in range(0, len(parts), batch):
            rows = oracle.table(parts[at : at + batch], len(self.codes))
            nonfinite = np.full(len(rows), 5, np.int64)
            ins = np.array(self.codes, np.int32)
            _native.consensus(
                rows, ins, self.out_code, *self.keep_args(), elect, split, zero, merge, self.f, self.scale, nonfinite
            )
            bad += int((nonfinite - 5).sum())
        return outs, bad

    def unlike_numpy(self, **how):
        """What differs on any instruction set: outputs, and last the number of values that are not finite."""
        want = self.expected()
        bad = sum(int((~np.isfinite(oracle.widen(w, self.out_code, np.float64))).sum()) for w in want)
        found = []
        for isa in ISAS:
            _native.set_isa(isa)
            got, count = self.run(**how)
            found += [f"{isa}: {line}" for line in differences([*got, np.array(count)], [*want, np.array(bad)])]
        return found


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("keep", KEEPS)
def test_every_mode(mode, keep):
    i = MODES.index(mode) * len(KEEPS) + KEEPS.index(keep)
    codes = DTYPES[i % len(DTYPES)]
    sizes = [min(n, 9000) for n in SHORT] if keep in ("all", "drop") else SHORT  # nothing is ranked within a tile
    case = Case(i, codes, OUTS[i % 4], keep, mode, turned(i), sizes, round_code=[-1, 3, 2][i % 3])
    assert case.unlike_numpy() == []


@pytest.mark.parametrize("codes", DTYPES, ids=str)
@pytest.mark.parametrize("out", OUTS)
def test_every_dtype(codes, out):
    i = DTYPES.index(codes) * 4 + out
    keep, round_code = KEEPS[i % len(KEEPS)], [-1, 1, 2, 3][i % 4]
    case = Case(1000 + i, codes, out, keep, (1, False, 0, 0), turned(i), SHORT, round_code=round_code)
    assert case.unlike_numpy() == []


@pytest.mark.parametrize("models", [1, 2, 7, 8, 9, 17])
@pytest.mark.parametrize(
    "mode", [(0, False, 0, 0), (1, False, 1, 0), (1, True, 2, 1), (2, False, 0, 2), (1, True, 0, 0)], ids=str
)
def test_many_models(models, mode):
    codes = tuple([3, 3, 2, 1][i % 4] for i in range(models + 1))
    case = Case(models, codes, 3, "drop+index", mode, sizes=[2049, 70_001], kinds=["zeros", "normal"])
    assert case.unlike_numpy() == []


@pytest.mark.parametrize("codes", [(3, 3, 3, 3), (0, 3, 3, 3)], ids=str)
def test_gates_that_vanish_cancel_or_overflow(codes):
    case = Case(9, codes, 1, "index", (1, False, 0, 0), sizes=[1025] * 6)
    tiny = [1e-45, -1e-45, 1e-42] if 0 not in codes else [5e-324, -5e-324, 1e-310]
    case.f[::2, :, 1] = tiny
    case.f[1::2, :, 1] = [3e38, 3e38, -3e38]
    assert case.unlike_numpy() == []


@pytest.mark.parametrize("models", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("code", [1, 2, 3])
@pytest.mark.parametrize("mode", [(0, False, 0, 0), (1, False, 0, 0), (1, False, 1, 0), (1, False, 1, 1)], ids=str)
def test_fused_loops(models, code, mode):
    """All of one type, up to four models: gates whose sum depends on its order, and gates that cancel."""
    for seed, keep in enumerate(["all", "drop", "index"]):
        case = Case([51, models, seed], (code,) * (models + 1), code, keep, mode, turned(seed), [9, 1025, 4111] * 3)
        case.f[::3, :, 1] = [1.0, -1.0, 0.3, -0.3, 1.0][:models]
        case.f[1::3, :, 1] = [5.0, 3e8, -3e8, 1.0, 1.0][:models]
        assert case.unlike_numpy() == [], keep


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", ["index", "spread", "drop+index"])
def test_adversarial_ties(kind, keep):
    for seed, longest in enumerate((140_003, 65_536, 70_000)):
        case = Case([7, seed], (3, 3, 3), 3, keep, (1, False, 0, 0), kinds=[kind], sizes=[longest, 31])
        assert case.unlike_numpy() == [], seed


@pytest.mark.parametrize("keep", KEEPS)
def test_pieces_do_not_matter(keep):
    case = Case(21, (3, 3, 1), 3, keep, (1, False, 0, 0))
    cuts = [oracle.TILE, 2 * oracle.TILE]
    assert case.unlike_numpy(cuts=cuts) == []
    assert case.unlike_numpy(cuts=cuts, batch=1) == []
    assert case.unlike_numpy(cuts=cuts, batch=3, shuffle=5) == []
    if not case.trim:  # where nothing is ranked, a piece may start anywhere
        assert case.unlike_numpy(cuts=[1, 13, 1000, 1024, 5001, 65_535, 100_003], shuffle=6) == []


@pytest.mark.parametrize("e0", [oracle.TILE, 2**31, 2**35 - oracle.TILE, 2**40])
@pytest.mark.parametrize("keep", ["drop", "spread", "index"])
def test_far_into_a_tensor(e0, keep):
    case = Case(31, (3, 3, 3), 3, keep, (1, False, 0, 0), e0=e0, sizes=[131_080])
    assert case.unlike_numpy() == []


def test_index_rule_keeps_exactly_k():
    n, rng = 200_000, np.random.default_rng(41)
    for kind, k in itertools.product(["zeros", "equal", "two", "normal"], [1, 20_000, 65_536, 131_071, 199_999]):
        tensors = oracle.make(rng, n, (1, 1), kind)
        tensors[0][:] = 0
        tensors[1][tensors[1] & 0x7FFFFFFF == 0] = 0x3F000000  # no zero is left: what is kept can be counted
        key = tensors[1] & 0x7FFFFFFF
        order = np.argsort(-key.astype(np.int64), kind="stable")[:k]
        thr = key[order[-1]]
        ties = order[key[order] == thr]
        last = int(ties[-1])
        tile = last // oracle.TILE
        rank = int((ties // oracle.TILE == tile).sum())
        out = np.zeros(n, np.uint32)
        rows = oracle.table([{"tensors": tensors, "start": 0, "stop": n, "out": out}], 2)
        one, none = np.ones((1, 1, 3)), np.zeros((1, 1), np.int32)
        cut = np.array([[[tile, rank, -1]]], np.int64)
        _native.consensus(
            rows,
            np.array([1, 1], np.int32),
            1,
            -1,
            False,
            True,
            none[0],
            none,
            np.array([[thr]], np.uint64),
            cut,
            0,
            False,
            0,
            0,
            one,
            np.ones((1, 3)),
            np.zeros(1, np.int64),
        )
        want = np.zeros(n, np.uint32)
        want[order] = tensors[1][order]
        assert np.array_equal(out, want)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("elect", "split"), [(1, False), (1, True), (2, False)])
@pytest.mark.parametrize("codes", [(3, 3, 3, 3), (1, 0, 2), (2,) * 11], ids=str)
def test_votes(keep, elect, split, codes):
    case = Case(51, codes, 3, keep, (elect, split, 0, 0), turned(KEEPS.index(keep)), SHORT)
    want, parts, total = [], [], 0
    for g, ds in enumerate(case.kept):
        n = len(ds[0])
        with np.errstate(all="ignore"):
            v = oracle.vote(ds, elect, split, case.f[g])
        want += [
            [(v[a : a + oracle.TILE] > 0).sum(), (v[a : a + oracle.TILE] < 0).sum()] for a in range(0, n, oracle.TILE)
        ]
        parts += [
            {**p, "stats": total + p["start"] // oracle.TILE} for p in case.parts([oracle.TILE]) if p["group"] == g
        ]
        total += oracle.tiles(n)
    for isa in ISAS:
        _native.set_isa(isa)
        counts = np.full((total, 2), -1, np.int64)
        rows = oracle.table(parts[::-1], len(codes))
        _native.votes(rows, np.array(codes, np.int32), *case.keep_args(), elect, split, case.f, counts)
        assert counts.tolist() == want


@pytest.mark.parametrize("keep", ["drop", "drop+index"])
@pytest.mark.parametrize(("codes", "out"), [((3, 3, 3, 3), 3), ((2, 2, 2), 2), ((3, 0, 2), 1), ((1,) * 7, 1)], ids=str)
@pytest.mark.parametrize("elect", [0, 1])
def test_bits_that_l1_left(keep, codes, out, elect):
    case = Case(81, codes, out, keep, (elect, False, 0, 0), sizes=SHORT)
    parts = case.parts([oracle.TILE])
    outs = [np.full(len(t[0]), 0x7F81, oracle.STORAGE[out]) for t in case.groups]
    parts = [{**p, "out": outs[p["group"]], "stats": i} for i, p in enumerate(parts)]
    rows, ins = oracle.table(parts, len(codes)), np.array(codes, np.int32)
    other = rows.copy()
    other[:, 4] += 1  # under this key, the drop would keep other elements
    models, blocks = len(codes) - 1, sum(-(-(p["stop"] - p["start"]) // 1024) for p in parts)
    want = case.expected()
    for isa in ISAS:
        _native.set_isa(isa)
        bits, sums = np.full((blocks, models, 32), 7, np.uint32), np.zeros((len(rows), models, 2))
        _native.l1(rows, ins, *case.keep_args(), sums, bits)
        drawn = sums.copy()
        _native.l1(rows, ins, *case.keep_args(), drawn)
        assert np.array_equal(sums, drawn, equal_nan=True)
        _native.l1(other, ins, *case.keep_args(), drawn, bits, given=True)
        assert np.array_equal(sums, drawn, equal_nan=True), "given, they are taken as they are"
        args = (out, *case.keep_args(), elect, False, 0, 0, case.f, case.scale, np.zeros(len(rows), np.int64))
        _native.consensus(other, ins, *args, bits)
        assert differences(outs, want) == []
        for each in outs:
            each[:] = 0x7F81
    with pytest.raises(ValueError, match="bits"):
        _native.consensus(other, ins, *args, bits[1:])
    other[0, 2] += 8
    with pytest.raises(ValueError, match="tile"):
        _native.consensus(other, ins, *args, bits)


def test_inputs_stay_and_empty_pieces_do_nothing():
    case = Case(61, (3, 3, 3), 3, "drop+index", (1, False, 0, 0), sizes=[4097])
    before = [[x.copy() for x in t] for t in case.groups]
    case.run()
    assert all(
        np.array_equal(a, b) for s, t in zip(before, case.groups, strict=True) for a, b in zip(s, t, strict=True)
    )
    empty = np.zeros((2, 10), np.int64)
    nonfinite = np.zeros(2, np.int64)
    _native.consensus(
        empty, np.array([3, 3, 3], np.int32), 3, *case.keep_args(), 1, False, 0, 0, case.f, case.scale, nonfinite
    )
    assert not nonfinite.any()
