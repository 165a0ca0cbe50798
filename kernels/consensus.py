"""Consensus of deltas: keep, weight, elect a sign, merge what agrees, add to the base (TIES, DARE, DELLA, SCE, ...).

``d_i = keep(x_i - b)``, ``v_i = c_i d_i``, ``A = sum v_i``, ``B = sum |v_i|``; the elected sign is that of A
(``mass``), of ``sum a_i d_i`` (``mass`` with split) or of the number of positive less negative deltas (``count``). Then

- mean: ``out = b + (A + B) * h`` where the sign is plus, ``b + (A - B) * h`` where it is minus, with
  ``h = (lam / 2) / G`` and G the sum of g_i over the values of that sign (0 counts as 1, an infinite h as the largest
  number);
- sum: the same with ``h = lam / 2``; max: ``b + lam * mix``, mix the largest value of that sign, NaN if A is;
- no election: ``b + lam * (A / div)``.

One pass, ``(N + 2) * b`` bytes per element: the floor (thresholds come from device memory). The sums over the elected
sign are formed from A and B, which takes fewer instructions than two sums under masks (reference: TIES-Merging, arXiv
2306.01708). With up to eight models h is read from a table of all sets of them: finding the set takes fewer than the
sums of g and a division. (tests/kernels/aot.py counts instructions and registers.) Tiling: one flat program per
block, 8 or 16 elements per thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from ._call import Call, Place
from ._jit import at, divide, limited, load, place, store
from ._keep import Keep, delta, keep
from ._launch import Walk, config

NONE, MASS, COUNT = 0, 1, 2
"""How a sign is elected."""

PLUS, MAJORITY, BASE = 0, 1, 2
"""What a vote of zero means: plus, the table's sign, or the base unchanged."""

MEAN, SUM, MAX = 0, 1, 2
"""How the values of the elected sign are merged."""

MANY = 6
"""Inputs from which a program takes 8 warps: 4 would need too many registers each. On an H100 that took the merge of
eight models from 0.914 of copy to 0.942."""

SETS = tl.constexpr(8)
"""Models up to which h comes from a table of ``2 ** N`` entries."""


def flags(rules: Any, out: int) -> dict[str, Any]:
    """What the rules of a call (``fastmerge/ops/kernels.py``) decide of its kernel."""
    elect = int(rules.votes.elect)
    return {
        "out": out,
        "elect": elect,
        "split": bool(rules.votes.split),
        "zero": int(rules.zero),
        "merge": int(rules.merge),
        "div": elect == NONE and bool((rules.scale[:, 1] != 1).any()),
    }


