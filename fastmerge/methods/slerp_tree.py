"""Hierarchical SLERP: spherical interpolation of more than two models, two at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastmerge.methods import angles
from fastmerge.methods.base import Contract, per_model, shared
from fastmerge.methods.slerp import EPSILON, arc
from fastmerge.methods.span import Span, matrices, product, total
from fastmerge.ops.segments import F64

if TYPE_CHECKING:
    from fastmerge.ops.spec import Spec

Node = tuple[F64, float]
"""Coefficients ``[N, P]`` of what was merged, and its weight."""


@dataclass(frozen=True, kw_only=True)
class SlerpTree(Span):
    r"""SLERP of two models, of the result and the next one, and so on; or of both halves of the list, so merged.

    .. math:: s_k = \operatorname{slerp}\Bigl(s_{k-1}, x_k;\ t = \frac{w_k}{w_1 + \dots + w_k}\Bigr), \quad s_1 = x_1

    Shapes: ``x_i: [*S]`` -> ``[*S]``; angles per tensor, or per row of the last dimension.
    Numerics: all angles follow from the inner products of the inputs (the ordered sum), in fp64; one weighted sum in
    fp32 (fp64 for fp64), one rounding. Every step is slerp's: linear above the threshold, a vector of length 1e-8 or
    less counts as a unit vector. The order of the models matters. With a base, its task vectors are interpolated.
    Models of weight 0 change nothing. Inputs that are not finite, or whose squares overflow, are an error.
    Paper: Shoemake 1985, "Animating rotation with quaternion curves".
    """

    name = "slerp_tree"
    summary = "Spherical interpolation of more than two models, two at a time."
    formula = "out = slerp(slerp(x1, x2; w2/(w1+w2)), x3; w3/(w1+w2+w3)), ...; of x_i - b with a base"
    paper = "https://dl.acm.org/doi/10.1145/325165.325242"
    contract = Contract("optional", least=2)
    cases = (
        {"weight": [0.5, 0.3, 0.2]},
        {"weight": [1.0, 0.5, 0.0, 0.8, 0.3], "order": "balanced", "base": True},
        {"weight": 1.0, "scope": "row", "threshold": 1.0},
    )

    weight: tuple[float, ...] = per_model("share of the model", 1.0, low=0.0)
    order: Literal["left", "balanced"] = shared("one model after the other, or halves of the list", "left")
    scope: Literal["tensor", "row"] = shared("what one angle belongs to", "tensor")
    threshold: float = shared("|cosine| above which vectors count as parallel", 0.9995, low=0.0, high=1.0)

    @property
    def per_row(self) -> bool:
        """Whether each row has its own angles."""
        return self.scope == "row"

    def coefficients(self, stats: F64, count: int, *, double: bool) -> F64:
        """Those of the root."""
        gram = matrices(stats, count)

        def leaf(i: int) -> Node:
            one = np.zeros((count, len(stats)))
            one[i] = 1.0
            return one, self.weight[i]

        def merged(a: Node, b: Node) -> Node:
            (x, w), (y, v) = a, b
            if not w or not v:
                return a if not v else b
            images = product(gram, x), product(gram, y)
            squares = [np.maximum(total(list(c * g)), 0.0) for c, g in zip((x, y), images, strict=True)]
            norms = [np.where(np.sqrt(s) <= EPSILON, 1.0, np.sqrt(s)) for s in squares]
            cosine = np.clip(total(list(x * images[1])) / (norms[0] * norms[1]), -1.0, 1.0)
            theta = angles.acos(cosine)
            # acos rounds to an angle of 0 only there: below 2^-26 an arc and its chord are the same in fp64
            parallel = (np.abs(cosine) > self.threshold) | (1.0 - np.abs(cosine) < 2**-52)
            both = arc(np.full(len(stats), v / (w + v)), theta, parallel)
            return both[:, 0] * x + both[:, 1] * y, w + v

        def tree(first: int, last: int) -> Node:
            if last - first == 1:
                return leaf(first)
            middle = last - 1 if self.order == "left" else (first + last + 1) // 2
            return merged(tree(first, middle), tree(middle, last))

        return np.ascontiguousarray(tree(0, count)[0].T)

    def check(self, spec: Spec) -> list[str]:
        """Refuses weights that are all 0."""
        return [] if any(self.weight) else ["slerp_tree: all weights are 0; expected one above 0"]
