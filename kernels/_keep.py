"""Device functions of the keep pipeline: delta, Bernoulli drop, trim by magnitude. Used by every family of deltas.

``d_i = x_i - b``, rounded through the base's type where ROUND >= 0; ``drop``: kept where u16(e, model, 0) < bern;
``trim``: kept where the key of what is left lies above the threshold, or on it and within the tie cut: the element
index is below ``cut``, or, with SPREAD and a threshold of its own, u16(e, model, 1) < tie. Not kept is +0.

Thresholds and cuts are read from device memory, per segment and model, so a selection on the device needs no round
trip. The tie cut is an element index (see ``cuts_kernel``), not (tile, rank): one comparison per element.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, bernoulli, load, magnitude, narrow, widen
from ._launch import CONFIGS


class Keep(NamedTuple):
    """The keep pipeline of one call.

    Attributes:
        tables: model_index int32 ``[N]``, bern int32 ``[P, N]``, thr int32 (int64 where the work is fp64) ``[S, N]``,
            cut int64 ``[S, N]`` (element index from which ties are lost) and tie int32 ``[S, N]`` (-1: by cut).
        flags: ROUND, DROP, TRIM, SPREAD.
        wide_sums: what is kept is weighed and added in fp64, whatever it is.
    """

    tables: tuple[Place, Place, Place, Place, Place]
    flags: tuple[int, bool, bool, bool]
    wide_sums: bool = False


@triton.jit
def delta(p, done, offs, mask, b, ROUND: tl.constexpr, WIDE: tl.constexpr, UNMASKED: tl.constexpr):
    """``p[done + offs] - b`` in the work type, rounded through type ROUND where that is not negative."""
    d = load(p, done, offs, mask, WIDE, UNMASKED) - b
    if ROUND >= 0:
        d = widen(narrow(d, ROUND), ROUND, WIDE)
    return d


@triton.jit
def drop(d, key, e, model, bern, BLOCK: tl.constexpr, UNMASKED: tl.constexpr):
    """+0 where the element's random number is not below ``bern`` (int32)."""
    return tl.where(bernoulli(key, e, model, bern, 0, BLOCK, UNMASKED), d, 0.0)


@triton.jit
def trim(
    d,
    key,
    e,
    offs,
    model,
    thr,
    cut,
    tie,
    CUT: tl.constexpr,
    SPREAD: tl.constexpr,
    BLOCK: tl.constexpr,
    UNMASKED: tl.constexpr,
):
    """+0 where the delta is below the threshold or loses the tie.

    Args: ``e`` int64 first element of the block; ``thr`` key (int32 or int64); ``cut`` int64 element index from
    which ties are lost; ``tie`` int32, used with SPREAD where it is not negative. Without CUT no cut may lie inside the
    block: its ties are then all kept or all lost, which is one comparison of floats per element, NaNs kept.
    """
    if CUT:
        k = magnitude(d)
        rel = tl.minimum(tl.maximum(cut - e, 0), BLOCK).to(tl.int32)
        mine = k > tl.where(offs < rel, thr - 1, thr)
        if SPREAD:
            tied = (k == thr) & bernoulli(key, e, model, tl.maximum(tie, 0), 1, BLOCK, UNMASKED)
            mine = tl.where(tie >= 0, (k > thr) | tied, mine)
    else:
        # Above the bound lies what is kept: where it is infinity only NaNs, where it is a NaN's key nothing.
        least = tl.where(e >= cut, thr, thr - 1)
        if d.dtype == tl.float64:
            some = least < 0x7FF8000000000000
            below = tl.minimum(least, 0x7FF0000000000000).to(tl.float64, bitcast=True)
        else:
            some = least < 0x7FC00000
            below = tl.minimum(least, 0x7F800000).to(tl.float32, bitcast=True)
        mine = some & ~(tl.abs(d) <= tl.where(least < 0, -1.0, below))
    return tl.where(mine, d, 0.0)


