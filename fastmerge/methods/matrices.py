"""What methods share that look at the task vectors of a matrix as matrices, and average everything else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fastmerge.errors import OutputError
from fastmerge.methods.base import Method, shared
from fastmerge.ops import matrix as family
from fastmerge.ops.elementwise import Array
from fastmerge.ops.matrix import Matrix, Read

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec

VOCABULARY = 30_000
"""Rows or columns from which on a matrix is taken for an embedding, in a warning."""


def merge(op: Op, read: Read) -> Array:
    """An op's flat result."""
    with np.errstate(all="ignore"):
        return cast("Matrices", op.spec.method).made(op, read)


@dataclass(frozen=True, kw_only=True)
class Matrices(Method):
    """Methods that say what becomes of the task vectors of a matrix.

    Tensors that are no matrices, and those with ``average``, get the mean of their task vectors, as in the papers.
    """

    needs = ("matrix",)

    lam: float = shared("factor of the merged task vector", 1.0, name="lambda")
    average: bool = shared("average task vectors; for embeddings and heads, by filters", default=False)

    @abstractmethod
    def mixed(self, deltas: Sequence[int], delta: Any) -> Matrix:
        """The merged task vector ``[m, n]`` of a matrix.

        Args:
            deltas: their numbers.
            delta: makes the fp64 matrix of one, by its number.
        """

    @abstractmethod
    def held(self, m: int, n: int, models: int) -> int:
        """Bytes that :meth:`mixed` takes for matrices of this shape, its result included."""

    def whole(self, spec: Spec) -> bool:
        """Whether a tensor is looked at as a matrix."""
        return len(spec.shape) == 2 and spec.numel > 0 and not self.average

    def made(self, op: Op, read: Read) -> Array:
        """The base and what is added to it."""
        spec = op.spec
        numbers = range(1, len(spec.dtypes))
        base = read(0)

        def delta(i: int) -> Matrix:
            d = read(i)
            d -= base
            found = d.astype(np.float64).reshape(spec.shape)
            if self.whole(spec) and not np.isfinite(found).all():
                raise OutputError(f"{op.name}: a task vector is not finite: expected inputs without NaN and Inf")
            return found

        if self.whole(spec):
            mix = self.mixed(numbers, delta)
        else:
            mix = np.zeros(spec.shape)
            for i in numbers:
                mix += delta(i)
            mix /= len(numbers)
        mix *= self.lam
        mix += base.reshape(spec.shape)
        return mix.reshape(-1)

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """The whole tensor."""
        return family.reference(op, inputs, merge)

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """The same on host memory, without torch."""
        return family.MatrixProgram(ops, kernels, merge)

    def grain(self, spec: Spec) -> Grain:
        """Never cut."""
        return "matrix"

    def workspace(self, spec: Spec) -> int:
        """The base, a task vector as it is and in fp64, and what the method holds."""
        size = 8 if spec.double else 4
        m, n = spec.shape if self.whole(spec) else (spec.numel, 1)
        held = self.held(m, n, len(spec.models)) if self.whole(spec) else 8 * spec.numel
        return (2 * size + 8) * spec.numel + held

    def warn(self, spec: Spec) -> list[str]:
        """Names what is probably an embedding."""
        if self.whole(spec) and max(spec.shape) >= VOCABULARY:
            shape = " x ".join(map(str, spec.shape))
            how = "average: [{filter: embed, value: true}, {filter: lm_head, value: true}, {value: false}]"
            return [f"{self.name}: a matrix of {shape} looks like an embedding, which the paper averages: {how}"]
        return []
