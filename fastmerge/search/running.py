"""A search from its space to the best recipe."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastmerge.backends.choose import choose
from fastmerge.errors import FastMergeError, NoSpace, OutputError, RecipeError
from fastmerge.search import pareto
from fastmerge.search.baselines import baselines as usual
from fastmerge.search.evaluation import SCORE, evaluator, measure
from fastmerge.search.evaluators import Evaluator, named
from fastmerge.search.explore import Exploration, mean
from fastmerge.search.genes import Candidate
from fastmerge.search.journal import Evaluation, Journal, written
from fastmerge.search.pareto import Scores
from fastmerge.search.samplers import Sampler, sampler
from fastmerge.search.space import Space

log = logging.getLogger("fastmerge")

HELD_OUT = 0.2
"""Share of the items that a search does not see."""


class Renderer(Protocol):
    """Writes the merge that a recipe says into tensors that are there: a :class:`fastmerge.Session`, say."""

    def render(self, recipe: Mapping[str, Any], into: Any) -> object:
        """Merges; ``into`` is a module, or a mapping of names to tensors."""


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        recipe: the best one, as a mapping that :func:`fastmerge.merge` takes; its bytes are those that were scored.
        candidate: its genes.
        number: of its evaluation.
        scores: of it, by objective: the mean over the items of the search. They are too good: of many candidates that
            are equally good, the best one is that which had luck on these items.
        held_out: its scores on items that the search never saw, which say how good it is; empty without such items.
        baselines: scores of every single model and of equal weights, on the held-out items (on those of the search
            where there are none); empty where the recipe has no list of models.
        front: numbers of the evaluations that nothing dominates; with one objective the best one's.
        evaluations: all, in their order.
        objectives: what the scores are.
        items: how many items the search has, and how many were held out.
    """

    recipe: Mapping[str, Any] = field(repr=False)
    candidate: Candidate
    number: int
    scores: Mapping[str, float | None]
    held_out: Mapping[str, float | None]
    baselines: Mapping[str, Mapping[str, float | None]]
    front: tuple[int, ...]
    evaluations: tuple[Evaluation, ...] = field(repr=False)
    objectives: tuple[str, ...]
    items: tuple[int, int]

    def plain(self) -> dict[str, Any]:
        """As ``result.json`` has it."""
        return {
            "best": self.number,
            "scores": dict(self.scores),
            "held_out": dict(self.held_out),
            "baselines": {name: dict(scores) for name, scores in self.baselines.items()},
            "front": list(self.front),
        }

    def __str__(self) -> str:
        searched, held = self.items
        lines = [f"best: evaluation {self.number} of {len(self.evaluations)}: {_shown(self.scores)}"]
        if held:
            lines.append(f"on {held} held-out items: {_shown(self.held_out)}")
            lines.append(
                f"(the best of many looks too good on the {searched} items that it was chosen by: selection bias)"
            )
        else:
            lines.append("nothing was held out: the best of many looks too good on the items that it was chosen by")
        where = "held-out" if held else "the same"
        lines += [f"{name} on {where} items: {_shown(scores)}" for name, scores in self.baselines.items()]
        if len(self.objectives) > 1:
            lines.append(f"nothing is better in every objective than evaluations {', '.join(map(str, self.front))}")
        return "\n".join(lines)


