"""A genetic algorithm over numbers and choices: ask for candidates, tell their scores."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.search import pareto
from fastmerge.search.pareto import Scores

Genome = tuple[Any, ...]
"""One value for each gene: a number of its range, or the position of a choice."""

Told = tuple[Genome, Scores]


class Genetic:
    """Elites survive; others are children of parents that won a tournament, crossed and mutated.

    Two parents exchange what lies between two points, so that neighbours stay together, and where genes are ranges
    each child's number is drawn from the interval of theirs, wider by half on both sides (BLX-0.5). Mutation draws a
    choice anew, and moves a number by a Gaussian of a tenth of its range. Numbers stay in their ranges.

    With several objectives parents are the best ``population_size`` of all parents and children so far, by
    non-dominated sorting and crowding (NSGA-II), and a generation is children alone.

    The same seed gives the same candidates for the same scores, on every machine.

    Args:
        genes: for each gene how many choices it has, or its range ``(low, high)``.
        population_size: candidates of a generation.
        mutation_rate: probability that a gene of a child is drawn anew or moved.
        crossover_rate: probability that two parents exchange a part; else their copies go on.
        elite_ratio: share of the best that goes on as it is; at least one does.
        tournament: so many candidates are drawn for each parent, and the best of them is it.
        seed: of all random choices.
        first: candidates of the first generation, before random ones.

    Attributes:
        best: the best candidate so far and its score, with several objectives the :func:`~.pareto.middle` of the front
            and its scores; None before any was told.
        generation: how many were told.

    Raises:
        RecipeError: a parameter is out of range; all are listed.
    """

    blend = 0.5
    step = 0.1

    def __init__(
        self,
        genes: Sequence[int | tuple[float, float]],
        *,
        population_size: int = 20,
        mutation_rate: float = 0.1,
        crossover_rate: float = 0.7,
        elite_ratio: float = 0.1,
        tournament: int = 3,
        seed: int = 0,
        first: Sequence[Genome] = (),
    ) -> None:
        rates = {"mutation_rate": mutation_rate, "crossover_rate": crossover_rate, "elite_ratio": elite_ratio}
        problems = [f"{k}: expected a number from 0 to 1, got {v!r:.80}" for k, v in rates.items() if not _share(v)]
        for key, value in (("population_size", population_size), ("tournament", tournament)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{key}: expected a whole number above 0, got {value!r:.80}")
        if not genes or any(g < 1 if isinstance(g, int) else not g[0] < g[1] for g in genes):
            problems.append(f"genes: expected one choice or more, or (low, high) each, got {list(genes)!r:.80}")
        if problems:
            raise RecipeError(problems)
        self._genes = tuple(genes)
        self._size = population_size
        self._mutation, self._crossover = mutation_rate, crossover_rate
        self._elites = min(max(1, int(elite_ratio * population_size)), population_size)
        self._tournament = tournament
        self._random = random.Random(seed)  # noqa: S311  no secret
        self.best: tuple[Genome, float | Scores] | None = None
        self.generation = 0
        self._parents: list[Told] = []
        drawn = [self._drawn() for _ in range(population_size - len(first))]
        self._population = [*map(tuple, first), *drawn][:population_size]

    def ask(self, n: int | None = None) -> list[Genome]:
        """The candidates of this generation; the first ``n`` of them where that is given."""
        return self._population[:n]

    def tell(self, scores: Sequence[float] | Sequence[Scores]) -> None:
        """The scores of the candidates, in their order; the larger the better. NaN counts as the worst.

        Args:
            scores: a number for each candidate, or a number for each objective.

        Raises:
            RecipeError: there are none, or more than candidates.
        """
        if not 0 < len(scores) <= len(self._population):
            raise RecipeError(f"scores: expected {len(self._population)}, one for each candidate, got {len(scores)}")
        told = list(zip(self._population, map(pareto.numbers, scores), strict=False))
        several = len(told[0][1]) > 1
        pool = list({g: (g, s) for g, s in [*self._parents, *told]}.values()) if several else told
        ranked = [pool[i] for i in pareto.order([s for _, s in pool])]
        self._remember([s for _, s in pool], pool, several=several)
        self.generation += 1
        self._parents = ranked[: self._size] if several else []
        following = [] if several else [g for g, _ in ranked[: self._elites]]
        parents = [g for g, _ in ranked[: self._size]]
        while len(following) < self._size:
            following += self._children(self._won(parents), self._won(parents))
        self._population = following[: self._size]

    def _remember(self, scores: Sequence[Scores], pool: Sequence[Told], *, several: bool) -> None:
        genome, best = pool[pareto.middle(scores)]
        if several:
            self.best = genome, best
        elif self.best is None or best > pareto.numbers(self.best[1]):
            self.best = genome, best[0]

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as values that JSON can hold."""
        kind, numbers, gauss = self._random.getstate()
        best = None
        if self.best is not None:
            score = self.best[1]
            best = [list(self.best[0]), list(score) if isinstance(score, tuple) else score]
        return {
            "generation": self.generation,
            "population": [list(g) for g in self._population],
            "parents": [[list(g), list(s)] for g, s in self._parents],
            "best": best,
            "random": [kind, list(numbers), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another run was."""
        kind, numbers, gauss = state["random"]
        self._random.setstate((kind, tuple(numbers), gauss))
        self._population = [tuple(g) for g in state["population"]]
        self._parents = [(tuple(g), tuple(s)) for g, s in state["parents"]]
        self.generation = state["generation"]
        self.best = None
        if state["best"] is not None:
            genome, score = state["best"]
            self.best = tuple(genome), tuple(score) if isinstance(score, list) else score

    def _drawn(self) -> Genome:
        return tuple(
            [self._random.randrange(g) if isinstance(g, int) else self._random.uniform(*g) for g in self._genes]
        )

    def _won(self, parents: Sequence[Genome]) -> Genome:
        """The best of some that are drawn; parents stand in the order of their scores."""
        return parents[min([self._random.randrange(len(parents)) for _ in range(self._tournament)])]

    def _children(self, one: Genome, other: Genome) -> list[Genome]:
        if self._random.random() < self._crossover:
            first, last = sorted(self._random.sample(range(len(one) + 1), 2))
            pairs = [
                self._crossed(gene, a, b, swapped=first <= i < last)
                for i, (gene, a, b) in enumerate(zip(self._genes, one, other, strict=True))
            ]
            one, other = tuple([a for a, _ in pairs]), tuple([b for _, b in pairs])
        return [self._mutated(one), self._mutated(other)]

    def _crossed(self, gene: int | tuple[float, float], a: Any, b: Any, *, swapped: bool) -> tuple[Any, Any]:
        if isinstance(gene, int):
            return (b, a) if swapped else (a, b)
        reach = self.blend * abs(a - b)
        low, high = min(a, b) - reach, max(a, b) + reach
        return _within(self._random.uniform(low, high), gene), _within(self._random.uniform(low, high), gene)

    def _mutated(self, genome: Genome) -> Genome:
        drawn = [self._random.random() < self._mutation for _ in genome]
        return tuple(
            [self._moved(g, value) if new else value for value, g, new in zip(genome, self._genes, drawn, strict=True)]
        )

    def _moved(self, gene: int | tuple[float, float], value: Any) -> Any:
        if isinstance(gene, int):
            return self._random.randrange(gene)
        return _within(value + self._random.gauss(0.0, self.step * (gene[1] - gene[0])), gene)


def _within(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
