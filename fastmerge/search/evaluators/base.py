"""The protocol of evaluators, and those that take other people's functions and engines."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import torch

Scores: TypeAlias = "Sequence[float] | Mapping[str, Sequence[float]]"
"""One number for each item, the larger the better; or, by objective, such a sequence."""


@runtime_checkable
class Evaluator(Protocol):
    """Scores a model on numbered items, each by itself: what racing, held-out items and paired comparisons need.

    It may have ``objectives``: the names of several scores.
    """

    def __len__(self) -> int:
        """How many items there are."""

    def __call__(self, model: Any, items: Sequence[int]) -> Scores:
        """The scores of a model.

        Args:
            model: a live module (or whatever else the search renders into); its weights are not changed.
            items: which, numbers from 0; each may appear once.

        Returns:
            The scores, in the order of ``items``.
        """


class Function:
    """An ordinary function as an evaluator.

    Without ``each`` there is one item: the score of ``function(model, data)``, or of ``function(model)`` where there
    are no data and it can be called so. With ``each`` an item is an element of ``data``, and the function is called
    with each.

    Args:
        function: gives a number, the larger the better; or numbers by objective.
        data: what it is called with.
        each: whether the elements of ``data`` are items.

    Raises:
        RecipeError: ``function`` cannot be called so, or ``data`` has no elements.
    """

    def __init__(self, function: Callable[..., Any], data: Any = None, *, each: bool = False) -> None:
        if not callable(function):
            raise RecipeError(f"evaluator: expected a function, got {function!r:.80}")
        if each and (isinstance(data, str | Mapping) or not hasattr(data, "__getitem__") or not len(data)):
            raise RecipeError(f"data: expected a list of items, got {data!r:.80}")
        self._alone = data is None and _binds(function, 1)
        if not self._alone and not _binds(function, 2):
            raise RecipeError(
                f"function: expected one of (model, data){'' if each else ' or (model)'}: {function!r:.80}"
            )
        self._function, self._data, self._each = function, data, each
        self.objectives = getattr(function, "objectives", None)

    def __len__(self) -> int:
        return len(self._data) if self._each else 1

    def __call__(self, model: Any, items: Sequence[int]) -> Scores:
        """Calls the function, once for each item.

        Raises:
            RecipeError: it gave no number, or there is no such item.
        """
        found = [self._one(model, i) for i in known_items(items, len(self))]
        if found and all(isinstance(one, Mapping) for one in found):
            return {str(name): [number(one.get(name)) for one in found] for name in found[0]}
        return [number(one) for one in found]

    def _one(self, model: Any, item: int) -> Any:
        if self._alone:
            return self._function(model)
        return self._function(model, self._data[item] if self._each else self._data)


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
        self.objectives = getattr(evaluate, "objectives", None)

    def __len__(self) -> int:
        return len(self._items)

    def __call__(self, model: Any, items: Sequence[int]) -> Scores:
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
        scores: Callable[[Sequence[int]], Scores],
        count: int,
    ) -> None:
        self._publish, self._scores, self._count = publish, scores, count
        self.objectives = getattr(scores, "objectives", None)

    def __len__(self) -> int:
        return self._count

    def __call__(self, model: Any, items: Sequence[int]) -> Scores:
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
        evaluate: an :class:`Evaluator`, or a function of a model that gives a number or numbers by objective.
        model: what it is called with.

    Returns:
        The exact sums, divided by the number of items; NaN where an item's score is NaN.

    Raises:
        RecipeError: there are more or fewer scores than items, no items at all, or a score is no number.
    """
    wrapped = evaluate if isinstance(evaluate, Evaluator) else Function(evaluate)
    asked = range(len(wrapped))
    if not asked:
        raise RecipeError("evaluate: expected one item or more, got none")
    given = wrapped(model, asked)
    by_name = given if isinstance(given, Mapping) else {"score": given}
    out = {}
    for name, some in by_name.items():
        numbers = [number(s) for s in some]
        if len(numbers) != len(asked):
            raise RecipeError(f"evaluate: expected {len(asked)} scores, one for each item, got {len(numbers)}")
        finite = all(map(math.isfinite, numbers))
        out[str(name)] = (math.fsum(numbers) if finite else sum(numbers)) / len(numbers)
    return out


def score(evaluate: Any, model: Any) -> float:
    """The mean score of an evaluator with one objective; NaN, which compares with nothing, counts as the worst.

    Raises:
        RecipeError: there are several objectives; or as in :func:`means`.
    """
    found = means(evaluate, model)
    if len(found) != 1:
        raise RecipeError(f"evaluate: expected one objective, got {', '.join(found) or 'none'}")
    (value,) = found.values()
    return -math.inf if math.isnan(value) else value


def number(value: Any) -> float:
    """A score as a float.

    Raises:
        RecipeError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise RecipeError(f"evaluator: expected a number, got {value!r:.80}") from None


def known_items(items: Iterable[int], count: int) -> list[int]:
    """Item numbers, checked.

    Raises:
        RecipeError: there is no such item.
    """
    out = list(items)
    if wrong := [i for i in out if not 0 <= i < count]:
        raise RecipeError(f"items: expected numbers from 0 to {count - 1}, got {wrong[0]}")
    return out


def _binds(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except ValueError:  # compiled ones may have no signature
        return True
    except TypeError:
        return False
    return True
