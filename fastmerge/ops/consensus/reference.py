"""The definition of the consensus family, in plain torch.

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

A result that is stored in fp32 would show the roundings of weights, sums and quotient, so from v_i on its work type is
fp64 (``wide_sums``), and lanes of sums of magnitudes are added in fp64; task vectors, and what is kept, are as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.ops import blocks as ref
from fastmerge.ops.consensus.rules import Consensus, kept, l1_factor
from fastmerge.ops.spec import Op
from fastmerge.philox import DROP, TIES, u16

if TYPE_CHECKING:
    import torch


def deltas(inputs: Sequence[torch.Tensor], op: Op, rules: Consensus) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base and the deltas, in the work type."""
    base, *others = ref.work(inputs, op.spec)
    found = [x - base for x in others]
    if rules.round_base:
        stored = ref.torch_dtype(op.spec.dtypes[0])
        found = [ref.round_to(d, stored).to(base.dtype) for d in found]
    return base, found


def _where(d: torch.Tensor, keep: ref.Mask) -> torch.Tensor:
    import torch

    return torch.where(torch.from_numpy(keep), d, torch.zeros_like(d))


def trim(found: Sequence[torch.Tensor], ops: Sequence[Op], rules: Sequence[Consensus], i: int) -> list[ref.Mask]:
    """Which elements of model i's deltas stay, over the tensors that share one threshold."""
    order = sorted(range(len(ops)), key=lambda g: ops[g].name.encode())
    sizes = [ops[g].spec.numel for g in order]
    magnitudes = np.concatenate([ref.keys(found[g]) for g in order])
    noise = None
    if rules[0].ties == "spread":
        noise = np.concatenate([u16(ops[g].key, rules[g].models[i], TIES, 0, ops[g].spec.numel) for g in order])
    k = kept(sum(sizes), rules[0].density[i], rules[0].keep_count)
    parts = np.split(ref.top(magnitudes, k, rules[0].ties, noise), np.cumsum(sizes)[:-1])
    return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]


def vote(
    v: Sequence[torch.Tensor], d: Sequence[torch.Tensor], factors: Sequence[float], rules: Consensus
) -> torch.Tensor:
    """The quantity whose sign is elected."""
    if rules.elect == "count":
        total = (d[0] > 0).to(d[0].dtype) - (d[0] < 0).to(d[0].dtype)
        for x in d[1:]:
            total = total + ((x > 0).to(x.dtype) - (x < 0).to(x.dtype))
        return total
    if rules.split:
        return ref.weighted_sum(d, factors)
    total = v[0]
    for x in v[1:]:
        total = total + x
    return total


def mix(
    base: torch.Tensor,
    d: Sequence[torch.Tensor],
    factors: Sequence[float],
    rules: Consensus,
    majority: Callable[[torch.Tensor], float],
) -> torch.Tensor:
    """From kept deltas to the unrounded output."""
    import torch

    if rules.wide_sums:
        base, d = base.double(), [x.double() for x in d]
    coefficients = [w * f for w, f in zip(rules.weight, factors, strict=True)]
    v = [ref.number(c, x) * x for c, x in zip(coefficients, d, strict=True)]
    a, b = v[0], v[0].abs()
    for x in v[1:]:
        a, b = a + x, b + x.abs()
    lam = ref.number(rules.lam, base)
    if rules.elect == "none":
        return base + lam * ref.divide(a, rules.div)
    votes = vote(v, d, factors, rules)
    tied = {"plus": 1.0, "majority": majority(votes), "base": 1.0}[rules.zero]
    plus = (votes > 0) | ((votes == 0) & (tied > 0))
    if rules.merge == "max":
        high, low = torch.zeros_like(a), torch.zeros_like(a)
        for x in v:
            high, low = torch.where(x > high, x, high), torch.where(x < low, x, low)
        out = base + lam * torch.where(a.isnan(), a, torch.where(plus, high, low))
    else:
        share = lam * ref.number(0.5, a)
        if rules.merge == "mean":
            agree, against = torch.zeros_like(a), torch.zeros_like(a)
            for c, x in zip(rules.count_weight, v, strict=True):
                w = ref.number(c, x)
                agree, against = torch.where(x > 0, agree + w, agree), torch.where(x < 0, against + w, against)
            den = torch.where(plus, agree, against)
            share = share / torch.where(den == 0, torch.ones_like(den), den)
            most = torch.finfo(a.dtype).max
            share = share.clamp(-most, most)
        out = base + torch.where(plus, a + b, a - b) * share
    return torch.where(votes == 0, base, out) if rules.zero == "base" else out


def reference(
    inputs: Sequence[Sequence[torch.Tensor]], ops: Sequence[Op], rules: Sequence[Consensus]
) -> list[torch.Tensor]:
    """The definition of the family, for tensors that share their thresholds (one, or a whole model)."""
    pairs = [deltas(i, op, r) for i, op, r in zip(inputs, ops, rules, strict=True)]
    bases, found = [b for b, _ in pairs], [d for _, d in pairs]
    models = range(len(rules[0].weight))
    factors = [list(s.rescale) for s in rules]

    def restore(before: list[list[torch.Tensor]]) -> None:
        for g, d in enumerate(found):
            for i in models:
                wide = rules[g].wide_sums
                was, now = (float(ref.ordered_sum(x[i].abs(), wide=wide)) for x in (before[g], d))
                factors[g][i] = l1_factor(was, now, ops[g].name)

    raw = [list(d) for d in found]
    for d, op, rule in zip(found, ops, rules, strict=True):
        for i in models if rule.drop else ():
            d[i] = _where(d[i], u16(op.key, rule.models[i], DROP, 0, op.spec.numel) < np.int64(rule.bernoulli[i]))
    if rules[0].l1 == "drop":
        restore(raw)
    if rules[0].trim:
        for i in models:
            for d, keep in zip(found, trim([d[i] for d in found], ops, rules, i), strict=True):
                d[i] = _where(d[i], keep)
    if rules[0].l1 == "trim":
        restore(raw)

    def majority(votes: torch.Tensor) -> float:
        if rules[0].zero != "majority" or not rules[0].whole_model:
            every = [votes]
        else:
            every = [_votes(d, f, s) for d, f, s in zip(found, factors, rules, strict=True)]
        return 1.0 if sum(int((x > 0).sum()) - int((x < 0).sum()) for x in every) > 0 else -1.0

    parts = zip(bases, found, factors, rules, ops, strict=True)
    return [ref.finish(mix(b, d, f, s, majority), op.spec) for b, d, f, s, op in parts]


def _votes(d: Sequence[torch.Tensor], factors: Sequence[float], rules: Consensus) -> torch.Tensor:
    if rules.wide_sums:
        d = [x.double() for x in d]
    v = [ref.number(w * f, x) * x for w, f, x in zip(rules.weight, factors, d, strict=True)]
    return vote(v, d, factors, rules)
