"""Tensors that a caller hands over: whether they are dense torch tensors, and the memory that they take."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.errors import ShapeError

if TYPE_CHECKING:
    import torch


def check(what: str, value: Any) -> None:
    """Whether something is a dense tensor.

    Args:
        what: how the error names it.
        value: anything.

    Raises:
        ShapeError: for anything else.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise ShapeError(f"{what}: expected a torch tensor, got {type(value).__module__}.{type(value).__qualname__}")
    if value.layout != torch.strided:
        raise ShapeError(f"{what}: expected a dense tensor, got one of layout {value.layout}")


def check_inputs(name: str, ids: Sequence[Hashable], values: Sequence[Any]) -> None:
    """The same of all inputs of one tensor, called by their ids; cheap where there is nothing to say."""
    import torch

    for value in values:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            for key, each in zip(ids, values, strict=True):
                check(f"{name or 'tensor'}: input {key!r}", each)


def extent(t: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one behind its last."""
    start = t.data_ptr()
    if not t.numel():
        return start, start
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()


def python_values(value: Any) -> Any:
    """Numbers out of arrays and tensors, as numbers and lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
