"""Where tensors come from, and where results go: files and memory, and sources that are made from others.

A made source has :meth:`Made.fill`, which makes any run of elements from its own sources, so that they nest;
:mod:`fastmerge.ops.made` holds them. Everything they compute is a function of logical element indices alone: any
chunking gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from fastmerge.dtypes import DType
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastmerge.checkpoint import TensorInfo

Bring = Callable[[Source, "npt.NDArray[np.int64]"], None]
"""Brings runs of a source to memory: rows (first element, elements, address)."""


class FileRange(NamedTuple):
    """The bytes of one tensor of a checkpoint.

    Attributes:
        info: where in which file of the model.
        model: position of the model among the plan's checkpoints.
    """

    info: TensorInfo
    model: int

    @property
    def dtype(self) -> DType:
        """Of its elements."""
        return self.info.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.info.shape


class Memory(NamedTuple):
    """A contiguous tensor that a caller owns and keeps alive: a source, or a target."""

    address: int
    dtype: DType
    shape: tuple[int, ...]


@runtime_checkable
class Made(Protocol):
    """A source whose elements are computed into the slot."""

    @property
    def dtype(self) -> DType: ...  # noqa: D102  of its elements

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102  of the tensor

    @property
    def inputs(self) -> tuple[Source, ...]: ...  # noqa: D102  what it is made from

    @property
    def workspace(self) -> int: ...  # noqa: D102  most bytes that it takes beside the slot while it is made

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Makes elements ``e0 .. e0 + n`` at an address."""


def inputs_of(source: Source) -> tuple[Source, ...]:
    """The sources that a source is made from in the end; itself where it is simply there."""
    if type(source) is FileRange or not isinstance(source, Made):
        return (source,)
    return tuple(i for s in source.inputs for i in inputs_of(s))


def workspace(source: Source) -> int:
    """Most bytes beside the slot while a source is brought to it."""
    return source.workspace if isinstance(source, Made) else 0
