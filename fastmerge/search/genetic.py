"""A genetic algorithm over choices: ask for candidates, tell their scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from fastmerge.errors import RecipeError

Genome = tuple[int, ...]
"""One choice for each gene."""


class Genetic:
    """Elites survive; others are children of the better half, crossed at two points and mutated.

    The same seed gives the same candidates for the same scores, on every machine.

    Args:
        choices: how many values each gene has.
        population_size: candidates of a generation.
        mutation_rate: probability that a gene of a child is drawn anew.
        crossover_rate: probability that two parents exchange a part; else their copies go on.
        elite_ratio: share of the best that goes on as it is; at least one does.
        seed: of all random choices.
        first: candidates of the first generation, before random ones.

    Attributes:
        best: the best candidate so far and its score; None before any was told.
        generation: how many were told.

    Raises:
        RecipeError: a parameter is out of range; all are listed.
    """

    def __init__(
        self,
        choices: Sequence[int],
        *,
        population_size: int = 20,
        mutation_rate: float = 0.1,
        crossover_rate: float = 0.7,
        elite_ratio: float = 0.1,
        seed: int = 0,
        first: Sequence[Genome] = (),
    ) -> None:
        rates = {"mutation_rate": mutation_rate, "crossover_rate": crossover_rate, "elite_ratio": elite_ratio}
        problems = [f"{k}: expected a number from 0 to 1, got {v!r:.80}" for k, v in rates.items() if not _share(v)]
        if isinstance(population_size, bool) or not isinstance(population_size, int) or population_size < 1:
            problems.append(f"population_size: expected a whole number above 0, got {population_size!r:.80}")
        if not choices or min(choices) < 1:
            problems.append(f"choices: expected one or more for each gene, got {list(choices)!r:.80}")
        if problems:
            raise RecipeError(problems)
        self._choices = tuple(choices)
        self._size = population_size
        self._mutation, self._crossover = mutation_rate, crossover_rate
        self._elites = min(max(1, int(elite_ratio * population_size)), population_size)
        self._random = random.Random(seed)  # noqa: S311  no secret
        self.best: tuple[Genome, float] | None = None
        self.generation = 0
        drawn = [self._drawn() for _ in range(population_size - len(first))]
        self._population = [*first, *drawn][:population_size]

    def ask(self) -> list[Genome]:
        """The candidates of this generation."""
        return list(self._population)

    def tell(self, scores: Sequence[float]) -> None:
        """The scores of the candidates, in their order; the larger the better. NaN counts as the worst.

        Raises:
            RecipeError: there are more or fewer of them than candidates.
        """
        if len(scores) != len(self._population):
            raise RecipeError(f"scores: expected {len(self._population)}, one for each candidate, got {len(scores)}")
        worst = float("-inf")
        numbers = [float(s) for s in scores]
        numbers = [worst if math.isnan(s) else s for s in numbers]
        order = sorted(range(len(numbers)), key=lambda i: -numbers[i])
        ranked = [self._population[i] for i in order]
        if self.best is None or numbers[order[0]] > self.best[1]:
            self.best = ranked[0], numbers[order[0]]
        self.generation += 1
        following = ranked[: self._elites]
        parents = ranked[: max(1, len(ranked) // 2)]
        while len(following) < self._size:
            following += self._children(self._random.choice(parents), self._random.choice(parents))
        self._population = following[: self._size]

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as values that JSON can hold."""
        kind, numbers, gauss = self._random.getstate()
        best = None if self.best is None else [list(self.best[0]), self.best[1]]
        return {
            "generation": self.generation,
            "population": [list(g) for g in self._population],
            "best": best,
            "random": [kind, list(numbers), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another run was."""
        kind, numbers, gauss = state["random"]
        self._random.setstate((kind, tuple(numbers), gauss))
        self._population = [tuple(g) for g in state["population"]]
        self.generation = state["generation"]
        self.best = None if state["best"] is None else (tuple(state["best"][0]), state["best"][1])

    def _drawn(self) -> Genome:
        return tuple([self._random.randrange(n) for n in self._choices])

    def _children(self, one: Genome, other: Genome) -> list[Genome]:
        if len(one) > 1 and self._random.random() < self._crossover:
            first, last = sorted(self._random.sample(range(len(one) + 1), 2))
            one, other = (
                one[:first] + other[first:last] + one[last:],
                other[:first] + one[first:last] + other[last:],
            )
        return [self._mutated(one), self._mutated(other)]

    def _mutated(self, genome: Genome) -> Genome:
        drawn = [self._random.random() < self._mutation for _ in genome]
        return tuple(
            [
                self._random.randrange(n) if new else gene
                for gene, n, new in zip(genome, self._choices, drawn, strict=True)
            ]
        )


def _share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
