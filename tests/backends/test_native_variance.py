"""Selection by variance: keys, counts, thresholds, sums and merges against plain numpy, on every instruction set."""

import itertools

import numpy as np
import pytest

from fastmerge import _native
from fastmerge.backends.native import NativeKernels
from fastmerge.dtypes import BF16, F16, F32, F64
from fastmerge.ops.kernels import Brackets, Deltas, Found, Keep, Rules, Votes
from fastmerge.ops.segments import Segments
from tests import keep_oracle
from tests.backends.isas import ISAS, using
from tests.backends.test_native_coded import CUTS, KINDS, Pieces
from tests.kernels_numpy import NumpyKernels
from tests.ops.test_coded import SHAPES

TYPES = {0: F64, 1: F32, 2: F16, 3: BF16}
CODES = [(3, 3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 3, 1), (3, 0, 2, 1), (3, 2, 1, 0), (3, 3)]
DATA = ("normal", "zeros", "two", "special", "nans")
ALL = (1 << 62, 0, -1)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with using(request.param):
        yield request.param


def deltas_of(groups, models):
    every = np.full((groups, models), 65536, np.int32)
    return Deltas(-1, False, np.arange(models, dtype=np.int32), every, variance=True)


def tensors(codes, sizes=(1, 33, 1025, 70_001)):
    rng = np.random.default_rng(len(codes))
    return [keep_oracle.make(rng, n, codes, DATA[i % len(DATA)]) for i, n in enumerate(sizes * 2)]


def segments(groups, codes, out=None):
    """The tensors cut at tiles, in another order than theirs."""
    parts, first = [], 0
    for g, inputs in enumerate(groups):
        n = len(inputs[0])
        for start, stop in keep_oracle.pieces(n, [keep_oracle.TILE]):
            stats = first + start // keep_oracle.TILE
            parts.append(
                dict(tensors=inputs, start=start, stop=stop, group=g, stats=stats, out=None if out is None else out[g])
            )
        first += keep_oracle.tiles(n)
    table = keep_oracle.table(parts[::-1], len(codes))
    return Segments(table, tuple(TYPES[c] for c in codes), BF16, np.zeros(len(table), np.int64)), first


