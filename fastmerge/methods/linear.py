"""Weighted averages of whole models, and uniform soups."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fastmerge.methods.base import Contract, Method, per_input, shared
from fastmerge.ops.combine import CombineProgram, weights_in_range

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Op, Spec


def _sum(weights: Sequence[float]) -> float:
    total = 0.0
    for w in weights:
        total += w
    return total


def _tables(spec: Spec) -> tuple[tuple[float, ...], float]:
    """Coefficients and divisor, as the work type holds them."""
    return weights_in_range(*cast("Average", spec.method).table(spec), double=spec.double)


@dataclass(frozen=True, kw_only=True)
class Average(Method):
    """Methods that say which coefficients and divisor a weighted sum of the inputs has; the rest follows."""

    wide = True
    coded = True

    @abstractmethod
    def table(self, spec: Spec) -> tuple[Sequence[float], float]:
        """One coefficient per input, and what their sum is divided by."""

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """``(sum c_i x_i) / div``."""
        from fastmerge.ops import blocks

        return blocks.combined(inputs, op.spec, *_tables(op.spec))

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """One pass of the combine kernel."""
        from fastmerge.ops.per_spec import PerSpec

        tables = PerSpec(_tables, ops)
        coef, scale = tables.rows(lambda t: t[0]), tables.rows(lambda t: (1.0, t[1]))
        return CombineProgram(kernels, coef, scale, delta=False, wide=ops[0].spec.double)


@dataclass(frozen=True, kw_only=True)
class Linear(Average):
    r"""Weighted average of any number of models; the base, where one is listed, is an ordinary input.

    .. math:: \frac{\sum_i w_i x_i}{\sum_i w_i} \quad\text{(without normalize: } \textstyle\sum_i w_i x_i)

    Shapes: ``x_i: [*S]`` -> ``[*S]``.
    Numerics: fp32 (fp64 where an input is fp64 or the result fp32) in input order, one division, one rounding. The
    weights are summed in fp64; where the type could not hold them, a power of two takes weights and sum into its range.
    Paper: Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
    """

    name = "linear"
    summary = "Weighted average of models; with equal weights, a uniform soup."
    formula = "out = sum_i w_i x_i / sum_i w_i"
    paper = "https://arxiv.org/abs/2203.05482"
    contract = Contract("ignored")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mergekit": {}, "soup": {"weight": 1.0}}
    cases = (
        {"weight": [0.6, 0.3, 0.9]},
        {"weight": [1.5, -0.5], "normalize": False, "models": 2},
        {"weight": 1.0, "models": 1},
        {"weight": 0.25, "models": 7},
        {"preset": "soup", "models": 4},
    )

    weight: tuple[float, ...] = per_input("coefficient of the model")
    normalize: bool = shared("divide by the sum of the weights", default=True)

    @property
    def divisor(self) -> float:
        """Sum of the weights where they are normalised, else 1."""
        return _sum(self.weight) if self.normalize else 1.0

    def table(self, spec: Spec) -> tuple[Sequence[float], float]:
        """The weights and their sum."""
        return self.weight, self.divisor

    def check(self, spec: Spec) -> list[str]:
        """Refuses weights that cancel where they are divided by."""
        if self.normalize and abs(self.divisor) <= 1e-12 * _sum([abs(w) for w in self.weight]):
            shown = f"linear: weights {list(self.weight)} sum to zero with normalize: true"
            return [f"{shown}; every element would be inf or NaN"]
        return []

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that nearly cancel."""
        if self.normalize and abs(self.divisor) < 1e-2 * _sum([abs(w) for w in self.weight]):
            return [
                f"linear: weights {list(self.weight)} nearly cancel; normalize: true multiplies by {1 / self.divisor:g}"
            ]
        return []
