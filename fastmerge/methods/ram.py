"""RAM: what one model alone has changed is added as it is, what several have changed is averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.methods.base import Contract, shared
from fastmerge.methods.elementwise import Elementwise, deltas, number
from fastmerge.ops.elementwise import Array
from fastmerge.ops.segments import I64

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastmerge.ops.spec import Op


@dataclass(frozen=True, kw_only=True)
class Ram(Elementwise):
    r"""Add each task vector where no other model moves the element, and the mean where several do.

    .. math:: b + \sum_{i \in C} f_i d_i, \quad C = \{i : |d_i| > \epsilon\}, \quad f_i = \frac{1}{|C|}

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: deltas in fp32 (fp64 where an input is fp64 or the result fp32), one division, one rounding. A NaN counts
    as changed.
    Paper: "Reinforced Agent Merging", arXiv 2601.13572.
    """

    name = "ram"
    summary = "Task vectors: added where one model moves an element, averaged where several do."
    formula = "out = b + sum_C d_i / |C|, C = models with |d_i| > epsilon"
    paper = "https://arxiv.org/abs/2601.13572"
    contract = Contract("required")
    cases = ({}, {"epsilon": 2e-3, "models": 4})
    wide = True

    epsilon: float = shared("largest change that counts as none", 1e-5, low=0.0)

    def merged(self, op: Op, xs: list[Array], counts: I64) -> Array:
        """Count, weigh what is unique, add up, divide by the count."""
        base, d, changed, several = self.changes(xs)
        mix = np.zeros_like(base)
        for x, c, f in zip(d, changed, self.factors(counts, len(d)), strict=True):
            mix = mix + np.where(c, np.where(several == 1, number(f, x) * x, x), number(0.0, x))
        return base + mix / np.maximum(several, number(1.0, base))

    def changes(self, xs: list[Array]) -> tuple[Array, list[Array], list[npt.NDArray[np.bool_]], Array]:
        """The base, the task vectors, where each changes an element, and how many do."""
        base, d = deltas(xs)
        changed = [~(np.abs(x) <= number(self.epsilon, base)) for x in d]  # so that a NaN counts
        several: Any = changed[0].astype(base.dtype)
        for c in changed[1:]:
            several = several + c.astype(base.dtype)
        return base, d, changed, several

    def factors(self, counts: I64, models: int) -> list[float]:
        """What the elements count that a model alone has changed."""
        return [1.0] * models


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

    def counted(self, op: Op, xs: list[Array]) -> I64:
        """For each model the changes that it makes alone, then those that others make too."""
        _, _, changed, several = self.changes(xs)
        alone = [np.count_nonzero(c & (several == 1)) for c in changed]
        return np.array([alone, [np.count_nonzero(c & (several > 1)) for c in changed]], np.int64)

    def factors(self, counts: I64, models: int) -> list[float]:
        """By the numbers of shared and of unshared changes."""
        if not counts.size:
            return [1.0] * models  # of a tensor without elements
        out = []
        for alone, together in counts.T.tolist():
            least = max(float(alone), self.epsilon)
            ratio = together / least if least else self.alpha
            out.append(1.0 + self.r * min(ratio, self.alpha))
        return out
