"""Model Breadcrumbs: take the outliers and the small elements out of task vectors; then add up, or elect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fastmerge.methods.base import Contract, per_model
from fastmerge.methods.sparse import Sparse
from fastmerge.ops import blocks
from fastmerge.ops.consensus.masked import Draw

if TYPE_CHECKING:
    from fastmerge.ops.spec import Op, Spec


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Sparse):
    r"""Take the largest share ``gamma`` and the smallest elements out of each delta, and add the deltas to the base.

    .. math:: b + \lambda \sum_i w_i\, m_i \odot (x_i - b)

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``; ranks per tensor.
    Numerics: of n elements ``int(density n)`` stay, below the ``int(gamma n)`` largest, or fewer of those where they
    would not be enough; a density of 1 keeps everything, outliers too, and one that makes no element keeps none (all
    as in mergekit). Exact ranks, of equal magnitudes the first counts as the larger, as in ties; a NaN is no outlier to
    be rid of, it stays. Deltas in fp32 (fp64 for fp64), everything else in fp32 (fp64 for fp64 and where the result is
    fp32) in model order, one rounding.
    Paper: Davari and Belilovsky 2023, "Model Breadcrumbs", arXiv 2312.06795.
    """

    name = "breadcrumbs"
    summary = "Deltas without their outliers and small elements, then task arithmetic."
    formula = "out = b + lambda sum_i w_i m_i d_i, m_i: the next density_i below the largest gamma_i"
    paper = "https://arxiv.org/abs/2312.06795"
    contract = Contract("required")
    cases: ClassVar[tuple[dict[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.3, 0.9, 1.0], "gamma": [0.01, 0.2, 0.1]},
        {"weight": [0.6, 0.4], "normalize": True, "lambda": 1.3, "models": 2},
    )

    gamma: tuple[float, ...] = per_model("share of the largest elements that goes first", 0.01, low=0.0, high=1.0)

    def keep(self, keys: blocks.Keys, op: Op, model: int, draw: Draw) -> blocks.Mask:
        """A band of ranks."""
        n = op.spec.numel
        stay, gone = int(self.density[model] * n), int(self.gamma[model] * n)
        upto = n - max(0, n - stay - gone)
        band = blocks.top(keys, upto, "index", None)
        band &= ~blocks.top(keys, upto - stay, "index", None)
        band |= keys == blocks.NAN[keys.dtype.itemsize]
        return band

    def warn(self, spec: Spec) -> list[str]:
        """Names shares that exclude each other."""
        both = dict.fromkeys(zip(self.density, self.gamma, strict=True))
        return super().warn(spec) + [
            f"{self.name}: density {p:g} leaves room to take out {1 - p:g} of the elements, not gamma {g:g}"
            for p, g in both
            if p < 1 < p + g
        ]


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(Breadcrumbs):
    r"""Take the largest share ``gamma`` and the smallest elements out of each delta, then elect as TIES does.

    .. math:: b + \lambda \sum_{i \in A} w_i d_i, \quad d_i = m_i \odot (x_i - b)

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: the ranks of breadcrumbs, then the election of ties; ``normalize`` divides by the weights that agree.
    Paper: Davari and Belilovsky 2023, "Model Breadcrumbs", arXiv 2312.06795.
    """

    name = "breadcrumbs_ties"
    summary = "Deltas without their outliers and small elements, then sign election."
    formula = "out = b + lambda sum_A w_i m_i d_i, m_i: the next density_i below the largest gamma_i"
    paper = "https://arxiv.org/abs/2312.06795"
    contract = Contract("required")
    elects: ClassVar[bool] = True
    cases: ClassVar[tuple[dict[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.3, 0.9, 0.0], "gamma": 0.05, "rescale": True},
        {"weight": [0.6, 0.4], "normalize": True, "models": 2},
    )
