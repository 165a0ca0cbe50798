"""What methods share that thin task vectors by a rule of their own, which no kernel has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastmerge.methods.base import per_model, shared
from fastmerge.methods.deltas import NEGATIVE, TaskVectors, rules_of
from fastmerge.ops import blocks
from fastmerge.ops.consensus import reference as definition
from fastmerge.ops.consensus.rules import Consensus, l1_factor

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.spec import Grain, Op, Spec


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

    def keep(self, d: torch.Tensor, op: Op, model: int) -> blocks.Mask:
        """Which elements of a model's flat task vector stay, where its density is below 1."""
        raise NotImplementedError

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
        """Thin, restore sizes, then the family's definition."""
        import torch

        rules = rules_of(op.spec)
        base, found = definition.deltas(inputs, op, rules)
        factors = [1.0] * len(found)
        for i, d in enumerate(found):
            if self.density[i] < 1:
                kept = torch.where(torch.from_numpy(self.keep(d, op, i)), d, torch.zeros_like(d))
                if self.rescale:
                    before, after = (float(blocks.ordered_sum(x.abs())) for x in (d, kept))
                    factors[i] = l1_factor(before, after, op.name)
                found[i] = kept
        return blocks.finish(definition.mix(base, found, factors, rules, lambda _: 1.0), op.spec)

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that do not do what one may expect."""
        if self.elects and self.normalize and any(w < 0 for w in self.weights):
            return [f"{self.name}: {NEGATIVE}"]
        return []
