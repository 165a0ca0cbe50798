"""Iso-C: the sum of task vectors with a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmerge.methods.base import Contract
from fastmerge.methods.matrices import Matrices
from fastmerge.ops.matrix import Matrix, polar, workspace


@dataclass(frozen=True, kw_only=True)
class IsoC(Matrices):
    r"""Add up the task vectors of a matrix, and make all singular values of the sum their mean.

    .. math:: b + \lambda\,\bar\sigma\, U V^T, \quad U \Sigma V^T = \sum_i (x_i - b), \quad
              \bar\sigma = \frac1r \operatorname{tr} \Sigma

    Shapes: ``b, x_i: [m, n]`` -> ``[m, n]``, r = min(m, n); of other shapes, and with ``average``,
    ``b + lambda mean(x_i - b)``.
    Numerics: fp64 from the differences (fp32; fp64 for fp64) on, one rounding; U V^T is the polar factor, orthonormal
    to 1e-12, and the mean is its product with the sum. Directions whose singular value is below 1e-6 of the largest
    stay 0 (an SVD makes up vectors for them). LAPACK's last places differ between machines: of all methods this one and
    tsv_m give the same bytes only on the same machine. Inputs that are not finite are an error.
    Paper: Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging", arXiv 2502.04959.
    """

    name = "iso_c"
    summary = "The sum of task vectors, all its singular values made equal to their mean."
    formula = "out = b + lambda mean(s) U V^T, U diag(s) V^T = sum_i (x_i - b)"
    paper = "https://arxiv.org/abs/2502.04959"
    contract = Contract("required")
    cases = ({}, {"lambda": 0.6, "models": 2}, {"average": True})

    def mixed(self, deltas: Sequence[int], delta: Any) -> Matrix:
        """The polar factor of the sum, times the mean."""
        total: Matrix = delta(deltas[0])
        for i in deltas[1:]:
            total += delta(i)
        size = np.abs(total).max()  # so that no square leaves the numbers
        if size == 0:
            return total
        total /= size
        factor = polar(total)
        factor *= size * float(np.vdot(factor, total)) / min(total.shape)
        return factor

    def held(self, m: int, n: int, models: int) -> int:
        """The sum, and the polar factor's work."""
        return 8 * m * n + workspace(m, n)
