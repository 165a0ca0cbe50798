"""Candidates that race: all on a few items, the better half on more, and only the last on all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastmerge.search import pareto
from fastmerge.search.pareto import Scores


def rungs(items: int, rounds: int) -> list[int]:
    """How many items each round has: all in the last, half as many in the one before it, one at least.

    Successive halving (Karnin et al. 2013; Jamieson and Talwalkar 2016): each round drops half of the candidates.
    """
    return sorted({max(1, items >> (rounds - 1 - i)) for i in range(rounds)})


def survivors(scores: Sequence[Scores]) -> list[int]:
    """Positions of the better half, rounded up; in their order."""
    return sorted(pareto.order(scores)[: math.ceil(len(scores) / 2)])


def behind(scores: Scores, others: Sequence[Scores]) -> Scores:
    """The scores of one that was dropped, so that those of all that went further are better.

    It is known on fewer items: what it has there may be luck, and is not comparable.
    """
    lowest = [min(column) for column in zip(*others, strict=True)]
    return tuple([min(own, math.nextafter(low, -math.inf)) for own, low in zip(scores, lowest, strict=True)])


def cost(candidates: int, sizes: Sequence[int]) -> int:
    """Evaluations of single items that a race of so many candidates takes at most."""
    total = done = 0
    for size in sizes:
        total += candidates * (size - done)
        done, candidates = size, math.ceil(candidates / 2)
    return total
