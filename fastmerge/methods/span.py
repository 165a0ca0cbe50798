"""What methods share whose result is a combination of its inputs by coefficients that follow from inner products.

One pass of inner products, the method's mathematics on them in fp64, one pass of the weighted sum: however often a
method iterates, it never looks at the weights again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from fastmerge.errors import OutputError
from fastmerge.methods.base import Method
from fastmerge.ops import blocks
from fastmerge.ops.gram import GramProgram, check_sums, place
from fastmerge.ops.per_spec import PerSpec
from fastmerge.ops.segments import F64, TILE
from fastmerge.ops.split import by_kind

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec

NOISE = {False: 1e-6, True: 1e-14}
"""Squares of lengths below this share of what went into them are rounding, by whether the sums are fp64."""


def total(terms: Sequence[F64]) -> F64:
    """A sum in this order, which numpy's own is not: its order depends on the shape."""
    out = terms[0]
    for term in terms[1:]:
        out = out + term
    return out


def product(gram: F64, c: F64) -> F64:
    """Inner products ``[N, P]`` of vectors with their combination by ``c`` ``[N, P]``."""
    return total([gram[:, j] * c[j] for j in range(len(c))])


def square(gram: F64, c: F64) -> F64:
    """Squared length ``[P]`` of a combination; never negative."""
    return np.maximum(total([c[i] * row for i, row in enumerate(product(gram, c))]), 0.0)


def matrices(stats: F64, count: int) -> F64:
    """``[N, N, P]`` of inner products ``[P, C]``, pairs (0,0), (0,1), .., (1,1), ..."""
    out = np.empty((count, count, len(stats)))
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    for column, (i, j) in enumerate(pairs):
        out[i, j] = out[j, i] = stats[:, column]
    return out


@dataclass(frozen=True, kw_only=True)
class Span(Method):
    """Methods that say which coefficients follow from inner products; the rest follows.

    With a base, the vectors are the task vectors, and their combination is added to it.
    """

    coded = True

    difference: ClassVar[bool] = False
    """Whether the squared difference of the first two vectors is wanted as well."""
    undefined: ClassVar[str] = ""
    """Why a tensor may have no coefficients."""

    @property
    def per_row(self) -> bool:
        """Whether a vector is a row of the last dimension and not the whole tensor."""
        return False

    @abstractmethod
    def coefficients(self, stats: F64, count: int, *, double: bool) -> F64:
        """Coefficients ``[P, N]`` from inner products ``[P, C]``; NaN where there are none."""

    @classmethod
    def solve(cls, ops: Sequence[Op], stats: F64, rows: Sequence[int]) -> tuple[F64, F64]:
        """Coefficients ``[P, M]`` and scales ``[P, 2]`` for all vectors of all tensors, in order."""
        check_sums(ops, stats, rows)
        spec = ops[0].spec
        based, count = spec.has_base, len(spec.dtypes) - spec.has_base
        coef = np.zeros((len(stats), based + count))
        methods = PerSpec(lambda spec: cast("Span", spec.method), ops)
        owner = np.repeat(methods.index, rows)
        with np.errstate(all="ignore"):
            for i, method in enumerate(methods.each):
                some = owner == i
                if some.any():
                    coef[some, based:] = method.coefficients(stats[some], count, double=spec.double)
        bad = np.isnan(coef).any(axis=1)
        if bad.any():
            raise OutputError(f"{place(ops, int(np.argmax(bad)), rows)[1]}: {cls.undefined}")
        return coef, np.ones((len(stats), 2))

    def vectors(self, x: torch.Tensor, spec: Spec) -> torch.Tensor:
        """A tensor as vectors ``[P, n]``; of one that is contiguous, a view."""
        return x.reshape(spec.rows if self.per_row else 1, -1)

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Inner products, coefficients, the weighted sum; a tile of vectors, or one, at a time."""
        import torch

        spec, based = op.spec, int(op.spec.has_base)
        out = torch.empty(spec.shape, dtype=blocks.torch_dtype(spec.out_dtype))
        if not spec.numel:
            return out
        into, views = self.vectors(out, spec), [self.vectors(x.detach(), spec) for x in inputs]
        count, length = into.shape
        step = max(1, TILE // length)
        parts = [slice(first, first + step) for first in range(0, count, step)]

        def some(part: slice) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
            flat = blocks.work([v[part] for v in views], spec)
            xs = [x.reshape(-1, length) for x in flat]
            return (xs[0], [x - xs[0] for x in xs[1:]]) if based else (None, xs)

        stats = np.concatenate([blocks.gram(some(part)[1], diff=self.difference) for part in parts])
        coef, _ = self.solve([op], stats, [count])
        for part in parts:
            base, xs = some(part)
            total = blocks.column(coef[part, based], xs[0]) * xs[0]
            for i, x in enumerate(xs[1:], based + 1):
                total = total + blocks.column(coef[part, i], x) * x
            into[part] = blocks.round_to(total if base is None else base + total, out.dtype)
        return out

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Gram, solve, combine."""
        kinds = PerSpec(lambda spec: cast("Span", spec.method).per_row, ops).all()
        based = ops[0].spec.has_base

        def build(some: list[int]) -> Program:
            per_row: Any = kinds[some[0]]
            mine = [ops[i] for i in some]
            return GramProgram(kernels, mine, cls.solve, per_row=per_row, delta=based, diff=cls.difference)

        return by_kind(kinds, build)

    def grain(self, spec: Spec) -> Grain:
        """Coefficients of a tensor, or of each row."""
        return "matrix" if self.gap() else "row" if self.per_row else "tensor"
