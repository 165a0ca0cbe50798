"""The kernel interface in numpy, over raw addresses: an oracle for the native kernels that shares no code with them.

It follows the frozen arithmetic word by word, one operation per line, whole pieces at a time.
"""

from __future__ import annotations

import ctypes

import numpy as np

from fastmerge.methods.exponentials import exp, log
from fastmerge.philox import u16

TILE, LANES, HEADER = 65536, 2048, 7
STORED = {0: np.float64, 1: np.float32, 2: np.uint16, 3: np.uint16}


def memory(address, count, code):
    """A view of ``count`` elements at an address."""
    kind = np.dtype(STORED[code])
    if count == 0:
        return np.empty(0, kind)
    return np.frombuffer((ctypes.c_uint8 * (count * kind.itemsize)).from_address(int(address)), kind)


def widen(stored, code, work):
    if code == 3:
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(work)
    if code == 2:
        return stored.view(np.float16).astype(work)
    return stored.astype(work)


def store(x, code):
    """Rounds once to storage; every NaN canonical."""
    nan = np.isnan(x)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if code == 0:
            return np.where(nan, np.uint64(0x7FF8000000000000), x.astype(np.float64).view(np.uint64)).view(np.float64)
        if code == 1:
            return np.where(nan, np.uint32(0x7FC00000), x.astype(np.float32).view(np.uint32)).view(np.float32)
        if code == 2:
            return np.where(nan, np.uint16(0x7E00), x.astype(np.float16).view(np.uint16))
        # bf16 has 8 bits of mantissa down to 2^-126; rint rounds ties to even, and all of this is exact in fp64
        wide = np.where(np.isfinite(x), x, 0).astype(np.float64)
        ulp = np.ldexp(1.0, np.maximum(np.frexp(wide)[1], -125) - 8)
        near = np.where(np.isfinite(x), np.copysign(np.rint(wide / ulp) * ulp, x), x).astype(np.float32)
        return np.where(nan, 0x7FC0, near.view(np.uint32) >> 16).astype(np.uint16)


def key(d):
    if d.dtype == np.float64:
        return np.minimum(d.view(np.uint64) & np.uint64(0x7FFFFFFFFFFFFFFF), np.uint64(0x7FF8000000000000))
    return np.minimum(d.view(np.uint32) & np.uint32(0x7FFFFFFF), np.uint32(0x7FC00000))


def tile_sum(v, *, wide=False):
    """Ordered sum of at most one tile; the lanes in fp64 where ``wide``."""
    lanes = np.zeros(LANES, v.dtype)
    for j in range(0, len(v), LANES):
        some = v[j : j + LANES]
        lanes[: len(some)] += some
    lanes = lanes.astype(np.float64) if wide else lanes
    width = LANES // 2
    while width:
        lanes[:width] += lanes[width : 2 * width]
        width //= 2
    return float(lanes[0])


def quiet(function):
    def call(*args, **kwargs):
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return call


