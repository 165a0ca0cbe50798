"""What a plan is made of: operations over sources. Plain values, no data and no open files.

An :class:`Op` computes one tensor (or several copies of it) from its sources. All ops that are alike but for their
names and places share one :class:`Spec`, so that what is decided per kind of tensor is decided once: a model of
18,867 tensors has a few dozen specs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from fastmerge.dtypes import F32, DType

if TYPE_CHECKING:
    from fastmerge.methods.base import Method
    from fastmerge.ops.packing import Packing

Grain = Literal["copy", "element", "row", "tensor", "matrix", "model"]
"""What one result depends on, and so how far the stream may cut the work.

``copy``: bytes, in the kernel of the operating system. ``element``: no statistics. ``tensor``: statistics of a tensor,
from pieces cut at tiles. ``row``: the same with pieces cut at rows. ``matrix``: the tensor as a whole, never cut.
``model``: statistics of all tensors together.
"""


class Source(Protocol):
    """Where a tensor comes from: see :mod:`fastmerge.ops.sources` for the kinds there are."""

    @property
    def dtype(self) -> DType: ...  # noqa: D102  of its elements

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102  of the tensor


class Target(Protocol):
    """Where a result goes: a place in a shard, or memory; see :mod:`fastmerge.ops.sources`."""


class Spec:
    """What all tensors of one kind have in common; compared by identity.

    Ops of one spec also have the same inputs and targets in memory, as opposed to the slot of a unit.

    Attributes:
        method: what is computed, with its parameters.
        shape: of the result.
        dtypes: of the inputs, base first where there is one.
        out_dtype: of the result.
        has_base: whether input 0 is the base.
        models: position of each other input among the recipe's non-base models (random numbers use it).
        numel: elements of the result; 1 for a 0-d one.
        row: length of the last dimension; a tensor of fewer than two dimensions is one row.
        dense: whether the result is fp32 as it is, and not as codes, which would show nothing of further digits.
        double: whether the arithmetic is fp64: where an input is, and for dense results where methods ask for it.
        grain: how far the work may be cut.
        packing: how results are written that are stored as codes and scales; ``out_dtype`` is fp32 then.
        batch: equal for tensors of one kernel call: method, types, inputs, every parameter that is no number, and
            whether the definition stands in for kernels.
    """

    __slots__ = (
        *("batch", "dense", "double", "dtypes", "grain", "has_base", "method"),
        *("models", "numel", "out_dtype", "packing", "row", "shape", "workspace"),
    )

    def __init__(
        self,
        method: Method,
        shape: tuple[int, ...],
        dtypes: tuple[DType, ...],
        out_dtype: DType,
        *,
        has_base: bool = False,
        models: tuple[int, ...] | None = None,
        packing: Packing | None = None,
    ) -> None:
        """Derives the rest; ``models`` None counts from 0."""
        self.method = method
        self.shape = shape
        self.dtypes = dtypes
        self.out_dtype = out_dtype
        self.has_base = has_base
        self.models = tuple(range(len(dtypes) - has_base)) if models is None else models
        self.packing = packing
        self.numel = math.prod(shape)
        self.row = shape[-1] if len(shape) > 1 else self.numel
        self.dense = out_dtype is F32 and packing is None
        self.double = (method.wide and self.dense) or any(d.code == 0 for d in dtypes)
        self.grain: Grain = method.grain(self)
        self.workspace: int = method.workspace(self)
        what = type(method), method.gap(), method.wants(), method.words
        self.batch: tuple[object, ...] = (*what, dtypes, out_dtype, self.dense, has_base, self.models)

    @property
    def cut(self) -> int:
        """Elements at whose multiples the stream may cut, whatever the grain is."""
        return self.packing.cut if self.packing is not None else 1

    @property
    def stored(self) -> int:
        """Bytes of a result where it is kept."""
        return self.packing.nbytes if self.packing is not None else self.out_dtype.nbytes(self.numel)

    @property
    def rows(self) -> int:
        """Rows of the last dimension; an empty tensor has none."""
        return self.numel // self.row if self.numel else 0


class Op(NamedTuple):
    """One operation: sources in, targets out.

    Attributes:
        name: of the result; errors use it, and whole-model ranks count by it.
        spec: what is computed.
        key: 64-bit Philox key of (seed, name); 0 where the method draws no random numbers.
        inputs: base first; of a copy the first is copied, and any others must hold the same bytes.
        targets: where the result goes; more than one where a method makes several (expert replication).
    """

    name: str
    spec: Spec
    key: int = 0
    inputs: tuple[Source, ...] = ()
    targets: tuple[Target, ...] = ()
