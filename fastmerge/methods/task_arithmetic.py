"""Task vectors: add, scale, negate, and combine them as analogies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fastmerge.methods.base import Contract, per_model, shared
from fastmerge.methods.deltas import TaskVectors, rules_of
from fastmerge.ops.combine import CombineProgram

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.consensus.rules import Consensus
    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Op, Spec


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(TaskVectors):
    r"""Adds weighted deltas to the base: weights of -1 forget, (1, 1, -1) is an analogy.

    .. math:: b + \lambda\,\frac{\sum_i w_i (x_i - b)}{\sum_i w_i} \quad\text{(without normalize: no division)}

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: deltas and sums in fp32 (fp64 where an input is fp64) in model order, one rounding;
    ``delta_dtype: base`` rounds each delta to the base's type first.
    Paper: Ilharco et al. 2022, "Editing models with task arithmetic", arXiv 2212.04089.
    """

    name = "task_arithmetic"
    summary = "Adds, scales or subtracts what fine-tunes learned relative to the base."
    formula = "out = b + lambda sum_i w_i (x_i - b), divided by sum_i w_i where normalize is set"
    paper = "https://arxiv.org/abs/2212.04089"
    contract = Contract("required")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {"weight": 1.0},
        "fusionbench": {"weight": 1.0, "lambda": 0.3},
    }
    cases = (
        {"weight": [0.6, 0.8, 0.5]},
        {"weight": -1.0, "models": 1},
        {"weight": [1.0, 1.0, -1.0]},
        {"weight": [0.7, 0.6], "normalize": True, "lambda": 0.4, "models": 2},
        {"weight": [0.7, 0.6], "normalize": True, "delta_dtype": "base", "models": 2},
        {"preset": "fusionbench", "models": 5},
    )

    normalize: bool = shared("divide by the sum of the weights", default=False)
    density: tuple[float, ...] = per_model("accepted and ignored, as in mergekit", 1.0, low=0.0, high=1.0)
    rescale: bool = shared("accepted and ignored, as in mergekit", default=False)

    def rules(self, spec: Spec) -> Consensus:
        """The parameters as the kernels take them; mergekit's operations, whose roundings are these as well."""
        return super().rules(spec)._replace(div=self.divisor(normalize=self.normalize), wide_sums=False)

    @property
    def random(self) -> bool:
        """Nothing is drawn."""
        return False

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """``b + lambda (sum w_i (x_i - b)) / div``."""
        from fastmerge.ops import blocks

        if self.delta_dtype == "base":
            return super().reference(inputs, op)
        rules = rules_of(op.spec)
        return blocks.delta(inputs, op.spec, rules.weight, rules.lam, rules.div)

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """One pass of the combine kernel, or of the consensus kernel where task vectors are rounded."""
        from fastmerge.ops.per_spec import PerSpec

        if any(
            cast("TaskArithmetic", m).delta_dtype == "base"
            for m in {id(op.spec): op.spec.method for op in ops}.values()
        ):
            return super().program(ops, kernels)
        rules = PerSpec(rules_of, ops)
        coef, scale = rules.rows(lambda r: (0.0, *r.weight)), rules.rows(lambda r: (r.lam, r.div))
        return CombineProgram(kernels, coef, scale, delta=True)

    def warn(self, spec: Spec) -> list[str]:
        """Names parameters that have no effect, and weights that cancel."""
        found = self.cancelled(normalize=self.normalize)
        if any(d < 1 for d in self.density):
            found.append("task_arithmetic: density has no effect; use ties or dare_linear")
        return found
