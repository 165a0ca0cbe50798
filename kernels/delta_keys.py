"""Magnitude keys of all deltas of some pieces: the sample from which a selection takes its bracket.

``out[l, i] = bits(|x_i - b|)`` of element l of the pieces laid end to end, rounded and dropped as asked. One pass,
``(N + 1) * b`` bytes read and 4 N written per element, of a sample: not a hot path. Tiling: one flat program per
2048 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, load, magnitude, place
from ._keep import delta, drop
from ._launch import Walk, config


@triton.jit(do_not_specialize=["segments"])
def delta_keys_kernel(
    out,
    table,
    prefix,
    skip,
    segments: tl.int32,
    model_index,
    bern,
    M: tl.constexpr,
    CODES: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    WIDE: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block: its keys into out ``[L, N]``; the column ``stats`` is the segment's first l."""
    N: tl.constexpr = M - 1
    _, row, start, count, _, _ = place(prefix, skip, table, segments, M, BLOCK, False, UNMASKED)
    p = tl.load(row + 5)
    e = tl.load(row + 2) + start
    key = tl.load(row + 4)
    to = out + (tl.load(row + 6) + start) * N
    offs = tl.arange(0, BLOCK)
    mask = offs < count
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
    call: Call,
    out: Place,
    table: Place,
    walk: Walk,
    model_index: Place,
    bern: Place,
    *,
    inputs: int,
    codes: int,
    round_code: int,
    drop: bool,
    wide: bool,
) -> None:
    """Adds the launch of one variant.

    Args:
        call: that it belongs to.
        out: int32 (int64 where wide) ``[L, N]``: the bits of the keys.
        table: int64 ``[S, 7 + M]``; ``stats`` is where the segment starts among all elements.
        walk: the programs.
        model_index: int32 ``[N]``.
        bern: int32 ``[P, N]``.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        round_code: type that deltas are rounded to, -1 for none.
        drop: whether the Bernoulli drop comes first.
        wide: work in fp64.
    """
    cfg = config("delta_keys")
    flags = (inputs, codes, round_code, drop, wide, walk.unmasked, cfg.pop("BLOCK"))
    args = (out, table, *walk.places(call), model_index, bern)
    call.launch(delta_keys_kernel, (walk.programs,), args, *flags, **cfg)
