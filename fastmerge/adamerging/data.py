"""Batches: read without end, moved to the module's device, and as arguments of its call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from fastmerge.errors import RecipeError


class Feed:
    """The batches of some data, without end."""

    def __init__(self, who: str, data: Iterable[Any]) -> None:
        """Takes the data; ``who`` is what errors call them."""
        self._who = who
        self._data = data
        self._batches: Iterator[Any] | None = None

    def next(self) -> Any:
        """The next batch, from the start again after the last one.

        Raises:
            RecipeError: where there is none.
        """
        for _ in range(2):
            if self._batches is None:
                self._batches = iter(self._data)
            for batch in self._batches:
                return batch
            self._batches = None
        raise RecipeError(f"{self._who}: no batch: expected data that can be iterated again and again")


def read_once(who: str, data: Any) -> list[str]:
    """A problem where data cannot be read again from the start."""
    if not isinstance(data, Iterable):
        return [f"{who}: expected batches, got {type(data).__name__}"]
    again = iter(data) is not data
    return [] if again else [f"{who}: data that can be read once; expected a list, a DataLoader or the like"]


def moved(batch: Any, home: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(home)
    if isinstance(batch, Mapping):
        return {name: moved(value, home) for name, value in batch.items()}
    return [moved(value, home) for value in batch] if isinstance(batch, tuple | list) else batch


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a module is called on a batch: labels are kept apart."""
    if isinstance(batch, Mapping):
        return (), {name: value for name, value in batch.items() if name != "labels"}
    return (batch[0] if isinstance(batch, tuple | list) else batch,), {}
