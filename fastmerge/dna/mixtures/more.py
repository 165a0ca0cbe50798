"""A mixture of experts into a larger one: each of its experts several times."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fastmerge.dna import results
from fastmerge.dna.draft import MOST_COPIES, Draft, Request
from fastmerge.dna.mixtures.layout import Blend, active, assemble, check_active, groups, mixture, set_experts
from fastmerge.dna.parent import Parent
from fastmerge.errors import RecipeError
from fastmerge.ops.replicate import MOST_SIGMA


@dataclass(frozen=True)
class MoreExpertsConfig:
    """How often each expert is there.

    Attributes:
        num_experts: of the result: a multiple of the model's; twice as many where None.
        num_experts_per_token: of the result; None multiplies it likewise, which alone computes the same function.
        noise: standard deviation of normal noise on every copy but the first, so that copies can learn apart.
        noise_mode: ``relative`` to the root mean square of each tensor, or ``absolute``.
        seed: of the noise.
    """

    num_experts: int | None = None
    num_experts_per_token: int | None = None
    noise: float = 0.0
    noise_mode: Literal["relative", "absolute"] = "relative"
    seed: int = 0


def plan_more_experts(parent: Parent, config: MoreExpertsConfig | None = None) -> Draft:
    r"""A mixture whose every expert is there :math:`m` times, with its row of the router.

    .. math:: \sum_{j \in \text{top}_{mk}} \hat p_j f_j(x) = \sum_{i \in \text{top}_k} p_i f_i(x)

    holds where ``k`` is multiplied by :math:`m` too: copies have equal logits, so all copies of the chosen experts
    are chosen, and each has an m-th of the weight. Copies stand beside each other, so that equal logits in bf16 are
    told apart as in the model; with groups of experts (``n_group``) the groups are repeated as they are. Routers of
    sigmoids without ``norm_topk_prob`` have ``routed_scaling_factor`` divided by :math:`m`.

    Args:
        parent: of any architecture with experts.
        config: see :class:`MoreExpertsConfig`.

    Raises:
        RecipeError: numbers that do not fit.
        CheckpointError: a model that is no mixture, or is not known.
    """
    config = config or MoreExpertsConfig()
    model = mixture(parent)
    before, k = model.sizes["experts"], active(model.config, parent.ref)
    wanted = 2 * before if config.num_experts is None else config.num_experts
    problems = []
    if not isinstance(wanted, int) or not before <= wanted <= MOST_COPIES or wanted % before:
        problems.append(
            f"num_experts: expected a multiple of the model's {before}, at most {MOST_COPIES}, got {wanted!r:.80}"
        )
    times = wanted // before if not problems else 1
    chosen = k * times if config.num_experts_per_token is None else config.num_experts_per_token
    problems += check_active(chosen, wanted) if not problems else []
    if not (isinstance(config.noise, int | float) and 0 <= config.noise <= MOST_SIGMA):
        problems.append(f"noise: expected a number in 0 .. 2**100, got {config.noise!r}")
    if config.noise_mode not in ("relative", "absolute"):
        problems.append(f"noise_mode: expected relative or absolute, got {config.noise_mode!r}")
    if problems:
        raise RecipeError(problems)
    new = dict(model.config)
    set_experts(new, model, wanted, chosen)
    blocks = groups(new) > 1
    if blocks:
        new["n_group"] = groups(new) * times
        new["topk_group"] = int(new.get("topk_group") or 1) * times
    if "routed_scaling_factor" in new and not new.get("norm_topk_prob", True):
        new["routed_scaling_factor"] = float(new.get("routed_scaling_factor", 1.0)) / times
    draft = Draft(Request("more-experts", (parent.ref,), asdict(config)), (parent,), new, config.seed)
    origin = list(range(before)) * times if blocks else [e for e in range(before) for _ in range(times)]
    noise = [float(config.noise) if e in origin[:i] else 0.0 for i, e in enumerate(origin)]
    relative = config.noise_mode == "relative"
    blends = [Blend(((0, e),), noise=n, relative=relative) for e, n in zip(origin, noise, strict=True)]
    layers = {i: blends for i in range(model.layers) if model.is_sparse(i)}
    assemble(draft, [model], layers, lambda name: draft.copy(name, parent.tensors[name]))
    draft.facts |= {"experts": {"before": before, "after": wanted, "from": origin}, "num_experts_per_token": chosen}
    if chosen != k * times:
        draft.warnings.append(
            f"num_experts_per_token: {chosen} of {wanted} experts do not compute what {k} of {before} do; "
            f"{k * times} would"
        )
    if config.noise:
        draft.warnings.append(f"noise: {config.noise:g} ({config.noise_mode}): the result computes another function")
    return draft


def more_experts(
    model: Any,
    config: MoreExpertsConfig | None = None,
    *,
    model_config: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Makes a larger mixture of one: see :func:`plan_more_experts`.

    Args:
        model: a transformers module, a path with ``out``, or a state dictionary; not changed.
        config: see :class:`MoreExpertsConfig`.
        model_config: of a state dictionary: its config.json.
        out: directory to write, for a model on disk.
        options: of :func:`fastmerge.dna.results.write` on disk; in memory ``backend`` alone.

    Returns:
        As :func:`fastmerge.dna.results.deliver`.

    Raises:
        FastMergeError: as of :func:`plan_more_experts`, and of writing.
    """
    parent = Parent.open(model, config=model_config)
    return results.deliver(plan_more_experts(parent, config), model, out, **options)
