"""Mean direction: where the fine-tunes go on average, as far as they go on average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastmerge.methods.base import Contract, shared
from fastmerge.methods.span import NOISE, Span, matrices, square, total
from fastmerge.ops.segments import F64


@dataclass(frozen=True, kw_only=True)
class MeanDirection(Span):
    r"""The base, moved along the mean direction of the task vectors by their mean length, or by ``alpha``.

    .. math:: b + \alpha\,\frac{m}{|m|}, \quad m = \sum_i \frac{d_i}{|d_i|}, \quad
              \alpha = \frac1N \sum_i |d_i|, \quad d_i = x_i - b

    Some programs call this Model Stock; it is not (it moves further, whatever the angle), see ``model_stock``.

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``; one direction per tensor.
    Numerics: inner products in the ordered sum, coefficients in fp64, the result in fp32 (fp64 for fp64), one rounding.
    A task vector of 0 has no direction but counts in the mean length; where all are 0 the result is the base.
    Directions that cancel, to a thousandth (fp64: 1e-7), are an error, and so are inputs that are not finite.
    Paper: directional statistics (Mardia 1972); with the mean length it is ``multislerp`` of equal weights.
    """

    name = "mean_direction"
    summary = "The base, moved along the mean direction of the task vectors by their mean length."
    formula = "out = b + alpha m / |m|, m = sum_i d_i / |d_i|, alpha = mean |d_i|"
    paper = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    contract = Contract("required")
    undefined: ClassVar[str] = "the directions of its task vectors cancel, so their mean has no direction"
    cases = ({}, {"alpha": 0.3, "models": 2}, {"models": 1})

    alpha: float | None = shared("how far to go; null is the mean length of the task vectors", None)

    def coefficients(self, stats: F64, count: int, *, double: bool) -> F64:
        """Of the mean direction, times alpha."""
        gram = matrices(stats, count)
        norms = np.sqrt(np.stack([gram[i, i] for i in range(count)]))
        units = np.where(norms == 0, 0.0, 1.0 / np.where(norms == 0, 1.0, norms))
        length = square(gram, units)
        lost = length <= NOISE[double] * count * count
        size = total(list(norms)) / count if self.alpha is None else np.full(len(stats), self.alpha)
        found = units * (size / np.sqrt(np.where(lost, 1.0, length)))
        still = (norms == 0).all(axis=0)
        return np.ascontiguousarray(np.where(still, 0.0, np.where(lost, np.nan, found)).T)
