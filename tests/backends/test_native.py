"""combine, gram and fold of the extension against numpy and torch, bit by bit, on every instruction set."""

import numpy as np
import pytest
import torch

from fastmerge import _native
from tests.backends.isas import ISAS, using
from tests.kernels_numpy import STORED, store, tile_sum, widen

TILE = 65_536
DTYPES = [(3,), (2,), (1,), (0,), (3, 1, 2), (1, 3, 3), (0, 3, 1, 2), (3, 3, 2, 2, 1, 1)]
TORCH = {0: torch.float64, 1: torch.float32, 2: torch.float16, 3: torch.bfloat16}


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    """One of them; or all, for a test whose expected values take longer than the kernels."""
    with using(request.param if isinstance(request.param, str) else ISAS[0]):
        yield request.param


each_isa_in_turn = pytest.mark.parametrize("isa", [ISAS], ids="-".join, indirect=True)


def values(code, n, rng, special=True):
    """n stored values: normal ones, and with ``special`` every kind of odd one among them; of many a prime repeats."""
    if n > 1 << 20:
        return np.resize(values(code, 65_537, rng, special), n)
    x = store(rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3, n), code)
    if special and n > 4:
        raw = rng.integers(0, 2**64, n, np.uint64).astype({8: np.uint64, 4: np.uint32, 2: np.uint16}[x.itemsize])
        x = np.where(rng.random(n) < 0.05, raw.view(x.dtype), x)
        odd = [np.nan, -np.nan, np.inf, -np.inf, -0.0, 0.0, 1e-45, -1e-40, 6e-8, 3e-6, 65504.0, 3e38]
        some = store(np.array(odd, np.float32), code)
        at = rng.integers(0, n, min(n // 4, 40))
        x[at] = some[np.arange(len(at)) % len(some)]
    return x


def bits(x):
    return x.view({8: np.uint64, 4: np.uint32, 2: np.uint16}[x.itemsize])


class Batch:
    """Pieces of tensors at odd (element) alignment, and their table."""

    def __init__(self, codes, sizes, out_code, rng, *, row=None, special=True, e0=0):
        self.codes, self.out_code, self.row = codes, out_code, row
        self.work = np.float64 if 0 in codes else np.float32
        self.inputs = [[values(c, n + 3, rng, special)[3:] for c in codes] for n in sizes]
        self.outputs = [np.full(n + 2, -7, np.float64).astype(STORED[out_code]) for n in sizes]
        self.table = np.zeros((len(sizes), 7 + len(codes)), np.int64)
        self.ins = np.array(codes, np.int32)
        stats = 0
        for s, n in enumerate(sizes):
            self.table[s, :7] = (self.outputs[s][1:].ctypes.data, n, e0, row or n, 0, s, stats)
            self.table[s, 7:] = [x.ctypes.data for x in self.inputs[s]]
            stats += n
        self.nonfinite = np.zeros(len(sizes), np.int64)

    def x(self, s):
        return [widen(v, c, self.work) for v, c in zip(self.inputs[s], self.codes, strict=True)]


def combined(x, c, lam, div, delta):
    """The written order, one operation at a time; c, lam, div are scalars or arrays of the work type."""
    acc = None
    for i in range(1 if delta else 0, len(x)):
        v = c[i] * ((x[i] - x[0]) if delta else x[i])
        acc = v if acc is None else acc + v
    if np.any(div != 1):
        acc = acc / div
    return x[0] + lam * acc if delta else acc


@each_isa_in_turn
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("kinds", DTYPES, ids=str)
def test_combine(isa, kinds, delta):
    rng = np.random.default_rng(len(kinds) + delta)
    for m in (2, 3, 4, 5, 9) if delta else (1, 2, 3, 4, 5, 8, 9):
        codes = tuple((kinds * 9)[:m])
        for out_code in range(4):
            sizes = [1, 0, 15, 16, 1023, 1025, 8192 + 16 + 9]
            b = Batch(codes, sizes, out_code, rng)
            coef = rng.standard_normal((len(sizes), m))
            some = rng.random((len(sizes), 2)) < 0.5
            scale = np.where(some, 1.0, np.stack([rng.random(len(sizes)), np.full(len(sizes), 3.0)], 1))
            numbers = [(coef[s].astype(b.work), *scale[s].astype(b.work)) for s in range(len(sizes))]
            wanted = [store(combined(b.x(s), *three, delta), out_code) for s, three in enumerate(numbers)]
            for name in isa:
                with using(name):
                    _native.combine(b.table, b.ins, out_code, coef, scale, delta, False, b.nonfinite)
                for s, expected in enumerate(wanted):
                    got = b.outputs[s]
                    assert np.array_equal(bits(got[1:-1]), bits(expected)), (name, codes, out_code, sizes[s])
                    assert (got[0], got[-1]) == (np.array(-7.0).astype(got.dtype),) * 2  # nothing beside it was touched
                    assert b.nonfinite[s] == (~np.isfinite(widen(expected, out_code, np.float64))).sum()
                    got[:] = np.array(-7.0).astype(got.dtype)
                b.nonfinite[:] = 0


@pytest.mark.parametrize("kinds", [(1,), (3,), (1, 3)], ids=str)
@pytest.mark.parametrize("delta", [False, True])
def test_combine_in_fp64(kinds, delta):
    rng = np.random.default_rng(len(kinds) + 2 * delta)
    sizes = [0, 1, 17, 8192, 20_001]
    for m in (1, 2, 3, 4, 5) if not delta else (2, 5):
        for out_code in (1, 3):
            b = Batch((kinds * 5)[:m], sizes, out_code, rng)
            b.work = np.float64
            coef = rng.standard_normal((len(sizes), m))
            scale = np.stack([np.full(len(sizes), 0.7), [1.0, 3.0, 1.0, 0.3, 7.0]], 1)
            _native.combine(b.table, b.ins, out_code, coef, scale, delta, False, b.nonfinite, False, True)
            for s in range(len(sizes)):
                expected = store(combined(b.x(s), coef[s], *scale[s], delta), out_code)
                assert np.array_equal(bits(b.outputs[s][1:-1]), bits(expected)), (m, out_code, sizes[s])
                assert b.nonfinite[s] == (~np.isfinite(widen(expected, out_code, np.float64))).sum()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("count", [16, 64, 65])
def test_combine_of_many(count, delta):
    rng = np.random.default_rng(count)
    for code in (1, 3):
        b = Batch((code,) * count, [9001], code, rng)
        coef = rng.standard_normal((1, count))
        _native.combine(b.table, b.ins, code, coef, np.array([[0.5, 3.0]]), delta, False, b.nonfinite)
        lam, div = b.work(0.5), b.work(3.0)
        expected = store(combined(b.x(0), coef[0].astype(b.work), lam, div, delta), code)
        assert np.array_equal(bits(b.outputs[0][1:-1]), bits(expected))


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("code", [1, 2, 3])
def test_combine_that_is_called_far(code, far, delta):
    rng = np.random.default_rng(code)
    for m in (2, 3, 4, 5, 6):
        for size in (0, 1, 31, 64, 1024, 5000):
            b = Batch((code,) * m, [size, size], code, rng)
            count = 5
            table = b.table[[0, 0, 0, 1, 1]].copy()
            table[:, 5] = np.arange(count)
            outs = [np.full(size + 64, -7.0).astype(b.outputs[0].dtype) for _ in range(count)]
            at = [-o.ctypes.data % 64 // o.itemsize + (i == 1) for i, o in enumerate(outs)]  # one is not aligned
            table[:, 0] = [o.ctypes.data + a * o.itemsize for o, a in zip(outs, at, strict=True)]
            coef = rng.standard_normal((count, m))
            scale = np.stack([np.array([1, 0.5, 1, 2, 1.0]), np.array([1, 1, 3, 7, 1.0])], 1)
            found = np.zeros(count, np.int64)
            _native.combine(table, b.ins, code, coef, scale, delta, False, found, far)
            for i, (out, start) in enumerate(zip(outs, at, strict=True)):
                got = out.copy()
                out[:] = np.array(-7.0).astype(out.dtype)
                alone = np.zeros(1, np.int64)
                _native.combine(table[i : i + 1].copy(), b.ins, code, coef, scale, delta, False, alone)
                assert np.array_equal(bits(got), bits(out)), (m, size, i)
                assert found[i] == alone[0]
                assert size == 0 or bits(got)[start] != bits(np.array([-7.0]).astype(got.dtype))[0]


def test_combine_of_many_past_the_cache():
    size, count = (8 << 20) // 2 + 77, 9
    b = Batch((3,) * count, [size], 3, np.random.default_rng(3))
    coef, ones = np.linspace(-1, 1, count)[None], np.ones((1, 2))
    _native.combine(b.table, b.ins, 3, coef, ones, False, False, b.nonfinite)
    far = b.outputs[0].copy()
    for e0 in range(0, size, 1 << 20):
        piece = b.table.copy()
        piece[:, 1] = min(1 << 20, size - e0)
        piece[:, [0, *range(7, 7 + count)]] += 2 * e0
        _native.combine(piece, b.ins, 3, coef, ones, False, False, b.nonfinite)
    assert np.array_equal(bits(b.outputs[0]), bits(far))


def test_combine_equals_torch():
    rng = np.random.default_rng(5)
    for code in range(4):
        b = Batch((code,) * 3, [4097], code, rng)
        coef, scale = np.array([[0.3, -0.5, 1.1]]), np.array([[1.0, 3.0]])
        _native.combine(b.table, b.ins, code, coef, scale, False, False, b.nonfinite)
        work = TORCH[0 if code == 0 else 1]
        stored = [torch.from_numpy(v.copy()).view(TORCH[code]).to(work) for v in b.inputs[0]]
        c = torch.tensor(coef[0], dtype=work)
        want = ((c[0] * stored[0] + c[1] * stored[1] + c[2] * stored[2]) / 3.0).to(TORCH[code])
        got = torch.from_numpy(b.outputs[0][1:-1].copy()).view(TORCH[code])
        nan = torch.isnan(want)
        assert torch.equal(nan, torch.isnan(got))
        assert torch.equal(got[~nan].view(torch.uint8), want[~nan].view(torch.uint8))


@each_isa_in_turn
@pytest.mark.parametrize(
    ("code", "delta", "scale"),
    [(3, False, (1, 1)), (3, True, (1, 1)), (3, True, (0.7, 1)), (2, False, (1, 3)), (1, True, (0.7, 3))],
)
def test_combine_past_the_caches(isa, code, delta, scale):
    rng = np.random.default_rng(code)
    n = (9 << 20) // (4 if code == 1 else 2) + 37  # large outputs are streamed, from an address that is not aligned
    b = Batch((code,) * 3, [n], code, rng)
    coef = np.array([[0.25, -1.5, 0.3]])
    lam, div = np.array(scale, b.work)
    expected = store(combined(b.x(0), coef[0].astype(b.work), lam, div, delta), code)
    for name in isa:
        got = b.outputs[0]
        got[:] = np.array(-7.0).astype(got.dtype)
        b.nonfinite[:] = 0
        with using(name):
            _native.combine(b.table, b.ins, code, coef, np.array([scale], np.float64), delta, False, b.nonfinite)
        assert np.array_equal(bits(got[1:-1]), bits(expected)), name
        assert (got[0], got[-1]) == (np.array(-7.0).astype(got.dtype),) * 2
        assert b.nonfinite[0] == (~np.isfinite(widen(expected, code, np.float64))).sum()


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("row", [1, 5, 16, 100])
def test_combine_by_row_from_the_middle_of_a_row(row, delta):
    rng = np.random.default_rng(row)
    e0, n = 3 * row + row // 2, 777
    b = Batch((3, 3, 1), [n], 3, rng, row=row, e0=e0)
    rows = (e0 + np.arange(n)) // row
    coef, scale = rng.standard_normal((rows[-1] + 1, 3)), rng.random((rows[-1] + 1, 2)) + 0.5
    _native.combine(b.table, b.ins, 3, coef, scale, delta, True, b.nonfinite)
    c, (lam, div) = coef[rows].astype(np.float32).T, scale[rows].astype(np.float32).T
    expected = store(combined(b.x(0), c, lam, div, delta), 3)
    assert np.array_equal(b.outputs[0][1:-1], expected)


def test_combine_in_place_and_base_alone():
    rng = np.random.default_rng(1)
    b = Batch((3, 3), [5000], 3, rng)
    coef, scale = np.array([[0.5, 0.5]]), np.ones((1, 2))
    expected = store(combined(b.x(0), np.float32([0.5, 0.5]), np.float32(1), np.float32(1), False), 3)
    b.table[0, 0] = b.table[0, 8]
    _native.combine(b.table, b.ins, 3, coef, scale, False, False, b.nonfinite)
    assert np.array_equal(b.inputs[0][1], expected)
    only = Batch((3,), [100], 3, rng, special=False)
    _native.combine(only.table, only.ins, 3, np.ones((1, 1)), np.ones((1, 2)), True, False, only.nonfinite)
    assert np.array_equal(only.outputs[0][1:-1], only.inputs[0][0])


def grams(x, delta, diff, row):
    v = [a - x[0] for a in x[1:]] if delta else x
    n = len(x[0])
    tiles = [(t, min(t + TILE, r + row, n)) for r in range(0, n, row) for t in range(r, min(r + row, n), TILE)]
    out = []
    for a, z in tiles:
        sums = [tile_sum(v[i][a:z] * v[j][a:z]) for i in range(len(v)) for j in range(i, len(v))]
        if diff:
            d = v[0][a:z] - v[1][a:z]
            sums.append(tile_sum(d * d))
        out.append(sums)
    return np.array(out)


@each_isa_in_turn
@pytest.mark.parametrize("kinds", DTYPES, ids=str)
def test_gram(isa, kinds):
    rng = np.random.default_rng(len(kinds))
    for m, delta, diff in [
        (1, False, False),
        (2, False, True),
        (2, True, False),
        (3, True, True),
        (3, False, False),
        (5, False, True),
        (7, True, True),
        (8, False, False),
    ]:
        sizes = [1, 300, 2048, 0, 65_536 if m % 2 else 70_007, 4097]
        b = Batch(tuple((kinds * 9)[:m]), sizes, 1, rng, special=False)
        pairs = (m - delta) * (m - delta + 1) // 2 + diff
        b.table[:, 6] = np.cumsum([0] + [-(-n // TILE) for n in sizes[:-1]])
        expected = np.concatenate([grams(b.x(s), delta, diff, n) for s, n in enumerate(sizes) if n])
        for name in isa:
            partials = np.full((len(expected), pairs), np.nan)
            with using(name):
                _native.gram(b.table, b.ins, partials, delta, diff, False)
            assert np.array_equal(partials, expected), (name, m, delta, diff)


def test_gram_by_row_and_any_chunking():
    rng = np.random.default_rng(3)
    for row in (1, 100, 2049, TILE + 5):
        n = row * 4
        b = Batch((3, 3, 1), [n], 1, rng, row=row, special=False)
        each = -(-row // TILE)
        whole = np.zeros((4 * each, 4))
        _native.gram(b.table, b.ins, whole, True, True, True)
        assert np.array_equal(whole, grams(b.x(0), True, True, row))
        parts = np.zeros_like(whole)
        table = np.repeat(b.table, 2, 0)
        table[:, 1], table[1, 2], table[1, 6] = (row, n - row), row, each
        table[1, 7:] += row * np.array([2, 2, 4])
        _native.gram(table[::-1].copy(), b.ins, parts, True, True, True)
        assert np.array_equal(parts, whole)
    b = Batch((2, 2), [5 * TILE + 77], 1, rng, special=False)
    whole, parts = np.zeros((6, 4)), np.zeros((6, 4))
    _native.gram(b.table, b.ins, whole, False, True, False)
    for start in (4, 0, 1):  # tiles 4 to 5, 0, 1 to 3
        end = {4: b.table[0, 1], 0: TILE, 1: 4 * TILE}[start]
        table = b.table.copy()
        table[0, [1, 2, 6]] = end - start * TILE, start * TILE, start
        table[0, 7:] += 2 * start * TILE
        _native.gram(table, b.ins, parts, False, True, False)
    assert np.array_equal(whole, parts)
    assert np.array_equal(_native.fold(whole, np.array([0, 6])), _native.fold(parts, np.array([0, 6])))


def test_gram_of_special_values_is_canonical():
    rng = np.random.default_rng(8)
    b = Batch((3, 3), [4000], 1, rng)
    partials = np.zeros((1, 4))
    _native.gram(b.table, b.ins, partials, False, True, False)
    assert (bits(partials) == 0x7FF8000000000000).all()
    out = _native.fold(np.array([[np.inf], [-np.inf], [1.0]]), np.array([0, 2, 2, 3]))
    assert bits(out).tolist() == [[0x7FF8000000000000], [0], [0x3FF0000000000000]]


def test_fold_is_ordered():
    rng = np.random.default_rng(2)
    p = rng.standard_normal((1000, 3)) * 10.0 ** rng.integers(-8, 8, (1000, 3))
    first = np.array([0, 0, 1, 400, 1000])
    expected = np.zeros((4, 3))
    for g in range(4):
        for r in p[first[g] : first[g + 1]]:
            expected[g] += r
    assert np.array_equal(_native.fold(p, first), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"table": np.zeros((1, 9), np.int64)},
        {"table": np.zeros((1, 8), np.int32)},
        {"ins": np.array([9], np.int32)},
        {"coef": np.ones((1, 2))},
        {"coef": np.ones((1, 1), np.float32)},
        {"scale": np.ones((2, 2))},
        {"out_code": 4},
        {"nonfinite": np.zeros(2, np.int64)},
        {"column": (1, -1)},
        {"column": (5, 1)},
        {"column": (0, 0)},
        {"column": (7, 0)},
        {"column": (7, 3)},
        {"column": (2, -8)},
        {"column": (3, 0), "per_row": True},
    ],
    ids="-".join,
)
def test_malformed_arguments(change):
    x, out = np.ones(8, np.float32), np.zeros(8, np.float32)
    table = np.array([[out.ctypes.data, 8, 0, 8, 0, 0, 0, x.ctypes.data]], np.int64)
    if "column" in change:
        table[0, change["column"][0]] = change["column"][1]
    a = {
        "table": table,
        "ins": np.array([1], np.int32),
        "out_code": 1,
        "coef": np.ones((1, 1)),
        "scale": np.ones((1, 2)),
        "delta": False,
        "per_row": False,
        "nonfinite": np.zeros(1, np.int64),
    }
    _native.combine(**{**a, "table": table[:0].copy(), "nonfinite": np.zeros(0, np.int64)})
    with pytest.raises(ValueError, match=r"expected|address|row|negative"):
        _native.combine(**{**a, **{k: v for k, v in change.items() if k != "column"}})
    assert not out.any()


def test_gram_refuses_pieces_off_a_tile_and_short_partials():
    x = np.ones(TILE, np.float32)
    row = [0, TILE, 0, TILE, 0, 0, 0, x.ctypes.data]
    ins = np.ones(1, np.int32)
    for column, value in [(2, 5), (6, 1), (6, -1)]:
        bad = np.array([row], np.int64)
        bad[0, column] = value
        with pytest.raises(ValueError, match=r"tile|partials"):
            _native.gram(bad, ins, np.zeros((1, 1)), False, False, False)
    with pytest.raises(ValueError, match="diff"):
        _native.gram(np.array([row], np.int64), ins, np.zeros((1, 2)), False, True, False)
    with pytest.raises(ValueError, match="first"):
        _native.fold(np.zeros((2, 1)), np.array([0, 3]))


def dots(x):
    base, *others, gradient = x
    parts = [slice(s, s + TILE) for s in range(0, len(base), TILE)]
    return np.array([[tile_sum(gradient[p] * (v[p] - base[p])) for v in others] for p in parts])


@each_isa_in_turn
@pytest.mark.parametrize("kinds", DTYPES, ids=str)
def test_dot(isa, kinds):
    """One to nine models, in registers and by blocks: every tail of a tile, a row of lanes and a step."""
    rng = np.random.default_rng(len(kinds))
    for m in (3, 4, 5, 6, 7, 11):
        sizes = [1, 15, 300, 2048, 0, 10_007, 65_536 if m % 2 else 70_007, 4097]
        b = Batch(tuple((kinds * 11)[:m]), sizes, 1, rng, special=False)
        b.table[:, 6] = np.cumsum([0] + [-(-n // TILE) for n in sizes[:-1]])
        expected = np.concatenate([dots(b.x(s)) for s, n in enumerate(sizes) if n])
        for name in isa:
            partials = np.full((len(expected), m - 2), np.nan)
            with using(name):
                _native.dot(b.table, b.ins, partials)
            assert np.array_equal(partials, expected), (name, m)


def test_dot_of_special_values_and_any_chunking():
    rng = np.random.default_rng(4)
    odd = Batch((3, 3, 3), [4000], 1, rng)
    partials = np.zeros((1, 1))
    _native.dot(odd.table, odd.ins, partials)
    assert (bits(partials) == 0x7FF8000000000000).all()
    b = Batch((3, 3, 3, 3), [3 * TILE + 77], 1, rng, special=False)
    whole, parts = np.zeros((4, 2)), np.zeros((4, 2))
    _native.dot(b.table, b.ins, whole)
    assert np.array_equal(whole, dots(b.x(0)))
    table = np.repeat(b.table, 2, 0)
    table[:, 1], table[1, 2], table[1, 6] = (TILE, 2 * TILE + 77), TILE, 1
    table[1, 7:] += 2 * TILE
    _native.dot(table[::-1].copy(), b.ins, parts)
    assert np.array_equal(whole, parts)


def test_dot_refuses_what_it_cannot_read():
    x = np.ones(TILE, np.float32)
    row = [0, TILE, 0, TILE, 0, 0, 0, *[x.ctypes.data] * 3]
    ins, out = np.ones(3, np.int32), np.zeros((1, 1))
    for column, value in [(2, 5), (6, 1), (7, 0), (9, 3)]:
        bad = np.array([row], np.int64)
        bad[0, column] = value
        with pytest.raises(ValueError, match=r"tile|partials|address"):
            _native.dot(bad, ins, out)
    with pytest.raises(ValueError, match="3 inputs"):
        _native.dot(np.array([row[:-1]], np.int64), ins[:2].copy(), out)
    with pytest.raises(ValueError, match="partials"):
        _native.dot(np.array([row], np.int64), ins, np.zeros((1, 2)))
