"""Where to look for a k-th largest magnitude: brackets of keys from samples, without the host.

A sample is runs of 16 neighbours, one at a hashed place of each of equally long strata of a query's elements: a run is
a sector of memory, and runs so short leave little of what neighbours share (rows of one scale widen the scatter of
shares by at most four, blocks of a thousand would widen it by thirty). Two samples make a bracket: a small one, all of
whose keys are listed, gives a coarse bracket; of a larger one only the keys inside that are listed, which gives the
ends of a bracket sixteen times narrower. Ends are keys of the sample, because of checkpoints: deltas of bf16 weights
take a few hundred values, and a bracket is then often a single one, with a tenth of all elements on it.

Nothing here needs to be right: counts decide (count.py, decide.py), and a query whose bracket missed tries again.

``state`` int64 ``[Q, 12]`` is what is known of each query: see :data:`FIELDS`. ``brackets`` int64 ``[Q, 2]`` is
(lo, hi); lo above every key closes a query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._jit import drawn, find, load, magnitude, narrow, typed, widen

FIELDS = ("thr", "keep", "tied", "where", "k", "end", "above", "high", "low")
"""Columns of ``state``: the threshold, how many elements at it stay, how many there are (0: open), which column of the
counts says where they are (see decide.py); the rank k, and a span: ranks up to ``end`` have keys from ``low`` on, those
up to ``above`` keys beyond ``high``."""

WIDTH = 12
"""Columns of ``state``, some to spare."""

RUN = 16
"""Neighbours of a run: 32 bytes of bf16, what a memory transaction brings anyway."""

CHUNK = 2048
"""Elements of one program of a sample."""

RANKED = tl.constexpr(16_384)
"""Keys that one program holds in registers, 32 in each of 512 threads."""


@triton.jit
def size_of(CODE: tl.constexpr):
    """Bytes of an element."""
    return 8 if CODE == 0 else (4 if CODE == 1 else 2)


@triton.jit
def lanes(x, BLOCK: tl.constexpr):
    """One number per run, for each of its 16 lanes."""
    return tl.reshape(tl.broadcast_to(tl.expand_dims(x, 1), (BLOCK // 16, 16)), (BLOCK,))


@triton.jit(do_not_specialize=["sets", "seed"])
def sample_kernel(
    keys,
    tallies,
    table,
    prefix,
    sets: tl.int32,
    first,
    runs,
    model_index,
    bern,
    state,
    brackets,
    regions,
    seed: tl.int32,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per 128 runs of a set: lists keys inside the brackets of its queries, and counts.

    prefix int64 ``[G + 1]``: programs before each set; first int64 ``[G + 1]``: its first segment; runs int64
    ``[S + 1]``: runs before each segment. tallies int64 ``[G, N, 3]`` is added to: keys inside the bracket, keys in the
    span, and how many of those are at the upper end of the bracket or above.
    """
    N: tl.constexpr = M - 1
    NEVER: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    pid = tl.program_id(0)
    g = find(prefix, sets, pid).to(tl.int64)
    asked = False
    for i in tl.static_range(N):
        asked = asked | (tl.load(brackets + (g * N + i) * 2) < NEVER)
    if asked:
        chunk = pid.to(tl.int64) - tl.load(prefix + g)
        wanted = (tl.load(prefix + g + 1) - tl.load(prefix + g)) * (BLOCK // 16)
        begin = tl.load(first + g)
        members = (tl.load(first + g + 1) - begin).to(tl.int32)
        zero = tl.load(runs + begin)
        have = tl.load(runs + begin + members) - zero
        # What a run has in common is found once for its 16 lanes: two divisions of 64 bits a thread, not sixteen.
        number = chunk * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
        at = number * have // wanted
        width = (number + 1) * have // wanted - at
        h = (number.to(tl.uint32) ^ (seed.to(tl.uint32) * 0x85EBCA6B)) * 0x9E3779B1
        h = (h ^ (h >> 15)) * 0x2C1B3C6D
        h = h ^ (h >> 13)
        at += zero + ((h.to(tl.uint64) * width.to(tl.uint64)) >> 32).to(tl.int64)
        low = begin + number * 0
        high = low + members
        while members > 1:  # which of the set's segments: empty ones are passed over
            middle = (low + high) // 2
            here = (high - low > 1) & (tl.load(runs + middle) <= at)
            high = tl.where((high - low > 1) & ~here, middle, high)
            low = tl.where(here, middle, low)
            members = (members + 1) // 2
        row = table + low * (7 + M)
        start = (at - tl.load(runs + low)) * 16
        inner = tl.arange(0, BLOCK) & 15
        none = inner * 0
        # No address where there is no run: were width itself spread, its division would be done again in every lane.
        base = lanes(tl.where(width > 0, tl.load(row + 7) + start * size_of(CODES & 15), 0), BLOCK)
        good = base != 0
        base += inner * size_of(CODES & 15)
        b = load(typed(base, CODES & 15, False), 0, none, good, WIDE, False)
        for i in tl.static_range(N):
            q = g * N + i
            lo = tl.load(brackets + q * 2)
            if lo < NEVER:
                CODE: tl.constexpr = (CODES >> (4 * i + 4)) & 15
                mine = lanes(tl.load(row + 8 + i) + start * size_of(CODE), BLOCK) + inner * size_of(CODE)
                d = load(typed(mine, CODE, False), 0, none, good, WIDE, False) - b
                if ROUND >= 0:
                    d = widen(narrow(d, ROUND), ROUND, WIDE)
                if DROP:
                    e = lanes(tl.load(row + 2) + start, BLOCK) + inner
                    key = lanes(tl.load(row + 4), BLOCK)
                    bound = lanes(tl.load(bern + tl.load(row + 5) * N + i), BLOCK)
                    d = tl.where(drawn(key, e, tl.load(model_index + i), bound, 0), d, 0.0)
                k = magnitude(d).to(tl.int64)
                hi = tl.load(brackets + q * 2 + 1)
                span = good & (k >= tl.load(state + q * COLUMNS + 8)) & (k <= tl.load(state + q * COLUMNS + 7))
                inside = good & (k > lo) & (k < hi)
                some = inside.to(tl.int32)
                total = tl.sum(some, axis=0)
                to = tallies + q * 3
                tl.atomic_add(to + 1, tl.sum(span.to(tl.int64), axis=0), sem="relaxed")
                tl.atomic_add(to + 2, tl.sum((span & (k >= hi)).to(tl.int64), axis=0), sem="relaxed")
                if total > 0:
                    slot = tl.atomic_add(to, total.to(tl.int64), sem="relaxed") + tl.cumsum(some, axis=0) - some
                    begin_at = tl.load(regions + q * 2)
                    fits = inside & (slot < tl.load(regions + q * 2 + 1))
                    tl.store(keys + begin_at + slot, k.to(keys.dtype.element_ty), mask=fits)


@triton.jit
def ranked(k, rank, bits):
    """The rank-th largest of keys in registers (those below 0 do not count): all are below ``1 << bits``."""
    bound = tl.zeros((), k.dtype)
    one = tl.full((), 1, k.dtype)
    while bits > 0:
        bits -= 1
        higher = bound | (one << bits.to(k.dtype))
        enough = tl.sum((k >= higher).to(tl.int32), axis=0) >= rank
        bound = tl.where(enough, higher, bound)
    return bound


@triton.jit
def bits_of(n):
    """Bits of a number from 0 to 2^53 (at most one too many for what fp64 rounds)."""
    return ((n.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1022).to(tl.int32)


@triton.jit
def bracket_kernel(
    brackets,
    state,
    tallies,
    keys,
    regions,
    N: tl.constexpr,
    SIGMAS: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (g, i): from the listed keys of a sample the next bracket; LAST where everything is counted with it.

    The rank's place in the sample is known within SIGMAS standard deviations of independent draws; of a long list every
    n-th key is looked at. A span whose keys all fit the list is taken whole.
    """
    NEVER: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    q = tl.program_id(0).to(tl.int64) * N + tl.program_id(1)
    lo = tl.load(brackets + q * 2)
    if lo < NEVER:
        hi = tl.load(brackets + q * 2 + 1)
        mine = state + q * COLUMNS
        k, end, above = tl.load(mine + 4), tl.load(mine + 5), tl.load(mine + 6)
        high, low = tl.load(mine + 7), tl.load(mine + 8)
        used = tl.load(tallies + q * 3)
        slots = tl.load(regions + q * 2 + 1)
        some = tl.minimum(used, slots)
        new_lo = low - 1
        new_hi = high + 1
        if some < 64:
            if LAST and end - above > slots:
                if (lo >= low) | (hi <= high):  # as narrow as it gets: often one key that many elements have
                    new_lo = lo
                    new_hi = hi
                else:
                    new_lo = low + (high - low) // 2
                    new_hi = new_lo
        elif end - above > slots or not LAST:
            step = (some + BLOCK - 1) // BLOCK
            m = ((some + step - 1) // step).to(tl.float64)
            lane = tl.arange(0, BLOCK) * step
            here = lane < some
            x = tl.load(keys + tl.load(regions + q * 2) + lane, mask=here, other=0)
            x = tl.where(here, x - (lo + 1).to(x.dtype), -1)
            bits = bits_of(hi - lo)
            share = (k - above).to(tl.float64) / (end - above).to(tl.float64)
            n = tl.load(tallies + q * 3 + 1).to(tl.float64)
            per = m / used.to(tl.float64)
            place = (share * n - tl.load(tallies + q * 3 + 2).to(tl.float64)) * per
            margin = SIGMAS * tl.sqrt(n * share * (1.0 - share)) * per + 2.0
            margin += tl.where(step > 1, SIGMAS * 0.5 * tl.sqrt(m), 0.0)
            top = tl.minimum(tl.floor(place - margin), m).to(tl.int32)
            bottom = tl.maximum(tl.ceil(place + margin), 1.0)
            if top >= 1:
                new_hi = ranked(x, top, bits).to(tl.int64) + lo + 1
            elif bottom > 1.0:
                new_hi = hi
            if bottom <= m:
                new_lo = ranked(x, bottom.to(tl.int32), bits).to(tl.int64) + lo + 1
            elif place - margin < m:
                new_lo = lo
        if LAST:  # a key of 0, which a dropped element has, is never listed: the list knows nothing of drops
            new_lo = tl.maximum(new_lo, 0)
        tl.store(brackets + q * 2, new_lo)
        tl.store(brackets + q * 2 + 1, new_hi)