class Piece:
    """One row of a table, loaded."""

    def __init__(self, segments, row, *, wide=False):
        self.out, self.n, self.e0, self.row, self.key, self.group, self.stats, *addresses = (int(v) for v in row)
        self.work = np.float64 if wide or any(d.code == 0 for d in segments.dtypes) else np.float32
        pairs = zip(addresses, segments.dtypes, strict=True)
        self.x = [widen(memory(a, self.n, d.code), d.code, self.work) for a, d in pairs]

    def write(self, values, segments, n):
        code = segments.out_dtype.code
        stored = store(values, code)
        if self.n:
            memory(self.out, self.n, code)[:] = stored
        if len(segments.nonfinite):
            segments.nonfinite[n] += int((~np.isfinite(widen(stored, code, np.float64))).sum())

    def deltas(self, round_code):
        out = [x - self.x[0] for x in self.x[1:]]
        return out if round_code < 0 else [widen(store(d, round_code), round_code, self.work) for d in out]

    def dropped(self, round_code, drop, index, bern):
        out = self.deltas(round_code)
        for i in range(len(out) if drop else 0):
            keep = u16(self.key, int(index[i]), 0, self.e0, self.n).astype(np.int64) < bern[self.group, i]
            out[i] = np.where(keep, out[i], self.work(0))
        return out

    def variance(self):
        """The sum of the squared differences of all pairs of models."""
        total = np.zeros(self.n, self.work)
        for i, x in enumerate(self.x[1:], 1):
            for y in self.x[i + 1 :]:
                apart = x - y
                total += apart * apart
        return total

    def ranked(self, round_code, drop, index, bern, variance=False):
        """What selection ranks by magnitude: the task vectors, or the one for all of them."""
        return [self.variance()] if variance else self.dropped(round_code, drop, index, bern)

    def kept_together(self, thr, cut):
        """The task vectors where their variance stays."""
        t, (tile, rank, _) = thr[self.group, 0], (int(c) for c in cut[self.group, 0])
        k, e = key(self.variance()).astype(np.uint64), self.e0 + np.arange(self.n)
        here = (k == t) & (e // TILE == tile)
        stays = (k > t) | ((k == t) & (e // TILE < tile)) | (here & (np.cumsum(here) - here < rank))
        return [np.where(stays, d, self.work(0)) for d in self.deltas(-1)]

    def kept(self, round_code, drop, trim, index, bern, thr, cut, bits=None):
        out = self.dropped(round_code, drop and bits is None, index, bern)
        for i in range(len(out) if bits is not None else 0):  # of a table of one piece
            stays = np.unpackbits(bits[:, i].copy().view(np.uint8), bitorder="little")[: self.n]
            out[i] = np.where(stays, out[i], self.work(0))
        for i in range(len(out) if trim else 0):
            k = key(out[i]).astype(np.uint64)
            t, (cut_tile, cut_rank, tie) = thr[self.group, i], (int(c) for c in cut[self.group, i])
            equal = k == t
            if tie >= 0:
                ok = u16(self.key, int(index[i]), 1, self.e0, self.n).astype(np.int64) < tie
            else:
                tiles = (self.e0 + np.arange(self.n)) // TILE
                rank = np.zeros(self.n, np.int64)
                for j in np.unique(tiles):
                    here = tiles == j
                    rank[here] = np.cumsum(equal[here]) - equal[here]
                ok = (tiles < cut_tile) | ((tiles == cut_tile) & (rank < cut_rank))
            out[i] = np.where((k > t) | (equal & ok), out[i], self.work(0))
        return out

    def summed(self, keep):
        variance = keep.deltas.variance
        kept = self.kept_together(keep.thr, keep.cut) if variance else self.kept(*flat(keep))
        return [d.astype(np.float64) for d in kept] if keep.wide_sums else kept


def pieces(segments, *, wide=False):
    return [Piece(segments, row, wide=wide) for row in segments.table]


def flat(keep):
    (round_code, drop, index, bern, _), trim, thr, cut, bits, given, _ = keep
    return round_code, drop, trim, index, bern, thr, cut, bits if given else None


class NumpyKernels:
    launcher = None

    def supports(self, spec):
        return None

    @quiet
    def combine(self, segments, coef, scale, *, delta, per_row, wide=False):
        for n, p in enumerate(pieces(segments, wide=wide)):
            row = np.full(p.n, p.group)
            if per_row:
                row = p.group + (p.e0 + np.arange(p.n)) // p.row
            c = coef[row].astype(p.work)
            lam, div = scale[row, 0].astype(p.work), scale[row, 1].astype(p.work)
            acc = None
            for i in range(1 if delta else 0, len(p.x)):
                v = c[:, i] * ((p.x[i] - p.x[0]) if delta else p.x[i])
                acc = v if acc is None else acc + v
            acc = np.where(div == 1, acc, acc / div)
            p.write(p.x[0] + lam * acc if delta else acc, segments, n)

    @quiet
    def gram(self, segments, partials, *, delta, diff, per_row):
        self._gram(segments, partials, lambda p: p.deltas(-1) if delta else p.x, diff, per_row)

    @quiet
    def gram_kept(self, segments, keep, partials):
        self._gram(segments, partials, lambda p: p.kept_together(keep.thr, keep.cut), False, False)

    def _gram(self, segments, partials, vectors, diff, per_row):
        for p in pieces(segments):
            v = vectors(p)
            spans = [(s, p.n) for s in range(0, p.n, TILE)]
            if per_row:
                spans = [(t, r + p.row) for r in range(0, p.n, max(p.row, 1)) for t in range(r, r + p.row, TILE)]
            for number, (start, end) in enumerate(spans):
                part = [x[start : min(start + TILE, end)] for x in v]
                sums = [tile_sum(part[i] * part[j]) for i in range(len(v)) for j in range(i, len(v))]
                if diff:
                    apart = part[0] - part[1]
                    sums.append(tile_sum(apart * apart))
                partials[p.stats + number] = sums

    @quiet
    def dot(self, segments, partials):
        for p in pieces(segments):
            base, *others, gradient = p.x
            for number, start in enumerate(range(0, p.n, TILE)):
                part = slice(start, start + TILE)
                partials[p.stats + number] = [tile_sum(gradient[part] * (x[part] - base[part])) for x in others]

    @quiet
    def fold(self, partials, first):
        out = np.zeros((len(first) - 1, partials.shape[1]))
        for g in range(len(first) - 1):
            for row in partials[first[g] : first[g + 1]]:
                out[g] += row
        return out

    @quiet
    def delta_keys(self, segments, deltas, out):
        at = 0
        for p in pieces(segments):
            for i, d in enumerate(p.ranked(*deltas)):
                out[at : at + p.n, i] = key(d)
            at += p.n

    @quiet
    def count(self, segments, deltas, brackets, found):
        (lo, hi), (counts, keys, where, used) = brackets, found
        for p in pieces(segments):
            for i, d in enumerate(p.ranked(*deltas)):
                k, a, b = key(d).astype(np.uint64), lo[p.group, i], hi[p.group, i]
                for number, start in enumerate(range(0, p.n, TILE)):
                    part = k[start : start + TILE]
                    inside = (part > a) & (part < b)
                    at_lo = 0 if a == b else int((part == a).sum())
                    counts[p.stats + number, i] = ((part > b).sum(), (part == b).sum(), at_lo, inside.sum())
                    listed = np.flatnonzero(inside)
                    room = max(0, min(len(listed), keys.shape[1] - int(used[i])))
                    keys[i, used[i] : used[i] + room] = part[listed[:room]]
                    where[i, used[i] : used[i] + room, 0] = p.group
                    where[i, used[i] : used[i] + room, 1] = p.e0 + start + listed[:room]
                    used[i] += len(listed)

    @quiet
    def kth(self, segments, deltas, ranks, thr, found):
        for p in pieces(segments):
            for i, d in enumerate(p.ranked(*deltas)):
                k, rank = key(d).astype(np.uint64), int(ranks[p.group, i])
                if not 0 < rank < p.n:
                    continue
                at = np.sort(k)[p.n - rank]
                keep, ties = rank - int((k > at).sum()), np.flatnonzero(k == at)
                tile = int(ties[min(keep, len(ties) - 1)]) // TILE
                thr[p.group, i] = at
                found[p.group, i] = (keep, len(ties), tile, int((ties[:keep] // TILE == tile).sum()))

    @quiet
    def l1(self, segments, keep, sums):
        for p in pieces(segments):
            raw = p.deltas(keep.deltas.round_code)
            kept = p.kept(*flat(keep))
            for i, (d, k) in enumerate(zip(raw, kept, strict=True)):
                for number, start in enumerate(range(0, p.n, TILE)):
                    for column, x in enumerate((d, k)):
                        part = np.abs(x[start : start + TILE])
                        sums[p.stats + number, i, column] = tile_sum(part, wide=keep.wide_sums)

    @quiet
    def importance(self, segments, divergence, out):
        at = 0
        for p in pieces(segments):
            for r in range(0, p.n, max(p.row, 1)):
                q, v = (self._softmax(x[r : r + p.row].astype(np.float64)) for x in p.x)
                terms = v * log(v / q)
                found = p.work(sum([tile_sum(terms[t : t + TILE]) for t in range(0, p.row, TILE)], 0.0))
                divergence[p.group + (p.e0 + r) // p.row] = found
                out[at + r : at + r + p.row] = np.abs(p.x[1][r : r + p.row] - p.x[0][r : r + p.row]) * found
            at += p.n

    @staticmethod
    def _softmax(x):
        powers = exp(x - x.max())
        return powers / sum([tile_sum(powers[t : t + TILE]) for t in range(0, len(x), TILE)], 0.0) + 1e-8

    @quiet
    def fuse(self, segments, divergence, least):
        for n, p in enumerate(pieces(segments)):
            d = p.x[1] - p.x[0]
            important = np.abs(d) * divergence.astype(p.work)[p.group + (p.e0 + np.arange(p.n)) // max(p.row, 1)]
            p.write(p.x[0] + d * (important >= p.work(least)).astype(p.work), segments, n)

    def _vote(self, p, d, elect, split, f):
        c, _, a = (f[p.group, :, j].astype(d[0].dtype) for j in range(3))
        v = [c[i] * x for i, x in enumerate(d)]
        if elect == 2:
            return v, sum((x > 0).astype(np.int64) - (x < 0) for x in d)
        terms = [a[i] * x for i, x in enumerate(d)] if split else v
        total = terms[0]
        for x in terms[1:]:
            total = total + x
        return v, total

    @quiet
    def votes(self, segments, keep, votes, counts):
        for p in pieces(segments):
            _, vote = self._vote(p, p.summed(keep), *votes)
            for number, start in enumerate(range(0, p.n, TILE)):
                part = vote[start : start + TILE]
                counts[p.stats + number] = ((part > 0).sum(), (part < 0).sum())

    @quiet
    def consensus(self, segments, keep, rules):
        (elect, split, f), zero, merge, scale = rules
        for n, p in enumerate(pieces(segments)):
            d = p.summed(keep)
            work = d[0].dtype.type
            v, vote = self._vote(p, d, elect, split, f)
            base, gate = p.x[0].astype(work), f[p.group, :, 1].astype(work)
            lam, div, majority = scale[p.group].astype(work)
            a, b = v[0], np.abs(v[0])
            for x in v[1:]:
                a, b = a + x, b + np.abs(x)
            if elect == 0:
                p.write(base + lam * (a if div == 1 else a / div), segments, n)
                continue
            up = vote > 0
            if zero == 0 or (zero == 1 and majority > 0):
                up = up | (vote == 0)
            if merge == 2:
                high, low = np.zeros_like(a), np.zeros_like(a)
                for x in v:
                    high = np.where(x > high, x, high)
                    low = np.where(x < low, x, low)
                out = base + lam * np.where(np.isnan(a), a, np.where(up, high, low))
            else:
                share = lam * work(0.5)
                if merge == 0:
                    plus, minus = np.zeros_like(a), np.zeros_like(a)
                    for g, x in zip(gate, v, strict=True):
                        plus = np.where(x > 0, plus + g, plus)
                        minus = np.where(x < 0, minus + g, minus)
                    den = np.where(up, plus, minus)
                    share = share / np.where(den == 0, work(1), den)
                    most = np.finfo(work).max
                    share = np.where(share > most, most, np.where(share < -most, -most, share))
                out = base + np.where(up, a + b, a - b) * share
            p.write(np.where(vote == 0, base, out) if zero == 2 else out, segments, n)