def thresholds(groups, codes):
    """One in the middle of each tensor's keys, where ties end in some tile; those of 0 are never cut."""
    kernels = NumpyKernels()
    thr, cut = np.zeros((len(groups), 1), np.uint64), np.full((len(groups), 1, 3), ALL, np.int64)
    for g, inputs in enumerate(groups):
        s, _ = segments([inputs], codes)
        keys = np.empty((len(inputs[0]), 1), np.uint64 if 0 in codes else np.uint32)
        kernels.delta_keys(s, deltas_of(1, len(codes) - 1), keys)
        thr[g] = max(1, np.sort(keys[:, 0])[len(keys) // 2])
        cut[g] = [(0, 3, -1), (1, 1, -1), ALL, (0, 0, -1), (0, 700, -1)][g % 5]
    return thr, cut


def alike(call):
    """Whether a call leaves the same in its arrays, of the extension and of numpy."""
    pairs = zip(call(NativeKernels()), call(NumpyKernels()), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_keys_and_counts(codes):
    groups = tensors(codes)
    s, tiles = segments(groups, codes)
    deltas, key = deltas_of(len(groups), len(codes) - 1), np.uint64 if 0 in codes else np.uint32
    total = sum(len(g[0]) for g in groups)

    def keys(kernels):
        out = np.full((total, 1), 7, key)
        kernels.delta_keys(s, deltas, out)
        return [out]

    assert alike(keys)
    thr, _ = thresholds(groups, codes)
    for low, high in ((thr, thr), (thr, thr * np.uint64(2)), (0 * thr, 0 * thr)):

        def count(kernels, ends=(low, high)):
            counts, used = np.zeros((tiles, 1, 4), np.int64), np.zeros(1, np.int64)
            found = np.zeros((1, total), key), np.zeros((1, total, 2), np.int64)
            kernels.count(s, deltas, Brackets(*ends), Found(counts, *found, used))
            return [counts, *found, used]

        assert alike(count)


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_thresholds_of_whole_tensors(codes):
    groups = tensors(codes, (1, 33, 5000, 4096 * 5))
    rows = [
        keep_oracle.table([dict(tensors=g, start=0, stop=len(g[0]), group=n)], len(codes)) for n, g in enumerate(groups)
    ]
    s = Segments(np.concatenate(rows), tuple(TYPES[c] for c in codes), BF16)
    ranks = np.array([[max(1, len(g[0]) // (3 + n))] for n, g in enumerate(groups)])
    thr, found = np.zeros((len(groups), 1), np.uint64), np.zeros((len(groups), 1, 4), np.int64)
    NativeKernels().kth(s, deltas_of(len(groups), len(codes) - 1), ranks, thr, found)
    wanted, at = np.zeros_like(thr), np.zeros_like(found)
    NumpyKernels().kth(s, deltas_of(len(groups), len(codes) - 1), ranks, wanted, at)
    settled = found[:, 0, 1] > 0
    assert settled.sum() >= len(groups) - 3  # those of one element are not asked, and a sample may miss
    assert np.array_equal(thr[settled], wanted[settled])
    assert np.array_equal(found[settled, 0, :2], at[settled, 0, :2])
    cut = settled & (found[:, 0, 0] < found[:, 0, 1])
    assert np.array_equal(found[cut], at[cut])


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_sums_and_merges_of_what_stays(codes):
    groups, models = tensors(codes), len(codes) - 1
    outs = [np.full(len(g[0]), 7, np.uint16) for g in groups]
    s, tiles = segments(groups, codes, outs)
    keep = Keep(deltas_of(len(groups), models), True, *thresholds(groups, codes))

    def gram(kernels):
        partials = np.full((tiles, models * (models + 1) // 2), 7.0)
        kernels.gram_kept(s, keep, partials)
        return [np.where(np.isnan(partials), np.nan, partials).view(np.uint64)]

    assert alike(gram)
    rng = np.random.default_rng(0)
    for split, elect, merge in itertools.product((False, True), (0, 1), (0, 1)):
        votes = Votes(elect, split, rng.uniform(0.2, 1, (len(groups), models, 3)))
        rules = Rules(votes, 0, merge, np.full((len(groups), 3), (0.7, 1.0, 1.0)))

        def merged(kernels, rules=rules):
            s.nonfinite[:] = 0
            kernels.consensus(s, keep, rules)
            return [*(o.copy() for o in outs), s.nonfinite.copy()]

        assert alike(merged)


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda s: s[0])
def test_coded_inputs(shape, kinds):
    models, key = len(kinds) - 1, np.uint64 if 0 in kinds else np.uint32
    index, bern = np.arange(models, dtype=np.int32), np.full((1, models), 65536, np.int32)
    for cuts in CUTS[:2]:
        pieces = Pieces(shape, kinds, cuts)

        def keys(table, ins, out):
            _native.delta_keys(table, ins, -1, False, index, bern, out.view(key).reshape(-1, 1), True)

        found, plain = pieces.both(keys, pieces.n * key().itemsize)
        assert np.array_equal(found, plain)
        thr = np.sort(found.view(key))[[[pieces.n // 2]]].astype(np.uint64)
        cut = np.full((1, 1, 3), (0, 5, -1), np.int64)
        columns = models * (models + 1) // 2

        def gram(table, ins, out, pieces=pieces, thr=thr, cut=cut, columns=columns):
            partials = out.view(np.float64).reshape(pieces.tiles, columns)
            _native.gram_kept(table, ins, partials, index, bern, thr, cut)

        assert np.array_equal(*pieces.both(gram, 8 * pieces.tiles * columns))

        def merged(table, ins, out, thr=thr, cut=cut):
            table[:, 0] = out.ctypes.data + 2 * table[:, 2]
            f, scale, bad = np.full((1, models, 3), 0.5), np.ones((1, 3)), np.zeros(len(table), np.int64)
            kept = (-1, False, True, index, bern, thr, cut)
            _native.consensus(table, ins, 3, *kept, 1, True, 0, 0, f, scale, bad, None, False, True)

        assert np.array_equal(*pieces.both(merged, 2 * pieces.n))


def test_what_variance_does_not_go_with_is_refused():
    x = np.zeros((3, 64), np.float32)
    table = np.array([[x.ctypes.data, 64, 0, 64, 0, 0, 0, *(v.ctypes.data for v in x)]], np.int64)
    ins, index, bern = np.full(3, 1, np.int32), np.arange(2, dtype=np.int32), np.full((1, 2), 65536, np.int32)
    thr, cut = np.zeros((1, 1), np.uint64), np.full((1, 1, 3), ALL, np.int64)

    def keys(round_code=-1, drop=False, columns=1):
        _native.delta_keys(table, ins, round_code, drop, index, bern, np.zeros((64, columns), np.uint32), True)

    def merge(trim=True, cut=cut, thr=thr):
        rest = (1, True, 0, 0, np.ones((1, 2, 3)), np.ones((1, 3)), np.zeros(1, np.int64), None, False, True)
        _native.consensus(table, ins, 1, -1, False, trim, index, bern, thr, cut, *rest)

    keys()
    merge()
    for wrong, said in (
        (lambda: keys(round_code=3), "no drop and no rounding"),
        (lambda: keys(drop=True), "no drop and no rounding"),
        (lambda: keys(columns=2), r"out: expected shape \[64, 1\]"),
        (lambda: merge(trim=False), "expected a trim"),
        (lambda: merge(cut=np.full((1, 1, 3), (0, 0, 9), np.int64)), "ties that are cut"),
        (lambda: merge(thr=np.zeros((1, 2), np.uint64)), r"thr: expected shape \[1, 1\]"),
        (lambda: _native.gram_kept(table, ins, np.zeros((1, 2)), index, bern, thr, cut), "partials: expected shape"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()
