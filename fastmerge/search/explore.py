"""The loop of a search: ask, evaluate what is new, tell."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from fastmerge.errors import OutputError
from fastmerge.search import racing
from fastmerge.search.genes import Candidate, Gene
from fastmerge.search.journal import Evaluation, Journal
from fastmerge.search.pareto import Scores
from fastmerge.search.samplers import Sampler

IDLE = 20
"""Generations in a row without a new candidate after which a search ends: there is nothing left to see."""

Measure = Callable[[Candidate, int, int], Sequence[Scores]]
"""The scores of a candidate on each of the items from one to another, by their place in the order of the search."""


class Exploration:
    """A search as it goes.

    A candidate is evaluated once on an item, however often it is asked for. The evaluations of an earlier run are
    taken in place of new ones, in their order, so that the run goes on as if it had never stopped.

    Args:
        sampler: fresh from its seed.
        genes: what candidates are values of.
        measure: evaluates.
        journal: takes every evaluation, and has those of an earlier run.
        items: how many there are.
        rounds: of a race; 1 evaluates every candidate on all items.
        progress: called with every evaluation.

    Attributes:
        evaluations: all so far.
        candidates: of each evaluation.
    """

    def __init__(
        self,
        sampler: Sampler,
        genes: Sequence[Gene],
        measure: Measure,
        journal: Journal,
        *,
        items: int,
        rounds: int = 1,
        progress: Callable[[Evaluation], None] | None = None,
    ) -> None:
        self._sampler, self._genes, self._measure, self._journal = sampler, genes, measure, journal
        self._items, self._sizes = items, racing.rungs(items, rounds)
        self._progress = progress
        self._known: dict[tuple[Candidate, int], Scores] = {}
        self._generation = 0
        self.evaluations: list[Evaluation] = []
        self.candidates: list[Candidate] = []

    def run(self, budget: int) -> None:
        """Goes on until the budget is spent, nothing new comes, or the sampler has no more.

        Args:
            budget: what may be evaluated, in candidates on all items. One that a race drops costs what it took.
        """
        left = budget * self._items
        idle = 0
        while left > 0 and idle < IDLE:
            asked = [tuple(c) for c in self._sampler.ask()]
            fresh = [c for c in dict.fromkeys(asked) if (c, self._sizes[0]) not in self._known]
            affordable = len(fresh)
            while racing.cost(affordable, self._sizes) > left:
                affordable -= 1
            if affordable < len(fresh) and len(self._sizes) > 1:
                return  # a race of some of a generation may drop others than that of all
            out = set(fresh[affordable:])
            told, spent = self._race([c for c in dict.fromkeys(asked) if c not in out])
            if out or not asked:
                return
            left -= spent
            idle = 0 if fresh else idle + 1
            self._sampler.tell([told[c] if len(told[c]) > 1 else told[c][0] for c in asked])
            self._generation += 1

    def finished(self) -> list[int]:
        """Numbers of the evaluations on all items."""
        return [e.number for e in self.evaluations if e.items == self._items]

    def _race(self, candidates: Sequence[Candidate]) -> tuple[dict[Candidate, Scores], int]:
        """What to tell of each, and how many evaluations of single items it took."""
        told: dict[Candidate, Scores] = {}
        dropped: list[list[Candidate]] = []
        running, spent, done = list(candidates), 0, 0
        for size in self._sizes:
            for candidate in running:
                if (candidate, size) not in self._known:
                    self._evaluate(candidate, done, size)
                    spent += size - done
                told[candidate] = self._known[candidate, size]
            if size < self._items:
                stay = set(racing.survivors([told[c] for c in running]))
                dropped.append([c for i, c in enumerate(running) if i not in stay])
                running = [c for i, c in enumerate(running) if i in stay]
            done = size
        further = running
        for some in reversed(dropped):
            told.update({c: racing.behind(told[c], [told[f] for f in further]) for c in some})
            further = [*further, *some]
        return told, spent

    def _evaluate(self, candidate: Candidate, done: int, size: int) -> None:
        """The mean over the first ``size`` items, from that over the first ``done`` and the scores of the others."""
        number = len(self.evaluations)
        genes = tuple([g.shown(v) for g, v in zip(self._genes, candidate, strict=True)])
        if number < len(self._journal.recorded):
            found = self._journal.recorded[number]
            if (found.number, found.generation, found.genes, found.items) != (number, self._generation, genes, size):
                raise OutputError(
                    f"{self._journal.directory}: evaluation {number} is of {list(found.genes)!r:.200} on {found.items} "
                    f"items, where this search comes to {list(genes)!r:.200} on {size}: other versions of what it "
                    "needs made these files; take another directory"
                )
        else:
            started = time.perf_counter()
            some = self._measure(candidate, done, size)
            columns = list(zip(*some, strict=True))
            before = self._known[candidate, done] if done else (0.0,) * len(columns)
            scores = tuple([mean(done, old, column) for old, column in zip(before, columns, strict=True)])
            found = Evaluation(number, self._generation, genes, scores, size, round(time.perf_counter() - started, 6))
            self._journal.add(found)
        self.evaluations.append(found)
        self.candidates.append(candidate)
        self._known[candidate, size] = found.scores
        if self._progress is not None:
            self._progress(found)


def mean(done: int, before: float, scores: Sequence[float]) -> float:
    """Of ``done`` scores whose mean is known, and of others; NaN is worse than any number."""
    if not math.isfinite(before):
        return before
    try:
        mean = (before * done + math.fsum(scores)) / (done + len(scores))
    except (OverflowError, ValueError):
        mean = math.nan
    return mean if math.isfinite(mean) else -math.inf
