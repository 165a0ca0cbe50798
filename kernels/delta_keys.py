"""Magnitude keys of all deltas of some pieces: the sample from which a selection takes its bracket.

``out[l, i] = bits(|x_i - b|)`` of element l of the pieces laid end to end, rounded and dropped as asked. One pass,
``(N + 1) * b`` bytes read and 4 N written per element, of a sample: not a hot path. Tiling: one flat program per
2048 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._jit import at, load, magnitude
from ._keep import delta, drop
from ._launch import I64, OPTIONS, chunks, config, spread, upload


@triton.jit(do_not_specialize=["log"])
def delta_keys_kernel(
    out,
    table,
    items,
    model_index,
    bern,
    log: tl.int32,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (item, block): keys of a block into out ``[L, N]``; the item's output row is its first l."""
    N: tl.constexpr = M - 1
    pid = tl.program_id(0)
    item = items + (pid >> log).to(tl.int64) * 5
    first = (pid & ((1 << log) - 1)) * BLOCK
    count = tl.load(item + 2).to(tl.int32)
    if first >= count:
        return
    row = table + tl.load(item) * (7 + M)
    start = tl.load(item + 1) + first
    p = tl.load(item + 3)
    e = tl.load(row + 2) + start
    key = tl.load(row + 4)
    to = out + (tl.load(item + 4) + first) * N
    offs = tl.arange(0, BLOCK)
    mask = offs < count - first
    b = load(at(tl.load(row + 7), start, CODES & 15, UNMASKED), 0, offs, mask, WIDE, UNMASKED)
    for i in tl.static_range(N):
        x = at(tl.load(row + 8 + i), start, (CODES >> (4 * i + 4)) & 15, UNMASKED)
        d = delta(x, 0, offs, mask, b, ROUND, WIDE, UNMASKED)
        if DROP:
            d = drop(d, key, e, tl.load(model_index + i), tl.load(bern + p * N + i), BLOCK, UNMASKED)
        if UNMASKED:
            tl.store(to + offs * N + i, magnitude(d))
        else:
            tl.store(to + offs * N + i, magnitude(d), mask=mask)


def delta_keys(
    out: torch.Tensor,
    table: torch.Tensor,
    items: I64,
    model_index: torch.Tensor,
    bern: torch.Tensor,
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
        out: int32 (int64 where wide) ``[L, N]`` on the device: the bits of the keys.
        table: int64 ``[S, 7 + M]`` on the device.
        items: work items (host) of this variant; the output row is where the item starts among all elements.
        model_index: int32 ``[N]``.
        bern: int32 ``[P, N]``.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        round_code: type that deltas are rounded to, -1 for none.
        drop: whether the Bernoulli drop comes first.
        wide: work in fp64.
        unmasked: which variant the items are for.
    """
    cfg = config("delta_keys")
    log = spread(items, cfg["BLOCK"])
    for part in chunks(upload(items, table.device), 1 << log):
        delta_keys_kernel[(len(part) << log,)](
            out, table, part, model_index, bern, log, inputs, codes, round_code, drop, wide, unmasked, **cfg, **OPTIONS
        )
