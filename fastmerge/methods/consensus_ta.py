"""Consensus Task Arithmetic: keep what at least k models' TALL masks agree to be theirs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.methods.base import Contract, per_model, shared
from fastmerge.methods.elementwise import Elementwise, deltas, number
from fastmerge.ops.elementwise import Array
from fastmerge.ops.segments import I64

if TYPE_CHECKING:
    from fastmerge.ops.spec import Op, Spec


@dataclass(frozen=True, kw_only=True)
class ConsensusTaskArithmetic(Elementwise):
    r"""Task arithmetic of those elements that are in the masks of at least ``k`` models.

    .. math:: b + \lambda\, \Bigl[\sum_i m_i \ge k\Bigr] \odot d, \quad d = \sum_i w_i d_i, \quad
              m_i = \bigl[\,|w_i d_i| \ge \rho_i\, |d - w_i d_i|\,\bigr], \quad d_i = x_i - b

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: fp32 (fp64 where an input is fp64), sums in model order, one rounding. A NaN is in every mask, so that it
    is not lost. With k = 0 this is task arithmetic; with k = 2, the authors' choice, what one model alone wants
    (selfish) or none (catastrophic) goes.
    Paper: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", arXiv 2405.07813.
    """

    name = "consensus_ta"
    summary = "Task arithmetic of what at least k models agree to need (TALL masks, Consensus TA)."
    formula = "out = b + lambda [sum_i m_i >= k] d, d = sum_i w_i d_i, m_i = |w_i d_i| >= mask_lambda_i |d - w_i d_i|"
    paper = "https://arxiv.org/abs/2405.07813"
    contract = Contract("required")
    cases = (
        {},
        {"weight": [0.8, 0.5], "mask_lambda": [0.2, 0.6], "k": 1, "lambda": 0.7, "models": 2},
        {"k": 3, "mask_lambda": 0.2, "models": 5},
    )

    weight: tuple[float, ...] = per_model("coefficient of the model's task vector", 1.0)
    mask_lambda: tuple[float, ...] = per_model(
        "how much of the rest an element must reach to be in the mask", 0.4, low=0.0
    )
    k: int = shared("least number of masks that an element is in", 2, low=0)
    lam: float = shared("factor of the merged task vector", 1.0, name="lambda")

    def merged(self, op: Op, xs: list[Array], counts: I64) -> Array:
        """The sum, the masks against it, and what enough of them hold."""
        base, d = deltas(xs)
        v = [number(w, x) * x for w, x in zip(self.weight, d, strict=True)]
        mix = v[0]
        for x in v[1:]:
            mix = mix + x
        masks: Any = np.zeros(len(base), np.int32)
        for x, rho in zip(v, self.mask_lambda, strict=True):
            masks += ~(np.abs(x) < number(rho, x) * np.abs(mix - x))  # so that a NaN is in it
        return base + number(self.lam, base) * np.where(masks >= self.k, mix, number(0.0, mix))

    def warn(self, spec: Spec) -> list[str]:
        """Names a k that no element reaches."""
        if self.k > len(self.weight):
            return [f"consensus_ta: k = {self.k} is more than the {len(self.weight)} models: the result is the base"]
        return []
