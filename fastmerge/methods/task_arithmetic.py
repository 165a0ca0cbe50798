"""Task vectors: add, scale, negate, and combine them as analogies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastmerge.methods.base import Contract, Group, Param, Program, once_per_kind
from fastmerge.ops import blocks as reference
from fastmerge.ops.combine import CombineProgram
from fastmerge.ops.consensus import rules as consensus

if TYPE_CHECKING:
    import torch


class TaskArithmetic(consensus.ConsensusMethod):
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
    params = (
        *consensus.delta_params("coefficient of the model's delta; null is 1/N"),
        Param("normalize", "shared", bool, False, "divide by the sum of the weights"),
        Param("density", "model", float, 1.0, "accepted and ignored, as in mergekit", 0.0, 1.0),
        Param("rescale", "shared", bool, False, "accepted and ignored, as in mergekit"),
    )
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

    @classmethod
    def reference(cls, inputs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
        """``b + lambda (sum w_i (x_i - b)) / div``."""
        if group.params["delta_dtype"] == "base":
            return super().reference(inputs, group)
        spec = cls.spec(group)
        return reference.delta(inputs, group, spec.weight, spec.lam, spec.div)

    @classmethod
    def program(cls, groups: Sequence[Group], kernels: Any) -> Program:
        """One pass of the combine kernel, or of the consensus kernel where deltas are rounded."""
        if any(g.params["delta_dtype"] == "base" for g in groups):
            return super().program(groups, kernels)
        specs = once_per_kind(cls.spec, groups)
        coef = np.array([(0.0, *s.weight) for s in specs])
        scale = np.array([(s.lam, s.div) for s in specs])
        return CombineProgram(kernels, coef, scale, delta=True)

    @classmethod
    def warn(cls, group: Group) -> list[str]:
        """Names parameters that have no effect, and weights that cancel."""
        found = []
        if any(m["density"] < 1 for m in group.models):
            found.append("task_arithmetic: density has no effect; use ties or dare_linear")
        if group.params["normalize"] and abs(sum(consensus.weights(group))) < 1e-8:
            found.append("task_arithmetic: weights sum to zero, so normalize is left out")
        return found
