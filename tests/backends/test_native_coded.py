"""Kernels of coded inputs: what they write is what they write for the same values in fp32, on every instruction set."""

import itertools

import numpy as np
import pytest

from fastmerge import _native
from fastmerge.backends.native import CODED
from fastmerge.ops.made import array
from tests.backends.isas import ISAS, using
from tests.ops.test_coded import SHAPES, coded, dense, weights

TILE = 65_536


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with using(request.param):
        yield request.param


class Pieces:
    """Pieces of a tensor whose inputs are coded where ``kinds`` says so, beside the same in fp32."""

    def __init__(self, shape, kinds, cuts):
        self.sources = [weights(*shape, seed) for seed in range(len(kinds))]
        flat = [dense(s) for s in self.sources]
        n = len(flat[0])
        edges = sorted({0, n, *(c for c in cuts if c < n)})
        self.n, self.keep, self.kinds = n, [flat], kinds
        rows = [[], []]
        for a, b in itertools.pairwise(edges):
            given = []
            for source, kind, x in zip(self.sources, kinds, flat, strict=True):
                value = coded(source, a, b - a) if kind == CODED else x[a:b]
                if kind in (0, 3):
                    value = x[a:b].astype(np.float64) if kind == 0 else (x[a:b].view(np.uint32) >> 16).astype(np.uint16)
                given.append(value)
            plain = [
                g if k != CODED else x[a:b].copy() for g, k, x in zip(given, kinds, flat, strict=True)
            ]  # bf16 and fp64 inputs are the same on both sides
            self.keep += [given, plain]
            for to, inputs in zip(rows, (given, plain), strict=True):
                to.append([0, b - a, a, n, 77, 0, a // TILE, *(i.ctypes.data for i in inputs)])
        self.tables = [np.array(r, np.int64) for r in rows]
        self.ins = [np.array(kinds, np.int32), np.array([1 if k == CODED else k for k in kinds], np.int32)]
        self.tiles = -(-n // TILE)

    def both(self, call, size):
        """What ``call(table, ins, out)`` leaves in ``size`` zeroed bytes, with coded inputs and without."""
        found = []
        for table, ins in zip(self.tables, self.ins, strict=True):
            out = np.zeros(size, np.uint8)
            call(table.copy(), ins, out)
            found.append(out)
        return found


CUTS = [(), (TILE,), (TILE,)]
KINDS = [(4, 4, 4), (4, 3, 4), (1, 4, 3), (4, 0, 4), (0, 4, 4)]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_combine(shape, kinds):
    pieces = Pieces(shape, kinds, (5, 1029, 70_000))
    for delta, (out_code, wide), per_row in itertools.product(
        (False, True), ((1, False), (3, False), (1, True)), (False, True)
    ):
        size = 4 if out_code == 1 else 2
        rows = pieces.n // shape[3] if per_row else 1
        coef = np.random.default_rng(0).normal(0.4, 1, (rows, len(kinds)))
        scale = np.stack([np.full(rows, 0.7), np.linspace(1, 3, rows)], 1)

        def call(table, ins, out, how=(delta, per_row), code=out_code, wide=wide, coef=coef, scale=scale, size=size):
            table[:, 0] = out.ctypes.data + size * table[:, 2]
            if how[1]:
                table[:, 3] = shape[3]
            bad = np.zeros(len(table), np.int64)
            _native.combine(table, ins, code, coef, scale, *how, bad, False, wide)
            out[-8:] = np.array([bad.sum()]).view(np.uint8)

        assert np.array_equal(*pieces.both(call, pieces.n * size + 8))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_sums_and_selection(shape, kinds):
    models = len(kinds) - 1
    key = np.uint64 if 0 in kinds else np.uint32
    index, bern = np.arange(models, dtype=np.int32), np.full((1, models), 40_000, np.int32)
    for cuts, drop in zip(CUTS, (False, True, False), strict=True):
        pieces = Pieces(shape, kinds, cuts)

        def gram(table, ins, out, pieces=pieces):
            columns = models * (models + 1) // 2 + 1
            _native.gram(table, ins, out.view(np.float64).reshape(pieces.tiles, columns), True, True, False)

        assert np.array_equal(*pieces.both(gram, 8 * pieces.tiles * (models * (models + 1) // 2 + 1)))

        def keys(table, ins, out, drop=drop):
            _native.delta_keys(table, ins, -1, drop, index, bern, out.view(key).reshape(-1, models))

        found, plain = pieces.both(keys, pieces.n * models * key().itemsize)
        assert np.array_equal(found, plain)
        found = found.view(key).reshape(-1, models)
        ordered = np.sort(found, axis=0)
        lo, hi = (ordered[[int(pieces.n * q)]].astype(np.uint64) for q in (0.5, 0.52))
        counts, cap = 8 * pieces.tiles * models * 4, pieces.n

        def count(table, ins, out, drop=drop, lo=lo, hi=hi, counts=counts, cap=cap, pieces=pieces):
            size = models * cap * key().itemsize
            where = np.zeros((models, cap, 2), np.int64)
            used = np.zeros(models, np.int64)
            _native.count(
                *(table, ins, -1, drop, index, bern, lo, hi),
                out[:counts].view(np.int64).reshape(pieces.tiles, models, 4),
                out[counts : counts + size].view(key).reshape(models, cap),
                where,
                used,
            )
            assert used.any()
            out[counts + size :] = where.reshape(-1).view(np.uint8)

        assert np.array_equal(*pieces.both(count, counts + models * cap * (key().itemsize + 16)))
        thr, cut = lo, np.full((1, models, 3), (1, 5, -1), np.int64)

        def l1(table, ins, out, drop=drop, thr=thr, cut=cut, pieces=pieces):
            sums = out.view(np.float64).reshape(pieces.tiles, models, 2)
            for trim in (True, False):
                before = sums.copy()
                _native.l1(table, ins, -1, drop, trim, index, bern, thr, cut, sums, None, False)
                sums += before

        assert np.array_equal(*pieces.both(l1, 16 * pieces.tiles * models))

        def votes(table, ins, out, drop=drop, thr=thr, cut=cut, pieces=pieces):
            f = np.full((1, models, 3), 0.5)
            counts = out.view(np.int64).reshape(pieces.tiles, 2)
            _native.votes(table, ins, -1, drop, True, index, bern, thr, cut, 1, False, f, counts)

        assert np.array_equal(*pieces.both(votes, 16 * pieces.tiles))


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_consensus(shape, kinds):
    models = len(kinds) - 1
    index, bern = np.arange(models, dtype=np.int32), np.full((1, models), 40_000, np.int32)
    rng = np.random.default_rng(1)
    f, scale = rng.normal(0.4, 0.5, (1, models, 3)), np.array([[0.9, 1.0, 1.0]])
    pieces = Pieces(shape, kinds, (TILE,))
    modes = [(0, False, 0, 0), (1, False, 0, 0), (1, True, 1, 1), (2, False, 2, 2)]
    for (mode, keep), out_code in zip(itertools.product(modes, ("", "drop", "trim")), itertools.cycle((1, 3))):
        size = 4 if out_code == 1 else 2
        thr = np.full((1, models), np.float32(0.5).view(np.uint32), np.uint64)
        if 0 in kinds:
            thr[:] = np.float64(0.5).view(np.uint64)
        cut = np.full((1, models, 3), (1, 5, -1), np.int64)

        def call(table, ins, out, mode=mode, keep=keep, code=out_code, size=size, thr=thr, cut=cut):
            table[:, 0] = out.ctypes.data + size * table[:, 2]
            bad = np.zeros(len(table), np.int64)
            kept = (-1, keep == "drop", keep == "trim", index, bern, thr, cut)
            _native.consensus(table, ins, code, *kept, *mode, f, scale, bad, None)
            out[-8:] = np.array([bad.sum()]).view(np.uint8)

        assert np.array_equal(*pieces.both(call, pieces.n * size + 8))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s[0])
def test_thresholds_of_whole_tensors(shape):
    pieces = Pieces(shape, (4, 4, 4), ())
    index, bern = np.arange(2, dtype=np.int32), np.zeros((1, 2), np.int32)

    def call(table, ins, out):
        thr, found = out[:16].view(np.uint64).reshape(1, 2), out[16:].view(np.int64).reshape(1, 2, 4)
        ranks = np.array([[pieces.n // 2, pieces.n // 5]])
        _native.kth(table, ins, -1, False, index, bern, ranks, thr, found)
        assert thr.all()

    assert np.array_equal(*pieces.both(call, 16 + 64))


def test_what_does_not_fit_is_refused():
    source = weights(*SHAPES[0], 0)
    room = coded(source, 0, 4096)
    table = np.array([[room.ctypes.data, 4096, 0, 4096, 0, 0, 0, room.ctypes.data]], np.int64)
    out = np.zeros(4096, np.float32)
    table[:, 0] = out.ctypes.data

    def call(ins=(CODED,)):
        _native.combine(
            table, np.array(ins, np.int32), 1, np.ones((1, 1)), np.ones((1, 2)), False, False, np.zeros(1, np.int64)
        )

    call()
    words = array(room.ctypes.data, 12, np.int64)
    for field, wrong in enumerate((100, 1, 10, 8, -4, 1, -1, 0, 0, 0, 0, 5)):
        kept = words[field]
        words[field] = wrong
        with pytest.raises(ValueError, match="coded input"):
            call()
        words[field] = kept
    table[:, 2] = 1
    with pytest.raises(ValueError, match="begins or ends inside the piece"):
        call()
    with pytest.raises(ValueError, match="type code"):
        _native.dot(
            np.concatenate([table, table[:, 7:], table[:, 7:]], 1), np.array([4, 4, 4], np.int32), np.zeros((1, 1))
        )
