"""Scores of a model on items, as a search takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.search.evaluators import Evaluator, Function
from fastmerge.search.evaluators.base import number
from fastmerge.search.pareto import Scores

SCORE = ("score",)
"""The objectives of an evaluator that names none."""


def evaluator(evaluate: Any, data: Any = None) -> Evaluator:
    """An evaluator, or ``eval_fn(model, eval_data) -> float`` as one of a single item.

    Raises:
        RecipeError: it is neither, or it is an evaluator and there are data, or it has no items.
    """
    if not isinstance(evaluate, Evaluator):
        return Function(evaluate, data)
    if data is not None:
        raise RecipeError("eval_data: an evaluator has its own items; data is for functions")
    if not len(evaluate):
        raise RecipeError("evaluate: expected an evaluator with items, got one without any")
    return evaluate


def measure(evaluate: Evaluator, model: Any, items: Sequence[int], objectives: Sequence[str]) -> list[Scores]:
    """The scores of each item, a number for each objective.

    Raises:
        RecipeError: the evaluator gives other objectives, more or fewer scores than items, or what is no number.
    """
    given = evaluate(model, items)
    columns = given if isinstance(given, Mapping) else dict.fromkeys(SCORE, given)
    if set(columns) != set(objectives):
        wanted = f"expected scores for {', '.join(objectives)}, got {', '.join(map(str, columns))}"
        raise RecipeError(f"evaluate: {wanted} ('objectives' names several)")
    out = [[number(score) for score in columns[name]] for name in objectives]
    for name, column in zip(objectives, out, strict=True):
        if len(column) != len(items):
            raise RecipeError(f"evaluate: {name}: expected {len(items)} scores, one for each item, got {len(column)}")
    return list(zip(*out, strict=True))
