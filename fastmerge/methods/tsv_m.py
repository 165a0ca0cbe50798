"""TSV-M: the largest singular directions of each task vector, turned so that they do not interfere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastmerge.methods.base import Contract
from fastmerge.methods.matrices import Matrices
from fastmerge.ops.matrix import Matrix, largest, polar, workspace


@dataclass(frozen=True, kw_only=True)
class TaskSingularVectors(Matrices):
    r"""Keep the k = r / N largest singular triples of each task vector, and make the vectors of all orthonormal.

    .. math:: b + \lambda\, \hat U \Sigma \hat V^T, \quad \hat U = \operatorname{polar}[U_1 \cdots U_N], \quad
              \hat V = \operatorname{polar}[V_1 \cdots V_N], \quad U_i \Sigma_i V_i^T \approx x_i - b

    Shapes: ``b, x_i: [m, n]`` -> ``[m, n]``, r = min(m, n), k at least 1; of other shapes, and with ``average``,
    ``b + lambda mean(x_i - b)``.
    Numerics: fp64 from the differences (fp32; fp64 for fp64) on, one rounding; the polar factors are orthonormal to
    1e-12. Directions whose singular value is below 1e-6 of the largest are left out. LAPACK's last places differ
    between machines: of all methods this one and iso_c give the same bytes only on the same machine. Inputs that are
    not finite are an error.
    Paper: Gargiulo et al. 2024, "Task Singular Vectors: Reducing Task Interference in Model Merging", arXiv 2412.00081.
    """

    name = "tsv_m"
    summary = "The largest singular directions of each task vector, made orthogonal to each other's."
    formula = "out = b + lambda polar([U_1..U_N]) diag(s) polar([V_1..V_N])^T, r / N triples of each x_i - b"
    paper = "https://arxiv.org/abs/2412.00081"
    contract = Contract("required")
    cases = ({}, {"lambda": 0.6, "models": 2}, {"average": True, "models": 4})

    def mixed(self, deltas: Sequence[int], delta: Any) -> Matrix:
        """Triples of each, vectors of all made orthonormal, and their product."""
        left, right, values = [], [], []
        for i in deltas:
            d: Matrix = delta(i)
            shape, size = d.shape, float(np.abs(d).max())
            d /= size or 1.0  # so that no square leaves the numbers
            u, s, v = largest(d, max(1, min(shape) // len(deltas)))
            left.append(u)
            values.append(s * size)
            right.append(v)
            del d
        u = polar(np.concatenate(left, axis=1))
        del left
        v = polar(np.concatenate(right, axis=1))
        u *= np.concatenate(values)
        return u @ v.T

    def held(self, m: int, n: int, models: int) -> int:
        """The vectors of all, a polar factor's work, and the result."""
        k = models * max(1, min(m, n) // models)
        return 8 * m * n + 16 * (m + n) * k + max(workspace(m, k), workspace(n, k), workspace(m, n))
