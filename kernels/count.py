"""Counts of delta keys around a bracket per tile and model, and the keys strictly inside it: exact selection.

For every tile and model: ``#key > hi``, ``#key == hi``, ``#key == lo`` (0 where lo == hi), ``#lo < key < hi``, with
key = bits(|d_i|) and d_i = x_i - b, rounded and dropped as asked. Keys strictly inside are appended to the list of
their query, in any order, with their tile. With a bracket that holds less than a percent of the data this decides the
k-th magnitude in one read of everything, ``(N + 1) * b`` bytes per element for all models together; no sort, no gather
of the rest.

The loop that reads everything has no branches, no atomics, no barrier and no stores: four comparisons choose what an
element adds to its eight neighbours' word, one of three counters or the bit that says it is inside. The counters then
share one register of ten bits each (a tile gives them at most 256), and the bits stay in registers too, 32 elements to
a word. The marked few are found afterwards, once per tile and model: one integer atomic, then as many rounds as the
fullest thread has marks, whose elements are read again (out of the cache: a tile of two models is 384 KB). Counts are
integers: their order does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, load, magnitude, place
from ._keep import delta, drop
from ._launch import CONFIGS, Walk

STEP = 4
"""Blocks of 2048 elements whose marks fill a word of 32 bits; their loads are in flight together."""


@triton.jit
def above(bound, WIDE: tl.constexpr, LEAST: tl.constexpr):
    """The number that ``bits & largest`` exceeds just where the key, its canonical form, exceeds ``bound - LEAST``.

    Bits of NaNs are not brought to their one key for every element: the bound is moved out of their way instead.
    """
    if WIDE:
        top = bound > 0x7FF8000000000000 - 1 + LEAST
        t = tl.where(top, 0x7FFFFFFFFFFFFFFF, tl.minimum(bound - LEAST, 0x7FF0000000000000))
    else:
        top = bound > 0x7FC00000 - 1 + LEAST
        t = tl.where(top, 0x7FFFFFFF, tl.minimum(bound - LEAST, 0x7F800000))
    return t


@triton.jit
def listed(
    words,
    begin,
    rounds,
    row,
    start,
    address,
    tile,
    taken,
    keys,
    tiles,
    limit,
    i: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Appends what is marked in the words of model i: keys and tile, from slot ``taken`` (per thread) below ``limit``.

    Word j is that of the 8192 elements from ``begin - 8192 j`` on. A marked element was not dropped (its key is not 0),
    so its key is that of its delta.
    """
    group = tl.arange(0, GROUPS)
    base = at(tl.load(row + 7), start, CODES & 15, False)
    x = at(address, start, (CODES >> (4 * i + 4)) & 15, False)
    while rounds > 0:
        w = words[WORDS - 1]
        number = tl.zeros((GROUPS,), tl.int32) + (WORDS - 1)
        for j in tl.static_range(WORDS - 1):
            some = words[WORDS - 2 - j] != 0
            w = tl.where(some, words[WORDS - 2 - j], w)
            number = tl.where(some, WORDS - 2 - j, number)
        low = w & ((w ^ -1) + 1)
        left = ()
        for j in tl.static_range(WORDS):
            left = left + (tl.where(number == j, words[j] ^ low, words[j]),)
        words = left
        bit = (low.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        here = (low != 0) & (taken < limit)
        offs = begin - number * 8192 + (bit >> 3) * 2048 + group * 8 + (bit & 7)
        offs = tl.where(here, offs, 0)
        b = load(base, 0, offs, here, WIDE, False)
        d = delta(x, 0, offs, here, b, ROUND, WIDE, False)
        tl.store(keys + taken, magnitude(d), mask=here)
        tl.store(tiles + taken, tl.zeros((GROUPS,), tl.int32) + tile, mask=here)
        taken += 1
        rounds -= 1


@triton.jit
def ones(w):
    """Number of bits of each int32 that are set."""
    c = w.to(tl.uint32, bitcast=True)
    c = c - ((c >> 1) & 0x55555555)
    c = (c & 0x33333333) + ((c >> 2) & 0x33333333)
    c = (c + (c >> 4)) & 0x0F0F0F0F
    c = c + (c >> 8)
    return ((c + (c >> 16)) & 63).to(tl.int32)


@triton.jit(do_not_specialize=["segments"])
def count_kernel(
    counts,
    keys,
    tiles,
    used,
    table,
    prefix,
    skip,
    segments: tl.int32,
    model_index,
    bern,
    owner,
    lists,
    brackets,
    regions,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    WORDS: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile, into counts int64 ``[R, N, 4]`` of open queries, and their lists.

    brackets int64 ``[O, N, 2]`` (lo, hi) has row ``owner[s]`` for the segment; lo above every key closes a query, and a
    tile whose queries are all closed is not read. Row ``lists[s]`` of regions int64 ``[L, N, 2]`` (first slot, slots)
    and of used is that of its lists.
    """
    N: tl.constexpr = M - 1
    GROUPS: tl.constexpr = BLOCK // 8
    NEVER: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE else 0x7FFFFFFF
    s, row, start, count, _, unit = place(prefix, skip, table, segments, M, 65536, False, UNMASKED)
    mine = tl.load(owner + s) * N
    tile = (tl.load(row + 6) + unit).to(tl.int32)
    lows = ()
    highs = ()
    packs = ()
    inside = ()
    marks = ()
    asked = False
    for i in tl.static_range(N):
        low = tl.load(brackets + (mine + i) * 2)
        high = tl.load(brackets + (mine + i) * 2 + 1)
        asked = asked | (low < NEVER)
        if not WIDE:
            low = low.to(tl.int32)
            high = high.to(tl.int32)
        lows = lows + ((above(low, WIDE, 1), above(low, WIDE, 0)),)
        highs = highs + ((above(high, WIDE, 1), above(high, WIDE, 0)),)
        packs = packs + (tl.zeros((GROUPS,), tl.int32),)
        inside = inside + (tl.zeros((), tl.int32),)
        for _ in tl.static_range(WORDS):
            marks = marks + (tl.zeros((GROUPS,), tl.int32),)
    if asked:
        p = tl.load(row + 5)
        e = tl.load(row + 2) + start
        key = tl.load(row + 4)
        offs = tl.arange(0, BLOCK)
        ptrs = ()
        for i in tl.static_range(M):
            ptrs = ptrs + (at(tl.load(row + 7 + i), start, (CODES >> (4 * i)) & 15, UNMASKED),)
        done = 0
        for _part in tl.range(0, 8 // WORDS):  # with one or two models once: no loop then, and no registers for it
            pause = tl.minimum(done + WORDS * 8192, count)
            while done < pause:
                words = ()
                for _ in tl.static_range(N):
                    words = words + (tl.zeros((GROUPS,), tl.int32),)
                for u in tl.static_range(4):
                    step = done + u * BLOCK
                    mask = offs < count - step
                    b = load(ptrs[0], step, offs, mask, WIDE, UNMASKED)
                    new = ()
                    now = ()
                    for i in tl.static_range(N):
                        d = delta(ptrs[1 + i], step, offs, mask, b, ROUND, WIDE, UNMASKED)
                        if DROP:
                            model = tl.load(model_index + i)
                            bound = tl.load(bern + p * N + i)
                            d = drop(d, key, e + step, model, bound, BLOCK, UNMASKED)
                        if WIDE:
                            k = d.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
                        else:
                            k = d.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                        one = tl.where(k > lows[i][1], 0x10000 << (offs & 7), tl.where(k > lows[i][0], 0x100, 0))
                        one = tl.where(k > highs[i][1], 1, tl.where(k > highs[i][0], 0x10, one))
                        if not UNMASKED:
                            one = tl.where(mask, one, 0)
                        eight = tl.sum(tl.reshape(one, (GROUPS, 8)), axis=1)
                        new = new + (packs[i] + (eight & 0xF) + ((eight & 0xF0) << 6) + ((eight & 0xF00) << 12),)
                        now = now + (words[i] | (((eight >> 16) & 0xFF) << (8 * u)),)
                    packs = new
                    words = now
                moved = ()
                for i in tl.static_range(N):
                    moved = moved + (words[i],)
                    for j in tl.static_range(WORDS - 1):
                        moved = moved + (marks[i * WORDS + j],)
                marks = moved
                done += 8192
            fresh = ()
            total = ()
            for i in tl.static_range(N):
                c = tl.zeros((GROUPS,), tl.int32)
                mine_words = ()
                for j in tl.static_range(WORDS):
                    c += ones(marks[i * WORDS + j])
                    mine_words = mine_words + (marks[i * WORDS + j],)
                    fresh = fresh + (tl.zeros((GROUPS,), tl.int32),)
                some = tl.sum(c, axis=0)
                total = total + (inside[i] + some,)
                if some > 0:
                    q = tl.load(lists + s) * N + i
                    taken = tl.atomic_add(used + q, some.to(tl.int64), sem="relaxed")
                    first = tl.load(regions + q * 2)
                    limit = first + tl.load(regions + q * 2 + 1)
                    slot = first + taken + tl.cumsum(c, axis=0) - c
                    listed(
                        mine_words, done - 8192, tl.max(c, axis=0), row, start, tl.load(row + 8 + i), tile, slot,
                        keys, tiles, limit, i, CODES, ROUND, WIDE, WORDS, GROUPS,
                    )  # fmt: skip
            marks = fresh
            inside = total
        for i in tl.static_range(N):
            to = counts + (tile.to(tl.int64) * N + i) * 4
            wanted = tl.load(brackets + (mine + i) * 2) < NEVER  # read again: a register less in the loop
            tl.store(to, tl.sum(packs[i] & 1023, axis=0).to(tl.int64), mask=wanted)
            tl.store(to + 1, tl.sum((packs[i] >> 10) & 1023, axis=0).to(tl.int64), mask=wanted)
            tl.store(to + 2, tl.sum(packs[i] >> 20, axis=0).to(tl.int64), mask=wanted)
            tl.store(to + 3, inside[i].to(tl.int64), mask=wanted)


def count(
    call: Call,
    outs: tuple[Place, Place, Place, Place],
    table: Place,
    walk: Walk,
    model_index: Place,
    bern: Place,
    queries: tuple[Place, Place, Place, Place],
    *,
    inputs: int,
    codes: int,
    round_code: int,
    drop: bool,
    wide: bool,
) -> None:
    """Adds the launch of one variant.

    Args:
        call: that it belongs to.
        outs: counts int64 ``[R, N, 4]``, written where a query is open; the lists' keys int32 (int64 where wide) and
            tiles int32 (the row of counts); used int64 ``[L, N]``, added to, also where a list is full.
        table: int64 ``[S, 7 + M]``.
        walk: the programs, one per tile.
        model_index: int32 ``[N]``.
        bern: int32 ``[P, N]``.
        queries: owner int64 ``[S]``, lists int64 ``[S]``, brackets int64 ``[O, N, 2]``, regions int64 ``[L, N, 2]``.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        round_code: type that deltas are rounded to, -1 for none.
        drop: whether the Bernoulli drop comes first.
        wide: work in fp64.
    """
    models = inputs - 1
    words = 8 if models <= 2 else 4 if models <= 4 else 2
    cfg = CONFIGS["count"]
    flags = (inputs, codes, round_code, drop, wide, words, walk.unmasked, cfg["BLOCK"])
    args = (*outs, table, *walk.places(call), model_index, bern, *queries)
    # Two programs a multiprocessor, where the compiler would take a little too much for that. (Two bf16 models take 75
    # registers by themselves; asked for 80, the compiler uses them all and spills one.)
    more = walk.unmasked and not wide and models <= (2 if drop else 4)
    single = any((codes >> (4 * i)) & 15 == 1 for i in range(inputs))
    limit = {"maxnreg": 128} if more and (drop or single) else {}
    call.launch(count_kernel, (walk.programs,), args, *flags, num_warps=cfg["num_warps"], **limit)
