"""Evaluators that take other people's functions, evaluators and engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.errors import RecipeError
from fastmerge.search.evaluation import SCORE, Evaluator, evaluator, rows
from fastmerge.search.explore import mean

if TYPE_CHECKING:
    import torch


class Each:
    """An ordinary function as an evaluator of many items: ``function(model, item)`` for each of them.

    A function that scores everything at once needs none: :func:`~fastmerge.search.evaluation.evaluator` takes it as an
    evaluator of one item.

    Args:
        function: gives a number, the larger the better; or numbers by objective.
        data: the items.

    Raises:
        RecipeError: ``function`` is none, or there are no items.
    """

    def __init__(self, function: Callable[[Any, Any], Any], data: Sequence[Any]) -> None:
        if not callable(function):
            raise RecipeError(f"function: expected a function, got {function!r:.80}")
        if isinstance(data, str | Mapping) or not hasattr(data, "__getitem__") or not len(data):
            raise RecipeError(f"data: expected a list of items, got {data!r:.80}")
        self._function, self._data = function, data
        self.objectives = getattr(function, "objectives", SCORE)

    def __len__(self) -> int:
        return len(self._data)

    def __call__(self, model: Any, items: Sequence[int]) -> Any:
        """The scores, one call for each."""
        found = [self._function(model, self._data[i]) for i in known_items(items, len(self))]
        if found and all(isinstance(one, Mapping) for one in found):
            return {name: [one.get(name) for one in found] for name in found[0]}
        return found


class Subset:
    """Some items of an evaluator, numbered anew.

    Args:
        evaluate: of all items.
        items: which of them.

    Raises:
        RecipeError: there is no such item.
    """

    def __init__(self, evaluate: Evaluator, items: Sequence[int]) -> None:
        self._evaluate, self._items = evaluate, tuple(known_items(items, len(evaluate)))
        self.objectives = getattr(evaluate, "objectives", SCORE)

    def __len__(self) -> int:
        return len(self._items)

    def __call__(self, model: Any, items: Sequence[int]) -> Any:
        """The scores of these items."""
        return self._evaluate(model, [self._items[i] for i in known_items(items, len(self))])


class Served:
    """Scores by a serving engine that takes new weights: vLLM, SGLang, or a trainer's own.

    For each candidate ``publish`` gets its weights, then ``scores`` asks the engine. What an engine needs around a
    transfer (pause, start, finish, an empty prefix cache) belongs into ``publish``.

    Args:
        publish: takes an iterator of (name, tensor), which it must use up before it returns: the tensors are the live
            weights themselves, and the next candidate overwrites them. Tied weights come once, under their first name.
        scores: called with item numbers; gives their scores in this order.
        count: how many items there are.
    """

    def __init__(
        self,
        publish: Callable[[Iterator[tuple[str, torch.Tensor]]], object],
        scores: Callable[[Sequence[int]], Any],
        count: int,
    ) -> None:
        self._publish, self._scores, self._count = publish, scores, count
        self.objectives = getattr(scores, "objectives", SCORE)

    def __len__(self) -> int:
        return self._count

    def __call__(self, model: Any, items: Sequence[int]) -> Any:
        """Hands the weights over, then asks for the scores.

        Raises:
            RecipeError: ``publish`` did not take all weights: the engine would mix two candidates.
        """
        asked = known_items(items, self._count)
        left = weights(model)
        self._publish(left)
        if missed := [name for name, _ in left]:
            raise RecipeError(f"publish: expected all weights to be taken, {len(missed)} were not, such as {missed[0]}")
        return self._scores(asked)


def weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a module or a state dictionary; memory that several names share comes once."""
    state: Mapping[str, torch.Tensor] = model.state_dict() if hasattr(model, "state_dict") else model
    seen = set()
    for name, tensor in state.items():
        place = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
        if not tensor.numel() or place not in seen:
            seen.add(place)
            yield name, tensor.detach()


def means(evaluate: Any, model: Any) -> dict[str, float]:
    """Mean scores over all items, by objective; the only one of an evaluator without names is called ``score``.

    Args:
        evaluate: an :class:`~fastmerge.search.evaluation.Evaluator`, or a function of a model that gives a number, or
            numbers by objective.
        model: what it is called with.

    Returns:
        The means; minus infinity where an item's score is NaN or not finite.

    Raises:
        RecipeError: there are more or fewer scores than items, no items at all, or a score is no number.
    """
    scored = evaluator(evaluate)
    items = range(len(scored))
    given = scored(model, items)
    names = tuple(given) if isinstance(given, Mapping) else SCORE
    columns = zip(*rows(given, len(items), names), strict=True)
    return {name: mean(0, 0.0, column) for name, column in zip(names, columns, strict=True)}


def score(evaluate: Any, model: Any) -> float:
    """The mean score of an evaluator with one objective.

    Raises:
        RecipeError: there are several objectives; or as in :func:`means`.
    """
    found = means(evaluate, model)
    if len(found) != 1:
        raise RecipeError(f"evaluate: expected one objective, got {', '.join(found) or 'none'}")
    return next(iter(found.values()))


def known_items(items: Iterable[int], count: int) -> list[int]:
    """Item numbers, checked.

    Raises:
        RecipeError: there is no such item.
    """
    out = list(items)
    if wrong := [i for i in out if not 0 <= i < count]:
        raise RecipeError(f"items: expected numbers from 0 to {count - 1}, got {wrong[0]}")
    return out
