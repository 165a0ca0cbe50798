"""MagMax: of each element the task vector that moved it most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastmerge.methods.base import Contract, shared
from fastmerge.methods.elementwise import Elementwise, deltas, number
from fastmerge.ops.elementwise import Array
from fastmerge.ops.segments import I64

if TYPE_CHECKING:
    from fastmerge.ops.spec import Op


@dataclass(frozen=True, kw_only=True)
class MagMax(Elementwise):
    r"""Add to the base, element by element, the largest of the task vectors.

    .. math:: b + \lambda\, d_{i^*}, \quad i^* = \arg\max_i |d_i|, \quad d_i = x_i - b

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: fp32 (fp64 where an input is fp64), one rounding. Of equal magnitudes the later model's counts; a NaN is
    larger than everything.
    Paper: Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual Learning", arXiv 2407.06322.
    """

    name = "magmax"
    summary = "Of each element the task vector of the largest magnitude."
    formula = "out = b + lambda d_i, i: the model whose |d_i| is largest"
    paper = "https://arxiv.org/abs/2407.06322"
    contract = Contract("required")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fusionbench": {"lambda": 0.5}}
    cases = ({}, {"preset": "fusionbench", "models": 2})

    lam: float = shared("factor of the merged task vector", 1.0, name="lambda")

    def merged(self, op: Op, xs: list[Array], counts: I64) -> Array:
        """The largest so far beside each next one."""
        base, d = deltas(xs)
        mix = d[0]
        for x in d[1:]:
            mix = np.where(np.isnan(mix) | (np.abs(x) < np.abs(mix)), mix, x)
        return base + number(self.lam, base) * mix
