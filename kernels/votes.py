"""How many elements vote plus and how many minus, per tile: the majority sign of whole tensors.

The vote of an element is the one of consensus.py (A, ``sum a_i d_i`` or the count of signs) over kept deltas. One
pass, ``(N + 1) * b`` bytes per element. Tiling: one program per tile; two counters of 16 bits share a register per
eight neighbours (at most 256 each per tile).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, load, place
from ._keep import Keep, delta, keep
from ._launch import CONFIGS, Walk


@triton.jit(do_not_specialize=["segments"])
def votes_kernel(
    counts,
    table,
    prefix,
    skip,
    segments: tl.int32,
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
    WIDE_SUMS: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile: its votes into counts int64 ``[R, 2]`` (plus, minus); f ``[P, N, 3]`` (c, g, a)."""
    N: tl.constexpr = M - 1
    s, row, start, count, _, unit = place(prefix, skip, table, segments, M, 65536, False, UNMASKED)
    p = tl.load(row + 5)
    stat = tl.load(row + 6) + unit
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
        vote = tl.zeros((BLOCK,), tl.int32 if ELECT == 2 else (tl.float64 if WIDE_SUMS else tl.float32))
        for i in tl.static_range(N):
            d = delta(ptrs[i], done, offs, mask, b, ROUND, WIDE, UNMASKED)
            d = keep(
                d, key, e + done, offs, s, p * N + i, i, model_index, bern, thr, cut, tie,
                N, DROP, TRIM, SPREAD, TRIM, BLOCK, UNMASKED
            )  # fmt: skip
            if ELECT == 2:
                vote += (d > 0).to(tl.int32) - (d < 0).to(tl.int32)
            else:
                mine = tl.load(f + (p * N + i) * 3 + (2 if SPLIT else 0)) * d.to(vote.dtype)
                if i == 0:
                    vote = mine
                else:
                    vote = vote + mine
        inc = tl.where(vote > 0, 1, tl.where(vote < 0, 1 << 16, 0))
        if not UNMASKED:
            inc = tl.where(mask, inc, 0)
        pack += tl.sum(tl.reshape(inc, (BLOCK // 8, 8)), axis=1)
        done += BLOCK
    tl.store(counts + stat * 2, tl.sum(pack & 0xFFFF, axis=0).to(tl.int64))
    tl.store(counts + stat * 2 + 1, tl.sum(pack >> 16, axis=0).to(tl.int64))


def votes(
    call: Call,
    counts: Place,
    table: Place,
    walk: Walk,
    keep: Keep,
    f: Place,
    *,
    inputs: int,
    codes: int,
    elect: int,
    split: bool,
    wide: bool,
) -> None:
    """Adds the launch of one variant.

    Args:
        call: that it belongs to.
        counts: int64 ``[R, 2]``; every row is written.
        table: int64 ``[S, 7 + M]``.
        walk: the programs, one per tile.
        keep: tables of the keep pipeline.
        f: ``[P, N, 3]`` (c, g, a) in the type of the sums.
        inputs: M, the base included.
        codes: packed type codes of the inputs.
        elect: how the vote is formed (see consensus.py).
        split: by ``sum a_i d_i`` instead of A.
        wide: work in fp64.
    """
    flags = (inputs, codes, *keep.flags, elect, split, wide, wide or keep.wide_sums, walk.unmasked)
    args, config = (counts, table, *walk.places(call), *keep.tables, f), CONFIGS["votes"]
    call.launch(votes_kernel, (walk.programs,), args, *flags, config["BLOCK"], num_warps=config["num_warps"])
