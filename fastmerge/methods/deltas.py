"""What methods that add task vectors to a base share: parameters, and how they become the rules of the kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from fastmerge.keys import rescale, threshold
from fastmerge.methods.base import Method, per_model, shared
from fastmerge.ops.consensus.rules import Consensus, in_range

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec


def rules_of(spec: Spec) -> Consensus:
    """The rules of a spec whose method is a :class:`TaskVectors`, in numbers that the work type holds."""
    rules = _rules(spec)
    return in_range(rules, double=spec.double or rules.wide_sums)


@functools.lru_cache(256)
def _rules(spec: Spec) -> Consensus:
    return cast("TaskVectors", spec.method).rules(spec)


@dataclass(frozen=True, kw_only=True)
class TaskVectors(Method):
    """Methods of the consensus family: each says what :class:`Consensus` its parameters make, the rest follows."""

    coded = True

    weight: tuple[float | None, ...] = per_model("coefficient of the model's task vector; null is 1/N")
    lam: float = shared("factor of the merged task vector", 1.0, name="lambda")
    delta_dtype: Literal["fp32", "base"] = shared("task vectors are exact, or rounded to the base's type", "fp32")
    int8_mask: bool = shared("accepted and ignored: masks are never stored", default=False)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of all models; null is 1 / N."""
        return tuple(1.0 / len(self.weight) if w is None else w for w in self.weight)

    def divisor(self, *, normalize: bool) -> float:
        """Sum of the weights with ``normalize``, 1 without it or where they cancel (as in mergekit)."""
        total = 0.0
        for w in self.weights:
            total += w
        return total if normalize and abs(total) >= 1e-8 else 1.0

    def cancelled(self, *, normalize: bool) -> list[str]:
        """Names weights that cancel where they were to be divided by."""
        lost = normalize and abs(sum(self.weights)) < 1e-8
        return [f"{self.name}: weights sum to zero, so normalize is left out"] if lost else []

    def rules(self, spec: Spec) -> Consensus:
        """The parameters as the kernels take them.

        Here: weighted task vectors added up, without drop, trim or election. Methods replace what they do otherwise.
        """
        ones = (1.0,) * len(self.weight)
        return Consensus(
            weight=self.weights,
            count_weight=ones,
            bernoulli=(65536,) * len(ones),
            density=ones,
            rescale=ones,
            keep_count="floor",
            lam=self.lam,
            div=1.0,
            models=spec.models,
            round_base=self.delta_dtype == "base",
            drop=False,
            trim=False,
            whole_model=False,
            ties="index",
            elect="none",
            split=False,
            zero="plus",
            merge="sum",
            l1="none",
            wide_sums=spec.dense,
        )

    @property
    def random(self) -> bool:
        """Drops, and ties that are thinned, draw random numbers."""
        return True

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """The family's definition for a model of one tensor."""
        from fastmerge.ops.consensus import reference as definition

        return definition.reference([inputs], [op], [rules_of(op.spec)])[0]

    @classmethod
    def reference_all(cls, inputs: Sequence[Sequence[torch.Tensor]], ops: Sequence[Op]) -> list[torch.Tensor]:
        """All tensors together where the threshold is the model's."""
        if ops and ops[0].spec.grain == "model":
            from fastmerge.ops.consensus import reference as definition
            from fastmerge.ops.per_spec import PerSpec

            return definition.reference(inputs, ops, PerSpec(rules_of, ops).all())
        return super().reference_all(inputs, ops)

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Any selection and sums, then consensus."""
        from fastmerge.ops.consensus import program as family
        from fastmerge.ops.per_spec import PerSpec

        return family.program(ops, PerSpec(rules_of, ops), kernels)

    def grain(self, spec: Spec) -> Grain:
        """Trimming, restoring a sum of magnitudes and majorities look at a tensor, or at the whole model."""
        rules = _rules(spec)
        if not (rules.trim or rules.l1 != "none" or rules.zero == "majority"):
            return "element"
        return "model" if rules.whole_model and (rules.trim or rules.zero == "majority") else "tensor"


@dataclass(frozen=True, kw_only=True)
class Election(TaskVectors):
    """Parameters of the trim, the election and the disjoint merge."""

    trim_scope: Literal["tensor", "model"] = shared("rank magnitudes in each tensor or in the model", "tensor")
    ties: Literal["index", "all", "spread"] = shared("at the threshold: the first, all, or thinned", "index")
    keep_count: Literal["at_least_one", "floor", "plus_one", "complement"] = shared(
        "how a density becomes a number of elements", "at_least_one"
    )
    elect: Literal["mass", "count"] = shared("sign of the sum of task vectors, or of their number", "mass")
    elect_weighted: bool = shared("weights count in the sum (never in the number)", default=True)
    zero: Literal["plus", "majority", "base"] = shared("what a tied vote elects", "plus")
    merge: Literal["mean", "mean_count", "sum", "max"] = shared(
        "agreeing task vectors: divided by their weights, by their number, summed, or the largest", "mean"
    )

    def election(self, *, normalize: bool) -> dict[str, Any]:
        """The fields of :class:`Consensus` that these parameters decide."""
        merge = "sum" if not normalize and self.merge in ("mean", "mean_count") else self.merge
        return {
            "div": 1.0,
            "count_weight": tuple(1.0 for _ in self.weight) if merge == "mean_count" else self.weights,
            "keep_count": self.keep_count,
            "whole_model": self.trim_scope == "model",
            "ties": self.ties,
            "elect": self.elect,
            "split": self.elect == "mass" and not self.elect_weighted,
            "zero": self.zero,
            "merge": "mean" if merge == "mean_count" else merge,
        }

    def unusual(self, *, normalize: bool) -> list[str]:
        """What an election makes of unusual weights."""
        w = self.weights
        found = []
        if any(x < 0 for x in w) and normalize and self.merge == "mean":
            found.append(NEGATIVE)
        if any(x <= 0 for x in w) and (not self.elect_weighted or self.merge == "mean_count"):
            found.append("agreement is that of weighted deltas: weight 0 is never counted, a negative weight turns")
        if len(w) > 1 and normalize and self.merge == "mean_count" and all(x is None for x in self.weight):
            found.append("weights 1/N divided by the count shrink the merged delta by the number of models")
        return found


def drop_table(density: Sequence[float]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Bernoulli thresholds and the unbiased rescale of each model."""
    bernoulli = tuple(threshold(d) for d in density)
    return bernoulli, tuple(rescale(t) for t in bernoulli)


NEGATIVE = "negative weights flip the vote and make the divisor signed, so an elected sign can turn over"

PAPER: Mapping[str, Any] = {
    "trim_scope": "model",
    "ties": "all",
    "keep_count": "plus_one",
    "elect_weighted": False,
    "zero": "majority",
    "merge": "mean_count",
}
"""The rules of the TIES authors' code, as overrides of mergekit's."""

SNIPPET: Mapping[str, Any] = {
    "weight": None,
    "ties": "all",
    "keep_count": "complement",
    "zero": "base",
    "merge": "mean_count",
}
"""The rules of the widespread 40-line version: weights 1/N and a division by the count (N times too small)."""

PEFT: Mapping[str, Any] = {"keep_count": "floor", "elect_weighted": False, "merge": "mean_count"}
"""The rules of peft's ``merge_utils``."""
