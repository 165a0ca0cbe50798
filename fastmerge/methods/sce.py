"""SCE: select the elements where models differ most, weigh models by the size of their task vectors, elect signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fastmerge.methods.base import Contract, Method, shared
from fastmerge.ops import blocks
from fastmerge.ops.consensus import program as family
from fastmerge.ops.consensus import reference as definition
from fastmerge.ops.consensus.rules import Consensus
from fastmerge.ops.gram import check_sums
from fastmerge.ops.per_spec import PerSpec
from fastmerge.ops.program import Program
from fastmerge.ops.segments import F64, I64, TILE, Segments
from fastmerge.ops.selection.variance import Variance
from fastmerge.ops.tiles import Partial, gather, number

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.spec import Grain, Op, Spec

LEAST = 1e-6
"""Mean squares that add up to less make equal weights (mergekit's constant; usual for fine-tunes in bf16)."""

UNKNOWN = "the weights of its models are unknown"


def shares(squares: F64, numel: int) -> tuple[float, ...]:
    """Weights of models from the sums of squares of their task vectors."""
    means = [s / max(numel, 1) for s in squares.tolist()]
    total = 0.0
    for mean in means:
        total += mean
    return tuple(1 / len(means) if total < LEAST else mean / total for mean in means)


def rules(weights: tuple[float, ...], spec: Spec) -> Consensus:
    """The consensus of task vectors with these weights: signs are elected without them."""
    ones = (1.0,) * len(weights)
    return Consensus(
        weight=weights,
        count_weight=weights,
        bernoulli=(65536,) * len(ones),
        density=ones,
        rescale=ones,
        keep_count="floor",
        lam=1.0,
        div=1.0,
        models=spec.models,
        round_base=False,
        drop=False,
        trim=False,
        whole_model=False,
        ties="index",
        elect="mass",
        split=True,
        zero="plus",
        merge="mean",
        l1="none",
        wide_sums=spec.dense,
    )


class SceProgram(Program):
    """Any selection, sums of squares of what is left, then the consensus whose weights follow from them."""

    def __init__(self, ops: Sequence[Op], kernels: Kernels) -> None:
        """Takes tensors with the same number of models, and the backend."""
        self._ops = ops
        self._kernels = kernels
        self._numel = np.array([op.spec.numel for op in ops], np.int64)
        self._models = len(ops[0].spec.models)
        shares = [cast("Sce", op.spec.method).select_topk for op in ops]
        self._variance = Variance(ops, shares, kernels) if min(shares) < 1 else None
        self._merge: family.ConsensusProgram | None = None

    @property
    def ready(self) -> bool:
        """Once the weights are known."""
        return self._merge is not None

    @property
    def _due(self) -> Variance | None:
        """The selection, while it is due."""
        return None if self._variance is None or self._variance.done else self._variance

    def resident(self, segments: Segments) -> None:
        """Thresholds of small tensors in one call."""
        if self._due is not None:
            self._due.resident(segments)

    def pieces(self) -> I64 | None:
        """What selection asks for; everything for the squares."""
        return None if self._due is None else self._due.pieces()

    def statistics(self, segments: Segments) -> Any:
        """Of the selection, or inner products of the task vectors in every tile, of which the squares are used."""
        if self._due is not None:
            return self._due.statistics(segments)
        numbered, spans, tiles = number(segments)
        partials = np.empty((tiles, self._models * (self._models + 1) // 2))
        if self._variance is None:
            self._kernels.gram(numbered, partials, delta=True, diff=False, per_row=False)
        else:
            self._kernels.gram_kept(numbered, self._variance.keep, partials)
        return Partial(spans, partials)

    def advance(self, partials: Sequence[Any]) -> None:
        """Ends a pass of the selection, or adds tiles in order, from which the weights follow."""
        if self._due is not None:
            self._due.advance(partials)
            return
        tiles = -(-self._numel // TILE)
        sums = self._kernels.fold(gather(partials, tiles), np.concatenate([[0], np.cumsum(tiles)]))
        n = self._models
        squares = sums[:, [i * n - i * (i - 1) // 2 for i in range(n)]]
        check_sums(self._ops, squares, [1] * len(squares), UNKNOWN)
        found = [rules(shares(s, op.spec.numel), op.spec) for s, op in zip(squares, self._ops, strict=True)]
        self._merge = family.ConsensusProgram(self._ops, PerSpec.of_each(self._ops, found), self._kernels)

    def apply(self, segments: Segments) -> None:
        """The consensus."""
        if self._merge is None:
            raise AssertionError("apply before the statistics are complete")
        if self._variance is None:
            self._merge.apply(segments)
        else:
            self._merge.merge(segments, self._variance.keep)


@dataclass(frozen=True, kw_only=True)
class Sce(Method):
    r"""Keep the elements whose task vectors vary most, weigh models by mean squares, average what has the elected sign.

    .. math:: b + \frac{\sum_{i \in A} w_i d_i}{\sum_{i \in A} w_i}, \quad
              A = \{i : \operatorname{sign}(d_i) = \operatorname{sign} \sum_j d_j\}, \quad
              w_i = \frac{\overline{d_i^2}}{\sum_j \overline{d_j^2}}

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``; one weight per model and tensor, of what was selected.
    Numerics: squares in the ordered sum, weights in fp64, the rest as ties. ``select_topk`` is a share of the elements
    whose variance is not zero; variances are compared as sums of squared differences of pairs, so that equal ones are
    found equal, and equal models have none. Where elements tie, the first ones stay. Mean squares that add up to less
    than 1e-6 make equal weights, as in mergekit; agreeing weights that add up to less than 1e-6 are divided by all the
    same (mergekit divides by 1e-6). Task vectors that are not finite, or whose squares overflow, are an error.
    Paper: Wan et al. 2024, "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
    """

    name = "sce"
    summary = "Select what varies most, weigh models by the size of their task vectors, merge those that agree."
    formula = "out = b + sum_A w_i d_i / sum_A w_i, w_i ~ mean(d_i^2), A = models whose delta has the elected sign"
    paper = "https://arxiv.org/abs/2408.07990"
    contract = Contract("required")
    coded = True
    only_defined = "select_topk below 1 on a GPU"
    cases = (
        {},
        {"models": 2},
        {"select_topk": 0.3},
        {"select_topk": 0.1, "models": 2},
        {"select_topk": 0.0},
        {"select_topk": 0.5, "models": 9},
        {"select_topk": 0.5, "models": 1},
    )

    select_topk: float = shared("share of the varying elements that is kept", 1.0, low=0.0, high=1.0)
    int8_mask: bool = shared("accepted and ignored: masks are never stored", default=False)

    def wants(self) -> tuple[str, ...]:
        """Ranks of variances, where anything is selected."""
        return ("gram_kept",) if self.select_topk < 1 else ()

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Select, weigh, elect and merge."""
        import torch

        spec, keep = op.spec, self.selected(inputs, op.spec)

        def deltas(where: slice, some: list[torch.Tensor]) -> list[torch.Tensor]:
            d = [x - some[0] for x in some[1:]]
            return d if keep is None else [torch.where(keep[where], x, torch.zeros_like(x)) for x in d]

        squares = np.zeros((1, len(inputs) - 1))
        for where, some in blocks.pieces(inputs, spec):
            squares += [float(blocks.ordered_sum(x * x)) for x in deltas(where, some)]
        check_sums([op], squares, [1], UNKNOWN)
        made = rules(shares(squares[0], spec.numel), spec)

        def merged(where: slice, some: list[torch.Tensor]) -> torch.Tensor:
            return definition.mix(some[0], deltas(where, some), made.rescale, made, lambda _: 1.0)

        return blocks.in_pieces(inputs, spec, merged)

    def selected(self, inputs: Sequence[torch.Tensor], spec: Spec) -> torch.Tensor | None:
        """Where the variance is largest: the sum of the squared differences of all pairs, but for a factor."""
        import torch

        if self.select_topk >= 1:
            return None
        keys: blocks.Keys = np.zeros(spec.numel, np.uint64 if spec.double else np.uint32)
        for where, (_, *xs) in blocks.pieces(inputs, spec):
            total = torch.zeros_like(xs[0])
            for d in [x - y for i, x in enumerate(xs) for y in xs[i + 1 :]]:
                total = total + d * d
            keys[where] = blocks.keys(total)
        return torch.from_numpy(blocks.top(keys, int(np.count_nonzero(keys) * self.select_topk), "index", None))

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Sums of squares, then consensus."""
        return SceProgram(ops, kernels)

    def grain(self, spec: Spec) -> Grain:
        """Weights are a tensor's."""
        return "tensor"

    def defined(self, spec: Spec) -> int:
        """Of a selection the keys, a copy of them in another order, masks, and the result."""
        size = 8 if spec.double else 4
        return (2 * size + 4 + spec.out_dtype.size) * spec.numel if self.select_topk < 1 else super().defined(spec)

    def warn(self, spec: Spec) -> list[str]:
        """Says where nothing is selected, whatever the weights are."""
        if self.select_topk == 0:
            return ["sce: select_topk: 0 selects nothing: the result is the base"]
        if self.select_topk < 1 and len(spec.models) == 1:
            return ["sce: one model varies nowhere, so select_topk below 1 selects nothing: the result is the base"]
        return []
