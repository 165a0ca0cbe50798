"""Where to look for a k-th largest key: sample positions, brackets from a sample, and how ranges shrink."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastmerge.ops.segments import I64

if TYPE_CHECKING:
    import numpy.typing as npt

BLOCKS = 256
"""Blocks of a sample."""

BLOCK = 256
"""Elements of the smallest block: 512 bytes of bf16."""

SHARE, LEAST, MOST = 128, 1 << 14, 1 << 20
"""Elements of a sample: a 128th of the tensors within these bounds. At density 0.2 a bracket then holds 4 % of a
million elements and 1 % of a hundred million."""

SIGMAS = 6.0
"""Half width of a bracket, in standard deviations of the sampled rank."""

ADAPTIVE = 3
"""Passes that may use samples and lists freely; after them every second one halves the range of keys."""


class Span(NamedTuple):
    """What is known about a k-th largest key.

    Attributes:
        k: rank from the top, over all keys.
        end: keys that are not below ``low``: ranks up to this one.
        above: keys that are above ``high``.
        high: largest key that it can be.
        low: smallest one.
    """

    k: int
    end: int
    above: int
    high: int
    low: int = 0

    @property
    def size(self) -> int:
        """Keys in ``low .. high``."""
        return self.end - self.above


def blocks(groups: I64, sizes: I64) -> I64:
    """Pieces ``[K, 3]`` (group, e0, length) of a sample, spread evenly and irregularly over the tensors.

    Args:
        groups: their numbers.
        sizes: their elements; together more than ``LEAST``.
    """
    total = int(sizes.sum())
    want = min(max(total // SHARE, LEAST), MOST)
    count = min(BLOCKS, want // BLOCK)
    length = want // count
    edges = np.arange(count + 1) * total // count
    golden = np.arange(count) * 0.6180339887498949 % 1.0
    start = edges[:-1] + (golden * (np.diff(edges) - length + 1)).astype(np.int64)
    ends = np.cumsum(sizes)
    member = np.searchsorted(ends, start, side="right")
    e0 = start - (ends - sizes)[member]
    return np.stack([groups[member], e0, np.minimum(length, sizes[member] - e0)], axis=1)


def within(sample: npt.NDArray[Any], span: Span) -> npt.NDArray[Any]:
    """The part of sorted keys that lies in a span."""
    kind = sample.dtype.type
    return sample[np.searchsorted(sample, kind(span.low)) : np.searchsorted(sample, kind(span.high), side="right")]


def bracket(
    span: Span, sample: npt.NDArray[Any], spread: float, passes: int, listed: int
) -> tuple[tuple[int, int], float]:
    """Ends of the next bracket, and how many keys will probably lie strictly inside.

    Args:
        span: what is known.
        sample: some keys, sorted; those outside the span do not count.
        spread: how much wider than for independent draws.
        passes: number of this pass, from 1.
        listed: keys that a pass may list.
    """
    around = (max(span.low - 1, 0), span.high + 1)
    if passes > ADAPTIVE and passes % 2 == 0:
        middle = (span.low + span.high) // 2
        return (middle, middle), 0.0
    if span.size <= listed:
        return around, float(span.size)
    known = within(sample, span)
    m = len(known)
    kind = sample.dtype.type
    if m < 64:
        middle = (span.low + span.high) // 2
        return (middle, middle), 0.0
    p = (span.k - span.above) / span.size
    margin = SIGMAS * spread * math.sqrt(m * p * (1 - p)) + 2
    top, bottom = math.floor(p * m - margin), math.ceil(p * m + margin)
    hi = int(known[m - top]) if top >= 1 else around[1]
    lo = int(known[m - bottom]) if bottom <= m else around[0]
    inside = np.searchsorted(known, kind(hi)) - np.searchsorted(known, kind(lo), side="right")
    return (lo, hi), max(0.0, float(inside)) / m * span.size


def narrow(span: Span, ends: tuple[int, int], above: int, at_hi: int, inside: int, at_lo: int) -> Span:
    """What counts say about a key that they did not settle.

    Args:
        span: what was known.
        ends: of the bracket that was counted.
        above: keys above the bracket.
        at_hi: at its upper end.
        inside: strictly inside.
        at_lo: at its lower end (0 where the ends are the same).
    """
    lo, hi = ends
    if span.k <= above:
        return Span(span.k, above, span.above, span.high, hi + 1)
    if span.k <= above + at_hi + inside:
        return Span(span.k, above + at_hi + inside, above + at_hi, hi - 1, lo + 1)
    return Span(span.k, span.end, above + at_hi + inside + at_lo, lo - 1, span.low)
