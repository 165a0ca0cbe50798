"""Samplers: what they ask, what they find, and that a state goes on where another was."""

import itertools
import json
import math
import random

import pytest

from fastmerge.errors import RecipeError
from fastmerge.search import Genetic, sampler
from fastmerge.search.genes import Gene

RANGES = [Gene(-2.0, 2.0, model=f"m{i}") for i in range(4)]
MIXED = [Gene(0.0, 1.0), Gene(choices=("a", "b", "c"), parameter="method"), Gene(1.0, 3.0, parameter="t")]
GOAL = (0.5, -1.0, 1.5, 0.0)


def bowl(candidate):
    return -sum((x - g) ** 2 for x, g in zip(candidate, GOAL))


def run(made, score, generations):
    trail = []
    for _ in range(generations):
        trail.append(list(made.ask()))
        made.tell([score(c) for c in trail[-1]])
    return trail


def test_cma_finds_the_optimum_of_a_quadratic():
    made = sampler("cma", RANGES, seed=3)
    run(made, bowl, 60)
    assert made.best[0] == pytest.approx(GOAL, abs=2e-3)
    assert made.best[1] == bowl(made.best[0])
    turned = sampler("cma", RANGES, seed=3)  # the axes of this one are not those of the genes
    run(turned, lambda c: -((c[0] + c[1]) ** 2) - 100 * (c[0] - c[1] - 1) ** 2 - (c[2] - c[3]) ** 2 - c[3] ** 2, 120)
    assert turned.best[0] == pytest.approx((0.5, -0.5, 0.0, 0.0), abs=1e-3)


def test_cma_finds_choices_beside_numbers():
    fixed = Gene(choices=("only",), parameter="preset")
    made = sampler("cma", [*MIXED, fixed], seed=1)
    run(made, lambda c: -((c[0] - 0.25) ** 2) - (c[1] != 2) - (c[2] - 1.75) ** 2, 50)
    assert made.best[0] == pytest.approx((0.25, 2, 1.75, 0), abs=1e-2)
    other = sampler("cma", [*MIXED, fixed], seed=1)
    other.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert other.ask() == made.ask()
    assert all(g.held(v) for c in made.ask() for g, v in zip(MIXED, c))


def test_cma_starts_anew_where_nothing_changes():
    made = sampler("cma", RANGES, population_size=6, seed=0)
    trail = run(made, lambda c: 0.0, 40)
    assert sorted({len(g) for g in trail})[:2] == [6, 12]
    assert all(-2 <= x <= 2 for g in trail for c in g for x in c)


def test_the_genetic_algorithm_finds_numbers_and_choices():
    made = sampler("genetic", MIXED, population_size=30, seed=1)
    run(made, lambda c: -((c[0] - 0.25) ** 2) - (c[1] != 2) - (c[2] - 1.75) ** 2, 40)
    assert made.best[0][1] == 2
    assert made.best[0] == pytest.approx((0.25, 2, 1.75), abs=0.02)
    assert all(g.held(v) for c in made.ask() for g, v in zip(MIXED, c))
    ends = sampler("genetic", RANGES, seed=1)
    run(ends, sum, 60)
    assert ends.best[0] == (2.0, 2.0, 2.0, 2.0)  # the ends of ranges are in them


@pytest.mark.parametrize("name", ["genetic", "cma", "random", "sobol", "grid", "simplex"])
def test_a_state_goes_on_where_another_was(name):
    genes = [Gene(0.0, 1.0, model=f"m{i}") for i in range(3)]
    whole = sampler(name, genes, seed=5)
    trail = run(whole, sum, 6) if name != "simplex" else run(whole, sum, 1)
    for at in range(len(trail)):
        one = sampler(name, genes, seed=5)
        run(one, sum, at)
        other = sampler(name, genes, seed=5)
        other.load_state_dict(json.loads(json.dumps(one.state_dict())))
        assert list(map(list, run(other, sum, len(trail) - at))) == trail[at:]
        assert other.best == whole.best
    again = sampler(name, genes, seed=5)
    assert run(again, sum, len(trail)) == trail
    if name not in ("grid", "simplex"):
        assert run(sampler(name, genes, seed=6), sum, 1) != trail[:1]


def test_random_candidates_are_those_of_the_standard_library():
    made = sampler("random", [Gene(0.1, 1.0)] * 3, seed=7)
    random.seed(7)
    assert list(made.ask(5)) == [tuple(random.uniform(0.1, 1.0) for _ in range(3)) for _ in range(5)]


