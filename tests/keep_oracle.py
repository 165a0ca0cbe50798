"""Selection and consensus in plain numpy, one whole tensor at a time: what the native kernels are held to.

Shares nothing with them: conversions go through fp64 and ``rint``, ties are ranked by a running count, sums
are written out. Also builds segment tables, so that one tensor can be cut into any pieces.
"""

import itertools

import numpy as np

from fastmerge.philox import u16

TILE, LANES = 65_536, 2_048
STORAGE = {0: np.uint64, 1: np.uint32, 2: np.uint16, 3: np.uint16}
NAN = {0: 0x7FF8000000000000, 1: 0x7FC00000, 2: 0x7E00, 3: 0x7FC0}
SMALL = {2: (11, -24, 2.0**16), 3: (8, -133, 2.0**128)}  # significand bits, last place of subnormals, overflow


def work(codes):
    return np.float64 if 0 in codes else np.float32


def widen(bits, code, w):
    """Values of stored bits, exactly."""
    if code == 3:
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(w)
    return bits.view({0: np.float64, 1: np.float32, 2: np.float16}[code]).astype(w)


def stored(x, code):
    """Bits of values rounded to nearest even, every NaN the canonical one."""
    with np.errstate(all="ignore"):
        if code in SMALL:
            digits, least, overflow = SMALL[code]
            wide = np.asarray(x, np.float64)
            _, exponent = np.frexp(wide)
            place = np.maximum(exponent - digits, least)
            r = np.ldexp(np.rint(np.ldexp(wide, -place)), place)
            r = np.where(np.isfinite(wide), r, wide)
            r = np.where(np.abs(r) >= overflow, np.copysign(np.inf, wide), r)
            if code == 2:
                bits = r.astype(np.float16).view(np.uint16)
            else:
                bits = (r.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            kind = {0: np.float64, 1: np.float32}[code]
            bits = np.asarray(x).astype(kind).view(STORAGE[code])
    return np.where(np.isnan(x), STORAGE[code](NAN[code]), bits)


def deltas(tensors, codes, round_code):
    w = work(codes)
    base = widen(tensors[0], codes[0], w)
    with np.errstate(all="ignore"):
        ds = [widen(x, c, w) - base for x, c in zip(tensors[1:], codes[1:], strict=True)]
    if round_code in STORAGE:
        ds = [widen(stored(d, round_code), round_code, w) for d in ds]
    return base, ds


def keys(d):
    wide = d.dtype == np.float64
    bits = np.abs(d).view(np.uint64 if wide else np.uint32)
    return np.minimum(bits, bits.dtype.type(NAN[0 if wide else 1]))


def dropped(d, key, model, t, e0):
    return np.where(u16(key, model, 0, e0, len(d)).astype(np.int64) < t, d, d.dtype.type(0))


def trimmed(d, key, model, thr, cut, e0):
    k = keys(d)
    e = e0 + np.arange(len(d))
    cut_tile, cut_rank, tie_t = (int(c) for c in cut)
    tie = k == thr
    if tie_t >= 0:
        chosen = u16(key, model, 1, e0, len(d)).astype(np.int64) < tie_t
    else:
        here = e // TILE == cut_tile
        rank = np.cumsum(tie & here) - (tie & here)
        chosen = (e // TILE < cut_tile) | (here & (rank < cut_rank))
    return np.where((k > thr) | (tie & chosen), d, d.dtype.type(0))


def kept(ds, p, key, e0=0):
    """The keep pipeline; p: dict of drop, trim, index [N], bern [N], thr [N], cut [N, 3]."""
    out = []
    for i, delta in enumerate(ds):
        model = int(p["index"][i])
        d = dropped(delta, key, model, p["bern"][i], e0) if p["drop"] else delta
        out.append(trimmed(d, key, model, p["thr"][i], p["cut"][i], e0) if p["trim"] else d)
    return out


def vote(ds, elect, split, f):
    w = ds[0].dtype.type
    total = None
    for d, (c, _, a) in zip(ds, f, strict=True):
        term = ((d > 0).astype(int) - (d < 0).astype(int)).astype(w) if elect == 2 else w(a if split else c) * d
        total = term if total is None else total + term
    return total


@np.errstate(all="ignore")
def consensus(base, ds, elect, split, zero, merge, f, scale):
    """Values before the store, and where they are the base itself."""
    w = base.dtype.type
    lam, div = w(scale[0]), w(scale[1])
    vs = [w(c) * d for d, (c, _, _) in zip(ds, f, strict=True)]
    a, b = vs[0].copy(), np.abs(vs[0])
    for v in vs[1:]:
        a, b = a + v, b + np.abs(v)
    if elect == 0:
        return base + lam * (a / div if div != 1 else a)
    s = vote(ds, elect, split, f)
    plus = (s > 0) | ((s == 0) & (zero == 0 or (zero == 1 and scale[2] > 0)))
    up, down, most, least = (np.zeros_like(base) for _ in range(4))
    for v, (_, g, _) in zip(vs, f, strict=True):
        up = np.where(v > 0, up + w(g), up)
        down = np.where(v < 0, down + w(g), down)
        most = np.where(v > most, v, most)
        least = np.where(v < least, v, least)
    if merge == 2:
        out = base + lam * np.where(np.isnan(a), a, np.where(plus, most, least))
    else:
        h = lam * w(0.5)
        if merge == 0:
            den = np.where(plus, up, down)
            h = h / np.where(den == 0, w(1), den)
            h = np.where(np.isinf(h), np.copysign(np.finfo(w).max, h), h)
        out = base + np.where(plus, a + b, a - b) * h
    return np.where(s == 0, base, out) if zero == 2 else out


@np.errstate(all="ignore")
def tile_sums(x):
    """The written order of sums: lanes, halves; one fp64 per tile."""
    sums = []
    for at in range(0, len(x), TILE):
        tile = np.zeros(TILE, x.dtype)
        tile[: len(x[at : at + TILE])] = x[at : at + TILE]
        lanes = np.zeros(LANES, x.dtype)
        for row in tile.reshape(-1, LANES):
            lanes = lanes + row
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = lanes[:half] + lanes[half:]
        sums.append(float(lanes[0]))
    return np.array(sums)


def tiles(n):
    return -(-n // TILE)


def pieces(n, cuts):
    """(start, stop) of a tensor of n elements cut at the given places."""
    at = [0, *sorted(c for c in set(cuts) if 0 < c < n), n]
    return list(itertools.pairwise(at))


def table(parts, inputs):
    """Segment table from dicts: out (array or None), tensors, start, stop, e0, key, group, stats."""
    rows = np.zeros((len(parts), 7 + inputs), np.int64)
    for row, p in zip(rows, parts, strict=True):
        start = p["start"]
        out = p.get("out")
        row[0] = out[start:].ctypes.data if out is not None else 0
        row[1] = p["stop"] - start
        row[2] = p.get("e0", 0) + start
        row[3] = len(p["tensors"][0])
        row[4] = np.uint64(p.get("key", 0)).astype(np.int64)
        row[5] = p.get("group", 0)
        row[6] = p.get("stats", 0)
        row[7:] = [x[start:].ctypes.data for x in p["tensors"]]
    return rows


def make(rng, n, codes, kind="normal"):
    """Tensors of stored bits, base first."""
    base = rng.normal(0, 0.02, n)
    out = []
    for i, code in enumerate(codes):
        x = base.copy()
        if kind == "normal":
            x = x + rng.normal(0, 1e-3, n) * (i > 0)
        elif kind == "zeros":  # 88 % of the deltas are exactly zero
            x = x + rng.normal(0, 1e-2, n) * (i > 0) * (rng.random(n) < 0.12)
        elif kind == "equal":
            x = np.full(n, 0.5 + (0.25 if i else 0.0))
        elif kind == "two":
            x = np.where(rng.random(n) < 0.5, 0.5, -0.25) * (i > 0)
        elif kind == "special":
            x = x + rng.normal(0, 1e-3, n) * (i > 0)
            odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, 6e-8, 65504.0, -3e38, 3.39e38]
            where = rng.random(n) < 0.3
            x = np.where(where, rng.choice(odd, n), x)
        bits = stored(x, code)
        if kind == "nans":  # most are NaN, with any sign and payload, signalling ones too
            low = {0: 52, 1: 23, 2: 10, 3: 7}[code]
            exponent = bits.dtype.type(NAN[code] & ~((1 << (low - 1)) - 1) & ~(1 << (low - 1)))
            payload = rng.integers(1, 1 << low, n).astype(bits.dtype)
            sign = rng.integers(0, 2, n).astype(bits.dtype) << bits.dtype.type(8 * bits.itemsize - 1)
            bits = np.where(rng.random(n) < 0.7 * (i > 0), exponent | payload | sign, bits)
        out.append(bits)
    return out
