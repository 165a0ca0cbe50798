"""L1 norms of deltas before and after the keep pipeline, per tile and model: what a norm-preserving rescale needs.

``sum |d_i|`` and ``sum |keep(d_i)|`` in the written order of sums (see gram.py), in fp64 per tile. One pass,
``(N + 1) * b`` bytes per element for up to four models; more models take several launches. Masks are regenerated
from counters and thresholds, never stored. Tiling: one program per tile, 2048 lanes a step, two running sums per
model.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, fold, load, place
from ._keep import Keep, delta, keep
from ._launch import CONFIGS, L1_MODELS, Walk, registers


@triton.jit(do_not_specialize=["segments"])
def l1_kernel(
    sums,
    table,
    prefix,
    skip,
    segments: tl.int32,
    model_index,
    bern,
    thr,
    cut,
    tie,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    TRIM: tl.constexpr,
    SPREAD: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_SUMS: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile: models FROM .. TO - 1 into sums f64 ``[R, N, 2]``."""
    N: tl.constexpr = M - 1
    s, row, start, count, _, unit = place(prefix, skip, table, segments, M, 65536, False, UNMASKED)
    p = tl.load(row + 5)
    stat = tl.load(row + 6) + unit
    e = tl.load(row + 2) + start
    key = tl.load(row + 4)
    offs = tl.arange(0, BLOCK)
    base = at(tl.load(row + 7), start, CODES & 15, UNMASKED)
    ptrs = ()
    before = ()
    after = ()
    for i in tl.static_range(FROM, TO):
        ptrs = ptrs + (at(tl.load(row + 8 + i), start, (CODES >> (4 * i + 4)) & 15, UNMASKED),)
        before = before + (tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32),)
        after = after + (tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32),)
    done = 0
    while done < count:
        mask = offs < count - done
        b = load(base, done, offs, mask, WIDE, UNMASKED)
        new_before = ()
        new_after = ()
        for i in tl.static_range(FROM, TO):
            d = delta(ptrs[i - FROM], done, offs, mask, b, ROUND, WIDE, UNMASKED)
            new_before = new_before + (before[i - FROM] + tl.abs(d),)
            d = keep(
                d, key, e + done, offs, s, p * N + i, i, model_index, bern, thr, cut, tie,
                N, DROP, TRIM, SPREAD, TRIM, BLOCK, UNMASKED
            )  # fmt: skip
            new_after = new_after + (after[i - FROM] + tl.abs(d),)
        before = new_before
        after = new_after
        done += BLOCK
    both = ()
    for i in tl.static_range(TO - FROM):
        if WIDE_SUMS:
            both = both + (before[i].to(tl.float64), after[i].to(tl.float64))
        else:
            both = both + (before[i], after[i])
    columns = tl.arange(0, triton.next_power_of_2(2 * (TO - FROM)))
    to = sums + (stat * N + FROM) * 2 + columns
    tl.store(to, fold(both, 2 * (TO - FROM), BLOCK).to(tl.float64), mask=columns < 2 * (TO - FROM))


def l1(call: Call, sums: Place, table: Place, walk: Walk, keep: Keep, *, inputs: int, codes: int, wide: bool) -> None:
    """Adds the launches of one variant, for four models each.

    Args:
        call: that they belong to.
        sums: f64 ``[R, N, 2]``; every row is written.
        table: int64 ``[S, 7 + M]``.
        walk: the programs, one per tile.
        keep: tables of the keep pipeline.
        inputs: M, the base included.
        codes: packed type codes of the inputs.
        wide: work in fp64.
    """
    more = registers(fast=walk.unmasked and not wide)
    args = (sums, table, *walk.places(call), *keep.tables)
    if walk.unmasked and inputs <= 3 and all((codes >> (4 * i)) & 15 >= 2 for i in range(inputs)):
        if not (keep.flags[1] and keep.flags[2]):
            more = {"maxnreg": 80}  # three programs a multiprocessor, for 5 to 10 % more instructions
    for i in range(0, inputs - 1, L1_MODELS):
        models = (i, min(i + L1_MODELS, inputs - 1))
        flags = (inputs, codes, *keep.flags, *models, wide, wide or keep.wide_sums, walk.unmasked)
        about = {"num_warps": CONFIGS["l1"]["num_warps"], **more}
        call.launch(l1_kernel, (walk.programs,), args, *flags, CONFIGS["l1"]["BLOCK"], **about)
