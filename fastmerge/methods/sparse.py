"""What methods share that thin task vectors by a rule of their own, which no kernel has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastmerge.methods.base import per_model, shared
from fastmerge.methods.deltas import NEGATIVE, TaskVectors, rules_of
from fastmerge.ops import blocks
from fastmerge.ops.consensus import reference as definition
from fastmerge.ops.consensus.rules import Consensus, l1_factor
from fastmerge.ops.segments import TILE

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.spec import Grain, Op, Spec


def thinned(d: torch.Tensor, stays: torch.Tensor | None) -> torch.Tensor:
    """A task vector where it stays, 0 elsewhere; all of it without a mask."""
    import torch

    return d if stays is None else torch.where(stays, d, torch.zeros_like(d))


def total(d: torch.Tensor, stays: torch.Tensor | None) -> float:
    """Sum of the magnitudes that stay, tile by tile in the written order."""
    out = 0.0
    for first in range(0, len(d), TILE):
        where = slice(first, first + TILE)
        out += float(blocks.ordered_sum(thinned(d[where], stays if stays is None else stays[where]).abs()))
    return out


@dataclass(frozen=True, kw_only=True)
class Sparse(TaskVectors):
    """Each says which elements of a task vector stay, and whether signs are elected among what stays.

    Where every density is 1, everything stays, and the kernels of the family apply.
    """

    only_defined = "a density below 1"
    elects: ClassVar[bool] = False
    """Whether the models of an element vote on its sign, as in ties."""

    density: tuple[float, ...] = per_model("share of the task vector that is kept", 1.0, low=0.0, high=1.0)
    normalize: bool = shared("divide by the weights (where signs are elected: of what agrees)", default=False)
    rescale: bool = shared("restore the sum of magnitudes that thinning took", default=False)

    @abstractmethod
    def keep(self, d: torch.Tensor, op: Op, model: int) -> blocks.Mask:
        """Which elements of a model's flat task vector stay, where its density is below 1."""

    def rules(self, spec: Spec) -> Consensus:
        """The parameters as the kernels take them, of task vectors that are thinned already."""
        made = super().rules(spec)
        if not self.elects:
            return made._replace(div=self.divisor(normalize=self.normalize))
        return made._replace(
            count_weight=self.weights, elect="mass", zero="plus", merge="mean" if self.normalize else "sum"
        )

    def gap(self) -> str | None:
        """No kernel thins by these rules."""
        thins = any(x < 1 for x in self.density)
        return f"{self.name} with {self.only_defined} has no kernels yet" if thins else None

    def grain(self, spec: Spec) -> Grain:
        """Thinning looks at the whole tensor."""
        return "matrix" if self.gap() else "element"

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
                stays = torch.from_numpy(self.keep(d, op, i))
                if self.rescale:
                    factor = l1_factor(total(d, None), total(d, stays), op.name)
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
