"""A merge divided among processes: which of them writes what, from the plan alone."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from fastmerge.checkpoint import Place
from fastmerge.checkpoint.parts import Part
from fastmerge.ops.spec import Op

BLOCK = 4096
"""Parts end where blocks of their files do, so that no two processes write to the same page."""


class Share(NamedTuple):
    """What one part of a merge is.

    Attributes:
        ops: whose results it writes; where some of these hang on statistics of the whole model, all that do, since the
            statistics are of all. They are taken by every such part again, as nothing travels between parts.
        ranges: (shard, offset, bytes) of what it writes.
    """

    ops: tuple[Op, ...]
    ranges: tuple[tuple[int, int, int], ...]


def share(ops: Sequence[Op], part: Part) -> Share:
    """The ops of a plan that belong to a part: neighbours in the output, about as many bytes as in every other part.

    Args:
        ops: the plan's, in the order of the output's bytes.
        part: which; all parts of as many together hold every op once.
    """
    first, last = cuts(ops, part.of)[part.number - 1 : part.number + 1]
    mine = ops[first:last]
    ranges = [(t.shard, t.offset, t.nbytes) for op in mine for t in op.targets if isinstance(t, Place)]
    if any(op.spec.grain == "model" for op in mine):
        kept = {*range(first, last)}
        mine = [op for i, op in enumerate(ops) if i in kept or op.spec.grain == "model"]
    return Share(tuple(mine), tuple(ranges))


def cuts(ops: Sequence[Op], count: int) -> list[int]:
    """Where so many parts begin and end: at the op before which a part's share is done, or at the next block."""
    costs = [op.spec.out_dtype.nbytes(op.spec.numel) * len(op.targets) for op in ops]
    costs = [c + sum(d.nbytes(op.spec.numel) for d in op.spec.dtypes) for c, op in zip(costs, ops, strict=True)]
    totals = [*itertools.accumulate(costs, initial=0)]
    found = [0]
    for number in range(1, count):
        at = max(found[-1], min(bisect_left(totals, totals[-1] * number // count), len(ops)))
        while at < len(ops) and _inside(ops[at]):
            at += 1
        found.append(at)
    return [*found, len(ops)]


def _inside(op: Op) -> bool:
    """Whether what an op writes begins within a block."""
    return any(isinstance(t, Place) and t.offset % BLOCK for t in op.targets)
