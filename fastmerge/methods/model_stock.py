"""Model Stock: how far to move towards the average follows from the angle between the fine-tunes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from fastmerge.methods import angles
from fastmerge.methods.base import F64, Contract, Group, Method, Param, Program
from fastmerge.ops import blocks as reference
from fastmerge.ops.gram import GramProgram, rows_of
from fastmerge.ops.split import by_kind

if TYPE_CHECKING:
    import torch


def ratio(stats: F64, models: int, angle: bool, clamp: bool, floor: float) -> F64:
    """How far each vector moves from the base (0) to the average (1).

    Args:
        stats: ``[P, N (N + 1) / 2]`` inner products of the offsets, pairs (0,0), (0,1), .., (1,1), ...
        models: N.
        angle: average the angles instead of their cosines.
        clamp: limit the result to 0 .. 1.
        floor: least product of two norms.

    Returns:
        ``[P]``: ``N c / (1 + (N - 1) c)``; 0 at its pole.
    """
    column = {(i, j): n for n, (i, j) in enumerate((i, j) for i in range(models) for j in range(i, models))}
    total = np.zeros(len(stats))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for i in range(models):
            for j in range(i + 1, models):
                norms = np.sqrt(stats[:, column[i, i]]) * np.sqrt(stats[:, column[j, j]])
                norms = np.where(norms < floor, floor, norms)
                norms = np.where(norms == 0, 1.0, norms)
                c = np.clip(stats[:, column[i, j]] / norms, -1.0, 1.0)
                total = total + (angles.acos(c) if angle else c)
        mean = total / (models * (models - 1) // 2)
        c = angles.cos(mean) if angle else mean
        below = 1 + (models - 1) * c
        pole = np.abs(below) < 1e-6
        t = np.where(pole, 0.0, models * c / np.where(pole, 1.0, below))
    return np.clip(t, 0.0, 1.0) if clamp else t


class ModelStock(Method):
    r"""Between the base and the average of N fine-tunes, as far as their mutual angle suggests.

    .. math:: t\,\bar w + (1 - t)\,w_0, \quad t = \frac{N\cos\theta}{1 + (N - 1)\cos\theta}

    Shapes: ``w_i: [*S]`` -> ``[*S]``; one angle per tensor, or per row of the last dimension.
    Numerics: inner products of the offsets in the ordered sum, the ratio in fp64, and
    ``b + t ((sum w_i - b) / N)`` in fp32 (fp64 for fp64), one rounding. More than two models: the mean of the
    pairwise cosines (as its authors say), or of the angles (FusionBench). Products of norms below ``floor``
    are raised to it, which sends tiny updates towards the base (mergekit's behaviour).
    Paper: Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models", arXiv 2403.19522.
    """

    name = "model_stock"
    summary = "Average of fine-tunes, pulled towards the base by the angle between them."
    formula = "out = t mean(w) + (1 - t) w0, t = N cos th / (1 + (N - 1) cos th)"
    paper = "https://arxiv.org/abs/2403.19522"
    contract = Contract("required", least=2)
    params = (
        Param("filter_wise", "shared", bool, False, "one angle per row of the last dimension"),
        Param("cos_agg", "shared", ("cos", "angle"), "cos", "what is averaged over pairs of models"),
        Param("clamp_t", "shared", ("none", "unit"), "none", "limit t to 0 .. 1"),
        Param("floor", "shared", float, 1e-6, "least product of two offset norms", 0.0),
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {"floor": 0.0},
        "fusionbench": {"cos_agg": "angle", "floor": 0.0},
    }
    cases = (
        {"models": 2},
        {"models": 3, "filter_wise": True},
        {"models": 4, "preset": "fusionbench"},
        {"models": 3, "preset": "paper", "clamp_t": "unit", "filter_wise": True},
    )

    @classmethod
    def solve(cls, groups: Sequence[Group], stats: F64, rows: Sequence[int]) -> tuple[F64, F64]:
        """Coefficients ``[P, 1 + N]`` and scales (t, N) ``[P, 2]`` for all vectors of all groups, in order."""
        models = len(groups[0].models)
        scale = np.full((len(stats), 2), float(models))
        ends = np.cumsum([0, *rows])
        for g, first, last in zip(groups, ends[:-1], ends[1:], strict=True):
            p = g.params
            some = stats[first:last]
            scale[first:last, 0] = ratio(
                some, models, p["cos_agg"] == "angle", p["clamp_t"] == "unit", float(p["floor"])
            )
        return np.ones((len(stats), 1 + models)), scale

    @classmethod
    def reference(cls, inputs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
        """Inner products of the offsets of each vector, then the way from the base."""
        rows = rows_of(group) if group.params["filter_wise"] else 1
        base, *others = reference.work(inputs, group)
        if not group.numel:
            return reference.finish(base, group)
        base, *offsets = (x.reshape(rows, -1) for x in (base, *(x - base for x in others)))
        _, scale = cls.solve([group], reference.gram(offsets), [rows])
        total = reference.weighted_sum(offsets, [1.0] * len(offsets))
        mean = total / reference.column(scale[:, 1], base)
        return reference.finish(base + reference.column(scale[:, 0], base) * mean, group)

    @classmethod
    def program(cls, groups: Sequence[Group], kernels: Any) -> Program:
        """Gram of the offsets, solve, combine."""

        def build(some: list[int]) -> Program:
            part = [groups[i] for i in some]
            return GramProgram(kernels, part, cls.solve, per_row=bool(part[0].params["filter_wise"]), delta=True)

        return by_kind([g.params["filter_wise"] for g in groups], build)

    @classmethod
    def scope(cls, group: Group) -> Literal["element", "tensor", "row", "model"]:
        """One angle per tensor or row."""
        return "row" if group.params["filter_wise"] else "tensor"
