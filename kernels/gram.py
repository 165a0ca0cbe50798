"""Inner products of all pairs of inputs, tile by tile.

``G_ij = sum x_i x_j`` or, with a base, ``sum (x_i - b) (x_j - b)``, for i <= j row by row of the upper triangle;
``diff`` appends ``sum (x_0 - x_1)^2``. One pass over the inputs (``M * b`` bytes per element), 8 bytes written per
tile and column; more than ten columns take several launches over the same, then often cached, bytes.

Written order of sums (design law L2): products in the work type; lane j < 2048 adds elements j, j + 2048, ... of
its tile of 65,536 from +0; lanes fold by halves; the tile's sum is widened to fp64 and stored; the host adds tiles
in fp64 in tile order (`fold_here`). Tiling: one program per tile, 8 warps, eight neighbouring lanes to a thread, so
every load of 16-bit values is one 128-bit access and each column costs 8 registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._jit import at, fold, load
from ._launch import CONFIGS, GRAM_PAIRS, I64, OPTIONS, chunks, registers, upload


@triton.jit
def gram_kernel(
    partials,
    table,
    items,
    M: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    DELTA: tl.constexpr,
    DIFF: tl.constexpr,
    WIDE: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program t: columns FROM .. TO - 1 of tile t into partials f64 ``[R, COLUMNS]``."""
    item = items + tl.program_id(0).to(tl.int64) * 5
    row = table + tl.load(item) * (7 + M)
    start = tl.load(item + 1)
    count = tl.load(item + 2).to(tl.int32)
    offs = tl.arange(0, BLOCK)
    FIRST: tl.constexpr = 1 if DELTA else 0
    K: tl.constexpr = M - FIRST
    PAIRS: tl.constexpr = K * (K + 1) // 2
    lanes = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32)
    sums = ()
    for _ in tl.static_range(TO - FROM):
        sums = sums + (lanes,)
    ptrs = ()
    for i in tl.static_range(M):
        ptrs = ptrs + (at(tl.load(row + 7 + i), start, (CODES >> (4 * i)) & 15, UNMASKED),)
    done = 0
    while done < count:
        mask = offs < count - done
        if DELTA:
            b = load(ptrs[0], done, offs, mask, WIDE, UNMASKED)
        x = ()
        for i in tl.static_range(FIRST, M):
            v = load(ptrs[i], done, offs, mask, WIDE, UNMASKED)
            if DELTA:
                v = v - b
            x = x + (v,)
        new = ()
        for i in tl.static_range(K):
            for j in tl.static_range(i, K):
                if i * (2 * K - i + 1) // 2 + j - i >= FROM and i * (2 * K - i + 1) // 2 + j - i < TO:
                    new = new + (sums[i * (2 * K - i + 1) // 2 + j - i - FROM] + x[i] * x[j],)
        if DIFF and TO > PAIRS:
            e = x[0] - x[1]
            new = new + (sums[PAIRS - FROM] + e * e,)
        sums = new
        done += BLOCK
    stat = tl.load(item + 4)  # not held in registers during the loop
    for c in tl.static_range(TO - FROM):
        tl.store(partials + stat * COLUMNS + FROM + c, fold(sums[c], BLOCK).to(tl.float64))


def gram(
    partials: torch.Tensor,
    table: torch.Tensor,
    items: I64,
    *,
    inputs: int,
    codes: int,
    delta: bool,
    diff: bool,
    wide: bool,
    unmasked: bool,
) -> None:
    """Launches one variant for all columns, ten at a time; never waits.

    Args:
        partials: f64 ``[R, columns]`` on the device; the rows of the items are written.
        table: int64 ``[S, 7 + M]`` on the device.
        items: work items (host) of this variant, one per tile.
        inputs: M, the base included.
        codes: packed type codes of the inputs.
        delta: input 0 is a base; products are of x_i - b.
        diff: the last column is ``sum (x_0 - x_1)^2`` (of deltas where delta).
        wide: work in fp64.
        unmasked: which variant the items are for.
    """
    k = inputs - int(delta)
    columns = k * (k + 1) // 2 + int(diff)
    more = registers(fast=unmasked and not wide)
    for part in chunks(upload(items, table.device), 1):
        for c in range(0, columns, GRAM_PAIRS):
            span = (c, min(c + GRAM_PAIRS, columns))
            flags = (inputs, codes, columns, *span, delta, diff, wide, unmasked)
            gram_kernel[(len(part),)](partials, table, part, *flags, **CONFIGS["gram"], **OPTIONS, **more)
