"""Weighted sums: ``out = round(sum c_i x_i / div)``, or of deltas ``out = round(b + lam * (sum c_i (x_i - b) / div))``.

One pass; ``(M + 1) * b`` bytes per element (``b`` bytes per weight, M inputs with the base): the floor.

Arithmetic: every product, sum and quotient is one IEEE operation in the work type, terms in input order, one
rounding at the store (design law L1). Coefficients are one row of tables per tensor, or per row of a tensor.
Tiling: one program per block of 2048 elements, sixteen to a thread, flat: no loop, so the loads of all inputs are in
flight at once; a program finds its block in a prefix table, so one launch covers any number of tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, divide, load, place, store
from ._launch import Walk, config


@triton.jit(do_not_specialize=["segments"])
def combine_kernel(
    table,
    prefix,
    skip,
    segments: tl.int32,
    coef,
    scale,
    nonfinite,
    M: tl.constexpr,
    CODES: tl.constexpr,
    OUT: tl.constexpr,
    DELTA: tl.constexpr,
    DIV: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block; coef W ``[P, M]``, scale W ``[P, 2]`` (lam, div)."""
    s, row, start, count, r, _ = place(prefix, skip, table, segments, M, BLOCK, ROWS, UNMASKED)
    p = tl.load(row + 5) + r
    if ROWS:
        p += tl.load(row + 2) // tl.maximum(tl.load(row + 3), 1)
    offs = tl.arange(0, BLOCK)
    mask = offs < count
    if DELTA:
        b = load(at(tl.load(row + 7), start, CODES & 15, UNMASKED), 0, offs, mask, WIDE, UNMASKED)
        acc = b
    else:
        acc = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32)
    for i in tl.static_range(1 if DELTA else 0, M):
        x = load(at(tl.load(row + 7 + i), start, (CODES >> (4 * i)) & 15, UNMASKED), 0, offs, mask, WIDE, UNMASKED)
        if DELTA:
            x = x - b
        term = tl.load(coef + p * M + i) * x
        if i == (1 if DELTA else 0):
            acc = term
        else:
            acc = acc + term
    if DIV:
        acc = divide(acc, tl.zeros_like(acc) + tl.load(scale + p * 2 + 1))
    if DELTA:
        acc = b + tl.load(scale + p * 2) * acc
    store(at(tl.load(row), start, OUT, UNMASKED), offs, mask, acc, nonfinite + s, OUT, UNMASKED, BLOCK)


def combine(
    call: Call,
    table: Place,
    walk: Walk,
    coef: Place,
    scale: Place,
    nonfinite: Place,
    *,
    inputs: int,
    codes: int,
    out: int,
    delta: bool,
    div: bool,
    wide: bool,
    per_row: bool,
) -> None:
    """Adds the launch of one variant.

    Args:
        call: that it belongs to.
        table: int64 ``[S, 7 + M]``; the results go to its addresses.
        walk: the programs.
        coef: ``[P, M]`` in the work type.
        scale: ``[P, 2]`` (lambda, divisor), likewise.
        nonfinite: int64 ``[S]``, added to.
        inputs: M, the base included.
        codes: packed type codes of the inputs.
        out: type code of the results.
        delta: input 0 is a base.
        div: whether any divisor is not 1.
        wide: work in fp64.
        per_row: the row of parameters is group + row of the tensor.
    """
    cfg = config("combine")
    args = (table, *walk.places(call), coef, scale, nonfinite)
    flags = (inputs, codes, out, delta, div, wide, per_row, walk.unmasked, cfg.pop("BLOCK"))
    call.launch(combine_kernel, (walk.programs,), args, *flags, **cfg)
