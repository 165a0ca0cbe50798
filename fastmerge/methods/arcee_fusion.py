"""Arcee Fusion: take over the elements of the other model that matter most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.methods.base import Contract, Method
from fastmerge.methods.exponentials import exp, log
from fastmerge.ops import blocks

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.spec import Op

ROWS = 1 << 20
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

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Importances, their threshold, then what reaches it."""
        import torch

        base, x = blocks.work(inputs, op.spec)
        if not op.spec.numel:
            return blocks.finish(base, op.spec)
        d = x - base
        rows = [v.reshape(op.spec.rows, -1) for v in (x, base)]
        step = max(1, ROWS // max(op.spec.row, 1))
        parts = []
        for start in range(0, op.spec.rows, step):
            p, q = (probabilities(v[start : start + step]) for v in rows)
            parts.append(blocks.ordered_sum(p * torch.from_numpy(log((p / q).numpy()))))
        divergence = torch.cat(parts).to(base.dtype)
        importance = d.abs().reshape(op.spec.rows, -1) * divergence.unsqueeze(1)
        n = op.spec.numel
        ranks = [(n - 1) // 4, (n - 1) // 2, 3 * (n - 1) // 4]
        quarter, half, three = np.partition(importance.reshape(-1).numpy(), ranks)[ranks].tolist()
        threshold = blocks.number(three, d) - blocks.number(quarter, d)
        threshold = blocks.number(half, d) + blocks.number(1.5, d) * threshold
        mask = (importance.reshape(-1) >= threshold).to(d.dtype)
        return blocks.finish(base + d * mask, op.spec)