def search(
    space: Space | Mapping[str, Any],
    evaluate: Any,
    *,
    model: Any = None,
    session: Renderer | None = None,
    device: str = "cpu",
    sampler: str | Mapping[str, Any] | Sampler = "genetic",
    budget: int = 100,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    held_out: float = HELD_OUT,
    racing: int = 1,
    objectives: Sequence[str] | None = None,
    eval_data: Any = None,
    baselines: bool | Mapping[str, Mapping[str, Any]] = True,
    seed: int = 0,
    progress: Callable[[Evaluation], None] | None = None,
) -> Result:
    """Looks for the best merge of a space.

    Every candidate is rendered into ``model`` and evaluated there; at the end the best one is rendered again and stays
    there. The same arguments give the same search, whether or not it was killed on the way.

    Args:
        space: a :class:`~fastmerge.search.space.Space`, or the recipe that makes one.
        evaluate: an :class:`~fastmerge.search.evaluators.Evaluator`, the mapping of one
            (:func:`~fastmerge.search.evaluators.named`), or ``eval_fn(model, eval_data) -> float``; the larger the
            better.
        model: a module of the shape of the candidates, which is overwritten; None merges the middle of the space on
            disk, loads that with transformers and moves it to the session's device, the first of several.
        session: renders; None opens a :class:`fastmerge.Session` of the models of the space.
        device: of that session: ``cpu``, ``cuda``, ``cuda:0,cuda:1``, or ``auto``. Candidates are the same on all of
            them; what an evaluator makes of them may differ in rounding.
        sampler: a name of :data:`~fastmerge.search.samplers.SAMPLERS`, ``{name: options}``, or a fresh sampler.
        budget: candidates that are evaluated on all items; one that a race drops costs what it took.
        directory: for the files of the search; None keeps it in memory.
        resume: go on with the search of that directory, which must be the same; a larger budget goes further. A
            function must be the same as well: of one, files do not tell.
        held_out: share of the items that are set aside, chosen by the seed; 0 for none. One item is never set aside.
        racing: rounds of a race: candidates start on ``1 / 2**(racing - 1)`` of the items, all on the same, and the
            better half goes on to twice as many. 1 evaluates all on all items.
        objectives: names of the scores where an evaluator gives several; None takes the evaluator's ``objectives``,
            else ``score``.
        eval_data: what a function is called with.
        baselines: score every single model and equal weights as well; or other recipes, by name.
        seed: of the sampler and the split of the items.
        progress: called with every evaluation.

    Returns:
        The best recipe, its scores, and what they are worth.

    Raises:
        RecipeError: an argument is wrong; or what a recipe, the sampler or the evaluator says.
        OutputError: the directory has another search, or one and ``resume`` is not set.
        NoSpace: the disk is full; what was evaluated is kept, and ``resume`` goes on.
        BackendUnavailable: the device cannot be used here.
    """
    if session is None:
        choose(device, said=f"device {device!r}")  # before anything is merged or written
    made = space if isinstance(space, Space) else Space(space)
    scored = evaluator(
        named(evaluate, tokenizer=made.base.path) if isinstance(evaluate, Mapping) else evaluate, eval_data
    )
    names: tuple[str, ...] = tuple(objectives or getattr(evaluate, "objectives", None) or SCORE)
    _check(budget, held_out, racing, names)
    taken, aside = _split(len(scored), held_out, seed)
    name, options, fresh = _sampler(sampler, made, seed, len(names))
    facts = {
        "method": str(made.template.get("merge_method")) if isinstance(made.template.get("merge_method"), str) else "",
        "models": list(made.models),
        "genes": [gene.plain() for gene in made.genes],
        "objectives": list(names),
        **({"evaluator": evaluate} if isinstance(evaluate, Mapping) else {}),
        "sampler": name,
        "sampler_options": options,
        "seed": seed,
        "racing": racing,
        "items": {"search": len(taken), "held_out": len(aside)},
        "recipe": made.given,
    }
    with ExitStack() as stack:
        journal = Journal(directory, facts, resume=resume)
        stack.callback(journal.close)
        scene = _Scene(made, scored, names, model, session, device, stack, journal)

        refused: list[FastMergeError] = []

        def scores(candidate: Candidate, first: int, last: int) -> list[Scores]:
            try:
                scene.render(made.recipe(candidate))
            except (RecipeError, OutputError) as error:  # one model twice, weights that sum to 0, ...
                if isinstance(error, NoSpace):
                    raise  # which says nothing of the candidate
                refused.append(error)
                log.warning("a candidate that cannot be merged counts as the worst: %s", _first(error))
                return [(-math.inf,) * len(names)]
            return scene.scores(taken[first:last])

        run = Exploration(fresh, made.genes, scores, journal, items=len(taken), rounds=racing, progress=progress)
        run.run(budget)
        finished = run.finished()
        if not finished:
            raise RecipeError(f"budget: {budget} is too small for one race of {racing} rounds")
        every = [run.evaluations[i].scores for i in finished]
        best = finished[pareto.middle(every)]
        if refused and -math.inf in run.evaluations[best].scores:
            raise refused[-1]
        recipe = made.recipe(run.candidates[best])
        front = tuple([finished[i] for i in pareto.front(every)]) if len(names) > 1 else (best,)
        scores_of_best = written(names, run.evaluations[best].scores)
        known = {"best": best, "scores": scores_of_best, "front": list(front)}
        others = usual(made) if baselines is True else dict(baselines or {})
        if len(run.evaluations) == len(journal.recorded) and known.items() <= journal.result.items():
            held, beside = journal.result["held_out"], journal.result["baselines"]
            if model is not None:
                scene.render(recipe)
        else:
            beside = scene.beside(others, aside or taken)
            held = written(names, scene.mean(recipe, aside)) if aside else {}
            if not aside:
                scene.render(recipe)
        found = Result(
            recipe=recipe,
            candidate=run.candidates[best],
            number=best,
            scores=scores_of_best,
            held_out=held,
            baselines=beside,
            front=front,
            evaluations=tuple(run.evaluations),
            objectives=names,
            items=(len(taken), len(aside)),
        )
        journal.finish(found.plain(), made.yaml(found.candidate))
        return found


