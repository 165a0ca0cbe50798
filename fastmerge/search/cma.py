"""CMA-ES over ranges, and choices beside them, by the ``cmaes`` library."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from fastmerge.errors import BackendUnavailable, RecipeError
from fastmerge.search import genes as genetics
from fastmerge.search import pareto
from fastmerge.search.genes import Candidate, Gene

SPREAD = 1 / 6
"""First standard deviation, as a share of every range."""


class CMA:
    """CMA-ES (Hansen 2016): a Gaussian that learns from ranks where better candidates lie.

    Where there are choices beside ranges it is CatCMA with margin (Hamano et al. 2025), which learns how often each
    choice is to be taken as well.

    Every range counts as 0 to 1; it starts in the middle. A run that has stopped to move starts anew with twice the
    population (IPOP). The state is what was told: it is told again to a sampler of the same seed, which is then where
    the other one was.

    Args:
        genes: ranges, one at least, and choices.
        population_size: candidates of a generation; None for the library's ``4 + floor(3 ln n)``.
        sigma: first standard deviation, as a share of every range.
        seed: of all random choices.

    Attributes:
        best: the best candidate so far and its score; None before any was told.

    Raises:
        BackendUnavailable: the library is not there.
        RecipeError: no gene is a range, or an option is out of range.
    """

    def __init__(
        self, genes: Sequence[Gene], *, population_size: int | None = None, sigma: float = SPREAD, seed: int = 0
    ) -> None:
        genetics.check(genes)
        problems = []
        if all(g.choices for g in genes):
            problems.append("cma: expected one range or more, got choices alone; 'genetic' takes these")
        size = population_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 2):
            problems.append(f"population_size: expected a whole number above 1, got {size!r:.80}")
        if isinstance(sigma, bool) or not isinstance(sigma, int | float) or not 0 < sigma <= 1:
            problems.append(f"sigma: expected a number above 0, at most 1, got {sigma!r:.80}")
        if problems:
            raise RecipeError(problems)
        self._genes = tuple(genes)
        self._sigma, self._seed, self._first_size = sigma, seed, size
        self._begin()

    def _begin(self) -> None:
        self.best: tuple[Candidate, float] | None = None
        self._told: list[list[float]] = []
        self._restarts = 0
        self._waiting: list[Candidate] = []
        self._points: list[Any] = []
        self._start(self._first_size)

    def _start(self, size: int | None) -> None:
        try:
            import cmaes
        except ImportError:
            raise BackendUnavailable("cma needs the library cmaes: install fastmerge[evolve]") from None
        import numpy as np

        ranges = [i for i, g in enumerate(self._genes) if not g.choices]
        open_choices = [i for i, g in enumerate(self._genes) if len(g.choices) > 1]
        n = len(ranges)
        self._order = [*ranges, *open_choices]
        # A run of its own for each restart; the library takes seeds of 32 bits.
        seed = (self._seed + 1_000_003 * self._restarts) % 2**32
        how: dict[str, Any] = {"mean": np.full(n, 0.5), "sigma": self._sigma, "seed": seed, "population_size": size}
        unit = np.array([[0.0, 1.0]] * n)
        if open_choices:
            self._cma = cmaes.CatCMAwM(x_space=unit, c_space=[len(self._genes[i].choices) for i in open_choices], **how)
        else:
            self._cma = cmaes.CMA(bounds=unit, **how)

    def ask(self, n: int | None = None) -> Sequence[Candidate]:
        """The candidates of this generation; the first ``n`` of them where that is given."""
        while len(self._waiting) < self._cma.population_size:
            point = self._cma.ask()
            self._points.append(point)
            self._waiting.append(self._candidate(point))
        return self._waiting[:n]

    def _candidate(self, point: Any) -> Candidate:
        """The values of a point: numbers in 0 to 1, and with choices for each of them which one it takes."""
        values: list[genetics.Value] = [0] * len(self._genes)
        given = point.tolist() if not hasattr(point, "c") else [*point.x.tolist(), *point.c.argmax(1).tolist()]
        for i, value in zip(self._order, given, strict=True):
            gene = self._genes[i]
            values[i] = value if gene.choices else min(gene.low + (gene.high - gene.low) * value, gene.high)
        return tuple(values)

    def tell(self, scores: Sequence[Any]) -> None:
        """The scores of a whole generation, in its order; the larger the better. NaN counts as the worst.

        Raises:
            RecipeError: there are more or fewer of them than candidates of a generation.
        """
        asked = self.ask()
        if len(scores) != len(asked):
            raise RecipeError(f"scores: expected {len(asked)}, one for each candidate, got {len(scores)}")
        numbers = [min(pareto.numbers(s)[0], sys.float_info.max) for s in scores]
        self._told.append(numbers)
        first = max(range(len(numbers)), key=lambda i: numbers[i])
        if self.best is None or numbers[first] > self.best[1]:
            self.best = asked[first], numbers[first]
        self._cma.tell(list(zip(self._points, _losses(numbers), strict=True)))
        self._waiting, self._points = [], []
        if self._cma.should_stop():
            self._restarts += 1
            self._start(2 * self._cma.population_size)

    def state_dict(self) -> dict[str, Any]:
        """The scores of all generations; what is worse than any number is null."""
        return {"told": [[s if math.isfinite(s) else None for s in scores] for scores in self._told]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another of the same genes, options and seed was."""
        self._begin()
        for scores in state["told"]:
            self.tell([-math.inf if s is None else s for s in scores])


def _losses(scores: Sequence[float]) -> list[float]:
    """What the library makes small: finite, where the scores are not."""
    finite = [s for s in scores if math.isfinite(s)]
    worst = min(finite) - 1 if finite else 0.0
    return [-(s if math.isfinite(s) else worst) for s in scores]
