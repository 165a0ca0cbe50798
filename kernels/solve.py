"""What follows from sums, on the device: the blend weights of each vector, without a trip to the host.

A *vector* is a whole tensor or a row of one. A tile is one row of partial sums. The partials of a call stand in the
order segment, vector, tile, and two tables of prefixes, both int64 ``[S + 1]`` on the device, find them: ``tiles``
(tiles before each segment) and ``vectors`` (vectors before each segment). All vectors of a segment have the same
number of tiles. A segment may be empty.

Written order of sums (design law L2): tiles of a vector are added in fp64 in tile order from +0, as `fold_here` does on
the host. All else is elementwise fp64, the formulas of ``fastmerge/methods`` (`coefficients`, `ratio`) and
``fastmerge/ops/consensus/rules.py`` (`l1_factor`) operation by operation; results are rounded once to the work type
W (fp32, fp64 where WIDE). Sums that are not finite have no answer: the smallest index of one is put into ``bad`` int64
``[1]`` by an atomic minimum, which is the same whoever comes first; the number there is large before.

Tiling: one lane per vector (or vector and column), ``BLOCK`` lanes per program. Bytes hardly count here; what does is
the chain of additions of a fold, so its loads run ahead of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._angles import acos, at_least_zero, chord_angle, cos, f64, sin, unit
from ._jit import magnitude

GROUP = tl.constexpr(16)
"""Tiles that a fold loads before it adds those of the group before."""

SHORT = tl.constexpr(1e-8)
"""Vectors no longer than this count as unit vectors (slerp's EPSILON)."""

SMALL = tl.constexpr(1e-7)
"""Sums of magnitudes below this are not rescaled (L1_EPSILON)."""

POLE = tl.constexpr(1e-6)
"""Model Stock's denominators below this are a pole."""

INFINITE = tl.constexpr(0x7FF0000000000000)
"""The bits of an infinity; see :func:`fastmerge.kernels._jit.magnitude`."""


@triton.jit
def owner(prefix, segments, at):
    """The segment ``s`` (int64 block) with ``prefix[s] <= at < prefix[s + 1]``, never an empty one.

    Args:
        prefix: int64 ``[S + 1]``, not descending, from 0.
        segments: S.
        at: int64 block, not negative; beyond the last one the answer is some segment below S (0 where S is 0).
    """
    low = tl.zeros(at.shape, tl.int64)
    high = low + segments
    width = segments
    while width > 1:
        middle = (low + high) >> 1
        # The last of equal prefixes: those before it are of empty segments.
        reached = tl.load(prefix + middle) <= at
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        width = width - (width >> 1)
    return low


@triton.jit
def lanes(vectors, segments, BLOCK: tl.constexpr):
    """The vectors (int64 block) of this program, which of them exist, and their segments."""
    v = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return v, v < tl.load(vectors + segments), owner(vectors, segments, v)


@triton.jit
def report(bad, at, wrong):
    """Puts the smallest of the numbers ``at`` (int64 block) that are ``wrong`` into ``bad``."""
    tl.atomic_min(bad + tl.zeros(at.shape, tl.int32), at, mask=wrong, sem="relaxed")


@triton.jit
def infinite(x):
    """Whether fp64 values are an infinity or a NaN, by their bits: 1, else 0."""
    return (magnitude(x) >= INFINITE).to(tl.int32)


@triton.jit
def rows_ahead(p, left, C: tl.constexpr):
    """The values of GROUP tiles from ``p`` on, C apart; +0 for those that are not ``left``."""
    group = ()
    for i in tl.static_range(GROUP):
        group = group + (tl.load(p + i * C, mask=left > i, other=0.0),)
    return group


@triton.jit(do_not_specialize=["segments"])
def fold_kernel(sums, partials, tiles, vectors, segments: tl.int32, C: tl.constexpr, BLOCK: tl.constexpr):
    """The tiles of each vector and column in order: partials f64 ``[R, C]`` -> sums f64 ``[V, C]``.

    A sum that starts at +0 never is -0 (that takes two of them), so the +0 of a tile that a lane does not have adds
    nothing. V * C lanes. Asks for ``maxnreg`` of 255 at its launch: then all loads of a group stand before the
    additions (76 registers); else ptxas makes do with 54, and most loads wait for the additions.
    """
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < tl.load(vectors + segments) * C
    v = lane // C
    s = owner(vectors, segments, v)
    first = tl.load(tiles + s, mask=mask, other=0)
    before = tl.load(vectors + s, mask=mask, other=0)
    count = tl.load(vectors + s + 1, mask=mask, other=1) - before
    left = (tl.load(tiles + s + 1, mask=mask, other=0) - first) // count
    p = partials + (first + (v - before) * left) * C + lane % C
    left = left.to(tl.int32)
    most = tl.max(left, axis=0)
    total = tl.zeros((BLOCK,), tl.float64)
    group = rows_ahead(p, left, C)
    while most > 0:
        p += GROUP * C
        left -= GROUP
        ahead = rows_ahead(p, left, C)
        for i in tl.static_range(GROUP):
            total = total + group[i]
        group = ahead
        most -= GROUP
    tl.store(sums + lane, total, mask=mask)


@triton.jit
def cosines(sums, v, mask):
    """What two vectors' inner products say of their angle.

    Args:
        sums: f64 ``[V, 4]``: <a,a>, <a,b>, <b,b>, |a-b|^2.
        v: int64 block of vectors.
        mask: which exist.

    Returns:
        The cosine as their product knows it; the square of the distance of the unit vectors; whether they are so close
        that the latter knows the angle better; the better cosine; whether a sum is not finite.
    """
    aa = tl.load(sums + v * 4, mask=mask, other=0.0)
    ab = tl.load(sums + v * 4 + 1, mask=mask, other=0.0)
    bb = tl.load(sums + v * 4 + 2, mask=mask, other=0.0)
    difference = tl.load(sums + v * 4 + 3, mask=mask, other=0.0)
    wrong = (infinite(aa) | infinite(ab) | infinite(bb) | infinite(difference)) != 0
    norm_a = tl.sqrt(aa)
    norm_b = tl.sqrt(bb)
    zero = (norm_a <= f64(SHORT)) | (norm_b <= f64(SHORT))
    norm_a = tl.where(norm_a <= f64(SHORT), 1.0, norm_a)
    norm_b = tl.where(norm_b <= f64(SHORT), 1.0, norm_b)
    dot = unit(ab / (norm_a * norm_b))
    apart = norm_a - norm_b
    chord2 = at_least_zero((difference - apart * apart) / (norm_a * norm_b))
    close = (dot > 0.5) & ~zero
    return dot, chord2, close, tl.where(close, 1.0 - chord2 / 2.0, dot), wrong


@triton.jit(do_not_specialize=["segments"])
def apart_kernel(apart, sums, numbers, vectors, segments: tl.int32, BLOCK: tl.constexpr):
    """Counts the vectors of each segment that are not parallel: added to apart int32 ``[S]``, which is 0 before.

    sums f64 ``[V, 4]``; numbers f64 ``[S, 2]`` (t, threshold). V lanes.
    """
    v, mask, s = lanes(vectors, segments, BLOCK)
    _, chord2, close, cosine, _ = cosines(sums, v, mask)
    parallel = tl.abs(cosine) > tl.load(numbers + s * 2 + 1, mask=mask, other=0.0)
    parallel = parallel | (close & (chord2 == 0.0))
    tl.atomic_add(apart + s, tl.full((BLOCK,), 1, tl.int32), mask=mask & ~parallel, sem="relaxed")


@triton.jit(do_not_specialize=["segments"])
def slerp_kernel(
    coef,
    bad,
    sums,
    numbers,
    vectors,
    segments: tl.int32,
    apart,
    WIDE: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Blend weights of two vectors: coef W ``[V, 2]``; `coefficients` of fastmerge/methods/slerp.py. V lanes.

    sums f64 ``[V, 4]`` (<a,a>, <a,b>, <b,b>, |a-b|^2); numbers f64 ``[S, 2]`` (t, threshold). EVERY: rows are blended
    linearly where apart int32 ``[S]`` (see `apart_kernel`) is 0, or the row has no arc; else ``apart`` is not read.
    """
    v, mask, s = lanes(vectors, segments, BLOCK)
    dot, chord2, close, cosine, wrong = cosines(sums, v, mask)
    report(bad, v, wrong & mask)
    t = tl.load(numbers + s * 2, mask=mask, other=0.0)
    theta = tl.where(close, chord_angle(chord2), acos(dot))
    if EVERY:
        parallel = (tl.load(apart + s, mask=mask, other=0) == 0) | (tl.abs(cosine) >= 1.0)
    else:
        parallel = (tl.abs(cosine) > tl.load(numbers + s * 2 + 1, mask=mask, other=0.0)) | (theta == 0.0)
    rest = 1.0 - t
    whole = sin(theta)
    a = tl.where(parallel, rest, sin(rest * theta) / whole)
    b = tl.where(parallel, t, sin(t * theta) / whole)
    to = coef + v * 2
    tl.store(to, a.to(tl.float64 if WIDE else tl.float32), mask=mask)
    tl.store(to + 1, b.to(tl.float64 if WIDE else tl.float32), mask=mask)


@triton.jit
def between(x):
    """The nearest number between 0 and 1 as numpy's ``clip`` gives it: -0 stays -0, NaN stays NaN.

    The sign is read from the bits: of ``x < 0`` and a zero a compiler may make a maximum, which turns -0 into +0.
    """
    bits = x.to(tl.int64, bitcast=True)
    below = (bits < 0) & (x == x) & (magnitude(x) > 0)
    x = tl.where(below, 0.0, x)
    return tl.where(x > 1.0, 1.0, x)


@triton.jit(do_not_specialize=["segments"])
def model_stock_kernel(
    scale,
    bad,
    sums,
    numbers,
    vectors,
    segments: tl.int32,
    N: tl.constexpr,
    ANGLE: tl.constexpr,
    CLAMP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How far each vector moves towards the average of N models: scale W ``[V, 2]`` (t, N). V lanes.

    `ratio` of fastmerge/methods/model_stock.py. sums f64 ``[V, N (N + 1) / 2]``, pairs (0,0), (0,1), .., (1,1), ..;
    numbers f64 ``[S, 1]``: least product of two norms. ANGLE: angles are averaged, not cosines; CLAMP: t is limited to
    0 .. 1.
    """
    PAIRS: tl.constexpr = N * (N + 1) // 2
    v, mask, s = lanes(vectors, segments, BLOCK)
    floor = tl.load(numbers + s, mask=mask, other=0.0)
    row = sums + v * PAIRS
    wrong = tl.zeros((BLOCK,), tl.int32)
    norms = ()
    for i in tl.static_range(N):
        square = tl.load(row + i * (2 * N - i + 1) // 2, mask=mask, other=0.0)
        wrong = wrong | infinite(square)
        norms = norms + (tl.sqrt(square),)
    total = tl.zeros((BLOCK,), tl.float64)
    for i in tl.static_range(N):
        for j in tl.static_range(i + 1, N):
            product = tl.load(row + i * (2 * N - i + 1) // 2 + j - i, mask=mask, other=0.0)
            wrong = wrong | infinite(product)
            size = norms[i] * norms[j]
            size = tl.where(size < floor, floor, size)
            size = tl.where(size == 0.0, 1.0, size)
            c = unit(product / size)
            if ANGLE:
                c = acos(c)
            total = total + c
    report(bad, v, (wrong != 0) & mask)
    c = total / (N * (N - 1) // 2)
    if ANGLE:
        c = cos(c)
    below = c * (N - 1) + 1.0
    pole = tl.abs(below) < f64(POLE)
    t = tl.where(pole, 0.0, c * N / tl.where(pole, 1.0, below))
    if CLAMP:
        t = between(t)
    to = scale + v * 2
    tl.store(to, t.to(tl.float64 if WIDE else tl.float32), mask=mask)
    tl.store(to + 1, tl.full((BLOCK,), N, tl.float64 if WIDE else tl.float32), mask=mask)


@triton.jit(do_not_specialize=["total"])
def rescale_kernel(f, bad, sums, weights, total: tl.int64, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Norm-preserving rescales: f W ``[S, N, 3]``, (weight * factor, left alone, factor). ``total`` = S * N lanes.

    `l1_factor` of fastmerge/ops/consensus/rules.py. sums f64 ``[S, N, 2]`` (before, after); weights f64 ``[S, N]``. A
    factor of 1 asks for no finite sums. ``bad`` counts (segment, model) flattened.
    """
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < total
    before = tl.load(sums + lane * 2, mask=mask, other=0.0)
    after = tl.load(sums + lane * 2 + 1, mask=mask, other=0.0)
    one = (before < f64(SMALL)) | (after < f64(SMALL))
    wrong = (infinite(before) | infinite(after)) != 0
    report(bad, lane, wrong & mask & ~one)
    factor = tl.where(one, 1.0, before / after)
    weight = tl.load(weights + lane, mask=mask, other=0.0) * factor
    to = f + lane * 3
    tl.store(to, weight.to(tl.float64 if WIDE else tl.float32), mask=mask)
    tl.store(to + 2, factor.to(tl.float64 if WIDE else tl.float32), mask=mask)


@triton.jit
def majority_kernel(scale, counts, tiles, first, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Program g: the sign of the majority of set g into scale W ``[S, 3]``, column 2, of all its segments.

    counts int64 ``[R, 2]`` (plus, minus) per tile; set g is segments ``first[g] .. first[g + 1] - 1`` of first int64
    ``[G + 1]``. A tie is a minus. The numbers are integers, so no order is written.
    """
    start = tl.load(first + tl.program_id(0))
    stop = tl.load(first + tl.program_id(0) + 1)
    offs = tl.arange(0, BLOCK)
    at = tl.load(tiles + start)
    end = tl.load(tiles + stop)
    more = tl.zeros((BLOCK,), tl.int64)
    while at < end:
        mask = offs < end - at
        plus = tl.load(counts + (at + offs) * 2, mask=mask, other=0)
        more += plus - tl.load(counts + (at + offs) * 2 + 1, mask=mask, other=0)
        at += BLOCK
    sign = tl.where(tl.sum(more, axis=0) > 0, 1.0, -1.0).to(tl.float64 if WIDE else tl.float32)
    signs = tl.zeros((BLOCK,), tl.float64 if WIDE else tl.float32) + sign
    while start < stop:
        tl.store(scale + (start + offs) * 3 + 2, signs, mask=offs < stop - start)
        start += BLOCK