def test_sobol_is_spread_evenly():
    points = list(sampler("sobol", [Gene(0.0, 2.0), Gene(choices=tuple("abcd"))], seed=0).ask(64))
    cells = {(int(x * 8), c) for x, c in points}
    assert len(cells) == 64  # one in each of 16 x 4, where random points would leave a third empty
    assert len(set(points)) == 64


def test_grids_have_every_point_once():
    grid = sampler("grid", [Gene(0.0, 1.0), Gene(choices=(7, 8)), Gene(-1.0, 1.0)], steps=3)
    points = list(grid.ask(1000))
    assert points == list(itertools.product((0.0, 0.5, 1.0), (0, 1), (-1.0, 0.0, 1.0)))
    grid.tell([0.0] * len(points))
    assert list(grid.ask()) == []
    simplex = list(sampler("simplex", [Gene()] * 3, steps=4).ask(1000))
    assert len(simplex) == len(set(simplex)) == math.comb(6, 2)
    assert {sum(p) for p in simplex} == {1.0}
    assert simplex[0] == (1.0, 0.0, 0.0)


def test_several_objectives_spread_over_the_front():
    """Schaffer's problem: -x^2 and -(x - 2)^2; nothing dominates what lies in 0 .. 2."""
    made = Genetic([(-10.0, 10.0)], population_size=20, seed=2)
    run(made, lambda c: (-(c[0] ** 2), -((c[0] - 2) ** 2)), 30)
    found = sorted(c[0] for c, _ in made._parents)
    assert -0.05 <= found[0] <= 0.1
    assert 1.9 <= found[-1] <= 2.05
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert max(gaps) < 0.4
    state = json.loads(json.dumps(made.state_dict()))
    other = Genetic([(-10.0, 10.0)], population_size=20, seed=9)
    other.load_state_dict(state)
    assert run(other, lambda c: (c[0], -c[0]), 3) == run(made, lambda c: (c[0], -c[0]), 3)


def test_three_objectives_with_a_known_front():
    """(x, y, z) on a triangle: x + y + z <= 1 as a penalty leaves the triangle as the front."""

    def score(c):
        over = max(0.0, sum(c) - 1)
        return tuple(x - 2 * over for x in c)

    made = Genetic([(0.0, 1.0)] * 3, population_size=40, mutation_rate=0.3, seed=0)
    run(made, score, 40)
    sums = [sum(c) for c, _ in made._parents]
    assert 0.95 < sum(sums) / len(sums) < 1.02
    assert min(sums) > 0.7
    for k in range(3):
        assert max(c[k] for c, _ in made._parents) > 0.8


def test_scores_that_are_no_numbers_are_the_worst():
    for name in ("genetic", "cma"):
        made = sampler(name, RANGES, population_size=6, seed=0)
        asked = list(made.ask())
        made.tell([math.nan, 1.0, -math.inf, 2.0, math.nan, 0.0])
        assert made.best == (asked[3], 2.0)
        made.ask()
        made.tell([math.nan] * 6)
        assert made.best == (asked[3], 2.0)
        json.dumps(made.state_dict())


def test_what_is_wrong_with_samplers_is_said():
    with pytest.raises(RecipeError, match=r"'cmaes'.*did you mean 'cma'"):
        sampler("cmaes", RANGES)
    with pytest.raises(RecipeError, match=r"genetic has no option 'populaton_size' \(did you mean 'population_size'"):
        sampler("genetic", RANGES, populaton_size=3)
    with pytest.raises(RecipeError, match="one range or more, got choices alone; 'genetic' takes these"):
        sampler("cma", MIXED[1:2])
    with pytest.raises(RecipeError, match="one objective, got 2"):
        sampler("cma", RANGES, objectives=2)
    with pytest.raises(RecipeError, match="from 0 to 1"):
        sampler("simplex", RANGES)
    with pytest.raises(RecipeError, match="steps: expected a whole number of 2 or more"):
        sampler("grid", RANGES, steps=1)
    with pytest.raises(RecipeError, match="scores: expected 7"):
        sampler("cma", RANGES, population_size=7).tell([1.0])
    with pytest.raises(RecipeError, match="low < high"):
        sampler("random", [Gene(1.0, 1.0)])
    with pytest.raises(RecipeError, match="sigma"):
        sampler("cma", RANGES, sigma=0)
