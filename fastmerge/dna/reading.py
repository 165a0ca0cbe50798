"""Weights that are looked at before anything is planned, a run at a time."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from types import TracebackType
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from fastmerge.checkpoint import Files
from fastmerge.dna.parent import Parent, checkpoints
from fastmerge.ops.made import load
from fastmerge.ops.sources import Bring
from fastmerge.ops.spec import Source
from fastmerge.runtime.stores import OpStore

if TYPE_CHECKING:
    import numpy.typing as npt


class Reader:
    """Reads runs of the sources of some parents.

    Args:
        parents: whose sources; those on disk were opened with their positions among them.

    Attributes:
        bring: brings runs of sources to memory.
    """

    def __init__(self, parents: Sequence[Parent]) -> None:
        self._files = Files(checkpoints(parents))
        self.bring: Bring = OpStore([], self._files).bring

    def __enter__(self) -> Self:
        """Files are opened when they are first read."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes them."""
        self._files.__exit__(kind, error, at)

    def read(self, source: Source, first: int = 0, n: int | None = None) -> npt.NDArray[Any]:
        """A run of a source as fp32 (fp64 stays); all of it, in its shape, where no length is given."""
        if n is None:
            return load(self.bring, source, first, prod(source.shape)).reshape(source.shape)
        return load(self.bring, source, first, n)
