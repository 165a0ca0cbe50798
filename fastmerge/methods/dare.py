"""DARE: drop most of each task vector at random, rescale the rest; then add up, or elect as TIES does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fastmerge.methods.base import Contract, per_model, shared
from fastmerge.methods.deltas import PAPER, SNIPPET, Election, TaskVectors, drop_table
from fastmerge.ops.consensus.rules import Consensus

if TYPE_CHECKING:
    from fastmerge.ops.spec import Spec


@dataclass(frozen=True, kw_only=True)
class DareLinear(TaskVectors):
    r"""Keep each element of a delta with probability ``density``, rescale, and add the deltas to the base.

    .. math:: b + \lambda \sum_i w_i r_i\, m_i \odot (x_i - b), \quad m_i \sim \text{Bernoulli}(\rho_i)

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: masks are a function of (seed, tensor, model, element); the probability is a multiple of 1/65536.
    The rescale is ``sum |d| / sum |m d|`` of the tensor in the ordered sum (mergekit), or 1 over the probability
    (``keep``, the paper); deltas in fp32 (fp64 for fp64), everything else in fp32 (fp64 for fp64 and where the result
    is fp32) in model order, one rounding.
    Paper: Yu et al. 2023, "Language Models are Super Mario", arXiv 2311.03099.
    """

    name = "dare_linear"
    summary = "Random sparsification of deltas with rescaling, then task arithmetic."
    formula = "out = b + lambda sum_i w_i r_i m_i d_i, m_i ~ Bernoulli(density_i)"
    paper = "https://arxiv.org/abs/2311.03099"
    contract = Contract("required")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {"weight": 1.0, "density": 0.1, "rescale_norm": "keep"},
        "task_vectors": {"weight": 1.0, "density": 0.1, "rescale_norm": "keep", "shared_mask": True},
    }
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.1, 0.5, 1.0]},
        {"weight": [0.6, 0.4], "density": 0.66, "normalize": True, "lambda": 1.3, "models": 2},
        {"weight": [1.0, -1.0], "density": [0.0, 0.3], "rescale": False, "delta_dtype": "base", "models": 2},
        {"preset": "paper"},
        {"preset": "task_vectors", "models": 2},
    )

    density: tuple[float, ...] = per_model("probability that an element is kept", 1.0, low=0.0, high=1.0)
    normalize: bool = shared("divide by the weights (dare_ties: of the models that agree)", default=False)
    rescale: bool = shared("make up for what was dropped", default=True)
    rescale_norm: Literal["l1", "keep"] = shared("restore the sum of magnitudes, or divide by the density", "l1")
    shared_mask: bool = shared("drop the same elements of every model", default=False)

    def rules(self, spec: Spec) -> Consensus:
        """The parameters as the kernels take them."""
        bernoulli, unbiased = drop_table(self.density)
        drop = any(t < 65536 for t in bernoulli)
        keep = self.rescale and self.rescale_norm == "keep"
        return (
            super()
            .rules(spec)
            ._replace(
                bernoulli=bernoulli,
                rescale=unbiased if keep else (1.0,) * len(bernoulli),
                div=self.divisor(normalize=self.normalize),
                models=(0,) * len(bernoulli) if self.shared_mask else spec.models,
                drop=drop,
                l1="drop" if drop and self.rescale and not keep else "none",
            )
        )

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that cancel."""
        return self.cancelled(normalize=self.normalize)


@dataclass(frozen=True, kw_only=True)
class DareTies(Election, DareLinear):
    r"""Drop and rescale as DARE does, then elect a sign per element and merge what agrees, as TIES does.

    .. math:: b + \lambda \sum_{i \in A} w_i r_i\, m_i \odot (x_i - b), \quad A = \text{models of the elected sign}

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: as ``dare_linear`` and ``ties``. In mergekit the random drop replaces the trim; ``trim_density``
    below 1 trims by magnitude after the drop, as the paper does. Ranks are those of the deltas before the
    rescale, and the rescale makes up for the drop only.
    Paper: Yu et al. 2023, "Language Models are Super Mario", arXiv 2311.03099.
    """

    name = "dare_ties"
    summary = "Random sparsification of deltas with rescaling, then sign election as in TIES."
    formula = "out = b + lambda sum_A w_i r_i m_i d_i, A = models whose sparsified delta has the elected sign"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {
            **PAPER,
            **DareLinear.presets["paper"],
            "trim_density": 0.2,
            "normalize": True,
        },
        "task_vectors": {**DareLinear.presets["task_vectors"], **SNIPPET, "trim_density": 0.2, "normalize": True},
    }
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.1, 0.5, 1.0]},
        {"weight": [0.6, 0.4], "density": 0.66, "normalize": True, "lambda": 1.3, "models": 2},
        {"weight": 1.0, "density": 0.5, "trim_density": 0.3, "ties": "spread", "elect": "count", "delta_dtype": "base"},
        {"preset": "paper", "density": 0.6},
        {"preset": "task_vectors"},
    )

    trim_density: tuple[float, ...] = per_model("share kept by magnitude after the drop", 1.0, low=0.0, high=1.0)

    def rules(self, spec: Spec) -> Consensus:
        """The parameters as the kernels take them."""
        trim = any(d < 1 for d in self.trim_density)
        election = self.election(normalize=self.normalize)
        return super().rules(spec)._replace(density=self.trim_density, trim=trim, **election)

    def warn(self, spec: Spec) -> list[str]:
        """Names weights that do not do what one may expect, and a trim that trims nothing."""
        found = self.unusual(normalize=self.normalize)
        if any(d <= t < 1 for d, t in zip(self.density, self.trim_density, strict=True)):
            found.append("trim_density is not below density: the trim finds fewer elements than it may keep")
        return [f"dare_ties: {line}" for line in found]