@np.errstate(all="ignore")
def shares(rules: Any, work: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """``h`` of every set of models that may agree, in the work type; bit N - 1 - i of the column says model i does.

    Args:
        rules: factors ``[P, N, 3]`` (c, g, a) and scale ``[P, 3]`` (lam, div, majority sign).
        work: rounds to the work type.

    Returns:
        ``[P, 2 ** N]``, or one row where all are equal; one number where the kernel does not look.
    """
    models = rules.votes.factors.shape[1]
    if int(rules.votes.elect) == NONE or int(rules.merge) != MEAN or models > SETS.value:
        return work(np.zeros((1, 1)))
    count_weights, half = work(rules.votes.factors[:, :, 1]), work(rules.scale[:, 0])
    half = half * half.dtype.type(0.5)
    if len(half) > 1 and (count_weights == count_weights[0]).all() and (half == half[0]).all():
        count_weights, half = count_weights[:1], half[:1]
    kind = half.dtype.type
    den = np.zeros((len(half), 1 << models), kind)
    sets = np.arange(1 << models)
    for i in range(models):
        den += np.where(sets >> (models - 1 - i) & 1, count_weights[:, i : i + 1], kind(0))
    found = half[:, None] / np.where(den == 0, kind(1), den)
    most = np.finfo(kind).max
    return np.where(found > most, most, np.where(found < -most, -most, found))


@triton.jit
def inside(cut, s, e, i: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the tie cut of model i lies inside the block that starts at e: some of its ties stay, some go."""
    c = tl.load(cut + s * N + i)
    return (c > e) & (c < e + BLOCK)


@triton.jit
def merge_block(
    row,
    s,
    start,
    count,
    model_index,
    bern,
    thr,
    cut,
    tie,
    f,
    scale,
    share,
    nonfinite,
    step,
    M: tl.constexpr,
    CODES: tl.constexpr,
    OUT: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    TRIM: tl.constexpr,
    SPREAD: tl.constexpr,
    ELECT: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO: tl.constexpr,
    MERGE: tl.constexpr,
    DIV: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_SUMS: tl.constexpr,
    UNMASKED: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The merge of one block: elements ``start .. start + count`` of segment s, whose row of the table is given."""
    N: tl.constexpr = M - 1
    TABLE: tl.constexpr = N <= SETS
    p = tl.load(row + 5)
    e = tl.load(row + 2) + start
    key = tl.load(row + 4)
    offs = tl.arange(0, BLOCK)
    mask = offs < count
    W: tl.constexpr = tl.float64 if WIDE_SUMS else tl.float32
    b = load(at(tl.load(row + 7), start, CODES & 15, UNMASKED), 0, offs, mask, WIDE, UNMASKED)
    total = tl.zeros((BLOCK,), W)
    if ELECT != 0:
        mass = total
        vote = total
        # MAX works on bits: a comparison of floats may become min.f32, which puts -0 below +0.
        BITS: tl.constexpr = tl.int64 if WIDE_SUMS else tl.int32
        SIZE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if WIDE_SUMS else 0x7FFFFFFF
        INFINITY: tl.constexpr = 0x7FF0000000000000 if WIDE_SUMS else 0x7F800000
        most = tl.zeros((BLOCK,), BITS)
        least = most
        ups = total
        downs = total
        votes = tl.zeros((BLOCK,), tl.int32)
        minus = tl.zeros((BLOCK,), tl.uint32)  # whose values have a minus, and whose are not zero: bit N - 1 - i
        some = minus
    for i in tl.static_range(N):
        x = at(tl.load(row + 8 + i), start, (CODES >> (4 * i + 4)) & 15, UNMASKED)
        d = delta(x, 0, offs, mask, b, ROUND, WIDE, UNMASKED)
        d = keep(
            d,
            key,
            e,
            offs,
            s,
            p * N + i,
            i,
            model_index,
            bern,
            thr,
            cut,
            tie,
            N,
            DROP,
            TRIM,
            SPREAD,
            CUT,
            BLOCK,
            UNMASKED,
        )
        mine = f + (p * N + i) * 3
        d = d.to(W)
        v = tl.load(mine) * d
        if i == 0:
            total = v
        else:
            total = total + v
        if ELECT != 0:
            if SPLIT:
                a = tl.load(mine + 2) * d
                if i == 0:
                    vote = a
                else:
                    vote = vote + a
            if ELECT == 2:
                votes += (d > 0).to(tl.int32) - (d < 0).to(tl.int32)
            if MERGE == 2:
                u = v.to(BITS, bitcast=True)
                size = u & SIZE
                most = tl.where((u > most) & (size <= INFINITY), u, most)
                least = tl.where((u < 0) & (size > (least & SIZE)) & (size <= INFINITY), u, least)
            else:
                if i == 0:
                    mass = tl.abs(v)
                else:
                    mass = mass + tl.abs(v)
                if MERGE == 0 and TABLE:
                    if WIDE_SUMS:
                        sign = (v < 0).to(tl.uint32)
                    else:
                        sign = v.to(tl.uint32, bitcast=True) >> 31
                    minus = (minus << 1) | sign
                    some = some + tl.where(v != 0, 1 << (N - 1 - i), 0).to(tl.uint32)
                elif MERGE == 0:
                    g = tl.load(mine + 1)
                    ups = ups + tl.where(v > 0, g, 0.0)
                    downs = downs + tl.where(v < 0, g, 0.0)
    b = b.to(W)
    lam = tl.load(scale + p * 3)
    if ELECT == 0:
        mix = total
        if DIV:
            mix = divide(mix, tl.zeros_like(mix) + tl.load(scale + p * 3 + 1))
        y = b + lam * mix
    else:
        if ELECT == 2:
            up = votes > 0
            tied = votes == 0
        else:
            if not SPLIT:
                vote = total
            up = vote > 0
            tied = vote == 0
        if ZERO == 0:
            up = up | tied
        elif ZERO == 1:
            majority = tl.zeros_like(total) + tl.load(scale + p * 3 + 2)
            up = up | (tied & (majority > 0))
        if MERGE == 2:
            largest = tl.where(up, most, least).to(W, bitcast=True)
            y = b + lam * tl.where(total == total, largest, total)
        else:
            h = lam * 0.5
            if MERGE == 0 and TABLE:
                agree = some & (minus ^ tl.where(up, 0xFFFFFFFF, 0).to(tl.uint32))
                h = tl.gather(tl.load(share + p * step + tl.arange(0, 1 << N)), agree.to(tl.int32), 0)
            elif MERGE == 0:
                den = tl.where(up, ups, downs)
                h = limited(divide(tl.zeros_like(den) + h, tl.where(den == 0, 1.0, den)))
            y = b + tl.where(up, total + mass, total - mass) * h  # not + -mass, which is +0 for a mass of +0
        if ZERO == 2:
            y = tl.where(tied, b, y)
    store(at(tl.load(row), start, OUT, UNMASKED), offs, mask, y, nonfinite + s, OUT, UNMASKED, BLOCK)


@triton.jit(do_not_specialize=["segments", "step"])
def consensus_kernel(
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
    scale,
    share,
    nonfinite,
    step: tl.int32,
    M: tl.constexpr,
    CODES: tl.constexpr,
    OUT: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    TRIM: tl.constexpr,
    SPREAD: tl.constexpr,
    ELECT: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO: tl.constexpr,
    MERGE: tl.constexpr,
    DIV: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_SUMS: tl.constexpr,
    UNMASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per block. f ``[P, N, 3]`` (c, g, a), scale ``[P, 3]`` (lam, div, majority sign).

    share ``[1 or P, 2 ** N]`` as :func:`shares` makes it, step elements from row to row. Blocks with a tie cut inside
    are left to :func:`ties_kernel`: one per segment and model at most, which spares all others a look at each element.
    """
    s, row, start, count, _, _ = place(prefix, skip, table, segments, M, BLOCK, False, UNMASKED)
    mine = count > 0
    if TRIM and not SPREAD:
        e = tl.load(row + 2) + start
        for i in tl.static_range(M - 1):
            mine = mine & ~inside(cut, s, e, i, M - 1, BLOCK)
    if mine:
        merge_block(
            row, s, start, count, model_index, bern, thr, cut, tie, f, scale, share, nonfinite, step,
            M, CODES, OUT, ROUND, DROP, TRIM, SPREAD, ELECT, SPLIT, ZERO, MERGE, DIV, WIDE, WIDE_SUMS,
            UNMASKED, SPREAD, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["step"])
def ties_kernel(
    table,
    model_index,
    bern,
    thr,
    cut,
    tie,
    f,
    scale,
    share,
    nonfinite,
    step: tl.int32,
    M: tl.constexpr,
    CODES: tl.constexpr,
    OUT: tl.constexpr,
    ROUND: tl.constexpr,
    DROP: tl.constexpr,
    TRIM: tl.constexpr,
    SPREAD: tl.constexpr,
    ELECT: tl.constexpr,
    SPLIT: tl.constexpr,
    ZERO: tl.constexpr,
    MERGE: tl.constexpr,
    DIV: tl.constexpr,
    WIDE: tl.constexpr,
    WIDE_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (s, i): the block of segment s that holds the tie cut of model i, unless an earlier model's is there."""
    N: tl.constexpr = M - 1
    s = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    row = table + s * (7 + M)
    e0 = tl.load(row + 2)
    length = tl.load(row + 1)
    start = (tl.load(cut + s * N + i) - e0) // BLOCK * BLOCK
    mine = (start >= 0) & (start < length)
    for j in tl.static_range(N):
        here = inside(cut, s, e0 + start, j, N, BLOCK)
        mine = mine & tl.where(i == j, here, (i < j) | ~here)
    if mine:
        count = tl.minimum(length - start, BLOCK).to(tl.int32)
        merge_block(
            row, s, start, count, model_index, bern, thr, cut, tie, f, scale, share, nonfinite, step,
            M, CODES, OUT, ROUND, DROP, TRIM, SPREAD, ELECT, SPLIT, ZERO, MERGE, DIV, WIDE, WIDE_SUMS,
            False, True, BLOCK,
        )  # fmt: skip


def consensus(
    call: Call,
    table: Place,
    walks: Iterable[Walk],
    keep: Keep,
    f: Place,
    scale: Place,
    share: Place,
    nonfinite: Place,
    *,
    inputs: int,
    codes: int,
    out: int,
    elect: int,
    split: bool,
    zero: int,
    merge: int,
    div: bool,
    wide: bool,
) -> None:
    """Adds the launches.

    Args:
        call: that they belong to.
        table: int64 ``[S, 7 + M]``; the results go to its addresses.
        walks: the programs of all variants.
        keep: tables of the keep pipeline.
        f: ``[P, N, 3]`` (c, g, a) in the type of the sums.
        scale: ``[P, 3]`` (lambda, divisor, majority sign), likewise.
        share: what :func:`shares` made of both; read only for MEAN of at most SETS models.
        nonfinite: int64 ``[S]``, added to.
        inputs: M = N + 1, the base included.
        codes: packed type codes of the inputs.
        out: type code of the results.
        elect: how the sign is elected, as above.
        split: elect by ``sum a_i d_i`` instead of A.
        zero: what a vote of zero means.
        merge: how what agrees is merged.
        div: whether any divisor is not 1.
        wide: work in fp64.
    """
    cfg = config("consensus")
    if inputs > MANY:
        cfg["num_warps"] = max(cfg["num_warps"], 8)
    if keep.wide_sums and not wide:
        cfg["num_warps"] *= 2  # two registers for a number: half the elements a thread
    block = cfg.pop("BLOCK")
    step = share.shape[1] if share.shape[0] > 1 else 0
    args = (*keep.tables, f, scale, share, nonfinite, step)
    flags = (inputs, codes, out, *keep.flags, elect, split, zero, merge, div, wide, wide or keep.wide_sums)
    for walk in walks:
        some = (table, *walk.places(call), *args)
        call.launch(consensus_kernel, (walk.programs,), some, *flags, walk.unmasked, block, **cfg)
    if keep.flags[2] and not keep.flags[3]:
        call.launch(ties_kernel, (table.shape[0], inputs - 1), (table, *args), *flags, block, **cfg)
