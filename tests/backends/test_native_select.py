"""Keys, counts and L1 norms of the native kernels against plain numpy, bit by bit, on every instruction set."""

import itertools

import numpy as np
import pytest

from fastmerge import _native
from fastmerge.philox import philox4x32, u16
from tests import keep_oracle as oracle
from tests.backends.isas import ISAS, using

BF16_3 = (3, 3, 3, 3)
DTYPES = [BF16_3, (2, 2, 2), (1, 1, 1), (0, 0), (3, 2, 1), (2, 3, 3, 1), (1, 0, 3, 2), (0, 3)]
SIZES = [1, 7, 1023, 4096, 65_536, 70_001, 131_073]
KINDS = ["normal", "zeros", "nans", "equal", "two", "special"]


@pytest.fixture(autouse=True)
def restore():
    """The expected values take longer than the kernels, so each test has them once and tries every instruction set."""
    with using(_native.isa()):
        yield


def keys_type(codes):
    return np.uint64 if 0 in codes else np.uint32


def arguments(rng, groups, models, drop):
    index = rng.permutation(models).astype(np.int32) + 2
    bern = rng.choice([0, 1, 13107, 32768, 65535, 65536], (groups, models)).astype(np.int32)
    return index, bern if drop else np.zeros_like(bern)


