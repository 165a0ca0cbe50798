"""Which of the elements at a threshold stay: the first ones, all, or a random share.

Counts per tile tell in which tile the last one lies that stays. They are column 1 or 2 of the counts where the
threshold is the upper or lower end of a bracket (``where``, see decide.py); where it was found in the list,
:func:`tally_kernel` makes column 3 of them from the listed tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tally_kernel(
    state,
    counts,
    tallies,
    keys,
    tiles,
    regions,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (query, part): adds a part of a list's keys at the threshold to column 3 of the counts of their tiles."""
    q = tl.program_id(0).to(tl.int64)
    mine = state + q * COLUMNS
    if (tl.load(mine + 3) == 4) & (tl.load(mine + 1) < tl.load(mine + 2)):
        thr = tl.load(mine)
        size = tl.load(tallies + q)
        begin = tl.load(regions + q * 2)
        j = tl.program_id(1).to(tl.int64) * BLOCK
        while j < size:
            at_lane = j + tl.arange(0, BLOCK)
            x = tl.load(keys + begin + at_lane, mask=at_lane < size, other=0).to(tl.int64)
            mine_too = (at_lane < size) & (x == thr)
            tile = tl.load(tiles + begin + at_lane, mask=mine_too, other=0).to(tl.int64)
            to = counts + (tile * N + q % N) * 4 + 3
            tl.atomic_add(to, tl.full((BLOCK,), 1, tl.int64), mask=mine_too, sem="relaxed")
            j += PARTS * BLOCK


@triton.jit
def cut_kernel(
    found,
    state,
    counts,
    tiles,
    first,
    N: tl.constexpr,
    TIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (g, i): where the ties that stay end, into found int64 ``[Q, 4]`` as ``cuts_kernel`` reads it.

    TIES: 0 the first, 1 all, 2 a random share. Queries of no threshold (k is 0 or all) are the host's.
    """
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    q = g * N + i
    mine = state + q * COLUMNS
    tied = tl.load(mine + 2)
    if tied > 0:
        thr = tl.load(mine)
        keep = tl.load(mine + 1)
        column = tl.minimum(tl.load(mine + 3), 3)
        tile = tl.full((), 1 << 62, tl.int64)
        rank = tl.zeros((), tl.int64)
        tie = tl.full((), -1, tl.int64)
        if (TIES != 1) & (keep < tied) & (thr > 0):  # zeros add nothing, kept or not
            if TIES == 2:
                share = tl.floor(keep.to(tl.float64) / tied.to(tl.float64) * 65536.0 + 0.5)
                tie = tl.maximum(share, 1.0).to(tl.int64)
                tile = rank
            elif column < 0:
                tile = rank
                rank = keep
            else:
                begin = tl.load(tiles + tl.load(first + g))
                end = tl.load(tiles + tl.load(first + g + 1))
                lane = tl.arange(0, BLOCK)
                t = begin
                before = rank
                while t < end:
                    some = t + lane < end
                    c = tl.load(counts + ((t + lane) * N + i) * 4 + column, mask=some, other=0)
                    ends = before + tl.cumsum(c, axis=0)
                    one = tl.min(tl.where(some & (ends > keep), lane, BLOCK), axis=0)
                    if one < BLOCK:
                        tile = t + one - begin
                        rank = keep - tl.sum(tl.where(lane == one, ends - c, 0), axis=0)
                        t = end
                    else:
                        before += tl.sum(c, axis=0)
                        t += BLOCK
        to = found + q * 4
        tl.store(to, thr)
        tl.store(to + 1, tile)
        tl.store(to + 2, rank)
        tl.store(to + 3, tie)
