"""How good a model is: the protocol of evaluators, and functions that become one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastmerge.errors import RecipeError
from fastmerge.search.pareto import Scores

SCORE = ("score",)
"""The objectives of an evaluator that names none."""


class Evaluator(Protocol):
    """Scores a model on items, which are numbered from 0. It may have ``objectives``: the names of several scores."""

    def __len__(self) -> int:
        """How many items there are."""

    def __call__(self, model: Any, items: Sequence[int]) -> Sequence[float] | Mapping[str, Sequence[float]]:
        """A score for each of the items, in their order, the larger the better; or such scores by objective."""


class Whole:
    """``eval_fn(model, eval_data) -> float`` as an evaluator of one item.

    Args:
        function: the larger its result, the better; it may be a mapping of numbers by objective.
        data: what it is called with; None calls it with the model alone where it takes nothing else.
    """

    def __init__(self, function: Callable[..., Any], data: Any = None) -> None:
        self._arguments = () if data is None and _takes_one(function) else (data,)
        self._function = function
        self.objectives = getattr(function, "objectives", SCORE)

    def __len__(self) -> int:
        return 1

    def __call__(self, model: Any, items: Sequence[int]) -> Any:
        """The score, in a list of its own."""
        given = self._function(model, *self._arguments)
        return {k: [v] for k, v in given.items()} if isinstance(given, Mapping) else [given]


def evaluator(evaluate: Any, data: Any = None) -> Evaluator:
    """An evaluator, or a function as one.

    Raises:
        RecipeError: it is neither.
    """
    if not callable(evaluate):
        raise RecipeError(f"evaluate: expected a function or an evaluator, got {evaluate!r:.80}")
    if not hasattr(evaluate, "__len__"):
        return Whole(evaluate, data)
    if data is not None:
        raise RecipeError("eval_data: an evaluator has its own items; data is for functions")
    if not len(evaluate):
        raise RecipeError("evaluate: expected an evaluator with items, got one without any")
    made: Evaluator = evaluate
    return made


def measure(evaluate: Evaluator, model: Any, items: Sequence[int], objectives: Sequence[str]) -> list[Scores]:
    """The scores of each item.

    Raises:
        RecipeError: the evaluator gives other objectives, more or fewer scores than items, or what is no number.
    """
    return rows(evaluate(model, items), len(items), objectives)


def rows(given: Any, items: int, objectives: Sequence[str]) -> list[Scores]:
    """What an evaluator gave for so many items, item by item.

    Raises:
        RecipeError: as of :func:`measure`.
    """
    if isinstance(given, Mapping):
        if set(given) != set(objectives):
            raise RecipeError(
                f"evaluate: expected scores for {', '.join(objectives)}; got {', '.join(map(str, given))}"
            )
        columns = [given[name] for name in objectives]
    elif len(objectives) == 1:
        columns = [given]
    else:
        raise RecipeError(f"evaluate: expected scores by objective, {', '.join(objectives)}; got {given!r:.80}")
    out = []
    for name, column in zip(objectives, columns, strict=True):
        try:
            out.append([float(score) for score in column])
        except (TypeError, ValueError):
            raise RecipeError(f"evaluate: {name}: expected a number for each item, got {column!r:.80}") from None
        if len(out[-1]) != items:
            raise RecipeError(f"evaluate: {name}: expected {items} scores, one for each item, got {len(out[-1])}")
    return list(zip(*out, strict=True))


def imported(key: str, name: Any) -> Any:
    """What ``module:name`` names; modules of the working directory count.

    Raises:
        RecipeError: there is no such module or name.
    """
    module, colon, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (module and colon and attribute):
        raise RecipeError(f"{key}: expected 'module:name', got {name!r:.80}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise
        raise RecipeError(f"{key}: no module {module!r} here or among those that are installed") from None
    finally:
        if here in sys.path:
            sys.path.remove(here)
    try:
        return getattr(found, attribute)
    except AttributeError:
        raise RecipeError(f"{key}: module {module!r} has no {attribute!r}") from None


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with one argument and not with two."""
    import inspect

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(None, None)
    except TypeError:
        return True
    return False
