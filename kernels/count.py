"""Counts of delta keys around a bracket per tile and model, and the keys strictly inside it: exact selection.

For every tile and model: ``#key > hi``, ``#key == hi``, ``#key == lo`` (0 where lo == hi), ``#lo < key < hi``, with
key = bits(|d_i|) and d_i = x_i - b, rounded and dropped as asked. Keys strictly inside are appended, in any order,
with (group, e). With a bracket that holds less than a percent of the data this decides the k-th magnitude in one
read of everything, ``(N + 1) * b`` bytes per element for all models together; no sort, no gather of the rest.

Two kernels. The one that reads everything has no branches and no atomics: four comparisons choose what an element adds
to its eight neighbours' word, one of three counters or the bit that says it is inside. The counters then share one
register of ten bits each (a tile gives them at most 256), and the bits go to memory, ``N / 8`` bytes per element. The
other one finds the marked few, one tile and model per program: one integer atomic each, then as many rounds as the
fullest word of 32 bits has marks. (Appending where the element is found would burden every element for the few that
are wanted.) Counts are integers: their order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._jit import at, load, magnitude
from ._keep import delta, drop
from ._launch import CONFIGS, I64, OPTIONS, chunks, upload

MOST_TILES = 8192
"""Tiles of one launch: their marks take 64 MiB per model."""


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
def count_kernel(
    counts,
    marks,
    table,
    items,
    model_index,
    bern,
    lo,
    hi,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program t: tile t into counts int64 ``[R, N, 4]`` (all but the last column) and marks uint8 ``[T, N, 8192]``."""
    N: tl.constexpr = M - 1
    GROUPS: tl.constexpr = BLOCK // 8
    t = tl.program_id(0).to(tl.int64)
    item = items + t * 5
    row = table + tl.load(item) * (7 + M)
    start = tl.load(item + 1)
    count = tl.load(item + 2).to(tl.int32)
    p = tl.load(item + 3)
    e = tl.load(row + 2) + start
    key = tl.load(row + 4)
    offs = tl.arange(0, BLOCK)
    byte = tl.arange(0, GROUPS)
    ptrs = ()
    lows = ()
    highs = ()
    packs = ()
    for i in tl.static_range(M):
        ptrs = ptrs + (at(tl.load(row + 7 + i), start, (CODES >> (4 * i)) & 15, UNMASKED),)
    for i in tl.static_range(N):
        low = tl.load(lo + p * N + i)
        high = tl.load(hi + p * N + i)
        lows = lows + ((above(low, WIDE, 1), above(low, WIDE, 0)),)
        highs = highs + ((above(high, WIDE, 1), above(high, WIDE, 0)),)
        packs = packs + (tl.zeros((GROUPS,), tl.int32),)
    done = 0
    while done < count:
        mask = offs < count - done
        b = load(ptrs[0], done, offs, mask, WIDE, UNMASKED)
        new = ()
        for i in tl.static_range(N):
            d = delta(ptrs[1 + i], done, offs, mask, b, ROUND, WIDE, UNMASKED)
            if DROP:
                model = tl.load(model_index + i)
                d = drop(d, key, e + done, model, tl.load(bern + p * N + i), BLOCK, UNMASKED)
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
            to = marks + (t * N + i) * 8192 + done // 8
            tl.store(to + byte, (eight >> 16).to(tl.uint8))
        packs = new
        done += BLOCK
    stat = tl.load(item + 4)  # not held in registers during the loop
    for i in tl.static_range(N):
        to = counts + (stat * N + i) * 4
        tl.store(to, tl.sum(packs[i] & 1023, axis=0).to(tl.int64))
        tl.store(to + 1, tl.sum((packs[i] >> 10) & 1023, axis=0).to(tl.int64))
        tl.store(to + 2, tl.sum(packs[i] >> 20, axis=0).to(tl.int64))


