"""Inner products of all pairs of inputs, tile by tile.

``G_ij = sum x_i x_j`` or, with a base, ``sum (x_i - b) (x_j - b)``, for i <= j row by row of the upper triangle;
``diff`` appends ``sum (x_0 - x_1)^2``. One pass over the inputs (``M * b`` bytes per element), 8 bytes written per
tile and column; more than ten columns take several launches over the same, then often cached, bytes.

Written order of sums (design law L2): products in the work type; lane j < 2048 adds elements j, j + 2048, ... of
its tile of 65,536 from +0; lanes fold by halves; the tile's sum is widened to fp64 and stored; tiles are added in
fp64 in tile order (solve.py). Tiling: one program per tile, 8 warps, eight neighbouring lanes to a thread, so
every load of 16-bit values is one 128-bit access and each column costs 8 registers. An iteration takes two steps where
registers allow it, with all loads first (:func:`shape`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, fold, load, place
from ._launch import CONFIGS, GRAM_PAIRS, Walk, registers

STEPS = 2
"""Steps of an iteration, at most: all their loads stand first, then both add to the sums in turn."""


def shape(inputs: int, codes: int, columns: int, *, fast: bool) -> tuple[int, dict[str, int]]:
    """Steps of an iteration, and options of the compiler.

    Two steps of 16-bit values are 32 bytes a thread and input, what one step of fp32 is. With 2 inputs and 4 columns
    they fit 64 registers, and four programs share a multiprocessor: slerp's products have 64 KB in flight (with one
    step 66 registers, three programs and 24 KB); 3 TB/s take some 20 KB at every moment. 3 inputs with 3 columns take
    80 registers: three programs, 72 KB.
    """
    two = fast and inputs + columns <= 6 and all((codes >> (4 * i)) & 15 >= 2 for i in range(inputs))
    return (STEPS, {"maxnreg": 64 if inputs == 2 else 80}) if two else (1, registers(fast=fast))


@triton.jit(do_not_specialize=["segments"])
def gram_kernel(
    partials,
    table,
    prefix,
    skip,
    segments: tl.int32,
    M: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    DELTA: tl.constexpr,
    DIFF: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    UNMASKED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile: columns FROM .. TO - 1 into partials f64 ``[R, COLUMNS]``."""
    _, row, start, count, r, unit = place(prefix, skip, table, segments, M, 65536, ROWS, UNMASKED)
    stat = tl.load(row + 6) + unit
    if ROWS:
        stat += r * ((tl.load(row + 3) + 65535) // 65536)
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
        steps = ()  # all loads of an iteration first: they are in flight together
        for u in tl.static_range(STEPS):
            mask = offs < count - done - u * BLOCK
            x = ()
            for i in tl.static_range(M):
                x = x + (load(ptrs[i], done + u * BLOCK, offs, mask, WIDE, UNMASKED),)
            steps = steps + (x,)
        for u in tl.static_range(STEPS):
            x = ()
            for i in tl.static_range(FIRST, M):
                if DELTA:
                    x = x + (steps[u][i] - steps[u][0],)
                else:
                    x = x + (steps[u][i],)
            new = ()
            for i in tl.static_range(K):
                for j in tl.static_range(i, K):
                    if i * (2 * K - i + 1) // 2 + j - i >= FROM and i * (2 * K - i + 1) // 2 + j - i < TO:
                        new = new + (sums[i * (2 * K - i + 1) // 2 + j - i - FROM] + x[i] * x[j],)
            if DIFF and TO > PAIRS:
                e = x[0] - x[1]
                new = new + (sums[PAIRS - FROM] + e * e,)
            sums = new
        done += STEPS * BLOCK
    columns = tl.arange(0, triton.next_power_of_2(TO - FROM))
    to = partials + stat * COLUMNS + FROM + columns
    tl.store(to, fold(sums, TO - FROM, BLOCK).to(tl.float64), mask=columns < TO - FROM)


def gram(
    call: Call,
    partials: Place,
    table: Place,
    walk: Walk,
    *,
    inputs: int,
    codes: int,
    delta: bool,
    diff: bool,
    wide: bool,
    per_row: bool,
) -> None:
    """Adds the launches of one variant, for ten columns each.

    Args:
        call: that they belong to.
        partials: f64 ``[R, columns]``; every row is written.
        table: int64 ``[S, 7 + M]``.
        walk: the programs, one per tile.
        inputs: M, the base included.
        codes: packed type codes of the inputs.
        delta: input 0 is a base; products are of x_i - b.
        diff: the last column is ``sum (x_0 - x_1)^2`` (of deltas where delta).
        wide: work in fp64.
        per_row: tiles restart at each row.
    """
    k = inputs - int(delta)
    columns = k * (k + 1) // 2 + int(diff)
    args = (partials, table, *walk.places(call))
    cfg = CONFIGS["gram"]
    for c in range(0, columns, GRAM_PAIRS):
        span = (c, min(c + GRAM_PAIRS, columns))
        steps, more = shape(inputs, codes, span[1] - c, fast=walk.unmasked and not wide)
        flags = (inputs, codes, columns, *span, delta, diff, wide, per_row, walk.unmasked, steps, cfg["BLOCK"])
        call.launch(gram_kernel, (walk.programs,), args, *flags, num_warps=cfg["num_warps"], **more)
