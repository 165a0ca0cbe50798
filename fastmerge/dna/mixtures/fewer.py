"""A mixture with fewer experts: some are kept, the others dropped, or merged into the kept one that they are like."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fastmerge.dna import results
from fastmerge.dna.anatomy import Anatomy
from fastmerge.dna.draft import Draft, Request
from fastmerge.dna.mixtures.layout import Blend, active, assemble, check_active, groups, mixture, set_experts
from fastmerge.dna.mixtures.weights import F64, grams, likeness, norms
from fastmerge.dna.parent import Parent
from fastmerge.dna.reading import Reader
from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import numpy.typing as npt

Scores = Sequence[Any] | Mapping[int, Any]
"""By layer with experts (in their order, or by the layer's number): one number per expert, larger is kept rather."""


@dataclass(frozen=True)
class FewerExpertsConfig:
    """Which experts stay, and what becomes of the others.

    Attributes:
        num_experts: of the result, in every layer.
        num_experts_per_token: of the result; None leaves it, or lowers it to ``num_experts``.
        keep_by: how experts are scored: ``norm`` (the product of the norms of an expert's matrices), or with
            calibration batches ``counts`` (tokens that it gets), ``weights`` (the sum of their router weights),
            ``saliency`` (the mean over its tokens of router weight times norm of its output: REAP); or ``given``.
        rest: ``drop`` the others (REAP), or ``merge`` each into the kept one that is most like it (REAM).
        merge_weights: experts are averaged by their ``scores``, or ``equal``.
        merge_router: average the rows of the router likewise; else the kept expert's row stays.
    """

    num_experts: int
    num_experts_per_token: int | None = None
    keep_by: Literal["norm", "counts", "weights", "saliency", "given"] = "norm"
    rest: Literal["drop", "merge"] = "drop"
    merge_weights: Literal["scores", "equal"] = "scores"
    merge_router: bool = False


_WORDS = {
    "keep_by": ("norm", "counts", "weights", "saliency", "given"),
    "rest": ("drop", "merge"),
    "merge_weights": ("scores", "equal"),
}


UNLIKE = 0.5
"""Cosine of two experts below which their neurons do not match: copies with noise of their own size have 0.7."""


class Weighed(NamedTuple):
    """What the weights say of the experts of one layer.

    Attributes:
        norms: ``[E]``.
        likeness: ``[E, E]`` cosines.
    """

    norms: F64
    likeness: F64


def weigh(parent: Parent) -> dict[int, Weighed]:
    """Reads the experts' weights, a panel at a time: what :func:`plan_fewer_experts` chooses by, by layer.

    Raises:
        CheckpointError: the model is no mixture, or its weights are not finite.
    """
    model = mixture(parent)
    found = {}
    with Reader([parent]) as reader:
        for layer in filter(model.is_sparse, range(model.layers)):
            given = grams(reader, model, layer)
            found[layer] = Weighed(norms(given), likeness(given))
    return found


def plan_fewer_experts(
    parent: Parent,
    config: FewerExpertsConfig,
    *,
    scores: Scores | None = None,
    weighed: Mapping[int, Weighed] | None = None,
) -> Draft:
    """A mixture of the ``num_experts`` experts of each layer with the highest scores, equal ones by their numbers.

    A merged expert is the mean of its members by ``merge_weights``: fp32, rounded once. Their neurons are matched by
    position, which fits experts that come from one dense model; nothing is permuted, and a warning counts merged
    experts whose weights point elsewhere (cosine below :data:`UNLIKE`). With groups of experts
    (``n_group``) each group keeps as many, and merges within itself.

    Args:
        parent: of any architecture with experts.
        config: see :class:`FewerExpertsConfig`.
        scores: for every ``keep_by`` but ``norm``.
        weighed: of :func:`weigh`, for ``keep_by: norm`` and ``rest: merge``.

    Raises:
        RecipeError: numbers that do not fit, or scores that are missing.
        CheckpointError: a model that is no mixture, or is not known.
    """
    model = mixture(parent)
    sparse = [i for i in range(model.layers) if model.is_sparse(i)]
    before, k = model.sizes["experts"], active(model.config, parent.ref)
    chosen = _check(config, model, before, k)
    by_layer = _scores(config, sparse, before, scores, weighed)
    if config.rest == "merge" and (weighed is None or set(sparse) - weighed.keys()):
        raise RecipeError("rest: merging needs what the weights say (weigh)")
    new = dict(model.config)
    set_experts(new, model, config.num_experts, chosen)
    draft = Draft(Request("fewer-experts", (parent.ref,), asdict(config)), (parent,), new)
    layers, told, far, merged = {}, {}, 0, 0
    for i in sparse:
        like = weighed[i].likeness if weighed is not None and config.rest == "merge" else None
        clusters = _clusters(by_layer[i], config.num_experts, groups(new), like)
        layers[i] = [_blend(cluster, by_layer[i], config) for cluster in clusters]
        if like is not None:
            cosines = [like[c[0], e] for c in clusters for e in c[1:]]
            far, merged = far + sum(one < UNLIKE for one in cosines), merged + len(cosines)
        told[str(i)] = [list(c) for c in clusters] if like is not None else [c[0] for c in clusters]
    assemble(draft, [model], layers, lambda name: draft.copy(name, parent.tensors[name]))
    draft.facts |= {
        "experts": {
            "before": before,
            "after": config.num_experts,
            "merged" if config.rest == "merge" else "kept": told,
        },
        "num_experts_per_token": chosen,
        "scores": {str(i): [float(f"{s:.6g}") for s in by_layer[i]] for i in sparse},
    }
    if far:
        draft.warnings.append(
            f"rest: merge: {far} of {merged} merged experts are unlike the kept ones (cosine below {UNLIKE}), so that "
            "their neurons are averaged with strangers; rest: drop does less harm"
        )
    if config.keep_by == "norm":
        draft.warnings.append(
            "keep_by: norm says little of what an expert does; calibration batches and keep_by: saliency say more"
        )
    return draft


def _check(config: FewerExpertsConfig, model: Anatomy, before: int, k: int) -> int:
    """The number of experts per token."""
    problems = [
        f"{key}: expected one of {', '.join(words)}, got {getattr(config, key)!r}"
        for key, words in _WORDS.items()
        if getattr(config, key) not in words
    ]
    wanted, parted = config.num_experts, groups(model.config)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted < before:
        raise RecipeError([*problems, f"num_experts: expected a whole number in 1 .. {before - 1}, got {wanted!r}"])
    if parted > 1 and (wanted % parted or wanted < 2 * parted):
        problems.append(
            f"num_experts: expected a multiple of {parted} (n_group), and two for each group, whose best two experts "
            f"count, got {wanted}"
        )
    chosen = min(k, wanted) if config.num_experts_per_token is None else config.num_experts_per_token
    room = wanted // parted * int(model.config.get("topk_group") or 1) if parted > 1 else wanted
    problems += check_active(chosen, room)
    if problems:
        raise RecipeError(problems)
    return chosen


def _scores(
    config: FewerExpertsConfig,
    sparse: Sequence[int],
    experts: int,
    scores: Scores | None,
    weighed: Mapping[int, Weighed] | None,
) -> dict[int, F64]:
    """``[E]`` for each layer with experts."""
    if config.keep_by == "norm":
        if weighed is None or set(sparse) - weighed.keys():
            raise RecipeError("keep_by: norm needs what the weights say (weigh)")
        return {i: weighed[i].norms for i in sparse}
    if scores is None:
        raise RecipeError(f"keep_by: {config.keep_by} needs scores, or calibration batches")
    given = dict(scores) if isinstance(scores, Mapping) else dict(zip(sparse, scores, strict=False))
    if sorted(given) != list(sparse) or (not isinstance(scores, Mapping) and len(scores) != len(sparse)):
        raise RecipeError(f"scores: expected one row for each of the layers {list(sparse)}, got {len(scores)} rows")
    found = {i: np.asarray(given[i], np.float64) for i in sparse}
    problems = [
        f"scores: layer {i}: expected {experts} finite numbers of 0 or more, got {np.asarray(given[i]).tolist()}"
        for i, row in found.items()
        if row.shape != (experts,) or not (np.isfinite(row).all() and (row >= 0).all())
    ]
    if problems:
        raise RecipeError(problems)
    return found


def _clusters(scores: F64, wanted: int, parted: int, like: F64 | None) -> list[tuple[int, ...]]:
    """The kept experts in their order, each with those that are merged into it behind it."""
    size = len(scores) // parted
    found: list[tuple[int, ...]] = []
    for first in range(0, len(scores), size):
        mine = range(first, first + size)
        ranked = sorted(mine, key=lambda e: (-scores[e], e))
        kept = sorted(ranked[: wanted // parted])
        clusters = {e: [e] for e in kept}
        for e in mine if like is not None else ():
            if e not in clusters:
                assert like is not None
                clusters[max(kept, key=lambda to, e=e: (like[e, to], -to))].append(e)  # type: ignore[misc]
        found += [tuple(c) for c in clusters.values()]
    return found


def _blend(cluster: tuple[int, ...], scores: npt.NDArray[np.float64], config: FewerExpertsConfig) -> Blend:
    members = tuple([(0, e) for e in cluster])
    weights = tuple([float(scores[e]) for e in cluster])
    if config.merge_weights == "equal" or sum(weights) == 0:
        weights = (1.0,) * len(cluster)
    return Blend(members, weights, weights if config.merge_router else None)


def fewer_experts(
    model: Any,
    config: FewerExpertsConfig,
    *,
    scores: Scores | None = None,
    calibration: Iterable[Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Leaves a mixture fewer experts: see :func:`plan_fewer_experts`.

    Args:
        model: a transformers module, a path with ``out``, or a state dictionary; not changed.
        config: see :class:`FewerExpertsConfig`.
        scores: one number per expert of each layer with experts, for ``keep_by: given``.
        calibration: batches of token ids ``[B, T]`` that the model is run on, for ``counts``, ``weights`` and
            ``saliency`` (needs torch and transformers; a model on disk is loaded).
        model_config: of a state dictionary: its config.json.
        out: directory to write, for a model on disk.
        options: of :func:`fastmerge.dna.results.write` on disk; in memory ``backend`` alone.

    Returns:
        As :func:`fastmerge.dna.results.deliver`.

    Raises:
        FastMergeError: as of :func:`plan_fewer_experts`, and of writing.
    """
    draft = draft_fewer_experts(model, config, scores=scores, calibration=calibration, model_config=model_config)
    return results.deliver(draft, model, out, **options)


def draft_fewer_experts(
    model: Any,
    config: FewerExpertsConfig,
    *,
    scores: Scores | None = None,
    calibration: Iterable[Any] | None = None,
    model_config: Mapping[str, Any] | None = None,
) -> Draft:
    """What :func:`fewer_experts` makes, with all that it takes to find out which experts stay."""
    parent = Parent.open(model, config=model_config)
    found = mixture(parent)
    _check(config, found, found.sizes["experts"], active(found.config, parent.ref))
    if config.keep_by not in ("norm", "given"):
        if calibration is None:
            raise RecipeError(f"keep_by: {config.keep_by} needs calibration batches")
        from fastmerge.dna.mixtures.routing import router_statistics

        outputs = config.keep_by == "saliency"
        scores = router_statistics(model, calibration, outputs=outputs).scores(config.keep_by)
    elif calibration is not None:
        raise RecipeError(f"calibration: has no effect with keep_by: {config.keep_by}")
    weighed = weigh(parent) if config.keep_by == "norm" or config.rest == "merge" else None
    return plan_fewer_experts(parent, config, scores=scores, weighed=weighed)
