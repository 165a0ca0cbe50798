"""What ties and dare share: one tensor's recipe for the consensus family, and its reference.

::

    d_i = x_i - b                              delta
    d_i = keep_i(d_i)                          Bernoulli drop, then magnitude trim; what is not kept is 0
    v_i = w_i r_i d_i                          weight and rescale, one coefficient
    A = sum v_i, B = sum |v_i|                 in model order
    sign = elected sign of the element         of A, of an unweighted sum, or of a count
    part = A + B or A - B                      twice the sum of the values of the elected sign
    out = b + part (lambda / 2) / G            G: the weights (or number) of those values; 1 for a sum

The quotient comes first because it takes one of 2^N values: a table, where a division per element would cost more
than the rest. G = 0 counts as 1; a quotient too large for the work type is its largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastmerge.methods.base import REQUIRED, Group, Method, Param, Program, once_per_kind
from fastmerge.ops import blocks as ref
from fastmerge.philox import DROP, TIES, rescale, threshold, u16

if TYPE_CHECKING:
    import torch

L1_EPSILON = 1e-7
"""Sums of magnitudes below this are not rescaled (mergekit's constant)."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """One tensor's parameters, resolved to what the kernels take.

    Attributes:
        weight: coefficient of each model, before any rescale.
        gate: what each model adds to the divisor where it agrees with the elected sign.
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
    """

    weight: tuple[float, ...]
    gate: tuple[float, ...]
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


def weights(group: Group) -> tuple[float, ...]:
    """Weights of all models; null is 1 / N."""
    return tuple(1.0 / len(group.models) if m["weight"] is None else float(m["weight"]) for m in group.models)


def divisor(group: Group) -> float:
    """Sum of the weights where ``normalize`` is set, 1 where it is not or where they cancel (as in mergekit)."""
    total = 0.0
    for w in weights(group):
        total += w
    return total if group.params["normalize"] and abs(total) >= 1e-8 else 1.0


def l1_factor(before: float, after: float) -> float:
    """The rescale that gives ``after`` the size of ``before``."""
    return 1.0 if before < L1_EPSILON or after < L1_EPSILON else before / after


def deltas(inputs: Sequence[torch.Tensor], group: Group, spec: Consensus) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base and the deltas, in the work type."""
    base, *others = ref.work(inputs, group)
    found = [x - base for x in others]
    if spec.round_base:
        kind = ref.torch_dtype(group.dtypes[0])
        found = [ref.round_to(d, kind).to(base.dtype) for d in found]
    return base, found


def _where(d: torch.Tensor, keep: ref.Mask) -> torch.Tensor:
    import torch

    return torch.where(torch.from_numpy(keep), d, torch.zeros_like(d))


def trim(found: Sequence[torch.Tensor], groups: Sequence[Group], specs: Sequence[Consensus], i: int) -> list[ref.Mask]:
    """Which elements of model i's deltas stay, over the tensors that share one threshold."""
    order = sorted(range(len(groups)), key=lambda g: groups[g].name.encode())
    sizes = [groups[g].numel for g in order]
    magnitudes = np.concatenate([ref.keys(found[g]) for g in order])
    noise = None
    if specs[0].ties == "spread":
        noise = np.concatenate([u16(groups[g].key, specs[g].models[i], TIES, 0, groups[g].numel) for g in order])
    k = kept(sum(sizes), specs[0].density[i], specs[0].keep_count)
    parts = np.split(ref.top(magnitudes, k, specs[0].ties, noise), np.cumsum(sizes)[:-1])
    return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]


def vote(
    v: Sequence[torch.Tensor], d: Sequence[torch.Tensor], factors: Sequence[float], spec: Consensus
) -> torch.Tensor:
    """The quantity whose sign is elected."""
    if spec.elect == "count":
        total = (d[0] > 0).to(d[0].dtype) - (d[0] < 0).to(d[0].dtype)
        for x in d[1:]:
            total = total + ((x > 0).to(x.dtype) - (x < 0).to(x.dtype))
        return total
    if spec.split:
        return ref.weighted_sum(d, factors)
    total = v[0]
    for x in v[1:]:
        total = total + x
    return total


