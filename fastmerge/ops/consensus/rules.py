"""What the consensus kernels take: one tensor's parameters, and how densities become numbers of elements."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from fastmerge.errors import OutputError
from fastmerge.ops.combine import deltas_in_range, exponent, shifted

L1_EPSILON = 1e-7
"""Sums of magnitudes below this are not rescaled (mergekit's constant)."""


class Consensus(NamedTuple):
    """One tensor's parameters, resolved to what the kernels take.

    Attributes:
        weight: coefficient of each model, before any rescale.
        count_weight: what each model adds to the divisor where it agrees with the elected sign.
        bernoulli: keep where the 16-bit random number is below this; 65536 keeps everything.
        density: share kept by magnitude; 1 keeps everything.
        keep_count: how many that is; see :func:`kept`.
        lam, div: ``b + lam * mix``; without an election ``mix`` is divided by ``div`` first.
        models: numbers of the models for the random numbers.
        round_base: deltas are rounded to the base's type.
        drop, trim: whether any model drops or trims.
        whole_model: thresholds (and the majority sign) belong to the whole model, not to the tensor.
        ties: ``index``, ``all`` or ``spread``.
        elect: ``none``, ``mass`` or ``count``.
        split: the vote sums deltas without their weights.
        zero: what a tied vote elects: ``plus``, ``majority`` (of all elements) or ``base`` (no change).
        merge: ``mean``, ``sum`` or ``max``.
        l1: restore the sum of magnitudes that ``drop`` or ``trim`` took; ``none``.
        wide_sums: from the kept task vectors on everything is fp64, whatever they are.
    """

    weight: tuple[float, ...]
    count_weight: tuple[float, ...]
    bernoulli: tuple[int, ...]
    density: tuple[float, ...]
    rescale: tuple[float, ...]
    keep_count: str
    lam: float
    div: float
    models: tuple[int, ...]
    round_base: bool
    drop: bool
    trim: bool
    whole_model: bool
    ties: str
    elect: Literal["none", "mass", "count"]
    split: bool
    zero: Literal["plus", "majority", "base"]
    merge: Literal["mean", "sum", "max"]
    l1: Literal["none", "drop", "trim"]
    wide_sums: bool

    @property
    def words(self) -> tuple[object, ...]:
        """What all tensors of one kernel call must have in common."""
        return (
            self.models,
            self.round_base,
            self.drop,
            self.trim,
            self.whole_model,
            self.ties,
            self.elect,
            self.split,
            self.zero,
            self.merge,
            self.l1,
        )


def kept(n: int, density: float, rule: str) -> int:
    """How many of n elements a density keeps (before any rule on ties adds to them).

    ``at_least_one`` is mergekit's ``max(1, int(density n))``; ``floor`` is peft's ``int(density n)``;
    ``plus_one`` is the TIES authors' ``|d| >= kthvalue(n - int(density n))``, which keeps one more;
    ``complement`` counts what goes: ``|d| >= kthvalue(int(n (1 - density)))``, where a 0th value keeps everything.
    """
    if density >= 1:
        return n
    if density <= 0 or n == 0:
        return 0
    if rule == "at_least_one":
        return max(1, int(density * n))
    if rule == "floor":
        return int(density * n)
    if rule == "plus_one":
        return min(n, int(density * n) + 1)
    gone = int(n * (1 - density))
    return n - gone + 1 if gone > 0 else n


def l1_factor(before: float, after: float, name: str) -> float:
    """The rescale that gives ``after`` the size of ``before``.

    Raises:
        OutputError: where a sum is not finite, for the tensor of that name.
    """
    if before < L1_EPSILON or after < L1_EPSILON:
        return 1.0
    if not (math.isfinite(before) and math.isfinite(after)):
        raise OutputError(
            f"{name}: rescale needs finite sums of magnitudes, got {before} before and {after} after the drop or trim: "
            "an input holds NaN or Inf, or task vectors that add up to more than the type holds"
        )
    return before / after


def in_range(rules: Consensus, *, double: bool) -> Consensus:
    """The same result from numbers that the work type holds (see :func:`fastmerge.ops.combine.deltas_in_range`)."""
    quotient = rules.elect != "none" and rules.merge == "mean"  # of weighted task vectors and their weights
    div = math.ldexp(1.0, exponent(rules.count_weight)) if quotient else rules.div
    weight, lam, one = deltas_in_range(rules.weight, rules.lam, div, double=double)
    if (weight, lam) == (rules.weight, rules.lam):
        return rules
    if quotient:
        return rules._replace(
            weight=weight, lam=lam, count_weight=shifted(rules.count_weight, -exponent(rules.count_weight))
        )
    return rules._replace(weight=weight, lam=lam, div=one)
