"""Where tensors come from, and where results go: files and memory, sources made from others, and results of ops.

A made source has :meth:`Made.fill`, which makes any run of elements from its own sources, so that they nest;
:mod:`fastmerge.ops.made` holds them. Everything they compute is a function of logical element indices alone: any
chunking gives the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeGuard, runtime_checkable

from fastmerge.dtypes import DType
from fastmerge.ops.segments import TILE
from fastmerge.ops.spec import Op, Source, Spec

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


class Range(NamedTuple):
    """Bytes of a shard.

    Attributes:
        shard: position in the layout's ``shards``.
        offset: first byte, absolute in the shard's file.
        nbytes: length in bytes.
    """

    shard: int
    offset: int
    nbytes: int


class Packed(NamedTuple):
    """Where a result goes that is written as codes and scales: the first bytes of both.

    Attributes:
        codes: of the codes.
        scales: of the scales.
    """

    codes: Range
    scales: Range


ALIGN = 64
"""Alignment of every run of input bytes in memory."""

PANEL = 4 * TILE
"""Elements of results that are made at a time: half a megabyte of each bf16 input stays in a core's cache."""

PIECES = 1024
"""Pieces of results, or tensors, that are made at a time at most."""


class Result(NamedTuple):
    """The tensor that an op makes, which no file holds: a stage of a recipe of several documents.

    Attributes:
        op: what makes it; its targets are not written.
        together: all ops whose statistics are taken together, where the grain is ``model``; ``op`` is one of them.
    """

    op: Op
    together: tuple[Op, ...] = ()

    @property
    def dtype(self) -> DType:
        """That to which the op rounds."""
        return self.op.spec.out_dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.op.spec.shape

    @property
    def inputs(self) -> tuple[Source, ...]:
        """Those of the op."""
        return self.op.inputs

    @property
    def workspace(self) -> int:
        """A panel of the op's inputs and of its result, and what those inputs take."""
        spec = self.op.spec
        elements = panel(spec, whole=True) if spec.grain == "matrix" else max(PANEL, panel(spec, whole=False))
        return panel_bytes(spec, elements, PIECES) + max(map(workspace, self.inputs))


def panel(spec: Spec, *, whole: bool) -> int:
    """Elements of a result that are made at a time: tiles, rows where it works by row, or all."""
    if whole:
        return spec.numel
    rows = max(1, PANEL // max(1, spec.row)) * spec.row if spec.grain == "row" else PANEL
    return min(rows, spec.numel)


def panel_bytes(spec: Spec, elements: int, pieces: int = 1) -> int:
    """Memory for pieces of results and of all of their inputs, each at an alignment of its own."""
    sizes = [*(d.size for d in spec.dtypes), spec.out_dtype.size]
    return sum(elements * size + (pieces + 1) * ALIGN for size in sizes)


def kinds_of(ops: Iterable[Op]) -> frozenset[type]:
    """The kinds of source that ops have. There may be tens of thousands, and nearly all plans have files alone."""
    return frozenset(map(type, itertools.chain.from_iterable(map(_INPUTS, ops))))


def inputs_of(source: Source) -> tuple[Source, ...]:
    """The sources that a source is made from in the end; itself where it is simply there."""
    if not _made(source):
        return (source,)
    inputs = source.inputs
    if {*map(type, inputs)} == {FileRange}:  # as nearly all are
        return inputs
    return tuple([i for s in inputs for i in inputs_of(s)])


def results_of(source: Source) -> Iterator[Result]:
    """Every result that a source is, or is made from."""
    if type(source) is Result:
        yield source
    if _made(source):
        for part in source.inputs:
            yield from results_of(part)


def spared(op: Op) -> tuple[int, int]:
    """Bytes fewer than its elements take in the slot that are read, and written, for an op: quantised tensors."""
    made = [s for s in op.inputs if type(s) is not FileRange]
    read = sum([s.dtype.nbytes(op.spec.numel) - getattr(s, "stored", s.dtype.nbytes(op.spec.numel)) for s in made])
    if op.spec.packing is None:
        return read, 0
    return read, op.spec.out_dtype.nbytes(op.spec.numel) - op.spec.stored


def all_spared(ops: Sequence[Op]) -> dict[int, tuple[int, int]]:
    """:func:`spared` of the ops that spare anything, by position."""
    if not kinds_of(ops) - {FileRange, Memory} and not any(spec.packing for spec in {op.spec for op in ops}):
        return {}
    return {o: found for o, op in enumerate(ops) if any(found := spared(op))}


def workspace(source: Source) -> int:
    """Most bytes beside the slot while a source is brought to it."""
    return source.workspace if _made(source) else 0


_INPUTS = attrgetter("inputs")
_KINDS: dict[type, bool] = {FileRange: False, Result: True}


def _made(source: Source) -> TypeGuard[Made | Result]:
    """Whether it has inputs; protocols are slow to ask, so each type is asked once."""
    kind = type(source)
    if kind not in _KINDS:
        _KINDS[kind] = isinstance(source, Made)
    return _KINDS[kind]
