"""Karcher mean: the point of the sphere with the least sum of squared angles to all models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmerge.methods import angles
from fastmerge.methods.base import Contract, shared
from fastmerge.methods.span import NOISE, Span, matrices, product, square, total
from fastmerge.ops.segments import F64


def mean_on_sphere(cosines: F64, share: F64, steps: int, tol: float, noise: float) -> F64:
    """Coefficients ``[N, P]`` of the Karcher mean of unit vectors.

    Args:
        cosines: ``[N, N, P]`` their inner products.
        share: ``[N, P]`` their weights: 0, or one over the number of those that count.
        steps: most iterations.
        tol: length of a step at which to stop.
        noise: square of a length below which a sum has no direction.
    """
    first = (np.cumsum(share > 0, axis=0) == 1) & (share > 0)  # of those that count
    length = square(cosines, share)
    lost = length <= max(tol * tol, noise)
    mean = np.where(lost, first, share / np.sqrt(np.where(lost, 1.0, length)))
    going = (share > 0).any(axis=0)
    for _ in range(steps):
        dots = np.clip(product(cosines, mean), -1.0, 1.0)
        theta = angles.acos(dots)
        pulls = (share > 0) & (theta >= tol) & (1 + dots > noise)  # an opposite vector pulls nowhere
        pull = np.where(pulls, share * theta / np.where(pulls, angles.sin(theta), 1.0), 0.0)
        tangent = pull - mean * total(list(pull * dots))
        size = np.sqrt(square(cosines, tangent))
        going = going & (size >= tol) & (size > 0)
        if not going.any():
            break
        safe = np.where(going, size, 1.0)
        moved = angles.cos(safe) * mean + angles.sin(safe) / safe * tangent
        moved = np.where(going, moved / np.sqrt(square(cosines, moved)), mean)
        if np.array_equal(moved, mean):
            break  # and so would every further step
        mean = moved
    return mean


@dataclass(frozen=True, kw_only=True)
class Karcher(Span):
    r"""The mean of directions on the sphere, at the mean length; a base, where one is listed, is an ordinary input.

    .. math:: \frac{1}{N} \sum_i |x_i| \cdot \arg\min_{|m| = 1} \sum_i \angle(m, x_i)^2

    Shapes: ``x_i: [*S]`` -> ``[*S]``; one mean per tensor.
    Numerics: inner products in the ordered sum; the iteration on N x N numbers in fp64, which never looks at the
    weights again; the result in fp32 (fp64 for fp64), one rounding. As in mergekit: inputs no longer than ``tol`` have
    no direction but count in the mean length, and where all are, the result is 0; directions that cancel start from
    the first input. One that is opposite to the mean pulls nowhere, so opposite inputs give the first one's
    direction. Inputs that are not finite, or whose squares overflow, are an error.
    Paper: Karcher 1977, "Riemannian center of mass and mollifier smoothing"; arXiv 2603.04972 for models.
    """

    name = "karcher"
    summary = "Mean of the models' directions on the sphere, at their mean length."
    formula = "out = mean |x_i| argmin_m sum_i angle(m, x_i)^2"
    paper = "https://arxiv.org/abs/2603.04972"
    contract = Contract("ignored")
    cases = (
        {},
        {"models": 2, "max_iter": 50, "tol": 1e-10},
        {"models": 1},
        {"models": 6, "max_iter": 0},
    )

    max_iter: int = shared("most iterations", 10, low=0)
    tol: float = shared("step at which to stop, and shortest length that has a direction", 1e-5, low=0.0)

    def coefficients(self, stats: F64, count: int, *, double: bool) -> F64:
        """Of the mean's direction, times the mean length."""
        gram = matrices(stats, count)
        norms = np.sqrt(np.stack([gram[i, i] for i in range(count)]))
        if count == 1:
            return np.ones((len(stats), 1))
        counts = norms > self.tol
        share = np.where(counts, 1.0 / np.maximum(counts.sum(axis=0), 1), 0.0)
        safe = np.where(counts, norms, 1.0)
        cosines = np.clip(gram / safe[:, None] / safe[None], -1.0, 1.0)
        for i in range(count):
            cosines[i, i] = 1.0
        mean = mean_on_sphere(cosines, share, self.max_iter, self.tol, NOISE[double])
        return np.ascontiguousarray((total(list(norms)) / count * mean / safe).T)