def mix(
    base: torch.Tensor,
    d: Sequence[torch.Tensor],
    factors: Sequence[float],
    spec: Consensus,
    majority: Callable[[torch.Tensor], float],
) -> torch.Tensor:
    """From kept deltas to the unrounded output."""
    import torch

    coefficients = [w * f for w, f in zip(spec.weight, factors, strict=True)]
    v = [ref.number(c, x) * x for c, x in zip(coefficients, d, strict=True)]
    a, b = v[0], v[0].abs()
    for x in v[1:]:
        a, b = a + x, b + x.abs()
    lam = ref.number(spec.lam, base)
    if spec.elect == "none":
        return base + lam * ref.divide(a, spec.div)
    votes = vote(v, d, factors, spec)
    tied = {"plus": 1.0, "majority": majority(votes), "base": 1.0}[spec.zero]
    plus = (votes > 0) | ((votes == 0) & (tied > 0))
    if spec.merge == "max":
        high, low = torch.zeros_like(a), torch.zeros_like(a)
        for x in v:
            high, low = torch.where(x > high, x, high), torch.where(x < low, x, low)
        out = base + lam * torch.where(a.isnan(), a, torch.where(plus, high, low))
    else:
        share = lam * ref.number(0.5, a)
        if spec.merge == "mean":
            agree, against = torch.zeros_like(a), torch.zeros_like(a)
            for g, x in zip(spec.gate, v, strict=True):
                gate = ref.number(g, x)
                agree, against = torch.where(x > 0, agree + gate, agree), torch.where(x < 0, against + gate, against)
            den = torch.where(plus, agree, against)
            share = share / torch.where(den == 0, torch.ones_like(den), den)
            most = torch.finfo(a.dtype).max
            share = share.clamp(-most, most)
        out = base + torch.where(plus, a + b, a - b) * share
    return torch.where(votes == 0, base, out) if spec.zero == "base" else out


def reference(
    inputs: Sequence[Sequence[torch.Tensor]], groups: Sequence[Group], specs: Sequence[Consensus]
) -> list[torch.Tensor]:
    """The definition of the family, for tensors that share their thresholds (one, or a whole model)."""
    pairs = [deltas(i, g, s) for i, g, s in zip(inputs, groups, specs, strict=True)]
    bases, found = [b for b, _ in pairs], [d for _, d in pairs]
    models = range(len(specs[0].weight))
    factors = [list(s.rescale) for s in specs]

    def restore(before: list[list[torch.Tensor]]) -> None:
        for g, d in enumerate(found):
            for i in models:
                was, now = (float(ref.ordered_sum(x[i].abs())) for x in (before[g], d))
                factors[g][i] = l1_factor(was, now)

    raw = [list(d) for d in found]
    for d, group, spec in zip(found, groups, specs, strict=True):
        for i in models if spec.drop else ():
            d[i] = _where(d[i], u16(group.key, spec.models[i], DROP, 0, group.numel) < np.int64(spec.bernoulli[i]))
    if specs[0].l1 == "drop":
        restore(raw)
    if specs[0].trim:
        for i in models:
            for d, keep in zip(found, trim([d[i] for d in found], groups, specs, i), strict=True):
                d[i] = _where(d[i], keep)
    if specs[0].l1 == "trim":
        restore(raw)

    def majority(votes: torch.Tensor) -> float:
        if specs[0].zero != "majority" or not specs[0].whole_model:
            every = [votes]
        else:
            every = [_votes(d, f, s) for d, f, s in zip(found, factors, specs, strict=True)]
        return 1.0 if sum(int((x > 0).sum()) - int((x < 0).sum()) for x in every) > 0 else -1.0

    parts = zip(bases, found, factors, specs, groups, strict=True)
    return [ref.finish(mix(b, d, f, s, majority), g) for b, d, f, s, g in parts]


def _votes(d: Sequence[torch.Tensor], factors: Sequence[float], spec: Consensus) -> torch.Tensor:
    v = [ref.number(w * f, x) * x for w, f, x in zip(spec.weight, factors, d, strict=True)]
    return vote(v, d, factors, spec)


