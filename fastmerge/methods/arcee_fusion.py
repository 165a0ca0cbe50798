"""Arcee Fusion: take over the elements of the other model that matter most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.methods.base import Contract, Method
from fastmerge.methods.exponentials import exp, log
from fastmerge.ops import blocks
from fastmerge.ops.fusion import FusionProgram

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec

ROWS = 1 << 18
"""Elements whose probabilities are held at a time; a row is the least."""

ABSENT = 1e-8
"""Added to probabilities (mergekit's constant)."""


def probabilities(x: torch.Tensor) -> torch.Tensor:
    """Softmax of rows ``[P, n]`` in fp64, plus :data:`ABSENT`."""
    import torch

    wide = x.double()
    powers = torch.from_numpy(exp((wide - wide.max(dim=1, keepdim=True).values).numpy()))
    return powers / blocks.ordered_sum(powers).unsqueeze(1) + ABSENT


@dataclass(frozen=True, kw_only=True)
class ArceeFusion(Method):
    r"""The base, with those elements of the other model whose importance is an outlier.

    .. math:: b + m \odot (x - b), \quad m = \bigl[I \ge q_{1/2} + 1.5\,(q_{3/4} - q_{1/4})\bigr], \quad
              I = |x - b| \cdot \operatorname{KL}(\operatorname{softmax} x \,\|\, \operatorname{softmax} b)

    Shapes: ``b, x: [*S]`` -> ``[*S]``; the divergence per row of the last dimension, quantiles per tensor.
    Numerics: divergences in fp64 from +, -, *, / alone, so that they are the same everywhere; the rest in fp32 (fp64
    for fp64). Quantile q is the element ``floor(q (n - 1))`` of the sorted importances, of all of them (mergekit
    samples 1,000,000 of a larger tensor at random). The result has the type of the others (mergekit: fp32). Equal
    models, and tensors of one number, have importances of 0 alone: then everything is taken over.
    Paper: none; Arcee AI.
    """

    name = "arcee_fusion"
    summary = "The base, with the other model's elements of outstanding importance."
    formula = "out = b + d where |d| KL(softmax x || softmax b) >= median + 1.5 IQR of it, else b"
    paper = "https://arcee.ai"
    contract = Contract("required", least=1, most=1)
    needs = ("importance",)
    coded = True

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Whole tensors, one after the other."""
        return FusionProgram(ops, kernels)

    def grain(self, spec: Spec) -> Grain:
        """Quantiles look at the whole tensor."""
        return "matrix"

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Importances, their threshold, then what reaches it."""
        import torch

        spec = op.spec
        if not spec.numel:
            return blocks.finish(inputs[0].reshape(-1), spec)
        importance = self.importance(inputs, spec)
        n = spec.numel
        ranks = [(n - 1) // 4, (n - 1) // 2, 3 * (n - 1) // 4]
        quarter, half, three = torch.from_numpy(np.partition(importance.numpy(), ranks)[ranks])
        threshold = half + 1.5 * (three - quarter)

        def fused(where: slice, some: list[torch.Tensor]) -> torch.Tensor:
            base, x = some
            return base + (x - base) * (importance[where] >= threshold)

        return blocks.in_pieces(inputs, spec, fused)

    def workspace(self, spec: Spec) -> int:
        """The importances, divergences, and a row of either input in fp64."""
        return (8 if spec.double else 4) * spec.numel + 8 * spec.rows + 16 * (spec.row + 8)

    def defined(self, spec: Spec) -> int:
        """The importances, a copy of them in another order, the result, and a row in fp64 a dozen times."""
        size = 8 if spec.double else 4
        return (2 * size + 1 + spec.out_dtype.size) * spec.numel + 100 * min(spec.numel, max(ROWS, spec.row))

    def importance(self, inputs: Sequence[torch.Tensor], spec: Spec) -> torch.Tensor:
        """Of every element, flat."""
        import torch

        found = torch.empty(spec.numel, dtype=torch.float64 if spec.double else torch.float32)
        step = max(1, ROWS // spec.row) * spec.row
        flat = [x.detach().reshape(-1) for x in inputs]
        for first in range(0, spec.numel, step):
            base, x = (v.reshape(-1, spec.row) for v in blocks.work([v[first : first + step] for v in flat], spec))
            p, q = probabilities(x), probabilities(base)
            divergence = blocks.ordered_sum(p * torch.from_numpy(log((p / q).numpy()))).to(x.dtype)
            found[first : first + step] = ((x - base).abs() * divergence.unsqueeze(1)).reshape(-1)
        return found