class _Scene:
    """The live model, made when it is first needed: a search that is all read from its files needs none."""

    def __init__(
        self,
        space: Space,
        evaluate: Evaluator,
        objectives: Sequence[str],
        model: Any,
        session: Renderer | None,
        device: str,
        stack: ExitStack,
        journal: Journal,
    ) -> None:
        self._space, self._evaluate, self._objectives = space, evaluate, objectives
        self._model, self._session, self._stack, self._directory = model, session, stack, journal.directory
        self._device = device

    def render(self, recipe: Mapping[str, Any]) -> None:
        """Gives the model the weights of a recipe."""
        fresh = self._model is None
        if fresh:
            from fastmerge.search.live import live

            self._model = live(self._space, self._directory)
        if self._session is None:
            from fastmerge.session import Session

            self._session = self._stack.enter_context(Session(list(self._space.refs), device=self._device))
        if fresh:
            self._model.to(getattr(self._session, "device", "cpu"))
        self._session.render(recipe, into=self._model)

    def scores(self, items: Sequence[int]) -> list[Scores]:
        """The scores of what was rendered on each of some items."""
        return measure(self._evaluate, self._model, items, self._objectives)

    def mean(self, recipe: Mapping[str, Any], items: Sequence[int]) -> Scores:
        """The mean scores of a recipe."""
        self.render(recipe)
        return tuple([mean(0, 0.0, column) for column in zip(*self.scores(items), strict=True)])

    def beside(self, recipes: Mapping[str, Mapping[str, Any]], items: Sequence[int]) -> dict[str, Any]:
        """The mean scores of what the best is compared to, by name; those that cannot be merged are left out."""
        out = {}
        for name, recipe in recipes.items():
            try:
                out[name] = written(self._objectives, self.mean(recipe, items))
            except FastMergeError as error:
                log.warning("%s is not compared to: %s", name, _first(error))
        return out


def _check(budget: int, held_out: float, racing: int, objectives: Sequence[str]) -> None:
    problems = []
    for key, value in (("budget", budget), ("racing", racing)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{key}: expected a whole number above 0, got {value!r:.80}")
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 <= held_out < 1:
        problems.append(f"held_out: expected a share of the items, from 0 to below 1, got {held_out!r:.80}")
    if not all(isinstance(o, str) and o for o in objectives) or len(set(objectives)) != len(objectives):
        problems.append(f"objectives: expected different names, got {list(objectives)!r:.80}")
    if problems:
        raise RecipeError(problems)


def _split(items: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """The items of the search in the order in which races use them, and those that are set aside."""
    order = list(range(items))
    random.Random(f"items {seed}").shuffle(order)  # noqa: S311  no secret
    aside = min(round(items * held_out) or (1 if held_out else 0), items - 1)
    return order[aside:], sorted(order[:aside])


def _sampler(given: Any, space: Space, seed: int, objectives: int) -> tuple[str, dict[str, Any], Sampler]:
    """Name and options as files have them, and the sampler."""
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, Mapping):
        return type(given).__name__.lower(), {}, given
    if len(given) != 1:
        raise RecipeError(f"sampler: expected one name with its options, got {', '.join(map(str, given)) or 'none'}")
    ((name, options),) = given.items()
    if not isinstance(options or {}, Mapping):
        raise RecipeError(f"sampler: {name}: expected a mapping of options, got {options!r:.80}")
    options = dict(options or {})
    return name, options, sampler(name, space.genes, seed=seed, objectives=objectives, **options)


def _first(error: FastMergeError) -> str:
    """The first of the problems that an error lists."""
    return str(getattr(error, "problems", [error])[0])


def _shown(scores: Mapping[str, float | None]) -> str:
    return ", ".join([f"{name} {'no number' if s is None else format(s, '.6g')}" for name, s in scores.items()])
