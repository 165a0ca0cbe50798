"""What makes up for what a slice leaves out: least squares for neurons, principal components for channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"

DAMPING = 1e-4
"""Ridge of the least squares, in units of the mean energy of a kept neuron."""


def refit_down(weight: Array, gram: Array, kept: npt.NDArray[np.int64], *, damping: float = DAMPING) -> Array:
    r"""The ``down_proj`` that gives nearest to what all neurons gave, from those that are kept.

    .. math:: W' = W_K + W_R H_{RK} (H_{KK} + \lambda I)^{-1}

    It is :math:`W H_{:K} H_{KK}^{-1}` with a ridge that draws it to the plain slice: for all neurons it is ``W``.

    Args:
        weight: W, ``[O, I]``.
        gram: H, sum of ``h h^T`` over tokens, ``[I, I]``.
        kept: K, in the order of the result's columns.
        damping: lambda over the mean of the diagonal of ``H_KK``.

    Returns:
        ``[O, K]``, fp64.
    """
    rest = np.setdiff1d(np.arange(len(gram)), kept)
    plain = weight[:, kept].astype(np.float64)
    inner = gram[np.ix_(kept, kept)].astype(np.float64)
    ridge = damping * float(np.trace(inner)) / len(kept)
    if not len(rest) or ridge <= 0:
        return plain
    inner[np.diag_indices_from(inner)] += ridge
    mix = np.linalg.solve(inner, gram[np.ix_(kept, rest)].astype(np.float64))
    fitted: Array = plain + weight[:, rest].astype(np.float64) @ mix.T
    return fitted


@dataclass(frozen=True)
class Rotation:
    """Coordinates of the residual stream, those first along which it varies most.

    Attributes:
        basis: fp64 ``[D, D]`` (or fewer columns), orthonormal columns.
        energy: mean square along each column, by the name of a norm's weight; empty for none.
    """

    basis: Array
    energy: Mapping[str, Array]


def components(covariance: Array) -> Array:
    """Principal components as columns, the largest first; of each the largest entry is positive."""
    _, vectors = np.linalg.eigh(covariance)
    vectors = np.ascontiguousarray(vectors[:, ::-1])
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return vectors
