"""Device functions of the keep pipeline: delta, Bernoulli drop, trim by magnitude. Used by every family of deltas.

``d_i = x_i - b``, rounded through the base's type where ROUND >= 0; ``drop``: kept where u16(e, model, 0) < bern;
``trim``: kept where the key of what is left lies above the threshold, or on it and within the tie cut: the element
index is below ``cut``, or, with SPREAD and a threshold of its own, u16(e, model, 1) < tie. Not kept is +0.

Thresholds are read from device memory, so a selection on the device needs no round trip. The tie cut arrives as an
element index per segment and model (see ``cuts_kernel``), not as (tile, rank): one comparison per element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._jit import at, bernoulli, load, magnitude, narrow, widen
from ._launch import CONFIGS, OPTIONS


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
    which ties are lost; ``tie`` int32, used with SPREAD where it is not negative. Without CUT the host promises
    that no cut lies inside a block and no threshold is a NaN's key: ties of the block are then all kept or all
    lost, which is one comparison of floats per element, NaNs kept.
    """
    if CUT:
        k = magnitude(d)
        rel = tl.minimum(tl.maximum(cut - e, 0), BLOCK).to(tl.int32)
        mine = k > tl.where(offs < rel, thr - 1, thr)
        if SPREAD:
            tied = (k == thr) & bernoulli(key, e, model, tl.maximum(tie, 0), 1, BLOCK, UNMASKED)
            mine = tl.where(tie >= 0, (k > thr) | tied, mine)
    else:
        least = tl.where(e >= cut, thr, thr - 1)
        if d.dtype == tl.float64:
            bound = tl.where(least < 0, -1.0, least.to(tl.float64, bitcast=True))
        else:
            bound = tl.where(least < 0, -1.0, least.to(tl.float32, bitcast=True))
        mine = ~(tl.abs(d) <= bound)
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
    """Drop, then trim, of model i: tables bern int32, thr and tie at ``at_model = p * N + i``, cut int64 ``[S, N]``."""
    model = tl.load(model_index + i)
    if DROP:
        d = drop(d, key, e, model, tl.load(bern + at_model), BLOCK, UNMASKED)
    if TRIM:
        t = tl.load(thr + at_model)
        c = tl.load(cut + s * N + i)
        r = tl.load(tie + at_model)
        d = trim(d, key, e, offs, model, t, c, r, CUT, SPREAD, BLOCK, UNMASKED)
    return d


@triton.jit
def cuts_kernel(
    out,
    table,
    bern,
    model_index,
    thr,
    cut,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (s, i): turns (tile, rank) of cut int64 ``[P, N, 3]`` into the element index out int64 ``[S, N]``.

    Ties before that index are kept: of rank 0 all before the tile. Else, only where the cut's tile lies in the
    segment, the tile of the base and of one model is read, once per tensor.
    """
    N: tl.constexpr = M - 1
    s = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    row = table + s * (7 + M)
    length = tl.load(row + 1)
    e0 = tl.load(row + 2)
    at_model = tl.load(row + 5) * N + i
    tile = tl.minimum(tl.load(cut + at_model * 3), 1 << 46)  # tile * 65536 stays an int64
    rank = tl.load(cut + at_model * 3 + 1)
    found = tile * 65536
    e = tl.maximum(found, e0)
    stop = tl.minimum(found + 65536, e0 + length)
    if (e < stop) & (rank > 0):
        key = tl.load(row + 4)
        t = tl.load(thr + at_model)
        base = tl.load(row + 7)
        mine = tl.load(row + 8 + i)
        offs = tl.arange(0, BLOCK)
        seen = tl.zeros((), tl.int64)
        found = stop
        while e < stop:
            mask = offs < stop - e
            b = load(at(base, e - e0, CODES & 15, False), 0, offs, mask, WIDE, False)
            d = b
            for k in tl.static_range(N):
                if k == i:
                    p = at(mine, e - e0, (CODES >> (4 * k + 4)) & 15, False)
                    d = delta(p, 0, offs, mask, b, ROUND, WIDE, False)
            if DROP:
                d = drop(d, key, e, tl.load(model_index + i), tl.load(bern + at_model), BLOCK, False)
            tied = (mask & (magnitude(d) == t)).to(tl.int32)
            before = seen + tl.cumsum(tied, axis=0) - tied
            first = tl.min(tl.where((tied == 1) & (before >= rank), offs, BLOCK), axis=0)
            seen += tl.sum(tied, axis=0)
            if first < BLOCK:
                found = e + first
                e = stop
            else:
                e += BLOCK
    tl.store(out + s * N + i, found)


def cuts(
    out: torch.Tensor,
    table: torch.Tensor,
    bern: torch.Tensor,
    model_index: torch.Tensor,
    thr: torch.Tensor,
    cut: torch.Tensor,
    *,
    inputs: int,
    codes: int,
    round_code: int,
    drop: bool,
    wide: bool,
) -> None:
    """Turns tie cuts into element indices; never waits.

    Args:
        out: int64 ``[S, N]`` on the device: the element index from which ties are lost.
        table: int64 ``[S, 7 + M]`` on the device.
        bern: int32 ``[P, N]``.
        model_index: int32 ``[N]``.
        thr: keys int32 (int64 where wide) ``[P, N]``.
        cut: int64 ``[P, N, 3]`` (tile, rank, tie).
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        round_code: type that deltas are rounded to, -1 for none.
        drop: whether the Bernoulli drop comes first.
        wide: work in fp64.
    """
    args = (out, table, bern, model_index, thr, cut, inputs, codes, round_code, drop, wide)
    cuts_kernel[(len(table), inputs - 1)](*args, **CONFIGS["cuts"], **OPTIONS)
