"""How many elements vote plus and how many minus, per tile: the majority sign of whole tensors.

The vote of an element is the one of consensus.py (A, ``sum a_i d_i`` or the count of signs) over kept deltas. One
pass, ``(N + 1) * b`` bytes per element. Tiling: one program per tile; two counters of 16 bits share a register per
eight neighbours (at most 256 each per tile).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._jit import at, load
from ._keep import delta, keep
from ._launch import CONFIGS, I64, OPTIONS, Keep, chunks, upload


@triton.jit
def votes_kernel(
    counts,
    table,
    items,
    model_index,
    bern,
    thr,
    cut,
    tie,
    f,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    TRIM: tl.constexpr,
    SPREAD: tl.constexpr,
    ELECT: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    UNMASKED: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program t: the votes of tile t into counts int64 ``[R, 2]`` (plus, minus); f W ``[P, N, 3]`` (c, g, a)."""
    N: tl.constexpr = M - 1
    item = items + tl.program_id(0).to(tl.int64) * 5
    s = tl.load(item)
    row = table + s * (7 + M)
    start = tl.load(item + 1)
    count = tl.load(item + 2).to(tl.int32)
    p = tl.load(item + 3)
    e = tl.load(row + 2) + start
    key = tl.load(row + 4)
    offs = tl.arange(0, BLOCK)
    base = at(tl.load(row + 7), start, CODES & 15, UNMASKED)
    ptrs = ()
    for i in tl.static_range(N):
        ptrs = ptrs + (at(tl.load(row + 8 + i), start, (CODES >> (4 * i + 4)) & 15, UNMASKED),)
    pack = tl.zeros((BLOCK // 8,), tl.int32)
    done = 0
    while done < count:
        mask = offs < count - done
        b = load(base, done, offs, mask, WIDE, UNMASKED)
        vote = tl.zeros((BLOCK,), tl.int32 if ELECT == 2 else (tl.float64 if WIDE else tl.float32))
        for i in tl.static_range(N):
            d = delta(ptrs[i], done, offs, mask, b, ROUND, WIDE, UNMASKED)
            d = keep(
                d, key, e + done, offs, s, p * N + i, i, model_index, bern, thr, cut, tie,
                N, DROP, TRIM, SPREAD, CUT, BLOCK, UNMASKED
            )  # fmt: skip
            if ELECT == 2:
                vote += (d > 0).to(tl.int32) - (d < 0).to(tl.int32)
            else:
                mine = tl.load(f + (p * N + i) * 3 + (2 if SPLIT else 0)) * d
                if i == 0:
                    vote = mine
                else:
                    vote = vote + mine
        inc = tl.where(vote > 0, 1, tl.where(vote < 0, 1 << 16, 0))
        if not UNMASKED:
            inc = tl.where(mask, inc, 0)
        pack += tl.sum(tl.reshape(inc, (BLOCK // 8, 8)), axis=1)
        done += BLOCK
    stat = tl.load(item + 4)  # not held in registers during the loop
    tl.store(counts + stat * 2, tl.sum(pack & 0xFFFF, axis=0).to(tl.int64))
    tl.store(counts + stat * 2 + 1, tl.sum(pack >> 16, axis=0).to(tl.int64))


def votes(
    counts: torch.Tensor,
    table: torch.Tensor,
    items: I64,
    keep: Keep,
    f: torch.Tensor,
    *,
    inputs: int,
    codes: int,
    elect: int,
    split: bool,
    wide: bool,
    unmasked: bool,
    cut: bool,
) -> None:
    """Launches one variant; never waits.

    Args:
        counts: int64 ``[R, 2]`` on the device; the rows of the items are written.
        table: int64 ``[S, 7 + M]`` on the device.
        items: work items (host) of this variant, one per tile.
        keep: tables of the keep pipeline, on the device.
        f: ``[P, N, 3]`` (c, g, a) in the work type, on the device.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        elect: how the vote is formed (see consensus.py).
        split: by ``sum a_i d_i`` instead of A.
        wide: work in fp64.
        unmasked: which variant the items are for.
        cut: whether ties may be decided inside them.
    """
    for part in chunks(upload(items, table.device), 1):
        flags = (inputs, codes, *keep.flags, elect, split, wide, unmasked, cut)
        votes_kernel[(len(part),)](counts, table, part, *keep.tables, f, *flags, **CONFIGS["votes"], **OPTIONS)
