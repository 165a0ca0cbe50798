"""What methods share that thin task vectors by a rule of their own, which no kernel has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from fastmerge.methods.base import per_model, shared
from fastmerge.methods.deltas import NEGATIVE, TaskVectors, rules_of
from fastmerge.ops import blocks
from fastmerge.ops.consensus import masked
from fastmerge.ops.consensus import reference as definition
from fastmerge.ops.consensus.masked import Draw
from fastmerge.ops.consensus.rules import Consensus, l1_factor
from fastmerge.ops.per_spec import PerSpec
from fastmerge.ops.segments import TILE
from fastmerge.philox import u16

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec


def thinned(d: torch.Tensor, stays: torch.Tensor | None) -> torch.Tensor:
    """A task vector where it stays, 0 elsewhere; all of it without a mask."""
    import torch

    return d if stays is None else torch.where(stays, d, torch.zeros_like(d))


def total(d: torch.Tensor, stays: torch.Tensor | None, *, wide: bool) -> float:
    """Sum of the magnitudes that stay, tile by tile in the written order; ``wide``: of lanes in fp64."""
    out = 0.0
    for first in range(0, len(d), TILE):
        where = slice(first, first + TILE)
        some = thinned(d[where], stays if stays is None else stays[where])
        out += float(blocks.ordered_sum(some.abs(), wide=wide))
    return out


def kept(op: Op, model: int, keys: blocks.Keys, draw: Draw) -> blocks.Mask:
    """Which elements an op's method leaves."""
    return cast("Sparse", op.spec.method).keep(keys, op, model, draw)


@dataclass(frozen=True, kw_only=True)
class Sparse(TaskVectors):
    """Each says which elements of a task vector stay, and whether signs are elected among what stays.

    What stays is decided in numpy and goes to the family's kernels as a mask; on a GPU the definition stands in, unless
    every density is 1, so that everything stays.
    """

    only_defined = "a density below 1 on a GPU"
    elects: ClassVar[bool] = False
    """Whether the models of an element vote on its sign, as in ties."""

    density: tuple[float, ...] = per_model("share of the task vector that is kept", 1.0, low=0.0, high=1.0)
    normalize: bool = shared("divide by the weights (where signs are elected: of what agrees)", default=False)
    rescale: bool = shared("restore the sum of magnitudes that thinning took", default=False)

    @abstractmethod
    def keep(self, keys: blocks.Keys, op: Op, model: int, draw: Draw) -> blocks.Mask:
        """Which elements of a model's task vector stay, where its density is below 1; ``keys`` are its magnitudes."""

    def rules(self, spec: Spec) -> Consensus:
        """The parameters as the kernels take them, of task vectors that are thinned already."""
        made = super().rules(spec)
        if not self.elects:
            return made._replace(div=self.divisor(normalize=self.normalize))
        return made._replace(
            count_weight=self.weights, elect="mass", zero="plus", merge="mean" if self.normalize else "sum"
        )

    @property
    def thins(self) -> bool:
        """Whether anything is to go."""
        return any(x < 1 for x in self.density)

    def wants(self) -> tuple[str, ...]:
        """Masks, where anything is to go."""
        return ("masks",) if self.thins else ()

    def grain(self, spec: Spec) -> Grain:
        """Thinning looks at the whole tensor."""
        return "matrix" if self.thins else "element"

    def workspace(self, spec: Spec) -> int:
        """Keys and masks."""
        return masked.workspace(spec.numel, len(spec.models), double=spec.double) if self.thins else 0

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Masks of whole tensors, then consensus; where everything stays, that alone."""
        if not any(cast("Sparse", spec.method).thins for spec in dict.fromkeys([op.spec for op in ops])):
            return super().program(ops, kernels)

        def rules(spec: Spec) -> Consensus:
            method = cast("Sparse", spec.method)
            l1: Literal["drop", "none"] = "drop" if method.rescale else "none"
            return rules_of(spec)._replace(drop=True, l1=l1, density=method.density)

        return masked.MaskedProgram(ops, PerSpec(rules, ops), kernels, kept)

    @property
    def random(self) -> bool:
        """Ranks need no random numbers."""
        return False

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Thin each task vector, restore its size, then the family's definition; one task vector is held at a time."""
        import torch

        rules = rules_of(op.spec)
        kept: list[torch.Tensor | None] = []
        factors = []
        for i, x in enumerate(inputs[1:]):
            stays, factor = None, 1.0
            if self.density[i] < 1:
                _, (d,) = definition.deltas([inputs[0], x], op, rules)
                stays = torch.from_numpy(self.keep(blocks.keys(d), op, i, u16))
                if self.rescale:
                    before, after = (total(d, some, wide=rules.wide_sums) for some in (None, stays))
                    factor = l1_factor(before, after, op.name)
            kept.append(stays)
            factors.append(factor)

        def merged(where: slice, some: list[torch.Tensor]) -> torch.Tensor:
            base, found = definition.deltas(some, op, rules)
            thin = [thinned(d, m if m is None else m[where]) for d, m in zip(found, kept, strict=True)]
            return definition.mix(base, thin, factors, rules, lambda _: 1.0)

        return blocks.in_pieces(inputs, op.spec, merged)

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that do not do what one may expect."""
        if not self.elects:
            return self.cancelled(normalize=self.normalize)
        return [f"{self.name}: {NEGATIVE}"] if self.normalize and any(w < 0 for w in self.weights) else []
