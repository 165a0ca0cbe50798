"""Which of several candidates are better, by one objective or by several."""

from __future__ import annotations

import math
from collections.abc import Sequence

Scores = tuple[float, ...]
"""One number for each objective, the larger the better."""


def dominates(one: Scores, other: Scores) -> bool:
    """Whether one is nowhere worse, and better somewhere."""
    return all(a >= b for a, b in zip(one, other, strict=True)) and one != other


def fronts(scores: Sequence[Scores]) -> list[list[int]]:
    """Positions by non-dominated sorting: nothing dominates the first front, only the first front the second.

    Source: NSGA-II (Deb et al. 2002), section III-A. Each front is in the order of the positions.
    """
    if scores and len(scores[0]) == 1:
        every = sorted({s[0] for s in scores}, reverse=True)
        place = {value: i for i, value in enumerate(every)}
        single: list[list[int]] = [[] for _ in every]
        for i, s in enumerate(scores):
            single[place[s[0]]].append(i)
        return single
    below = [[j for j, other in enumerate(scores) if dominates(s, other)] for s in scores]
    above = [0] * len(scores)
    for worse in below:
        for j in worse:
            above[j] += 1
    out = []
    found = [i for i, n in enumerate(above) if not n]
    while found:
        out.append(found)
        following = []
        for i in found:
            for j in below[i]:
                above[j] -= 1
                if not above[j]:
                    following.append(j)
        found = sorted(following)
    return out


def front(scores: Sequence[Scores]) -> list[int]:
    """The first of the :func:`fronts` alone, which takes less: positions, in their order."""
    found: list[int] = []
    # What dominates another comes before it in this order, so that nothing leaves the front again.
    for i in sorted(range(len(scores)), key=lambda i: scores[i], reverse=True):
        if not any(dominates(scores[j], scores[i]) for j in found):
            found.append(i)
    return sorted(found)


def crowding(scores: Sequence[Scores]) -> list[float]:
    """How much room each of a front has: the sum over objectives of the distance of its neighbours.

    Source: NSGA-II, section III-B. Those at an end of an objective have infinite room.
    """
    room = [0.0] * len(scores)
    for k in range(len(scores[0]) if scores else 0):
        order = sorted(range(len(scores)), key=lambda i: scores[i][k])
        low, high = scores[order[0]][k], scores[order[-1]][k]
        room[order[0]] = room[order[-1]] = math.inf
        if high > low and math.isfinite(high - low):
            for before, i, after in zip(order, order[1:], order[2:], strict=False):
                room[i] += (scores[after][k] - scores[before][k]) / (high - low)
    return room


def order(scores: Sequence[Scores]) -> list[int]:
    """Positions, the best first: by front, within one by room; equal ones stay in their order."""
    out = []
    for some in fronts(scores):
        room = crowding([scores[i] for i in some])
        out += [some[i] for i in sorted(range(len(some)), key=lambda i: -room[i])]
    return out


def middle(scores: Sequence[Scores]) -> int:
    """The position to take where one is wanted: of the first front, the largest sum of its objectives.

    Each objective counts from 0, its smallest value in the front, to 1, its largest. With one objective it is the best.
    One with a score that is no number is taken only where all have one.
    """
    found = front(scores)
    totals = [0.0] * len(found)
    for k in range(len(scores[0])):
        column = [scores[i][k] for i in found]
        low, high = min(column), max(column)
        if high > low and math.isfinite(high - low):
            totals = [t + (v - low) / (high - low) for t, v in zip(totals, column, strict=True)]
        else:
            totals = [t + (v > low) for t, v in zip(totals, column, strict=True)]
    return found[max(range(len(found)), key=lambda i: (-math.inf not in scores[found[i]], totals[i]))]


def numbers(scores: float | Sequence[float]) -> Scores:
    """Scores as a tuple; NaN is the worst there is."""
    given = scores if isinstance(scores, Sequence) else (scores,)
    return tuple([-math.inf if math.isnan(s) else s for s in map(float, given)])
