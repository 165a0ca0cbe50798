"""NuSLERP: spherical interpolation of two models, or of their task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fastmerge.methods.base import Contract, per_model, shared
from fastmerge.methods.slerp import angle, arc
from fastmerge.methods.span import Span
from fastmerge.ops.segments import F64

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.spec import Spec

SHORTEST = 1e-7
"""Vectors that are shorter are divided by this, not by their length (mergekit's constant)."""

PARALLEL = 1e-15
"""1 - |cosine| up to which there is no arc: a few roundings of fp64, where mergekit asks for none."""


@dataclass(frozen=True, kw_only=True)
class Nuslerp(Span):
    r"""Spherical interpolation of two models ``x``, ``y``; with a base, of what they add to it.

    .. math:: \frac{\sin((1-t)\theta)}{\sin\theta}\,x + \frac{\sin(t\theta)}{\sin\theta}\,y,
              \quad t = \frac{w_y}{w_x + w_y}, \quad \cos\theta = \frac{\langle x, y\rangle}{|x||y|}

    Shapes: ``x, y: [*S]`` -> ``[*S]``; one angle per tensor (``nuslerp_flatten``), per row of the last dimension, or
    per vector along the first one, which is what mergekit calls ``nuslerp_row_wise``.
    Numerics: as slerp, but linear only where the vectors are parallel or opposite. A vector shorter than 1e-7 is
    divided by that; one of length 0 counts as orthogonal. Weights that sum to zero count as equal, as in mergekit.
    Paper: mergekit's own; Shoemake 1985, "Animating rotation with quaternion curves".
    """

    name = "nuslerp"
    summary = "Spherical interpolation of two models or of their task vectors, by weights."
    formula = "out = sin((1-t) th)/sin th x + sin(t th)/sin th y, t = w_y / (w_x + w_y); on x - b, y - b with a base"
    paper = "https://dl.acm.org/doi/10.1145/325165.325242"
    contract = Contract("optional", least=2, most=2)
    only_defined = "nuslerp_row_wise where nuslerp_flatten is false"
    difference: ClassVar[bool] = True
    cases = (
        {"weight": [0.7, 0.3], "base": True},
        {"weight": [0.4, 0.4]},
        {"weight": [1.2, -0.3], "nuslerp_flatten": False, "base": True},
        {"weight": [0.2, 0.6], "nuslerp_flatten": False, "nuslerp_row_wise": True, "base": True},
    )

    weight: tuple[float, ...] = per_model("share of the model")
    nuslerp_flatten: bool = shared("one angle for the whole tensor", default=True)
    nuslerp_row_wise: bool = shared("without nuslerp_flatten: vectors along the first dimension", default=False)

    @property
    def t(self) -> float:
        """Position between the models."""
        x, y = self.weight
        return 0.5 if abs(x + y) < 1e-6 else y / (x + y)

    @property
    def per_row(self) -> bool:
        """Without ``nuslerp_flatten``."""
        return not self.nuslerp_flatten

    @property
    def columns(self) -> bool:
        """Whether vectors run along the first dimension."""
        return self.nuslerp_row_wise and not self.nuslerp_flatten

    def gap(self) -> str | None:
        """Columns have no kernels."""
        return f"{self.name} with {self.only_defined} has no kernels yet" if self.columns else None

    def vectors(self, x: torch.Tensor, spec: Spec) -> torch.Tensor:
        """Rows, or vectors along the first dimension."""
        if self.columns and len(spec.shape) > 1:
            return x.reshape(spec.shape[0], -1).T
        return super().vectors(x, spec)

    def coefficients(self, stats: F64, count: int, *, double: bool) -> F64:
        """On the arc by the share of the second model."""
        x, y = np.sqrt(stats[:, 0]), np.sqrt(stats[:, 2])
        least = np.minimum(x, y)
        cosine, theta = angle(stats, np.maximum(x, SHORTEST), np.maximum(y, SHORTEST), least >= SHORTEST)
        return arc(np.full(len(stats), self.t), theta, 1.0 - np.abs(cosine) <= PARALLEL)

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that cancel, and extrapolation."""
        x, y = self.weight
        if abs(x + y) < 1e-6:
            return [f"nuslerp: weights {x:g} and {y:g} sum to zero and count as equal"]
        return [] if 0 <= self.t <= 1 else [f"nuslerp: t = {self.t:g} is outside 0 .. 1 and extrapolates"]