@triton.jit(do_not_specialize=["cap"])
def list_kernel(
    counts,
    keys,
    where,
    used,
    marks,
    table,
    items,
    cap: tl.int64,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (t, i): what is marked in tile t of model i into keys ``[N, cap]`` and where int64 ``[N, cap, 2]``.

    A marked element was not dropped (its key is not 0), so its key is that of its delta. BLOCK is 2048, the 32-bit
    words of a tile's marks.
    """
    N: tl.constexpr = M - 1
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    item = items + t * 5
    row = table + tl.load(item) * (7 + M)
    start = tl.load(item + 1)
    count = tl.load(item + 2).to(tl.int32)
    p = tl.load(item + 3)
    words = tl.arange(0, BLOCK)
    full = (count + 2047) // 2048 * 64
    mine = (marks + (t * N + i) * 8192).to(tl.pointer_type(tl.uint32), bitcast=True)
    bits = tl.load(mine + words, mask=words < full, other=0)
    c = bits - ((bits >> 1) & 0x55555555)  # number of bits of each word, by halves
    c = (c & 0x33333333) + ((c >> 2) & 0x33333333)
    c = (c + (c >> 4)) & 0x0F0F0F0F
    c = c + (c >> 8)
    c = ((c + (c >> 16)) & 63).to(tl.int32)
    some = tl.sum(c, axis=0)
    tl.store(counts + (tl.load(item + 4) * N + i) * 4 + 3, some.to(tl.int64))
    if some > 0:
        taken = tl.atomic_add(used + i, some.to(tl.int64), sem="relaxed")
        slot = taken + tl.cumsum(c, axis=0) - c
        e = tl.load(row + 2) + start
        base = at(tl.load(row + 7), start, CODES & 15, False)
        address = tl.load(row + 8 + i)
        rounds = tl.max(c, axis=0)
        while rounds > 0:
            low = bits & ((bits ^ 0xFFFFFFFF) + 1)
            lowest = (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            here = (low != 0) & (slot < cap)
            offs = words * 32 + tl.where(here, lowest, 0)
            b = load(base, 0, offs, here, WIDE, False)
            d = b
            for k in tl.static_range(N):
                if k == i:
                    x = at(address, start, (CODES >> (4 * k + 4)) & 15, False)
                    d = delta(x, 0, offs, here, b, ROUND, WIDE, False)
            tl.store(keys + i * cap + slot, magnitude(d), mask=here)
            place = where + (i * cap + slot) * 2
            tl.store(place, tl.zeros((BLOCK,), tl.int64) + p, mask=here)
            tl.store(place + 1, e + offs, mask=here)
            slot += 1
            bits = bits & (bits - 1)
            rounds -= 1


def count(
    counts: torch.Tensor,
    keys: torch.Tensor,
    where: torch.Tensor,
    used: torch.Tensor,
    table: torch.Tensor,
    items: I64,
    model_index: torch.Tensor,
    bern: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    *,
    inputs: int,
    codes: int,
    round_code: int,
    drop: bool,
    wide: bool,
    unmasked: bool,
) -> None:
    """Launches one variant; never waits.

    Args:
        counts: int64 ``[R, N, 4]`` on the device; the rows of the items are written.
        keys: int32 (int64 where wide) ``[N, cap]``, the bits of the keys inside.
        where: int64 ``[N, cap, 2]``: group and logical element of each.
        used: int64 ``[N]``, added to; past cap nothing is stored.
        table: int64 ``[S, 7 + M]`` on the device.
        items: work items (host) of this variant, one per tile.
        model_index: int32 ``[N]``.
        bern: int32 ``[P, N]``.
        lo: lower key of the bracket, int32 (int64 where wide) ``[P, N]``.
        hi: upper key, not below lo.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        round_code: type that deltas are rounded to, -1 for none.
        drop: whether the Bernoulli drop comes first.
        wide: work in fp64.
        unmasked: which variant the items are for.
    """
    models = inputs - 1
    for part in chunks(upload(items, table.device), models, most=MOST_TILES):
        marks = torch.empty(len(part) * models * 8192, dtype=torch.uint8, device=table.device)
        args = (marks, table, part, model_index, bern, lo, hi, inputs, codes, round_code, drop, wide, unmasked)
        count_kernel[(len(part),)](counts, *args, **CONFIGS["count"], **OPTIONS)
        args = (keys, where, used, marks, table, part, keys.shape[-1], inputs, codes, round_code, wide)
        list_kernel[(len(part), models)](counts, *args, **CONFIGS["count"], **OPTIONS)
