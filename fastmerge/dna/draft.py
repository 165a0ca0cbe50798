"""What a request comes to: every tensor of the result, and the operation that makes it. Pure; nothing is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from fastmerge.dna.parent import Parent
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.keys import checked_seed, tensor_key
from fastmerge.methods.base import Method
from fastmerge.methods.passthrough import COPY, Passthrough
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Source, Spec

_ROUND = Passthrough(scale=(None,))

MOST_TENSORS = 1_000_000
"""Tensors of a result, at about 3 kB of plan each; today's largest models have 100,000."""

MOST_COPIES = 1 << 16
"""Layers of a result, and experts of a layer."""

MOST_UNITS = 1 << 20
"""Channels, inner units and heads of a result."""


class Slot(NamedTuple):
    """Where a result goes: a tensor, or a run of one (an expert of a fused tensor).

    Attributes:
        name: of the tensor.
        first: logical index of the first element there.
    """

    name: str
    first: int = 0


class Piece(NamedTuple):
    """An op whose targets have no places yet: one for each of its results."""

    op: Op
    slots: tuple[Slot, ...]


class Tensor(NamedTuple):
    """A tensor of the result."""

    dtype: DType
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What was asked for, as values that YAML can hold.

    Attributes:
        operation: ``upcycle``, ``depth-upscale``, ``grow``, ``slice`` and the like.
        refs: the models it starts from.
        options: by name.
    """

    operation: str
    refs: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def merge_method(self) -> str:
        """The operation."""
        return self.operation

    def to_yaml(self) -> str:
        """As a document; JSON is YAML."""
        return json.dumps({"operation": self.operation, "models": list(self.refs), **self.options}, indent=2) + "\n"

    def canonical(self, identities: Sequence[str], seed: int) -> str:
        """One line, free of paths, that decides the result together with the models' weights."""
        found = {"operation": self.operation, "models": list(identities), "seed": seed, "options": self.options}
        return json.dumps(found, sort_keys=True, separators=(",", ":"))


@dataclass
class Draft:
    """A model to be made.

    Planners fill it: each tensor is named once, with its type and shape, and covered by ops exactly once;
    :meth:`check` holds that.

    Attributes:
        request: what was asked for.
        parents: the models that sources are of.
        config: of the result.
        seed: of all random numbers.
        tensors: those of the result, in the order that they were named.
        pieces: what makes them.
        facts: what the report says beside the request: index maps, scores, what was matched.
        files: further files of the result, by name.
        warnings: what people should know.
    """

    request: Request
    parents: tuple[Parent, ...]
    config: dict[str, Any]
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _specs: dict[object, Spec] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Checks the seed."""
        checked_seed(self.seed)

    def tensor(self, name: str, dtype: DType, shape: Iterable[int]) -> str:
        """Names a tensor of the result that several ops fill."""
        if name in self.tensors:
            raise CheckpointError(f"{name}: made twice")
        if len(self.tensors) == MOST_TENSORS:
            raise RecipeError(f"expected a result of at most {MOST_TENSORS:,} tensors, got more")
        self.tensors[name] = Tensor(dtype, tuple(shape))
        return name

    def copy(self, to: str | Slot, source: Source) -> None:
        """The bytes of a source as they are; a made source goes through memory, unrounded."""
        self.add([to], COPY, [source], source.dtype, source.shape)

    def make(self, to: str | Slot, source: Source, dtype: DType) -> None:
        """A made source, rounded once to a type."""
        self.add([to], _ROUND, [source], dtype, source.shape)

    def add(
        self,
        to: Sequence[str | Slot],
        method: Method,
        inputs: Sequence[Source],
        dtype: DType,
        shape: tuple[int, ...],
        *,
        key: str | None = None,
        has_base: bool = False,
    ) -> None:
        """An op.

        Args:
            to: a target for each of its results; tensors that are not named yet get its type and shape.
            method: what is computed.
            inputs: of shape ``shape`` each, as a rule.
            dtype: of the results.
            shape: of each result.
            key: name that keys random numbers; the first target's where absent.
            has_base: whether input 0 is the base.
        """
        slots = tuple([Slot(t) if isinstance(t, str) else t for t in to])
        for slot, given in zip(slots, to, strict=True):
            if isinstance(given, str):
                self.tensor(slot.name, dtype, shape)
        dtypes = tuple([s.dtype for s in inputs])
        what = (method, shape, dtypes, dtype, has_base, tuple([isinstance(s, Memory) for s in inputs]), len(slots))
        if what not in self._specs:
            self._specs[what] = Spec(method, shape, dtypes, dtype, has_base=has_base)
        spec = self._specs[what]
        seeded = tensor_key(self.seed, key or slots[0].name) if method.random else 0
        self.pieces.append(Piece(Op(key or slots[0].name, spec, seeded, tuple(inputs)), slots))

    def check(self) -> None:
        """Holds that every element of every tensor is made exactly once.

        Raises:
            CheckpointError: naming the tensors that are not.
        """
        runs: dict[str, list[tuple[int, int]]] = {name: [] for name in self.tensors}
        problems = []
        for op, slots in self.pieces:
            for name, first in slots:
                if op.spec.out_dtype is not self.tensors[name].dtype:
                    problems.append(f"{name}: {op.spec.out_dtype.name} into {self.tensors[name].dtype.name}")
                runs[name].append((first, first + op.spec.numel))
        for name, (_, shape) in self.tensors.items():
            at = 0
            for first, end in sorted(runs[name]):
                if first != at:
                    problems.append(f"{name}: element {min(first, at)} is made {'twice' if first < at else 'never'}")
                    break
                at = end
            else:
                if at != prod(shape):
                    problems.append(f"{name}: {at} of {prod(shape)} elements are made")
        if problems:
            raise CheckpointError(problems)
