"""Weighted sums: ``out = round(sum c_i x_i / div)``, or of deltas ``out = round(b + lam * (sum c_i (x_i - b) / div))``.

One pass; ``(M + 1) * b`` bytes per element (``b`` bytes per weight, M inputs with the base): the floor.

Arithmetic: every product, sum and quotient is one IEEE operation in the work type, terms in input order, one
rounding at the store (design law L1). Coefficients are one row of tables per tensor, or per row of a tensor.
Tiling: one program per block of 2048 elements, sixteen to a thread, flat: no loop, so the loads of all inputs are in
flight at once; a program finds its block through the work items, so one launch covers any number of tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._jit import at, divide, load, store
from ._launch import I64, OPTIONS, chunks, config, spread, upload


@triton.jit(do_not_specialize=["log"])
def combine_kernel(
    table,
    items,
    coef,
    scale,
    nonfinite,
    log: tl.int32,
    M: tl.constexpr,
    CODES: tl.constexpr,
    OUT: tl.constexpr,
    DELTA: tl.constexpr,
    DIV: tl.constexpr,
    WIDE: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (item, block): items << log programs; coef W ``[P, M]``, scale W ``[P, 2]`` (lam, div)."""
    pid = tl.program_id(0)
    item = items + (pid >> log).to(tl.int64) * 5
    first = (pid & ((1 << log) - 1)) * BLOCK
    count = tl.load(item + 2).to(tl.int32)
    if first >= count:
        return
    s = tl.load(item)
    start = tl.load(item + 1) + first
    p = tl.load(item + 3)
    row = table + s * (7 + M)
    offs = tl.arange(0, BLOCK)
    mask = offs < count - first
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
    table: torch.Tensor,
    items: I64,
    coef: torch.Tensor,
    scale: torch.Tensor,
    nonfinite: torch.Tensor,
    *,
    inputs: int,
    codes: int,
    out: int,
    delta: bool,
    div: bool,
    wide: bool,
    unmasked: bool,
) -> None:
    """Launches one variant; never waits.

    Args:
        table: int64 ``[S, 7 + M]`` on the device; the results go to its addresses.
        items: work items (host) of this variant.
        coef: ``[P, M]`` in the work type, on the device.
        scale: ``[P, 2]`` (lambda, divisor), likewise.
        nonfinite: int64 ``[S]`` on the device, added to.
        inputs: M, the base included.
        codes: packed type codes of the inputs.
        out: type code of the results.
        delta: input 0 is a base.
        div: whether any divisor is not 1.
        wide: work in fp64.
        unmasked: which variant the items are for.
    """
    cfg = config("combine")
    log = spread(items, cfg["BLOCK"])
    for part in chunks(upload(items, table.device), 1 << log):
        combine_kernel[(len(part) << log,)](
            table, part, coef, scale, nonfinite, log, inputs, codes, out, delta, div, wide, unmasked, **cfg, **OPTIONS
        )
