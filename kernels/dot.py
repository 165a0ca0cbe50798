"""Inner products of a gradient with task vectors, tile by tile: the backward of a weighted sum of task vectors.

``s_i = sum g (x_i - b)`` over the elements of a tensor, differences and products in the work type. Input 0 is the
base b, the last one the gradient g. One pass over all inputs (``(N + 2) * b`` bytes per element for up to eight models;
more take several launches over the same gradient and base), 8 bytes written per tile and model.

Written order of sums and tiling: see gram.py. One program per tile, 2048 lanes a step, one running sum per model.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, fold, load, place
from ._launch import CONFIGS, DOT_MODELS, Walk, registers


@triton.jit(do_not_specialize=["segments"])
def dot_kernel(
    partials,
    table,
    prefix,
    skip,
    segments: tl.int32,
    M: tl.constexpr,
    CODES: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    WIDE: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile: models FROM .. TO - 1 into partials f64 ``[R, M - 2]``."""
    _, row, start, count, _, unit = place(prefix, skip, table, segments, M, 65536, False, UNMASKED)
    stat = tl.load(row + 6) + unit
    offs = tl.arange(0, BLOCK)
    base = at(tl.load(row + 7), start, CODES & 15, UNMASKED)
    gradient = at(tl.load(row + 6 + M), start, (CODES >> (4 * M - 4)) & 15, UNMASKED)
    ptrs = ()
    sums = ()
    for i in tl.static_range(FROM, TO):
        ptrs = ptrs + (at(tl.load(row + 8 + i), start, (CODES >> (4 * i + 4)) & 15, UNMASKED),)
        sums = sums + (tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32),)
    done = 0
    while done < count:
        mask = offs < count - done
        b = load(base, done, offs, mask, WIDE, UNMASKED)
        g = load(gradient, done, offs, mask, WIDE, UNMASKED)
        x = ()
        for i in tl.static_range(TO - FROM):  # all loads first: they are in flight together
            x = x + (load(ptrs[i], done, offs, mask, WIDE, UNMASKED),)
        new = ()
        for i in tl.static_range(TO - FROM):
            new = new + (sums[i] + g * (x[i] - b),)
        sums = new
        done += BLOCK
    columns = tl.arange(0, triton.next_power_of_2(TO - FROM))
    to = partials + stat * (M - 2) + FROM + columns
    tl.store(to, fold(sums, TO - FROM, BLOCK).to(tl.float64), mask=columns < TO - FROM)


def dot(call: Call, partials: Place, table: Place, walk: Walk, *, inputs: int, codes: int, wide: bool) -> None:
    """Adds the launches of one variant, for eight models each.

    Args:
        call: that they belong to.
        partials: f64 ``[R, N]``; every row is written.
        table: int64 ``[S, 7 + M]``.
        walk: the programs, one per tile.
        inputs: M, base and gradient included.
        codes: packed type codes of the inputs.
        wide: work in fp64.
    """
    more = registers(fast=walk.unmasked and not wide)
    args = (partials, table, *walk.places(call))
    cfg = CONFIGS["dot"]
    for i in range(0, inputs - 2, DOT_MODELS):
        models = (i, min(i + DOT_MODELS, inputs - 2))
        flags = (inputs, codes, *models, wide, walk.unmasked, cfg["BLOCK"])
        call.launch(dot_kernel, (walk.programs,), args, *flags, num_warps=cfg["num_warps"], **more)
