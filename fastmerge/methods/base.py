"""What a merge method declares: parameters, inputs, reference, and the program that runs it.

A method is one small class. It owns its mathematics twice: :meth:`Method.reference`, the definition in
plain torch, and :meth:`Method.program`, which expresses the same mathematics through one of the kernel
families (:mod:`fastmerge.ops`), for a whole batch of tensors at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError
from fastmerge.philox import tensor_key

if TYPE_CHECKING:
    import torch

TILE = 65_536
"""Elements per tile of every ordered sum (design law L2)."""

LANES = 2_048
"""Running sums inside a tile; lane ``j`` adds elements ``j, j + 2048, ...``."""

HEADER = 7
"""Columns of a segment row before its input addresses: out, length, e0, row, key, group, stats."""

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

REQUIRED: Any = object()
"""Default of a parameter that the recipe must give."""


@dataclass(frozen=True, slots=True)
class Param:
    """One declared parameter.

    Attributes:
        name: as recipes write it.
        scope: ``shared`` (one value per output tensor), ``model`` (one per non-base model) or ``input``
            (one per input, the base included where it is an input).
        type: ``float``, ``int``, ``bool`` or a tuple of allowed words.
        default: :data:`REQUIRED`, or the value where the recipe says nothing. A default of None, here or in a
            preset, means that None is a legal value.
        doc: one line for ``fastmerge methods``.
        low, high: inclusive bounds of a number.
    """

    name: str
    scope: Literal["shared", "model", "input"]
    type: type | tuple[str, ...]
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Contract:
    """Which inputs a method takes.

    Attributes:
        base: ``required``, ``optional``, or ``ignored`` (a base is then an ordinary input, as in mergekit).
        least, most: how many non-base models (for ``ignored``: how many inputs); ``most`` None is any number.
    """

    base: Literal["required", "optional", "ignored"]
    least: int = 1
    most: int | None = None


class Group(NamedTuple):
    """One output tensor as a method sees it: names, sizes and resolved parameters, never data.

    Attributes:
        name: output tensor name; with the seed it keys the random numbers.
        shape: common shape of all inputs.
        dtypes: input types, base first where the method has one.
        out_dtype: type of the result.
        params: resolved shared parameters.
        models: resolved ``model`` and ``input`` parameters, one mapping per non-base model, in recipe order;
            for methods that ignore the base, one per input.
        has_base: whether ``dtypes[0]`` is the base.
        indices: position of each non-base model among the recipe's non-base models (random numbers use it).
        seed: of the random numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[DType, ...]
    out_dtype: DType
    params: Mapping[str, Any]
    models: tuple[Mapping[str, Any], ...]
    has_base: bool
    indices: tuple[int, ...]
    seed: int = 0

    @property
    def key(self) -> int:
        """64-bit Philox key of (seed, name)."""
        return tensor_key(self.seed, self.name)

    @property
    def numel(self) -> int:
        """Elements of the tensor; 1 for a 0-d one."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Length of the last dimension; a tensor of fewer than two dimensions is one row."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel

    @property
    def double(self) -> bool:
        """Whether the arithmetic is fp64: exactly when an input is."""
        return any(d.code == 0 for d in self.dtypes)


@dataclass(slots=True)
class Segments:
    """A table of pieces of tensors, the argument of every kernel call.

    ``table`` is int64 ``[S, 7 + M]``, one row per piece; columns: 0 output address (0: none), 1 length in
    elements, 2 e0 (logical index of the first element in the whole tensor), 3 row length, 4 Philox key
    (bits), 5 index of the group, 6 scratch for the family, 7.. one input address per model, base first.
    All rows share the input types, the output type and the number of inputs. A piece starts at a multiple
    of the tile, or of the row for methods that work by row, unless a program asked for it otherwise.
    Kernels add their non-finite outputs to ``nonfinite`` ``[S]``, which is empty where nobody asks; on a GPU it is a
    tensor of the device, so that counting does not wait.
    """

    table: I64
    dtypes: tuple[DType, ...]
    out_dtype: DType
    nonfinite: I64 = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.table)


T = TypeVar("T")


def once_per_kind(make: Callable[[Group], T], groups: Sequence[Group]) -> list[T]:
    """``make(group)`` of each group, called once for those that share their parameters, as the tensors of a plan do.

    Args:
        make: reads ``params``, ``models`` and ``indices`` of a group, and nothing else.
        groups: of one method.
    """
    known: dict[tuple[object, ...], T] = {}
    out = []
    for g in groups:
        key = (id(g.params), g.indices, *map(id, g.models))  # the groups keep them alive
        if key not in known:
            known[key] = make(g)
        out.append(known[key])
    return out


class Program(Protocol):
    """The passes that compute a set of groups: any statistics first, then apply.

    The stream reads data and calls these; it does not know what they compute. ``statistics`` and ``apply``
    run on any worker thread, on any pieces that together cover the groups; ``advance`` runs once per pass,
    on the host, after every piece of the pass has been seen.
    """

    @property
    def ready(self) -> bool:
        """True once :meth:`apply` may be called; False while a statistics pass is due."""

    def settle(self, segments: Segments, native: Any) -> None:
        """Takes whole tensors in host memory, before the first pass, to spare passes; does nothing by default.

        ``native`` are kernels for host memory, whatever those of the program are.
        """
        return

    def pieces(self) -> I64 | None:
        """Plans the due statistics pass; asked once before it.

        Returns:
            What it reads: None for everything, or ``[K, 3]`` (group, e0, length). A piece longer than a tile starts
            at a tile and may be cut further at tiles; shorter ones (samples) start anywhere and stay whole.
        """

    def statistics(self, segments: Segments) -> Any:
        """One piece of the due pass. Pure: returns its partial result."""

    def advance(self, partials: Sequence[Any]) -> None:
        """Ends the pass: combines the partials (in any order of pieces) and decides what comes next."""

    def apply(self, segments: Segments) -> None:
        """Computes the output of the pieces into their output addresses."""


class Method(ABC):
    """A merge method, declared once."""

    name: ClassVar[str]
    summary: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    contract: ClassVar[Contract]
    params: ClassVar[tuple[Param, ...]]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Parameter sets that tests and benches iterate: plain parameters (a sequence gives one value per model),
    and optionally ``preset`` and ``models`` (how many non-base models; the contract decides otherwise)."""

    @classmethod
    @abstractmethod
    def reference(cls, inputs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
        """The definition, in plain torch, of one whole tensor (base first where there is one)."""

    @classmethod
    def reference_all(cls, inputs: Sequence[Sequence[torch.Tensor]], groups: Sequence[Group]) -> list[torch.Tensor]:
        """The definition for many tensors at once; differs from one by one only where the scope is ``model``."""
        return [cls.reference(i, g) for i, g in zip(inputs, groups, strict=True)]

    @classmethod
    @abstractmethod
    def program(cls, groups: Sequence[Group], kernels: Any) -> Program:
        """The same mathematics as passes over pieces of many tensors, on one kernel backend."""

    @classmethod
    def defaults(cls, preset: str | None = None) -> dict[str, Any]:
        """Default of every parameter under a preset (None: ``mergekit``, which is the declared defaults).

        Raises:
            RecipeError: for a preset that the method does not have.
        """
        out = {p.name: p.default for p in cls.params}
        if preset is not None and preset != "mergekit":
            if preset not in cls.presets:
                known = ", ".join(["mergekit", *(p for p in cls.presets if p != "mergekit")])
                raise RecipeError(f"{cls.name}: unknown preset {preset!r}; expected one of {known}")
            out.update(cls.presets[preset])
        return out

    @classmethod
    def scope(cls, group: Group) -> Literal["element", "tensor", "row", "model"]:  # noqa: ARG003  for subclasses
        """What one result depends on: how far the stream may cut the work.

        ``element`` needs no statistics, ``tensor`` and ``model`` gather them over a tensor or all tensors, from
        pieces cut at tiles; ``row`` is ``tensor`` with pieces cut at rows.
        """
        return "element"

    @classmethod
    def check(cls, group: Group) -> list[str]:  # noqa: ARG003  for subclasses
        """Problems of resolved parameters that bounds alone do not catch; empty where there are none."""
        return []

    @classmethod
    def warn(cls, group: Group) -> list[str]:  # noqa: ARG003  for subclasses
        """Questionable parameters (a negative TIES weight, weights that sum to zero): one line each."""
        return []
