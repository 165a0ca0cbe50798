"""DARE: drop most of each delta at random, rescale the rest; then add up, or elect as TIES does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fastmerge.methods.base import Contract, Group, Param
from fastmerge.methods.ties import PAPER, SEED, warnings
from fastmerge.ops.consensus import rules as consensus

_DROP = (
    Param("density", "model", float, 1.0, "probability that an element of the delta is kept", 0.0, 1.0),
    Param("normalize", "shared", bool, False, "divide by the weights (dare_ties: of the models that agree)"),
    Param("rescale", "shared", bool, True, "make up for what was dropped"),
    Param("rescale_norm", "shared", ("l1", "keep"), "l1", "restore the sum of magnitudes, or divide by the density"),
    Param("shared_mask", "shared", bool, False, "drop the same elements of every model"),
)


class DareLinear(consensus.ConsensusMethod):
    r"""Keep each element of a delta with probability ``density``, rescale, and add the deltas to the base.

    .. math:: b + \lambda \sum_i w_i r_i\, m_i \odot (x_i - b), \quad m_i \sim \text{Bernoulli}(\rho_i)

    Shapes: ``b, x_i: [*S]`` -> ``[*S]``.
    Numerics: masks are a function of (seed, tensor, model, element); the probability is a multiple of 1/65536.
    The rescale is ``sum |d| / sum |m d|`` of the tensor in the ordered sum (mergekit), or 1 over the probability
    (``keep``, the paper); everything else in fp32 (fp64 for fp64) in model order, one rounding.
    Paper: Yu et al. 2023, "Language Models are Super Mario", arXiv 2311.03099.
    """

    name = "dare_linear"
    summary = "Random sparsification of deltas with rescaling, then task arithmetic."
    formula = "out = b + lambda sum_i w_i r_i m_i d_i, m_i ~ Bernoulli(density_i)"
    paper = "https://arxiv.org/abs/2311.03099"
    contract = Contract("required")
    params = (*consensus.delta_params("coefficient of the model's delta; null is 1/N"), *_DROP)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {"weight": 1.0, "density": 0.1, "rescale_norm": "keep"},
        "seed": {"weight": 1.0, "density": 0.1, "rescale_norm": "keep", "shared_mask": True},
    }
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.1, 0.5, 1.0]},
        {"weight": [0.6, 0.4], "density": 0.66, "normalize": True, "lambda": 1.3, "models": 2},
        {"weight": [1.0, -1.0], "density": [0.0, 0.3], "rescale": False, "delta_dtype": "base", "models": 2},
        {"preset": "paper"},
        {"preset": "seed", "models": 2},
    )

    @classmethod
    def spec(cls, group: Group) -> consensus.Consensus:
        """The group's parameters as the family takes them."""
        p = group.params
        bern, unbiased = consensus.drop_table(group, "density")
        drop = any(t < 65536 for t in bern)
        keep = p["rescale"] and p["rescale_norm"] == "keep"
        return replace(
            super().spec(group),
            bernoulli=bern,
            rescale=unbiased if keep else (1.0,) * len(bern),
            models=(0,) * len(bern) if p["shared_mask"] else group.indices,
            drop=drop,
            l1="drop" if drop and p["rescale"] and not keep else "none",
        )


class DareTies(DareLinear):
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
    params = (
        *DareLinear.params,
        Param("trim_density", "model", float, 1.0, "share kept by magnitude after the drop", 0.0, 1.0),
        *consensus.election_params(),
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mergekit": {},
        "paper": {
            **PAPER,
            **DareLinear.presets["paper"],
            "trim_density": 0.2,
            "normalize": True,
        },
        "seed": {**DareLinear.presets["seed"], **SEED, "trim_density": 0.2, "normalize": True},
    }
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"weight": [1.0, 0.5, 0.8], "density": [0.1, 0.5, 1.0]},
        {"weight": [0.6, 0.4], "density": 0.66, "normalize": True, "lambda": 1.3, "models": 2},
        {"weight": 1.0, "density": 0.5, "trim_density": 0.3, "ties": "spread", "elect": "count", "delta_dtype": "base"},
        {"preset": "paper", "density": 0.6},
        {"preset": "seed"},
    )

    @classmethod
    def spec(cls, group: Group) -> consensus.Consensus:
        """The group's parameters as the family takes them."""
        density = tuple(float(m["trim_density"]) for m in group.models)
        trim = any(d < 1 for d in density)
        return replace(super().spec(group), density=density, trim=trim, **consensus.election(group))

    @classmethod
    def warn(cls, group: Group) -> list[str]:
        """Names weights that do not do what one may expect, and a trim that trims nothing."""
        found = warnings(group)
        if any(m["density"] <= m["trim_density"] < 1 for m in group.models):
            found.append("trim_density is not below density: the trim finds fewer elements than it may keep")
        return [f"dare_ties: {line}" for line in found]
