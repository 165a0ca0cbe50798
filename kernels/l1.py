"""L1 norms of deltas before and after the keep pipeline, per tile and model: what a norm-preserving rescale needs.

``sum |d_i|`` and ``sum |keep(d_i)|`` in the written order of sums (see gram.py), in fp64 per tile. One pass,
``(N + 1) * b`` bytes per element for up to four models; more models take several launches. Masks are regenerated
from counters and thresholds, never stored. Tiling: one program per tile, 2048 lanes a step, two running sums per
model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._jit import at, fold, load
from ._keep import delta, keep
from ._launch import CONFIGS, I64, L1_MODELS, OPTIONS, Keep, chunks, registers, upload


@triton.jit
def l1_kernel(
    sums,
    table,
    items,
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
    UNMASKED: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program t: models FROM .. TO - 1 of tile t into sums f64 ``[R, N, 2]``."""
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
                N, DROP, TRIM, SPREAD, CUT, BLOCK, UNMASKED
            )  # fmt: skip
            new_after = new_after + (after[i - FROM] + tl.abs(d),)
        before = new_before
        after = new_after
        done += BLOCK
    stat = tl.load(item + 4)  # not held in registers during the loop
    for i in tl.static_range(FROM, TO):
        to = sums + (stat * N + i) * 2
        tl.store(to, fold(before[i - FROM], BLOCK).to(tl.float64))
        tl.store(to + 1, fold(after[i - FROM], BLOCK).to(tl.float64))


def l1(
    sums: torch.Tensor,
    table: torch.Tensor,
    items: I64,
    keep: Keep,
    *,
    inputs: int,
    codes: int,
    wide: bool,
    unmasked: bool,
    cut: bool,
) -> None:
    """Launches one variant; never waits.

    Args:
        sums: f64 ``[R, N, 2]`` on the device; the rows of the items are written.
        table: int64 ``[S, 7 + M]`` on the device.
        items: work items (host) of this variant, one per tile.
        keep: tables of the keep pipeline, on the device.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        wide: work in fp64.
        unmasked: which variant the items are for.
        cut: whether ties may be decided inside them.
    """
    more = registers(fast=unmasked and not wide)
    for part in chunks(upload(items, table.device), 1):
        for i in range(0, inputs - 1, L1_MODELS):
            models = (i, min(i + L1_MODELS, inputs - 1))
            flags = (inputs, codes, *keep.flags, *models, wide, unmasked, cut)
            l1_kernel[(len(part),)](sums, table, part, *keep.tables, *flags, **CONFIGS["l1"], **OPTIONS, **more)
