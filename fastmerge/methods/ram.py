"""RAM: what one model alone has changed is added as it is, what several have changed is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastmerge.methods.base import Contract, Method, shared
from fastmerge.ops import blocks

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.spec import Op, Spec


@dataclass(frozen=True, kw_only=True)
class Ram(Method):
    r"""Add each task vector where no other model moves the element, and the mean where several do.

    .. math:: b + \sum_{i \in C} f_i d_i, \quad C = \{i : |d_i| > \epsilon\}, \quad f_i = \frac{1}{|C|}

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: deltas in fp32 (fp64 where an input is fp64), one division, one rounding. A NaN counts as changed.
    Paper: "Reinforced Agent Merging", arXiv 2601.13572.
    """

    name = "ram"
    summary = "Task vectors: added where one model moves an element, averaged where several do."
    formula = "out = b + sum_C d_i / |C|, C = models with |d_i| > epsilon"
    paper = "https://arxiv.org/abs/2601.13572"
    contract = Contract("required")
    cases = ({}, {"epsilon": 2e-3, "models": 4})

    epsilon: float = shared("largest change that counts as none", 1e-5, low=0.0)

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """Count, weigh what is unique, add up, divide by the count."""
        import torch

        factors = self.factors(inputs, op.spec)

        def merged(_: slice, some: list[torch.Tensor]) -> torch.Tensor:
            base, d, changed, count = self.changes(some)
            mix = torch.zeros_like(base)
            for x, c, f in zip(d, changed, factors, strict=True):
                mix = mix + torch.where(c, torch.where(count == 1, blocks.number(f, x) * x, x), torch.zeros_like(x))
            return base + mix / count.clamp(min=1.0)

        return blocks.in_pieces(inputs, op.spec, merged)

    def changes(
        self, some: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """The base, the task vectors, where each changes an element, and how many do."""
        base, *others = some
        d = [x - base for x in others]
        changed = [~(x.abs() <= blocks.number(self.epsilon, base)) for x in d]  # so that a NaN counts
        count = changed[0].to(base.dtype)
        for c in changed[1:]:
            count = count + c
        return base, d, changed, count

    def factors(self, inputs: Sequence[torch.Tensor], spec: Spec) -> list[float]:
        """What the elements count that a model alone has changed."""
        return [1.0] * (len(inputs) - 1)


@dataclass(frozen=True, kw_only=True)
class RamPlusTensorLocal(Ram):
    r"""As ram, but what a model alone has changed counts more, the more of its changes it shares with others.

    .. math:: f_i = 1 + r \min\Bigl(\alpha, \frac{\text{shared}_i}{\max(\text{alone}_i, \epsilon)}\Bigr)
              \ \text{where model i is alone}, \quad \frac{1}{|C|} \ \text{elsewhere}

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``; elements are counted in each tensor.
    Numerics: as ram; the factors in fp64. The result has the type of the others (mergekit: always fp32).
    Paper: "Reinforced Agent Merging", arXiv 2601.13572.
    """

    name = "ramplus_tl"
    summary = "As ram, with what one model alone moves enlarged by the share of its changes that others make too."
    formula = "out = b + f_i d_i where one model moves it, f_i = 1 + r min(alpha, shared_i / alone_i); else as ram"
    paper = "https://arxiv.org/abs/2601.13572"
    contract = Contract("required")
    cases = ({}, {"r": 0.5, "alpha": 3.0, "epsilon": 2e-3, "models": 4})

    r: float = shared("how much sharing enlarges", 0.1)
    alpha: float = shared("largest ratio of shared to unshared changes", 0.2, low=0.0)

    def factors(self, inputs: Sequence[torch.Tensor], spec: Spec) -> list[float]:
        """By the numbers of shared and of unshared changes."""
        own, common = [0] * len(spec.models), [0] * len(spec.models)
        for _, some in blocks.pieces(inputs, spec):
            _, _, changed, count = self.changes(some)
            for i, c in enumerate(changed):
                own[i] += int((c & (count == 1)).sum())
                common[i] += int((c & (count > 1)).sum())
        out = []
        for alone, together in zip(own, common, strict=True):
            least = max(float(alone), self.epsilon)
            ratio = together / least if least else self.alpha
            out.append(1.0 + self.r * min(ratio, self.alpha))
        return out
