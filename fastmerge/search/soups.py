"""Soups: averages of models, of all of them or of those that a greedy search keeps."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastmerge.errors import RecipeError
from fastmerge.search.averages import Averages
from fastmerge.search.evaluators.base import means, score

if TYPE_CHECKING:
    import torch

Models = Mapping[str, Any] | Sequence[Any]
"""Checkpoint directories (or hub ids), or modules, or state dictionaries: in order, or by name."""


@dataclass(frozen=True)
class Step:
    """One model that a greedy soup tried.

    Attributes:
        model: its name.
        score: of the soup with it.
        accepted: whether it stayed.
    """

    model: str
    score: float
    accepted: bool


@dataclass(frozen=True)
class Soup:
    """What became of the models.

    Attributes:
        recipe: the soup as a recipe of ``linear``; merging it gives the same bytes as ``model`` holds. Models in
            memory stand there by name.
        weights: of the models in the soup, in the order in which they are summed.
        model: the live module, or the state dictionary, that holds the soup; None where nobody asked for one.
        score: of the soup; None where it was not evaluated.
        scores: of each model by itself: by name, and for a soup of categories by category first.
        steps: of a greedy soup, in the order of trial.
    """

    recipe: dict[str, Any]
    weights: dict[str, float]
    model: Any = None
    score: float | None = None
    scores: Mapping[str, Any] | None = None
    steps: tuple[Step, ...] = ()


def uniform_soup(models: Models, evaluate: Any = None, *, into: Any = None) -> Soup:
    r"""The mean of all models, :math:`\frac{1}{N} \sum_i \theta_i`.

    Args:
        models: as of :func:`greedy_soup`.
        evaluate: as of :func:`greedy_soup`; nothing is evaluated where absent.
        into: as of :func:`greedy_soup`. Of directories only the recipe is made where both are absent.

    Returns:
        The soup, with its score where it was evaluated.

    Raises:
        FastMergeError: as of :func:`greedy_soup`.
    """
    names, given = _named(models)
    weights = dict.fromkeys(names, 1.0)
    if evaluate is None and into is None and _on_disk(given):
        return Soup(_recipe(names, given, weights), weights)
    averages = Averages(given, names, lambda: _target(given, into))
    averages.show(list(weights.values()))
    reached = None if evaluate is None else score(evaluate, averages.model)
    return Soup(_recipe(names, given, weights), weights, averages.model, reached)


def greedy_soup(
    models: Models,
    evaluate: Any,
    accept: Literal["gt", "ge"] = "gt",
    *,
    into: Any = None,
    progress: Callable[[Step], object] | None = None,
) -> Soup:
    """Averages the best model with those that do the average good, tried in the order of their own scores.

    Each model is evaluated by itself; then, the best first and the first of equals first, each is added to the soup if
    the mean with it scores more (``gt``, as the authors' code does) or at least as much (``ge``, as the paper says)
    as the soup without it. That takes 2 N - 1 evaluations. The soup is kept as a running sum in fp32 (fp64 for fp64
    models): a trial reads that sum and one model, and writes one candidate, however many models are in the soup. It is
    formed in the order in which ``linear`` sums the recipe's models, so that the bytes are the same.

    Paper: Wortsman et al. 2022, "Model soups", arXiv 2203.05482.

    Args:
        models: checkpoint directories or hub ids, whose weights are read from disk each time and never all in memory;
            or modules, or state dictionaries; with equal names, shapes and types. By name, or in order: directories
            are then named by themselves, others ``0``, ``1``, ... None is changed.
        evaluate: an :class:`~fastmerge.search.evaluators.Evaluator`, whose mean over all items counts, or a function of
            a model that gives a number; the larger the better, NaN is the worst. What it is called with is always the
            same live module (for state dictionaries, the same dictionary).
        accept: ``gt`` or ``ge``.
        into: that module, or dictionary of tensors; on any device. Where absent, a copy of the first model: of a
            directory what transformers' ``AutoModelForCausalLM`` loads, on the CPU.
        progress: called with each step.

    Returns:
        The soup, which ``model`` of it holds, with all scores.

    Raises:
        RecipeError: there is no model, two have one name, ``accept`` is no rule, or a score is no number.
        CheckpointError: a model on disk cannot be used.
        ShapeError: tensors of the models differ in name, shape or type, or ``into`` has others.
        BackendUnavailable: a directory is to be loaded, and transformers is not installed.
    """
    if accept not in ("gt", "ge"):
        raise RecipeError(f"accept: expected gt or ge, got {accept!r:.80}")
    names, given = _named(models)
    averages = Averages(given, names, lambda: _target(given, into))
    alone = []
    for i in range(len(names)):
        averages.show([float(i == j) for j in range(len(names))])
        alone.append(score(evaluate, averages.model))
    order = sorted(range(len(names)), key=lambda i: -alone[i])
    steps = []
    best = -math.inf
    for i in order:
        first = not averages.count
        if not first:
            averages.try_with(i)
        reached = alone[i] if first else score(evaluate, averages.model)
        step = Step(names[i], reached, first or reached > best or (accept == "ge" and reached == best))
        if step.accepted:
            averages.add(i)
            best = reached
        steps.append(step)
        if progress is not None:
            progress(step)
    averages.show_sum()
    weights = {step.model: 1.0 for step in steps if step.accepted}
    scores = dict(zip(names, alone, strict=True))
    return Soup(_recipe(names, given, weights), weights, averages.model, best, scores, tuple(steps))


def category_soup(models: Models, evaluate: Any, *, into: Any = None) -> Soup:
    r"""The mean of the strongest model of each category, :math:`\frac{1}{C} \sum_c \theta_{m(c)}`.

    A model that is the strongest of two categories counts twice, so that each category has the same say; of equals the
    first is the strongest.

    Args:
        models: as of :func:`greedy_soup`.
        evaluate: by category an evaluator or a function of a model, as of :func:`greedy_soup` (see
            :meth:`~fastmerge.search.evaluators.lines.Lines.by_category`); or one that gives scores by objective,
            which are then the categories.
        into: as of :func:`greedy_soup`.

    Returns:
        The soup; its ``scores`` are those of each model, by category. It is not evaluated itself.

    Raises:
        RecipeError: there are no categories, or models give scores for different ones.
        FastMergeError: as of :func:`greedy_soup`.
    """
    names, given = _named(models)
    averages = Averages(given, names, lambda: _target(given, into))
    every: dict[str, dict[str, float]] = {}
    for i, name in enumerate(names):
        averages.show([float(i == j) for j in range(len(names))])
        if isinstance(evaluate, Mapping):
            mine = {str(category): score(one, averages.model) for category, one in evaluate.items()}
        else:
            mine = means(evaluate, averages.model)
        if every and mine.keys() != every[names[0]].keys():
            raise RecipeError(f"{name}: expected scores of {', '.join(every[names[0]])}, got {', '.join(mine)}")
        every[name] = {k: -math.inf if math.isnan(v) else v for k, v in mine.items()}
    by_category = {c: {name: every[name][c] for name in names} for c in every[names[0]]}
    if not by_category:
        raise RecipeError("evaluate: expected one category or more, got none")
    weights: dict[str, float] = {}
    for mine in by_category.values():
        strongest = max(mine, key=lambda name: mine[name])
        weights[strongest] = weights.get(strongest, 0.0) + 1.0
    # Summed in the order of the models, as the recipe lists them.
    weights = {name: weights[name] for name in names if name in weights}
    averages.show([weights.get(name, 0.0) for name in names])
    return Soup(_recipe(names, given, weights), weights, averages.model, None, by_category)


def _named(models: Models) -> tuple[list[str], list[Any]]:
    """The models and what they are called."""
    if isinstance(models, str | os.PathLike) or not isinstance(models, Mapping | Sequence):
        raise RecipeError(f"models: expected several models, in order or by name; got {models!r:.80}")
    if isinstance(models, Mapping):
        names, given = [str(name) for name in models], list(models.values())
    else:
        given = list(models)
        names = [os.fspath(m) if isinstance(m, str | os.PathLike) else str(i) for i, m in enumerate(given)]
    if not names:
        raise RecipeError("models: expected one or more, got none")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError([f"models: {name!r} is there twice" for name in twice])
    disk = [isinstance(m, str | os.PathLike) for m in given]
    if any(disk) != all(disk):
        raise RecipeError("models: expected all on disk or all in memory")
    return names, [os.fspath(m) if isinstance(m, str | os.PathLike) else m for m in given]


def _on_disk(given: Sequence[Any]) -> bool:
    return isinstance(given[0], str)


def _recipe(names: Sequence[str], given: Sequence[Any], weights: Mapping[str, float]) -> dict[str, Any]:
    refs = dict(zip(names, given, strict=True)) if _on_disk(given) else {name: name for name in names}
    rows = [{"model": refs[name], "parameters": {"weight": weight}} for name, weight in weights.items()]
    return {"merge_method": "linear", "models": rows}


def _target(given: Sequence[Any], into: Any) -> Any:
    """What is evaluated: a module or a dictionary that the caller gave, or a copy of the first model."""
    if into is not None:
        return into
    first = given[0]
    if isinstance(first, str):
        return _loaded(first)
    return copy.deepcopy(first) if hasattr(first, "state_dict") else _empty(first)


def _empty(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _loaded(ref: str) -> Any:
    """A model on disk as transformers loads it, in its own type, on the CPU."""
    from fastmerge.checkpoint import Checkpoint
    from fastmerge.checkpoint.header import listing
    from fastmerge.errors import BackendUnavailable, CheckpointError
    from fastmerge.recipe.refs import model_ref

    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise BackendUnavailable("models are run by transformers: pip install transformers; or give into=") from None
    model = model_ref(ref)  # an adapter on it changes its weights, which are rendered over, but not its shape
    path = Checkpoint.open(model.path, revision=model.revision).path
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        made, said = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{ref}: transformers cannot load it: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if problems := [f"{ref}: {what}: {listing(sorted(map(str, said[what])))}" for what in said if said[what]]:
        raise CheckpointError(problems)
    return made.eval()
