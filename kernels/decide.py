"""From counts to thresholds, without the host: the end of an exact selection.

:func:`decide_kernel` ends a query whose counts allow it: the k-th largest key is an end of the bracket, or is inside
and the list of what is inside is complete. Else it says what the counts have taught (a span of keys) and leaves the
query open for another bracket, another count and another decision, which are launched in any case and leave at once
where nothing is open. What is then still open is settled digit by digit (settle.py). So no step asks the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sample import bits_of, ranked

SWEEP = 4096
"""Keys that a program looks at at a time."""

INNER = 32_768
"""Keys of a second, shorter list: of a long one, what lies in a bracket made from a share of it."""

WHOLE, UPPER, LOWER, TALLIED, LISTED = -1, 1, 2, 3, 4
"""Values of ``where``: in the only tile, a column of the counts, or the list, of which there is no column yet."""


@triton.jit
def decide_kernel(
    state,
    brackets,
    counts,
    tiles,
    first,
    tallies,
    keys,
    regions,
    inner,
    inners,
    N: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWEEP: tl.constexpr,
    INNER: tl.constexpr,
    RANKED: tl.constexpr,
):
    """Program (g, i): ends query ``g * N + i``, or narrows its span.

    tiles int64 ``[S + 1]``: tiles before each segment; first int64 ``[G + 1]``: the first segment of each set; tallies
    int64 ``[G, N]``: keys listed; inner: room for keys of long lists, from slot ``inners [G, N]`` on.
    """
    NEVER: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    q = g * N + i
    lo = tl.load(brackets + q * 2)
    if lo < NEVER:
        hi = tl.load(brackets + q * 2 + 1)
        mine = state + q * COLUMNS
        k = tl.load(mine + 4)
        begin = tl.load(tiles + tl.load(first + g))
        end = tl.load(tiles + tl.load(first + g + 1))
        lane = tl.arange(0, BLOCK)
        sums = (tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.int64))
        t = begin
        while t < end:
            some = t + lane < end
            to = counts + ((t + lane) * N + i) * 4
            sums = (
                sums[0] + tl.load(to, mask=some, other=0),
                sums[1] + tl.load(to + 1, mask=some, other=0),
                sums[2] + tl.load(to + 2, mask=some, other=0),
            )
            t += BLOCK
        above = tl.sum(sums[0], axis=0)
        upper = tl.sum(sums[1], axis=0)
        lower = tl.sum(sums[2], axis=0)
        inside = tl.load(tallies + q)
        thr = hi
        keep = k - above
        tied = upper
        where = tl.full((), 1, tl.int64)
        known = (k > above) & (k <= above + upper)
        if (k > above + upper + inside) & (k <= above + upper + inside + lower):
            known = True
            thr = lo
            keep = k - above - upper - inside
            tied = lower
            where = tl.full((), 2, tl.int64)
        if (k > above + upper) & (k <= above + upper + inside) & (inside <= tl.load(regions + q * 2 + 1)):
            found, at_it, left = pick(
                keys + tl.load(regions + q * 2),
                inner + tl.load(inners + q),
                inside,
                k - above - upper,
                lo,
                hi,
                SWEEP,
                INNER,
                RANKED,
            )
            if at_it > 0:
                known = True
                thr = found
                keep = left
                tied = at_it
                where = tl.full((), 4, tl.int64)
                t = begin
                while t < end:  # the column that the tally adds to
                    to = counts + ((t + lane) * N + i) * 4 + 3
                    tl.store(to, tl.zeros((BLOCK,), tl.int64), mask=t + lane < end)
                    t += BLOCK
        if known:
            tl.store(mine, thr)
            tl.store(mine + 1, keep)
            tl.store(mine + 2, tied)
            tl.store(mine + 3, where)
            tl.store(brackets + q * 2, tl.full((), NEVER, tl.int64))
            tl.store(brackets + q * 2 + 1, tl.full((), NEVER, tl.int64))
        else:
            high = tl.load(mine + 7)
            low = tl.load(mine + 8)
            if k <= above:
                tl.store(mine + 5, above)
                low = hi + 1
            elif k <= above + upper + inside:
                tl.store(mine + 5, above + upper + inside)
                tl.store(mine + 6, above + upper)
                high = hi - 1
                low = lo + 1
            else:
                tl.store(mine + 6, above + upper + inside + lower)
                high = lo - 1
            tl.store(mine + 7, high)
            tl.store(mine + 8, low)
            tl.store(brackets + q * 2, low - 1)
            tl.store(brackets + q * 2 + 1, high + 1)


@triton.jit
def pick(
    source,
    inner,
    n,
    rank,
    lo,
    hi,
    SWEEP: tl.constexpr,
    INNER: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The rank-th largest of n listed keys strictly between lo and hi.

    A list that one program's registers hold is decided there. Of a longer one every so-many-th key gives a bracket, and
    a sweep counts against it and moves what is inside to ``inner``, a short list: that is the next one. Where the
    bracket misses, the next is half the range of keys.

    Returns:
        The key, how many are equal to it (0: given up), and how many of those belong to the rank largest.
    """
    found = lo
    tied = n * 0
    keep = n * 0
    size = n
    moved = False
    tries = 0
    lane = tl.arange(0, RANKED)
    sweep = tl.arange(0, SWEEP)
    while (tied == 0) & (tries < 200):
        tries += 1
        here = inner if moved else source
        step = (size + RANKED - 1) // RANKED
        at_lane = lane * step
        x = tl.load(here + at_lane, mask=at_lane < size, other=0).to(tl.int64)
        mine = (at_lane < size) & (x > lo) & (x < hi)
        x = tl.where(mine, x - (lo + 1), -1)
        bits = bits_of(hi - lo)
        m = tl.sum(mine.to(tl.int32), axis=0)
        if step == 1:
            found = ranked(x, rank.to(tl.int32), bits) + lo + 1
            over = tl.sum((x > found - lo - 1).to(tl.int64), axis=0)
            tied = tl.sum((x == found - lo - 1).to(tl.int64), axis=0)
            keep = rank - over
        else:
            p_lo = lo + (hi - lo) // 2
            p_hi = p_lo
            if (m >= 64) & (tries < 4):
                place = rank.to(tl.float64) * m.to(tl.float64) / n.to(tl.float64)
                margin = 2.0 * tl.sqrt(m.to(tl.float64)) + 2.0
                top = tl.floor(place - margin).to(tl.int32)
                bottom = tl.ceil(place + margin).to(tl.int32)
                p_hi = hi
                p_lo = lo
                if top >= 1:
                    p_hi = ranked(x, top, bits) + lo + 1
                if bottom <= m:
                    p_lo = ranked(x, bottom, bits) + lo + 1
            over = n * 0
            upper = n * 0
            lower = n * 0
            between = n * 0
            j = n * 0
            while j < size:
                some = j + sweep < size
                y = tl.load(here + j + sweep, mask=some, other=0)
                z = y.to(tl.int64)
                some = some & (z > lo) & (z < hi)
                over += tl.sum((some & (z > p_hi)).to(tl.int32), axis=0)
                upper += tl.sum((some & (z == p_hi)).to(tl.int32), axis=0)
                lower += tl.sum((some & (z == p_lo) & (p_lo < p_hi)).to(tl.int32), axis=0)
                inside = (some & (z > p_lo) & (z < p_hi)).to(tl.int32)
                slot = between + tl.cumsum(inside, axis=0) - inside
                # In place where the list is the short one: what is written was read before the barriers of the sum.
                tl.store(inner + slot, y, mask=(inside == 1) & (slot < INNER))
                between += tl.sum(inside, axis=0)
                j += SWEEP
            tl.debug_barrier()
            if (rank > over) & (rank <= over + upper):
                found = p_hi
                tied = upper
                keep = rank - over
            elif (rank > over + upper + between) & (rank <= over + upper + between + lower):
                found = p_lo
                tied = lower
                keep = rank - over - upper - between
            elif (rank > over + upper) & (rank <= over + upper + between):
                rank -= over + upper
                n = between
                lo = p_lo
                hi = p_hi
                if moved | (between <= INNER):
                    moved = True
                    size = between
            elif moved:
                tries = 200
            elif rank <= over:
                n = over
                lo = p_hi
            else:
                rank -= over + upper + between + lower
                n -= over + upper + between + lower
                hi = p_lo
    return found, tied, keep
