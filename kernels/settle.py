"""The k-th magnitude of what no bracket has found: by the digits of its key, exact whatever the data.

One program per query reads all of its elements five times (nine in fp64), so this goes at the speed of one
multiprocessor, by estimate 0.9 G elements a second and read. That is the way of tensors of up to a tile (selection.py).
Of larger ones only data needs it that is made for the purpose: samples are taken at fixed places, and both rounds of
brackets have to miss.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import at, load, magnitude
from ._keep import delta, drop


@triton.jit
def settle_kernel(
    state,
    brackets,
    counts,
    tiles,
    first,
    table,
    model_index,
    bern,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (g, i): an open query by the digits of its keys, eight bits a read, and its ties in one more."""
    N: tl.constexpr = M - 1
    NEVER: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    READS: tl.constexpr = 8 if WIDE else 4
    g = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    q = g * N + i
    if tl.load(brackets + q * 2) < NEVER:
        mine = state + q * COLUMNS
        rank = tl.load(mine + 4)
        offs = tl.arange(0, BLOCK)
        digit = tl.arange(0, 256)
        thr = rank * 0
        tied = rank * 0
        read = 0
        while read <= READS:
            shift = ((READS - 1 - read) * 8).to(tl.int64)
            seen = tl.zeros((256,), tl.int64)
            s = tl.load(first + g)
            last = tl.load(first + g + 1)
            while s < last:
                row = table + s * (7 + M)
                length = tl.load(row + 1)
                e0 = tl.load(row + 2)
                key = tl.load(row + 4)
                base = at(tl.load(row + 7), rank * 0, CODES & 15, False)
                here = tl.zeros((), tl.int64)
                ties = tl.zeros((), tl.int64)
                e = rank * 0
                while e < length:
                    mask = offs < length - e
                    b = load(base, e, offs, mask, WIDE, False)
                    d = b
                    for j in tl.static_range(N):
                        if j == i:
                            p = at(tl.load(row + 8 + j), e, (CODES >> (4 * j + 4)) & 15, False)
                            d = delta(p, 0, offs, mask, b, ROUND, WIDE, False)
                    if DROP:
                        bound = tl.load(bern + tl.load(row + 5) * N + i)
                        d = drop(d, key, e0 + e, tl.load(model_index + i), bound, BLOCK, False)
                    x = magnitude(d).to(tl.int64)
                    if read < READS:
                        same = mask & ((x >> shift >> 8) == thr)
                        seen += tl.histogram(((x >> shift) & 255).to(tl.int32), 256, mask=same).to(tl.int64)
                    else:
                        ties += tl.sum((mask & (x == thr)).to(tl.int64), axis=0)
                        here = e // 65536
                        if ((e + BLOCK) % 65536 == 0) | (e + BLOCK >= length):
                            tl.store(counts + ((tl.load(tiles + s) + here) * N + i) * 4 + 3, ties)
                            ties = tl.zeros((), tl.int64)
                    e += BLOCK
                s += 1
            if read < READS:
                up = tl.sum(seen, axis=0) - tl.cumsum(seen, axis=0)  # keys with a larger digit
                best = tl.max(tl.where(up + seen >= rank, digit, -1), axis=0)
                rank -= tl.sum(tl.where(digit == best, up, 0), axis=0)
                tied = tl.sum(tl.where(digit == best, seen, 0), axis=0)
                thr = (thr << 8) | best.to(tl.int64)
            read += 1
        tl.store(mine, thr)
        tl.store(mine + 1, rank)
        tl.store(mine + 2, tied)
        tl.store(mine + 3, tl.full((), 3, tl.int64))
        tl.store(brackets + q * 2, tl.full((), NEVER, tl.int64))
        tl.store(brackets + q * 2 + 1, tl.full((), NEVER, tl.int64))
