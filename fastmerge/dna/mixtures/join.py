"""Several mixtures of experts into one that has the experts of all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastmerge.checkpoint.header import listing
from fastmerge.dna import results
from fastmerge.dna.anatomy import Anatomy
from fastmerge.dna.draft import Draft, Request
from fastmerge.dna.mixtures.layout import (
    ACTIVE,
    EXPERTS,
    Blend,
    active,
    assemble,
    check_active,
    groups,
    mixture,
    set_experts,
)
from fastmerge.dna.mixtures.trunk import Trunk, place
from fastmerge.dna.parent import Parent
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.planning.compare import differences, others


@dataclass(frozen=True)
class JoinExpertsConfig:
    """What several mixtures become one by.

    Attributes:
        num_experts_per_token: of the result; None leaves that of the models, which must then agree.
        merge_method: of everything that is no expert's and no router's: attention, norms, embeddings, shared experts.
        parameters: of that method, in the order of the models; the mean where ``linear`` has none.
        preset: a published variant of it.
        base: position of the base among the models, for methods that work on task vectors; its experts count, too.
        seed: of the method's random numbers.
    """

    num_experts_per_token: int | None = None
    merge_method: str = "linear"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    base: int | None = None
    seed: int = 0


COUNTS = {*EXPERTS, *ACTIVE, "output_router_logits"}
"""Keys in which the configurations of mixtures that are joined may differ."""


def plan_join_experts(parents: Sequence[Parent], config: JoinExpertsConfig | None = None) -> Draft:
    r"""Mixtures of one architecture as one: their experts in the order of the models, the rest merged.

    The router's rows, and its biases, are joined as they are: a token's logits are those that each model's own router
    gives it, side by side, and the ``k`` largest of all win. Routers that were trained apart give logits of different
    size, so a joined model wants training of its routers; its ``k`` experts weigh
    :math:`\exp(l_i) / \sum_{j \in 	ext{top}_k} \exp(l_j)` as in the models (where the router normalises).
    A model joined with itself, with twice the ``k``, computes what it did.

    Args:
        parents: two or more.
        config: see :class:`JoinExpertsConfig`.

    Raises:
        RecipeError: a method or a number that does not fit.
        CheckpointError: models that differ in anything but their experts' number.
    """
    config = config or JoinExpertsConfig()
    if len(parents) < 2:
        raise RecipeError(f"models: expected two or more mixtures, got {len(parents)}")
    models = [mixture(p) for p in parents]
    first = models[0]
    problems = _unlike(models)
    if problems:
        raise CheckpointError(problems)
    total = sum(m.sizes["experts"] for m in models)
    given = sorted({active(m.config, m.parent.ref) for m in models})
    if config.num_experts_per_token is None and len(given) > 1:
        raise RecipeError(f"num_experts_per_token: expected a number, as the models have different ones: {given}")
    k = given[0] if config.num_experts_per_token is None else config.num_experts_per_token
    if problems := check_active(k, total):
        raise RecipeError(problems)
    order = list(range(len(models)))
    if config.base is not None:
        if config.base not in order:
            raise RecipeError(f"base: expected a position in 0 .. {len(models) - 1}, got {config.base!r}")
        order.insert(0, order.pop(config.base))
    refs = [parents[i].ref for i in order]
    based = config.base is not None
    # Two models may have one name: parameters go by position.
    names = [str(i) for i in order]
    trunk = Trunk(
        config.merge_method, config.parameters, names[based:], base=names[0] if based else None, preset=config.preset
    )
    new = dict(first.config)
    set_experts(new, first, total, k)
    draft = Draft(
        Request("join-experts", tuple(p.ref for p in parents), asdict(config)), tuple(parents), new, config.seed
    )

    def merged(name: str) -> None:
        sources = [parents[i].tensors[name] for i in order]
        trunk.add(draft, name, name, sources, first.parent.tensors[name].dtype, place(first, first.places[name].layer))

    blends = [Blend(((m, e),)) for m, model in enumerate(models) for e in range(model.sizes["experts"])]
    layers = {i: blends for i in range(first.layers) if first.is_sparse(i)}
    assemble(draft, models, layers, merged)
    draft.facts |= {
        "experts": {
            m.parent.ref if len(set(refs)) == len(refs) else i: m.sizes["experts"] for i, m in enumerate(models)
        },
        "num_experts_per_token": k,
        "trunk": config.merge_method,
    }
    draft.warnings.append(
        f"routers of {len(models)} models are joined as they are: {k} of {total} experts are chosen by logits that "
        "were trained apart"
    )
    return draft


def _unlike(models: Sequence[Anatomy]) -> list[str]:
    """In what mixtures differ that cannot be joined."""
    first = models[0]
    problems = []
    for other in models[1:]:
        if other.arch is not first.arch:
            problems.append(
                f"{other.parent.ref}: expected model_type {first.arch.model_type}, got {other.arch.model_type}"
            )
            continue
        mine, theirs = first.config, other.config
        unlike = [*differences(mine, theirs), *[(key, mine[key], theirs[key]) for key in others(mine, theirs)]]
        problems += [
            f"{other.parent.ref}: config.json: {key}: expected {x!r}, as in {first.parent.ref}, got {y!r}"
            for key, x, y in unlike
            if key not in COUNTS
        ]
        gone = [n for n, found in first.places.items() if found.expert is None and n not in other.places]
        more = [n for n, found in other.places.items() if found.expert is None and n not in first.places]
        problems += [f"{other.parent.ref}: tensors are missing: {listing(gone)}"] if gone else []
        problems += [f"{first.parent.ref}: tensors are missing: {listing(more)}"] if more else []
    if groups(first.config) > 1:
        problems.append(
            f"{first.parent.ref}: n_group is {first.config['n_group']}: groups of experts compete by the sum of their "
            "best two, and those of different models are not to be compared; expected 1"
        )
    return problems


def join_experts(
    models: Sequence[Any],
    config: JoinExpertsConfig | None = None,
    *,
    model_config: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Joins mixtures of one architecture: see :func:`plan_join_experts`.

    Args:
        models: transformers modules, paths with ``out``, or state dictionaries; not changed.
        config: see :class:`JoinExpertsConfig`.
        model_config: of a state dictionary: its config.json.
        out: directory to write, for a model on disk.
        options: of :func:`fastmerge.dna.results.write` on disk; in memory ``backend`` alone.

    Returns:
        As :func:`fastmerge.dna.results.deliver`, in the form of the first model.

    Raises:
        FastMergeError: as of :func:`plan_join_experts`, and of writing.
    """
    parents = [Parent.open(m, config=model_config, at=i) for i, m in enumerate(models)]
    return results.deliver(plan_join_experts(parents, config), models[0] if models else None, out, **options)
