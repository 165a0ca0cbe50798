"""Weighted averages of whole models, and uniform soups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastmerge.methods.base import REQUIRED, Contract, Group, Method, Param, Program, once_per_kind
from fastmerge.ops import blocks as reference
from fastmerge.ops.combine import CombineProgram

if TYPE_CHECKING:
    import torch


def _sum(weights: Sequence[float]) -> float:
    total = 0.0
    for w in weights:
        total += w
    return total


class Linear(Method):
    r"""Weighted average of any number of models; the base, where one is listed, is an ordinary input.

    .. math:: \frac{\sum_i w_i x_i}{\sum_i w_i} \quad\text{(without normalize: } \textstyle\sum_i w_i x_i)

    Shapes: ``x_i: [*S]`` -> ``[*S]``.
    Numerics: fp32 (fp64 where an input is fp64) in input order, one division, one rounding. The weights are
    summed in fp64.
    Paper: Wortsman et al. 2022, "Model soups", arXiv 2203.05482.
    """

    name = "linear"
    summary = "Weighted average of models; with equal weights, a uniform soup."
    formula = "out = sum_i w_i x_i / sum_i w_i"
    paper = "https://arxiv.org/abs/2203.05482"
    contract = Contract("ignored")
    params = (
        Param("weight", "input", float, REQUIRED, "coefficient of the model"),
        Param("normalize", "shared", bool, True, "divide by the sum of the weights"),
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mergekit": {}, "soup": {"weight": 1.0}}
    cases = (
        {"weight": [0.6, 0.3, 0.9]},
        {"weight": [1.5, -0.5], "normalize": False, "models": 2},
        {"weight": 1.0, "models": 1},
        {"weight": 0.25, "models": 7},
        {"preset": "soup", "models": 4},
    )

    @classmethod
    def tables(cls, group: Group) -> tuple[list[float], float]:
        """Coefficients and divisor."""
        weights = [float(m["weight"]) for m in group.models]
        return weights, _sum(weights) if group.params["normalize"] else 1.0

    @classmethod
    def reference(cls, inputs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
        """``(sum c_i x_i) / div``."""
        return reference.plain(inputs, group, *cls.tables(group))

    @classmethod
    def program(cls, groups: Sequence[Group], kernels: Any) -> Program:
        """One pass of the combine kernel."""
        tables = once_per_kind(cls.tables, groups)
        return CombineProgram(
            kernels, np.array([c for c, _ in tables]), np.array([(1.0, div) for _, div in tables]), delta=False
        )

    @classmethod
    def check(cls, group: Group) -> list[str]:
        """Refuses weights that cancel where they are divided by."""
        weights, div = cls.tables(group)
        if group.params["normalize"] and abs(div) <= 1e-12 * _sum([abs(w) for w in weights]):
            return [f"linear: weights {weights} sum to zero with normalize: true; every element would be inf or NaN"]
        return []

    @classmethod
    def warn(cls, group: Group) -> list[str]:
        """Names weights that nearly cancel."""
        weights, div = cls.tables(group)
        if group.params["normalize"] and abs(div) < 1e-2 * _sum([abs(w) for w in weights]):
            return [f"linear: weights {weights} nearly cancel; normalize: true multiplies by {1 / div:g}"]
        return []
