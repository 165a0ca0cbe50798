"""Non-dominated sorting against its definition."""

import itertools
import math
import random

from fastmerge.search import pareto


def peeled(scores):
    """Fronts as their definition has them: what nothing that is left dominates, again and again."""
    left, out = list(range(len(scores))), []
    while left:
        front = [
            i
            for i in left
            if not any(
                all(a >= b for a, b in zip(scores[j], scores[i])) and any(a > b for a, b in zip(scores[j], scores[i]))
                for j in left
            )
        ]
        out.append(front)
        left = [i for i in left if i not in front]
    return out


def test_fronts_are_those_of_the_definition():
    source = random.Random(0)
    for objectives, n in itertools.product((1, 2, 3), (1, 2, 7, 40)):
        scores = [tuple(float(source.randrange(6)) for _ in range(objectives)) for _ in range(n)]
        scores[0] = (-math.inf,) * objectives
        assert pareto.fronts(scores) == peeled(scores)
        assert pareto.front(scores) == peeled(scores)[0]
    assert pareto.fronts([]) == []


def test_the_order_prefers_room():
    scores = [(0.0, 4.0), (1.0, 3.0), (1.1, 2.9), (4.0, 0.0), (0.0, 0.0)]
    assert pareto.crowding(scores[:4]) == [math.inf, (1.1 - 0) / 4 + (4 - 2.9) / 4, (4 - 1.0) / 4 + 3.0 / 4, math.inf]
    assert pareto.order(scores) == [0, 3, 2, 1, 4]
    assert pareto.order([(1.0,), (3.0,), (3.0,), (2.0,)]) == [1, 2, 3, 0]


def test_the_middle_of_a_front():
    assert pareto.middle([(0.0, 10.0), (0.9, 9.0), (1.0, 0.0), (0.5, 0.5)]) == 1
    assert pareto.middle([(1.0,), (5.0,), (5.0,)]) == 1
    assert pareto.middle([(-math.inf,), (-math.inf,)]) == 0
    assert pareto.middle([(1.0, -math.inf), (0.0, 1.0)]) == 1
