"""Multi-SLERP: the mean direction of several models, or of their task vectors, at their mean length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fastmerge.methods import angles
from fastmerge.methods.base import Contract, per_model, shared
from fastmerge.methods.span import NOISE, Span, matrices, square, total
from fastmerge.ops.segments import F64

if TYPE_CHECKING:
    from fastmerge.ops.spec import Spec


@dataclass(frozen=True, kw_only=True)
class Multislerp(Span):
    r"""The weighted mean of directions, at the weighted mean length; with a base, of the task vectors.

    .. math:: \sum_i w_i |x_i| \cdot \frac{m}{|m|}, \quad m = \sum_i w_i \frac{x_i}{|x_i| + \epsilon}

    Shapes: ``x_i: [*S]`` -> ``[*S]``; one direction per tensor.
    Numerics: inner products in the ordered sum, coefficients in fp64, the result in fp32 (fp64 for fp64), one rounding.
    mergekit's step in the tangent space at m is 0 for every input, since m is the mean there too; what is left of it
    is the factor cos(eps).
    Where the directions cancel to less than ``eps`` or to the rounding of the sums (a thousandth; fp64: 1e-7), two
    models are averaged linearly, as in mergekit; more are an error, unless all of them are 0 (equal to the base):
    then so is the result. One model is itself, whatever its weight. Inputs that are not finite are an error.
    Paper: Goddard, "Multi-SLERP"; see also the mean direction of directional statistics (Mardia 1972).
    """

    name = "multislerp"
    summary = "Mean direction of models, or of their task vectors, at their mean length."
    formula = "out = sum_i w_i |x_i| m / |m|, m = sum_i w_i x_i / (|x_i| + eps); of x_i - b with a base"
    paper = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    contract = Contract("optional")
    undefined: ClassVar[str] = (
        "the weighted directions of its inputs cancel, so their mean has no direction; other weights may help"
    )
    cases = (
        {"weight": [0.7, 0.3, 0.4], "base": True},
        {"weight": [1.0, -0.4, 0.8], "normalize_weights": False},
        {"weight": [0.5], "base": True},
    )

    weight: tuple[float, ...] = per_model("share of the model")
    normalize_weights: bool = shared("divide the weights by their sum", default=True)
    eps: float = shared("added to lengths that are divided by; least length of a mean", 1e-8, low=0.0)

    @property
    def weights(self) -> tuple[float, ...]:
        """What each model counts."""
        if not self.normalize_weights:
            return self.weight
        total = 0.0
        for w in self.weight:
            total += w
        return tuple(w / total for w in self.weight)

    def coefficients(self, stats: F64, count: int, *, double: bool) -> F64:
        """Of the mean direction, times the mean length."""
        if count == 1:
            return np.ones((len(stats), 1))
        gram, weights = matrices(stats, count), np.array(self.weights)[:, None]
        norms = np.sqrt(np.stack([gram[i, i] for i in range(count)]))
        units = weights / np.where(norms + self.eps == 0, 1.0, norms + self.eps)
        length, most = square(gram, units), total(list(np.abs(units) * norms))
        lost = length <= np.maximum(self.eps * self.eps, NOISE[double] * most * most)
        size = total(list(weights * norms)) * angles.cos(np.array(self.eps))
        found = units * (size / np.sqrt(np.where(lost, 1.0, length)))
        linear = lost & ((count == 2) | (norms == 0).all(axis=0))
        return np.ascontiguousarray(np.where(linear, weights, np.where(lost, np.nan, found)).T)

    def check(self, spec: Spec) -> list[str]:
        """Refuses weights that cancel where they are divided by."""
        total = size = 0.0
        for w in self.weight:
            total, size = total + w, size + abs(w)
        if len(self.weight) > 1 and self.normalize_weights and abs(total) <= 1e-12 * size:
            return [f"multislerp: weights {list(self.weight)} sum to zero with normalize_weights: true"]
        return []
