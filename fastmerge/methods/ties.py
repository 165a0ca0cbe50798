"""TIES: trim small deltas, elect a sign per element, merge what agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

from fastmerge.methods.base import REQUIRED, Contract, Group, Param
from fastmerge.ops.consensus import rules as consensus

PAPER: Mapping[str, Any] = {
    "trim_scope": "model",
    "ties": "all",
    "keep_count": "plus_one",
    "elect_weighted": False,
    "zero": "majority",
    "merge": "mean_count",
}
"""The rules of the authors' code, as overrides of mergekit's."""

SEED: Mapping[str, Any] = {
    "weight": None,
    "ties": "all",
    "keep_count": "complement",
    "zero": "base",
    "merge": "mean_count",
}
"""The rules of the widespread 40-line version: weights 1/N and a division by the count (N times too small)."""


def warnings(group: Group) -> list[str]:
    """What an election makes of unusual weights."""
    w = consensus.weights(group)
    p = group.params
    found = []
    if any(x < 0 for x in w) and p["normalize"] and p["merge"] == "mean":
        found.append("negative weights flip the vote and make the divisor signed, so an elected sign can turn over")
    if any(x <= 0 for x in w) and (not p["elect_weighted"] or p["merge"] == "mean_count"):
        found.append("agreement is that of weighted deltas: weight 0 is never counted, a negative weight turns")
    if len(w) > 1 and p["normalize"] and p["merge"] == "mean_count" and all(m["weight"] is None for m in group.models):
        found.append("weights 1/N divided by the count shrink the merged delta by the number of models")
    return found


class Ties(consensus.ConsensusMethod):
    r"""Trim each model's delta to its largest magnitudes, elect a sign per element, average what agrees.

    .. math:: b + \lambda\,\frac{\sum_{i \in A} w_i d_i}{\sum_{i \in A} w_i}, \quad
              A = \{i : \operatorname{sign}(w_i d_i) = s\}, \quad s = \operatorname{sign} \sum_i w_i d_i

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``; thresholds per tensor, or one for the whole model.
    Numerics: deltas in fp32 (fp64 where an input is fp64; ``delta_dtype: base`` rounds them), exact selection of
    the k-th magnitude, everything else in fp32 in model order, one rounding. NaN deltas rank above infinity.
    With bf16 weights many elements tie at the threshold: ``ties`` says what happens to them.
    Paper: Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708.
    """

    name = "ties"
    summary = "Trim small deltas, elect a sign per element, merge the deltas that agree."
    formula = "out = b + lambda sum_A w_i d_i / sum_A w_i, A = models whose trimmed delta has the elected sign"
    paper = "https://arxiv.org/abs/2306.01708"
    contract = Contract("required")
    params = (
        *consensus.delta_params("coefficient of the model's delta; null is 1/N"),
        Param("density", "model", float, 1.0, "share of the delta that is kept", 0.0, 1.0),
        Param("normalize", "shared", bool, True, "divide by what agrees; false sums"),
        Param("rescale", "shared", bool, False, "restore the sum of magnitudes that trimming took"),
        *consensus.election_params(),
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {**PAPER, "weight": 1.0, "density": 0.2},
        "fusionbench": {**PAPER, "weight": 1.0, "density": 0.2, "merge": "sum", "lambda": 0.3},
        "peft": {"density": REQUIRED, "keep_count": "floor", "elect_weighted": False, "merge": "mean_count"},
        "seed": {**SEED, "density": 0.2},
        "sdmecha": {**SEED, "weight": 1.0, "density": 0.2, "elect": "count"},
    }
    cases = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8]},
        {"weight": [1.0, 0.7], "density": 0.4, "normalize": False, "rescale": True, "lambda": 0.9, "models": 2},
        {"weight": 1.0, "density": 0.3, "ties": "spread", "delta_dtype": "base"},
        {"weight": [1.0, -0.6, 0.4], "density": [0.0, 1.0, 0.5], "merge": "max"},
        {"weight": 1.0},
        {"preset": "paper"},
        {"preset": "fusionbench", "models": 4},
        {"preset": "peft", "weight": [0.9, 1.1], "density": 0.35, "models": 2},
        {"preset": "seed"},
        {"preset": "sdmecha"},
        {"preset": "paper", "trim_scope": "tensor", "ties": "index"},
    )

    @classmethod
    def spec(cls, group: Group) -> consensus.Consensus:
        """The group's parameters as the family takes them."""
        density = tuple(float(m["density"]) for m in group.models)
        trim = any(d < 1 for d in density)
        l1: Literal["trim", "none"] = "trim" if trim and group.params["rescale"] else "none"
        return replace(super().spec(group), density=density, trim=trim, l1=l1, **consensus.election(group))

    @classmethod
    def warn(cls, group: Group) -> list[str]:
        """Names weights that do not do what one may expect."""
        return [f"ties: {line}" for line in warnings(group)]
