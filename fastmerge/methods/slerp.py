"""Spherical interpolation of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fastmerge.methods import angles
from fastmerge.methods.base import F64, REQUIRED, Contract, Group, Method, Param, Program
from fastmerge.ops import blocks as reference
from fastmerge.ops.gram import GramProgram, rows_of
from fastmerge.ops.split import by_kind

if TYPE_CHECKING:
    import torch

EPSILON = 1e-8
"""Vectors no longer than this count as unit vectors (mergekit's constant)."""


def coefficients(stats: F64, t: F64, threshold: F64, every: F64) -> F64:
    """Blend weights of two vectors from their inner products.

    Args:
        stats: ``[P, 4]``: <a,a>, <a,b>, <b,b>, |a-b|^2.
        t: ``[P]`` position between a (0) and b (1).
        threshold: ``[P]`` |cosine| above which a pair counts as parallel.
        every: ``[P]`` number of the tensor that must be parallel in all rows for any row to be blended
            linearly; NaN where each row decides for itself.

    Returns:
        ``[P, 2]`` coefficients of a and b.
    """
    norm_a, norm_b = np.sqrt(stats[:, 0]), np.sqrt(stats[:, 2])
    zero = (norm_a <= EPSILON) | (norm_b <= EPSILON)
    norm_a, norm_b = np.where(norm_a <= EPSILON, 1.0, norm_a), np.where(norm_b <= EPSILON, 1.0, norm_b)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        dot = np.clip(stats[:, 1] / (norm_a * norm_b), -1.0, 1.0)
        apart = norm_a - norm_b
        chord2 = np.maximum(0.0, (stats[:, 3] - apart * apart) / (norm_a * norm_b))
        # Where the vectors are close, their difference knows the angle better than their product does.
        close = (dot > 0.5) & ~zero
        cosine = np.where(close, 1.0 - chord2 / 2, dot)
        theta = np.where(close, angles.chord_angle(chord2), angles.acos(dot))
        parallel = np.abs(cosine) > threshold
        grouped = ~np.isnan(every)
        for g in set(every[grouped].tolist()):
            rows = every == g
            # Exactly parallel rows have no arc; they are blended linearly in any case.
            parallel[rows] = parallel[rows].all() | (np.abs(cosine[rows]) >= 1.0)
        sine = angles.sin(theta)
        blend_a = np.where(parallel, 1 - t, angles.sin((1 - t) * theta) / sine)
        blend_b = np.where(parallel, t, angles.sin(t * theta) / sine)
    return np.stack([blend_a, blend_b], axis=1)


class Slerp(Method):
    r"""Spherical interpolation of the base ``a`` and one other model ``b``; linear where they are parallel.

    .. math:: \frac{\sin((1-t)\theta)}{\sin\theta}\,a + \frac{\sin(t\theta)}{\sin\theta}\,b,
              \quad \cos\theta = \frac{\langle a, b\rangle}{|a||b|}

    Shapes: ``a, b: [*S]`` -> ``[*S]``; one angle per tensor, or per row of the last dimension.
    Numerics: inner products in the ordered sum (fp32 products, fp64 across tiles), the angle in fp64, taken
    from |a-b|^2 where the vectors are close; the blend in fp32 (fp64 for fp64), one rounding. Coefficients
    apply to the vectors as they are, so the norm is kept only where both have the same one. A vector of norm
    1e-8 or less counts as a unit vector. Inputs whose squares overflow give NaN.
    Paper: Shoemake 1985, "Animating rotation with quaternion curves".
    """

    name = "slerp"
    summary = "Spherical interpolation of two models, per tensor or per row."
    formula = "out = sin((1-t) th)/sin th a + sin(t th)/sin th b; (1-t) a + t b where |cos th| > threshold"
    paper = "https://dl.acm.org/doi/10.1145/325165.325242"
    contract = Contract("required", least=1, most=1)
    params = (
        Param("t", "shared", float, REQUIRED, "position between the base (0) and the other model (1)"),
        Param("scope", "shared", ("tensor", "row"), "tensor", "what one angle belongs to"),
        Param(
            "fallback",
            "shared",
            ("per_vector", "all_rows"),
            "per_vector",
            "linear for each parallel row, or only where all rows of the tensor are parallel",
        ),
        Param("threshold", "shared", float, 0.9995, "|cosine| above which vectors count as parallel", 0.0, 1.0),
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "seed": {"t": 0.5, "scope": "row", "fallback": "all_rows"},
    }
    cases = (
        {"t": 0.3},
        {"t": 0.0},
        {"t": 1.0},
        {"t": 1.25, "threshold": 1.0},
        {"t": 0.5, "threshold": 0.0},
        {"t": 0.35, "scope": "row"},
        {"preset": "seed"},
    )

    @classmethod
    def solve(cls, groups: Sequence[Group], stats: F64, rows: Sequence[int]) -> tuple[F64, F64]:
        """Coefficients ``[P, 2]`` and scales ``[P, 2]`` for all vectors of all groups, in order."""
        t = np.repeat([float(g.params["t"]) for g in groups], rows)
        threshold = np.repeat([float(g.params["threshold"]) for g in groups], rows)
        every = np.repeat([float(i) if cls._all_rows(g) else np.nan for i, g in enumerate(groups)], rows)
        return coefficients(stats, t, threshold, every), np.ones((len(stats), 2))

    @staticmethod
    def _all_rows(group: Group) -> bool:
        return bool(group.params["scope"] == "row" and group.params["fallback"] == "all_rows")

    @classmethod
    def reference(cls, inputs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
        """Inner products of each vector, then the blend."""
        rows = rows_of(group) if group.params["scope"] == "row" else 1
        a, b = (x.reshape(rows, -1) for x in reference.work(inputs, group)) if group.numel else [*inputs]
        if not group.numel:
            return reference.finish(a.reshape(-1), group)
        coef, _ = cls.solve([group], reference.gram([a, b], diff=True), [rows])
        blends = [reference.column(coef[:, i], a) for i in (0, 1)]
        return reference.finish(blends[0] * a + blends[1] * b, group)

    @classmethod
    def program(cls, groups: Sequence[Group], kernels: Any) -> Program:
        """Gram, solve, combine."""

        def build(some: list[int]) -> Program:
            part = [groups[i] for i in some]
            row = part[0].params["scope"] == "row"
            return GramProgram(kernels, part, cls.solve, per_row=row, diff=True, delta=False)

        return by_kind([g.params["scope"] for g in groups], build)

    @classmethod
    def scope(cls, group: Group) -> Literal["element", "tensor", "row", "model"]:
        """One angle per tensor or row."""
        return "row" if group.params["scope"] == "row" else "tensor"

    @classmethod
    def warn(cls, group: Group) -> list[str]:
        """Names extrapolation."""
        t = float(group.params["t"])
        return [] if 0 <= t <= 1 else [f"slerp: t = {t:g} is outside 0 .. 1 and extrapolates"]
