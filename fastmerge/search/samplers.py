"""Where candidates come from: one protocol, and the samplers by name."""

from __future__ import annotations

import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from fastmerge.errors import BackendUnavailable, RecipeError, hint
from fastmerge.search import genes as genetics
from fastmerge.search import pareto
from fastmerge.search.cma import CMA
from fastmerge.search.genes import Candidate, Gene
from fastmerge.search.genetic import Genetic

BATCH = 16
"""Candidates of a generation of a sampler that learns nothing from scores."""


class Sampler(Protocol):
    """Gives candidates and takes their scores, generation by generation; made of the same it gives the same."""

    best: Any
    """The best candidate that was told, and its score; None before that."""

    def ask(self, n: int | None = None) -> Sequence[Candidate]:
        """The candidates of this generation, at most ``n``; none where it has no more to give.

        Asked again before it is told, it gives the same.
        """

    def tell(self, scores: Sequence[Any]) -> None:
        """The scores of the candidates that were asked for, in their order: numbers, or one number per objective."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, as values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where another of the same genes and options was."""


class _Listed(ABC):
    """Candidates in an order that no score changes.

    Args:
        genes: what they are values of.
        batch: candidates of a generation.
    """

    def __init__(self, genes: Sequence[Gene], batch: int) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise RecipeError(f"batch: expected a whole number above 0, got {batch!r:.80}")
        genetics.check(genes)
        self.best: tuple[Candidate, Any] | None = None
        self._genes = tuple(genes)
        self._batch = batch
        self._given = 0
        self._waiting: list[Candidate] = []
        self._every = self._candidates()

    @abstractmethod
    def _candidates(self) -> Iterator[Candidate]:
        """All of them, the same each time."""

    def ask(self, n: int | None = None) -> Sequence[Candidate]:
        """The next candidates: ``n`` of them, or a generation."""
        wanted = self._batch if n is None else n
        self._waiting += itertools.islice(self._every, max(0, wanted - len(self._waiting)))
        return self._waiting[:wanted]

    def tell(self, scores: Sequence[Any]) -> None:
        """Remembers the best.

        Raises:
            RecipeError: there are more of them than candidates that wait for one.
        """
        if len(scores) > len(self._waiting):
            raise RecipeError(f"scores: expected at most {len(self._waiting)}, got {len(scores)}")
        told = list(zip(self._waiting, scores, strict=False))
        pool = [*([self.best] if self.best is not None else []), *told]
        if pool:
            self.best = pool[pareto.middle([pareto.numbers(s) for _, s in pool])]
        self._given += len(scores)
        self._waiting = self._waiting[len(scores) :]

    def state_dict(self) -> dict[str, Any]:
        """How many were told, and the best of them."""
        return {"given": self._given, "best": None if self.best is None else [list(self.best[0]), self.best[1]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind those that were told."""
        self._given = int(state["given"])
        self._waiting, self._every = [], itertools.islice(self._candidates(), self._given, None)
        self.best = None if state["best"] is None else (tuple(state["best"][0]), state["best"][1])


class Random(_Listed):
    """Every gene uniformly and by itself; numbers as ``random.uniform(low, high)`` gives them after ``random.seed``."""

    def __init__(self, genes: Sequence[Gene], *, seed: int = 0, batch: int = BATCH) -> None:
        self._seed = seed
        super().__init__(genes, batch)

    def _candidates(self) -> Iterator[Candidate]:
        source = random.Random(self._seed)  # noqa: S311  no secret
        while True:
            yield tuple(
                [source.randrange(len(g.choices)) if g.choices else source.uniform(g.low, g.high) for g in self._genes]
            )


class Sobol(_Listed):
    """A scrambled Sobol sequence: like random points, but spread evenly (torch's ``SobolEngine``)."""

    def __init__(self, genes: Sequence[Gene], *, seed: int = 0, batch: int = BATCH) -> None:
        self._seed = seed
        super().__init__(genes, batch)

    def _candidates(self) -> Iterator[Candidate]:
        try:
            import torch
        except ImportError:
            raise BackendUnavailable("sobol needs torch: install fastmerge[torch]") from None
        engine = torch.quasirandom.SobolEngine(len(self._genes), scramble=True, seed=self._seed)
        while True:
            for point in engine.draw(BATCH, dtype=torch.float64).tolist():
                yield tuple([_at(gene, share) for gene, share in zip(self._genes, point, strict=True)])


class Grid(_Listed):
    """All combinations of ``steps`` numbers of each range, from its lower to its upper end, and of all choices.

    The last gene moves first.
    """

    def __init__(self, genes: Sequence[Gene], *, seed: int = 0, steps: int = 5, batch: int = BATCH) -> None:
        self._steps = _number("steps", steps, 2)
        super().__init__(genes, batch)

    def _candidates(self) -> Iterator[Candidate]:
        last = self._steps - 1
        values: list[Sequence[float]] = [
            range(len(g.choices))
            if g.choices
            else [g.low + (g.high - g.low) * i / last for i in range(last)] + [g.high]
            for g in self._genes
        ]
        yield from itertools.product(*values)


class Simplex(_Listed):
    """All ways to share 1 among the genes in steps of ``1 / steps``: (1, 0, 0), (3/4, 1/4, 0), ... for ``steps=4``.

    Raises:
        RecipeError: a gene is no range from 0 to 1.
    """

    def __init__(self, genes: Sequence[Gene], *, seed: int = 0, steps: int = 4, batch: int = BATCH) -> None:
        self._steps = _number("steps", steps, 1)
        super().__init__(genes, batch)
        wrong = [f"{g.name}: a simplex shares 1 among ranges from 0 to 1; got {g.plain()}" for g in genes
                 if g.choices or g.low != 0 or g.high != 1]  # fmt: skip
        if wrong:
            raise RecipeError(wrong)

    def _candidates(self) -> Iterator[Candidate]:
        for shares in _shares(self._steps, len(self._genes)):
            yield tuple([share / self._steps for share in shares])


def _shares(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum of so many, the largest first ones first."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for others in _shares(total - first, parts - 1):
            yield (first, *others)


def _at(gene: Gene, share: float) -> genetics.Value:
    """The value at a share of a range, or of the choices."""
    if gene.choices:
        return min(int(share * len(gene.choices)), len(gene.choices) - 1)
    return min(gene.low + (gene.high - gene.low) * share, gene.high)


def _number(key: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise RecipeError(f"{key}: expected a whole number of {least} or more, got {value!r:.80}")
    return value


def genetic(genes: Sequence[Gene], **options: Any) -> Genetic:
    """The genetic algorithm over genes."""
    genetics.check(genes)
    return Genetic([len(g.choices) if g.choices else (g.low, g.high) for g in genes], **options)


SAMPLERS: Mapping[str, Any] = {
    "genetic": genetic,
    "cma": CMA,
    "random": Random,
    "sobol": Sobol,
    "grid": Grid,
    "simplex": Simplex,
}
"""The samplers by name: called with genes, ``seed`` and options of their own."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "genetic": ("population_size", "mutation_rate", "crossover_rate", "elite_ratio", "tournament"),
    "cma": ("population_size", "sigma"),
    "random": ("batch",),
    "sobol": ("batch",),
    "grid": ("steps", "batch"),
    "simplex": ("steps", "batch"),
}


def sampler(name: str, genes: Sequence[Gene], *, seed: int = 0, objectives: int = 1, **options: Any) -> Sampler:
    """Makes a sampler by its name.

    Args:
        name: of :data:`SAMPLERS`.
        genes: what candidates are values of.
        seed: of all random choices.
        objectives: how many scores each candidate has.
        options: of the sampler.

    Raises:
        RecipeError: there is no such sampler or option, or it does not fit the genes or the objectives.
    """
    if name not in SAMPLERS:
        raise RecipeError(f"sampler: {name!r:.80}{hint(str(name), SAMPLERS)}: expected one of {', '.join(SAMPLERS)}")
    known = OPTIONS[name]
    shown = ", ".join(known)
    if wrong := [
        f"sampler: {name} has no option {k!r}{hint(k, known)}: it has {shown}" for k in options if k not in known
    ]:
        raise RecipeError(wrong)
    if objectives > 1 and name == "cma":
        raise RecipeError(f"sampler: cma takes one objective, got {objectives}; 'genetic' takes several (NSGA-II)")
    made: Sampler = SAMPLERS[name](genes, seed=seed, **options)
    return made