def tensors_of(rng, codes, kinds=KINDS, sizes=SIZES):
    return [oracle.make(rng, n, codes, kinds[i % len(kinds)]) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("isa", ISAS)
def test_philox_lanes_and_words(isa):
    _native.set_isa(isa)
    for key, model, op, e0, n in [
        (0, 0, 0, 0, 1),
        (2**64 - 1, 3, 2, 5, 4099),
        (77, 2**31, 1, 2**35 - 9, 2000),
        (1, 0, 0, 2**40 + 1, 70_000),
    ]:
        assert np.array_equal(_native.philox_u16(key, model, op, e0, n), u16(key, model, op, e0, n))
    rng = np.random.default_rng(0)
    for _ in range(20):
        c, k = rng.integers(0, 2**32, 4, np.uint32), rng.integers(0, 2**32, 2, np.uint32)
        assert np.array_equal(_native.philox4x32(c, k), philox4x32(c, k))
    known = _native.philox4x32(np.zeros(4, np.uint32), np.zeros(2, np.uint32))
    assert [f"{w:08x}" for w in known] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("codes", DTYPES, ids=str)
@pytest.mark.parametrize(("round_code", "drop"), [(-1, False), (3, True), (2, False), (1, True)])
def test_delta_keys(codes, round_code, drop):
    rng = np.random.default_rng(1)
    groups = tensors_of(rng, codes)
    models = len(codes) - 1
    index, bern = arguments(rng, len(groups), models, drop)
    parts, want = [], []
    for g, tensors in enumerate(groups):
        key, e0 = 2**63 + 11 * g, [0, 8 * 1021 + 3, 2**36][g % 3]
        _, ds = oracle.deltas(tensors, codes, round_code)
        if drop:
            ds = [oracle.dropped(d, key, int(index[i]), bern[g, i], e0) for i, d in enumerate(ds)]
        columns = np.stack([oracle.keys(d) for d in ds], axis=1)
        n = len(tensors[0])
        for start, stop in oracle.pieces(n, [n // 3, n // 2 + 1]):
            parts.append({"tensors": tensors, "start": start, "stop": stop, "e0": e0, "key": key, "group": g})
            want.append(columns[start:stop])
    order = rng.permutation(len(parts))
    want = np.concatenate([want[i] for i in order])
    rows = oracle.table([parts[i] for i in order], len(codes))
    for isa in ISAS:
        _native.set_isa(isa)
        out = np.full((len(want), models), 7, keys_type(codes))
        _native.delta_keys(rows, np.array(codes, np.int32), round_code, drop, index, bern, out)
        assert np.array_equal(out, want), isa


def brackets(rng, columns, shape):
    """A bracket per model, of every kind that occurs: usual, one key, empty, everything, beyond all keys."""
    lo, hi = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)
    for g, i in itertools.product(*map(range, shape)):
        k = np.sort(columns[g][:, i].astype(np.uint64))
        a, b = np.sort(rng.integers(0, len(k), 2))
        lo[g, i], hi[g, i] = [
            (k[a], k[b]),
            (k[a], k[a]),
            (k[len(k) // 2], k[min(len(k) - 1, len(k) // 2 + len(k) // 50)]),
            (0, k[-1]),
            (0, 2**64 - 1),
            (2**63, 2**63 + 5),
            (0, 0),
            (k[-1], k[-1] + np.uint64(1)),
        ][rng.integers(8)]
    return lo, hi


def count_oracle(k, lo, hi, n):
    rows = []
    k = k.astype(np.uint64)
    for at in range(0, n, oracle.TILE):
        t = k[at : at + oracle.TILE]
        rows.append([(t > hi).sum(), (t == hi).sum(), 0 if lo == hi else (t == lo).sum(), ((t > lo) & (t < hi)).sum()])
    return rows


@pytest.mark.parametrize("codes", DTYPES, ids=str)
@pytest.mark.parametrize(("round_code", "drop", "seed"), [(-1, False, 0), (3, True, 1), (2, True, 0)])
def test_count(codes, round_code, drop, seed):
    rng = np.random.default_rng([2, seed])
    groups = tensors_of(rng, codes, KINDS[seed:] + KINDS[:seed])
    models = len(codes) - 1
    index, bern = arguments(rng, len(groups), models, drop)
    columns = []
    for g, tensors in enumerate(groups):
        _, ds = oracle.deltas(tensors, codes, round_code)
        if drop:
            ds = [oracle.dropped(d, 9 + g, int(index[i]), bern[g, i], 0) for i, d in enumerate(ds)]
        columns.append(np.stack([oracle.keys(d) for d in ds], axis=1))
    lo, hi = brackets(rng, columns, (len(groups), models))

    parts, first, total = [], [], 0
    for g, tensors in enumerate(groups):
        n = len(tensors[0])
        first.append(total)
        for start, stop in oracle.pieces(n, [oracle.TILE, 2 * oracle.TILE] if g % 2 else []):
            part = {"tensors": tensors, "start": start, "stop": stop, "key": 9 + g, "group": g}
            parts.append({**part, "stats": total + start // oracle.TILE})
        total += oracle.tiles(n)
    parts = [parts[i] for i in rng.permutation(len(parts))]

    def run(parts, cap):
        counts = np.full((total, models, 4), -1, np.int64)
        keys, where = np.zeros((models, cap), keys_type(codes)), np.full((models, cap, 2), -1, np.int64)
        used = np.zeros(models, np.int64)
        ins = np.array(codes, np.int32)
        for chunk in parts:
            rows = oracle.table(chunk, len(codes))
            _native.count(rows, ins, round_code, drop, index, bern, lo, hi, counts, keys, where, used)
        return counts, keys, where, used

    size = sum(len(c) for c in columns)
    tiles = [[count_oracle(k[:, i], lo[g, i], hi[g, i], len(k)) for i in range(models)] for g, k in enumerate(columns)]
    listed = []
    for i in range(models):
        inside = [np.flatnonzero((k[:, i] > lo[g, i]) & (k[:, i] < hi[g, i])) for g, k in enumerate(columns)]
        some = [[np.full(len(e), g), e, columns[g][e, i].astype(np.int64)] for g, e in enumerate(inside)]
        listed.append(np.concatenate([np.stack(three, axis=1) for three in some]))
    for isa in ISAS:
        _native.set_isa(isa)
        counts, keys, where, used = run([parts], size)
        for g, i in itertools.product(range(len(columns)), range(models)):
            want = tiles[g][i]
            assert counts[first[g] : first[g] + len(want), i].tolist() == want, (isa, g, i, lo[g, i], hi[g, i])
        for i, want in enumerate(listed):
            found = np.column_stack([where[i], keys[i].astype(np.int64)])[: used[i]]
            assert np.array_equal(found[np.lexsort(found[:, 1::-1].T)], want)
            assert (where[i, used[i] :] == -1).all()

        # One piece at a time, and a buffer that is too small: the counts stay, what fits is the same.
        again = run([[p] for p in parts], size)
        assert all(np.array_equal(a, b) for a, b in zip(again, (counts, keys, where, used), strict=True))
        cap = int(used.max()) // 3
        small = run([parts], cap)
        assert np.array_equal(small[0], counts)
        assert np.array_equal(small[3], used)
        assert np.array_equal(small[1], keys[:, :cap])
        assert np.array_equal(small[2], where[:, :cap])


@pytest.mark.parametrize("codes", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("drop", "trim", "spread", "round_code"),
    [(False, False, False, -1), (True, False, False, 3), (False, True, False, 3), (True, True, True, -1)],
)
def test_l1(codes, drop, trim, spread, round_code):
    rng = np.random.default_rng(3)
    groups = tensors_of(rng, codes)
    models = len(codes) - 1
    index, bern = arguments(rng, len(groups), models, drop)
    thr, cut = np.zeros((len(groups), models), np.uint64), np.zeros((len(groups), models, 3), np.int64)
    want, parts, total = [], [], 0
    for g, tensors in enumerate(groups):
        key, n = 2**63 + g, len(tensors[0])
        _, ds = oracle.deltas(tensors, codes, round_code)
        for i, d in enumerate(ds):
            thr[g, i] = np.sort(oracle.keys(d))[int(0.7 * n)]
            cut[g, i] = [rng.integers(0, 3), rng.integers(0, 40_000), rng.integers(0, 65_537) if spread else -1]
        p = {"drop": drop, "trim": trim, "index": index, "bern": bern[g], "thr": thr[g], "cut": cut[g]}
        ks = oracle.kept(ds, p, key)
        columns = [
            np.stack([oracle.tile_sums(np.abs(d)), oracle.tile_sums(np.abs(k))], -1)
            for d, k in zip(ds, ks, strict=True)
        ]
        want.append(np.stack(columns, axis=1))
        for start, stop in oracle.pieces(n, [oracle.TILE]):
            part = {"tensors": tensors, "start": start, "stop": stop, "key": key, "group": g}
            parts.append({**part, "stats": total + start // oracle.TILE})
        total += oracle.tiles(n)
    rows, expected = oracle.table(parts[::-1], len(codes)), oracle.stored(np.concatenate(want), 0)
    for isa in ISAS:
        _native.set_isa(isa)
        sums = np.full((total, models, 2), np.nan)
        _native.l1(rows, np.array(codes, np.int32), round_code, drop, trim, index, bern, thr, cut, sums)
        assert np.array_equal(sums.view(np.uint64), expected), isa


@pytest.mark.parametrize("isa", ISAS)
def test_pieces_must_start_where_a_tile_does(isa):
    _native.set_isa(isa)
    tensors = oracle.make(np.random.default_rng(4), 5000, (3, 3))
    rows = oracle.table([{"tensors": tensors, "start": 0, "stop": 5000, "e0": 4096}], 2)
    index, bern = np.zeros(1, np.int32), np.zeros((1, 1), np.int32)
    one = np.zeros((1, 1), np.uint64)
    with pytest.raises(ValueError, match="tile"):
        _native.count(
            rows,
            np.array([3, 3], np.int32),
            -1,
            False,
            index,
            bern,
            one,
            one,
            np.zeros((1, 1, 4), np.int64),
            np.zeros((1, 1), np.uint32),
            np.zeros((1, 1, 2), np.int64),
            np.zeros(1, np.int64),
        )


@pytest.mark.parametrize("codes", DTYPES, ids=str)
@pytest.mark.parametrize(("round_code", "drop"), [(-1, False), (3, True), (2, False)])
def test_kth(codes, round_code, drop):
    rng = np.random.default_rng(5)
    groups = tensors_of(rng, codes, sizes=[*SIZES, 9_000, 300_000, 81_920, 0, 64, 3000, 4095, 4096])
    models = len(codes) - 1
    index, bern = arguments(rng, len(groups), models, drop)
    ranks = np.zeros((len(groups), models), np.int64)
    want = {}
    for g, tensors in enumerate(groups):
        n = len(tensors[0])
        _, ds = oracle.deltas(tensors, codes, round_code)
        if drop:
            ds = [oracle.dropped(d, 9 + g, int(index[i]), bern[g, i], 0) for i, d in enumerate(ds)]
        for i, d in enumerate(ds):
            k = oracle.keys(d)
            r = ranks[g, i] = int(rng.choice([0, 1, n // 1000, n // 5, n // 2, n - 1, n]))
            if not 0 < r < n:
                continue
            at = np.sort(k)[n - r]
            ties = np.flatnonzero(k == at)
            keep = r - int((k > at).sum())
            tile = int(ties[keep]) // oracle.TILE if keep < len(ties) else -1
            want[g, i] = (int(at), keep, len(ties), tile, int((ties[:keep] // oracle.TILE == tile).sum()))
    whole = [
        {"tensors": t, "start": 0, "stop": len(t[0]), "e0": 0, "key": 9 + g, "group": g} for g, t in enumerate(groups)
    ]
    rows = oracle.table([whole[i] for i in rng.permutation(len(whole))], len(codes))
    for isa in ISAS:
        _native.set_isa(isa)
        thr = np.zeros((len(groups), models), np.uint64)
        found = np.zeros((len(groups), models, 4), np.int64)
        _native.kth(rows, np.array(codes, np.int32), round_code, drop, index, bern, ranks, thr, found)
        settled = {(int(g), int(i)) for g, i in np.argwhere(found[:, :, 1] > 0)}
        assert settled <= set(want)
        for g, i in settled:
            keep, tied, tile, rank = (int(x) for x in found[g, i])
            at, *expected = want[g, i]
            assert int(thr[g, i]) == at, isa
            assert [keep, tied] == expected[:2]
            assert keep == tied or [tile, rank] == expected[2:]
        assert {q for q in want if len(groups[q[0]][0]) >= 70_001} <= settled, "the bracket misses one in 16,000"
        assert {q for q in want if len(groups[q[0]][0]) < 4096} <= settled, "these are taken whole"
        assert not thr[found[:, :, 1] == 0].any()
    rows[0, 2] = 65_536
    with pytest.raises(ValueError, match="whole tensor"):
        _native.kth(rows, np.array(codes, np.int32), round_code, drop, index, bern, ranks, thr, found)
