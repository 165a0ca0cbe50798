"""What methods share that compute each element from the inputs' values there, by arithmetic that no kernel has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from fastmerge.methods.base import Method
from fastmerge.ops import elementwise as family
from fastmerge.ops.elementwise import Array
from fastmerge.ops.segments import I64

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec


def merge(op: Op, xs: list[Array], counts: I64) -> Array:
    """A block of an op's result."""
    return cast("Elementwise", op.spec.method).merged(op, xs, counts)


def count(op: Op, xs: list[Array]) -> I64:
    """What an op's method counts of a block."""
    return cast("Elementwise", op.spec.method).counted(op, xs)


def number(value: float, like: Array) -> Array:
    """A coefficient, rounded once to the type of ``like``; without dimensions."""
    with np.errstate(over="ignore"):
        return np.asarray(value).astype(like.dtype)


def deltas(xs: Sequence[Array]) -> tuple[Array, list[Array]]:
    """The base and the task vectors."""
    base, *others = xs
    return base, [x - base for x in others]


@dataclass(frozen=True, kw_only=True)
class Elementwise(Method):
    """Methods that say in numpy what becomes of an element; that is their definition and their program."""

    needs = ("elementwise",)

    @abstractmethod
    def merged(self, op: Op, xs: list[Array], counts: I64) -> Array:
        """The result of a block ``[n]`` of each input, base first; in the work type, before the rounding."""

    def counted(self, op: Op, xs: list[Array]) -> I64:
        """Numbers of elements of a block, which add up over the tensor; a method that has its own is asked before."""
        return np.zeros(0, np.int64)

    @classmethod
    def _count(cls) -> family.Count | None:
        return count if cls.counted is not Elementwise.counted else None

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Block by block."""
        return family.reference(op, inputs, merge, self._count())

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """The same on host memory, without torch."""
        return family.ElementwiseProgram(ops, kernels, merge, cls._count())

    def grain(self, spec: Spec) -> Grain:
        """An element; what is counted is counted in the tensor."""
        return "tensor" if self._count() else "element"