def drop_table(group: Group, density: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Bernoulli thresholds and the unbiased rescale of each model."""
    bern = tuple(threshold(float(m[density])) for m in group.models)
    return bern, tuple(rescale(t) for t in bern)


def delta_params(weight: str) -> tuple[Param, ...]:
    """Parameters of every method that adds deltas to a base."""
    return (
        Param("weight", "model", float, REQUIRED, weight),
        Param("lambda", "shared", float, 1.0, "factor of the merged delta"),
        Param("delta_dtype", "shared", ("fp32", "base"), "fp32", "deltas are exact, or rounded to the base's type"),
        Param("int8_mask", "shared", bool, False, "accepted and ignored: masks are never stored"),
    )


def election_params() -> tuple[Param, ...]:
    """Parameters of the trim, the election and the disjoint merge."""
    return (
        Param("trim_scope", "shared", ("tensor", "model"), "tensor", "rank magnitudes in each tensor or in the model"),
        Param("ties", "shared", ("index", "all", "spread"), "index", "at the threshold: the first, all, or thinned"),
        Param(
            "keep_count",
            "shared",
            ("at_least_one", "floor", "plus_one", "complement"),
            "at_least_one",
            "how a density becomes a number of elements",
        ),
        Param("elect", "shared", ("mass", "count"), "mass", "sign of the sum of deltas, or of their number"),
        Param("elect_weighted", "shared", bool, True, "weights count in the sum (never in the number)"),
        Param("zero", "shared", ("plus", "majority", "base"), "plus", "what a tied vote elects"),
        Param(
            "merge",
            "shared",
            ("mean", "mean_count", "sum", "max"),
            "mean",
            "agreeing deltas: divided by their weights, by their number, summed, or the largest",
        ),
    )


def election(group: Group) -> Mapping[str, Any]:
    """The fields of :class:`Consensus` that :func:`election_params` decide."""
    p = group.params
    merge = p["merge"]
    if not p["normalize"] and merge in ("mean", "mean_count"):
        merge = "sum"
    return {
        "div": 1.0,
        "gate": tuple(1.0 for _ in group.models) if merge == "mean_count" else weights(group),
        "keep_count": p["keep_count"],
        "whole_model": p["trim_scope"] == "model",
        "ties": p["ties"],
        "elect": p["elect"],
        "split": p["elect"] == "mass" and not p["elect_weighted"],
        "zero": p["zero"],
        "merge": "mean" if merge == "mean_count" else merge,
    }


class ConsensusMethod(Method):
    """A method of the family: it says what :class:`Consensus` its parameters make, and the rest follows."""

    @classmethod
    def spec(cls, group: Group) -> Consensus:
        """The group's parameters as the family takes them; reads ``params``, ``models`` and ``indices`` alone.

        Here: weighted deltas added up, without drop, trim or election. Methods replace what they do otherwise.
        """
        ones = (1.0,) * len(group.models)
        return Consensus(
            weight=weights(group),
            gate=ones,
            bernoulli=(65536,) * len(ones),
            density=ones,
            rescale=ones,
            keep_count="floor",
            lam=float(group.params["lambda"]),
            div=divisor(group),
            models=group.indices,
            round_base=group.params["delta_dtype"] == "base",
            drop=False,
            trim=False,
            whole_model=False,
            ties="index",
            elect="none",
            split=False,
            zero="plus",
            merge="sum",
            l1="none",
        )

    @classmethod
    def reference(cls, inputs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
        """The family's definition (:func:`reference`) for a model of one tensor."""
        return reference([inputs], [group], [cls.spec(group)])[0]

    @classmethod
    def reference_all(cls, inputs: Sequence[Sequence[torch.Tensor]], groups: Sequence[Group]) -> list[torch.Tensor]:
        """All tensors together where the threshold is the model's."""
        if groups and cls.scope(groups[0]) == "model":
            return reference(inputs, groups, once_per_kind(cls.spec, groups))
        return super().reference_all(inputs, groups)

    @classmethod
    def program(cls, groups: Sequence[Group], kernels: Any) -> Program:
        """Any selection and sums, then consensus."""
        from fastmerge.ops.consensus.program import program

        return program(groups, once_per_kind(cls.spec, groups), kernels)

    @classmethod
    def scope(cls, group: Group) -> Literal["element", "tensor", "row", "model"]:
        """Trimming, restoring a sum of magnitudes and majorities look at a tensor, or at the whole model."""
        spec = cls.spec(group)
        if not (spec.trim or spec.l1 != "none" or spec.zero == "majority"):
            return "element"
        return "model" if spec.whole_model and (spec.trim or spec.zero == "majority") else "tensor"