@triton.jit
def keep(
    d,
    key,
    e,
    offs,
    s,
    at_model,
    i: tl.constexpr,
    model_index,
    bern,
    thr,
    cut,
    tie,
    N: tl.constexpr,
    DROP: tl.constexpr,
    TRIM: tl.constexpr,
    SPREAD: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    UNMASKED: tl.constexpr,
):
    """Drop, then trim, of model i: bern int32 at ``at_model = p * N + i``; thr, cut int64 and tie int32 ``[S, N]``."""
    model = tl.load(model_index + i)
    if DROP:
        d = drop(d, key, e, model, tl.load(bern + at_model), BLOCK, UNMASKED)
    if TRIM:
        t = tl.load(thr + s * N + i)
        c = tl.load(cut + s * N + i)
        r = tl.load(tie + s * N + i)
        d = trim(d, key, e, offs, model, t, c, r, CUT, SPREAD, BLOCK, UNMASKED)
    return d


@triton.jit
def cuts_kernel(
    thr,
    cut,
    tie,
    table,
    owner,
    before,
    found,
    model_index,
    bern,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (s, i): what was found of query ``owner[s] * N + i`` as thr, cut and tie ``[S, N]``.

    found int64 ``[Q, 4]`` is (threshold, tile, rank, tie): ties before the rank-th one of that tile are kept, of rank
    0 all before the tile. Tiles are numbered through all tensors of a query, ``before[s]`` of them before this one.
    Only where the cut's tile lies in the segment, the tile of the base and of one model is read.
    """
    N: tl.constexpr = M - 1
    s = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    row = table + s * (7 + M)
    length = tl.load(row + 1)
    e0 = tl.load(row + 2)
    mine = found + (tl.load(owner + s) * N + i) * 4
    t = tl.load(mine)
    tile = tl.minimum(tl.load(mine + 1), 1 << 46) - tl.load(before + s)  # tile * 65536 stays an int64
    rank = tl.load(mine + 2)
    here = tile * 65536
    e = tl.maximum(here, e0)
    stop = tl.minimum(here + 65536, e0 + length)
    if (e < stop) & (rank > 0):
        key = tl.load(row + 4)
        base = tl.load(row + 7)
        address = tl.load(row + 8 + i)
        offs = tl.arange(0, BLOCK)
        seen = tl.zeros((), tl.int64)
        here = stop
        while e < stop:
            mask = offs < stop - e
            b = load(at(base, e - e0, CODES & 15, False), 0, offs, mask, WIDE, False)
            d = b
            for k in tl.static_range(N):
                if k == i:
                    p = at(address, e - e0, (CODES >> (4 * k + 4)) & 15, False)
                    d = delta(p, 0, offs, mask, b, ROUND, WIDE, False)
            if DROP:
                d = drop(d, key, e, tl.load(model_index + i), tl.load(bern + tl.load(row + 5) * N + i), BLOCK, False)
            tied = (mask & (magnitude(d) == t)).to(tl.int32)
            ahead = seen + tl.cumsum(tied, axis=0) - tied
            first = tl.min(tl.where((tied == 1) & (ahead >= rank), offs, BLOCK), axis=0)
            seen += tl.sum(tied, axis=0)
            if first < BLOCK:
                here = e + first
                e = stop
            else:
                e += BLOCK
    tl.store(thr + s * N + i, t.to(thr.dtype.element_ty))
    tl.store(cut + s * N + i, here)
    tl.store(tie + s * N + i, tl.load(mine + 3).to(tl.int32))


def cuts(
    call: Call,
    outs: tuple[Place, Place, Place],
    table: Place,
    queries: tuple[Place, Place, Place],
    model_index: Place,
    bern: Place,
    *,
    inputs: int,
    codes: int,
    round_code: int,
    drop: bool,
    wide: bool,
) -> None:
    """Adds the launch that turns tie cuts into element indices.

    Args:
        call: that it belongs to.
        outs: thr (int32, where wide int64), cut int64, tie int32, ``[S, N]`` each.
        table: int64 ``[S, 7 + M]``.
        queries: owner int64 ``[S]``, before int64 ``[S]`` and found int64 ``[Q, 4]``, see the kernel.
        model_index: int32 ``[N]``.
        bern: int32 ``[P, N]``.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        round_code: type that deltas are rounded to, -1 for none.
        drop: whether the Bernoulli drop comes first.
        wide: work in fp64.
    """
    flags = (inputs, codes, round_code, drop, wide, CONFIGS["cuts"]["BLOCK"])
    grid = (table.shape[0], inputs - 1)
    args = (*outs, table, *queries, model_index, bern)
    call.launch(cuts_kernel, grid, args, *flags, num_warps=CONFIGS["cuts"]["num_warps"])
