"""Model families: several sizes of one model, of which the smaller ones are the beginning of the larger ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastmerge.choices import chosen
from fastmerge.dna.cutting import Mended, plan_slicing
from fastmerge.dna.draft import Draft
from fastmerge.dna.kept import Sizes, choose
from fastmerge.dna.layers import LayerSelection
from fastmerge.dna.parent import Parent
from fastmerge.dna.slicing import ModelSlicingConfig, Refit, Study, finish, request_of
from fastmerge.errors import OutputError, RecipeError


def create_model_family(
    base_model: Any,
    sizes: Sequence[tuple[int, int]],
    *,
    config: ModelSlicingConfig | None = None,
    nested: bool = False,
    model_config: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Models of several sizes out of one.

    What counts is found once, for all of them, so that smaller members keep a part of what larger ones keep; with all
    of the model's sizes a member is the model. With calibration data each gets corrections of its own.

    In a nested family every axis is put in the order of its ranks instead, and a member keeps the beginning of it: each
    tensor (of a fused one each part) is the beginning of that of a larger member, in all of its dimensions, so that
    members can share memory and be trained together. (Where the architecture scales embeddings by the hidden size, they
    and the last norm differ by a constant.) There is no refit, rotation or correction of norms then.

    Args:
        base_model: a transformers module, a state dictionary, or a path or hub id.
        sizes: numbers of layers and hidden sizes; ``(16, 2048)`` becomes the member ``16L_2048D``.
        config: how to slice; its targets hold for all members but those of layers and hidden size, which are not given.
        nested: whether members share their weights.
        model_config: of a state dictionary: config.json as a mapping.
        out: directory that gets a directory for each member, for a model on disk.
        options: of :func:`fastmerge.dna.results.write`.

    Returns:
        By name what :func:`fastmerge.dna.results.deliver` gives.

    Raises:
        RecipeError: with what is wrong with the request; nothing is written.
        CheckpointError: as of :func:`fastmerge.dna.slicing.slice_model`.
        OutputError: a member's directory is there already.
    """
    from fastmerge.dna.results import check_out, deliver

    parent = Parent.open(base_model, config=model_config)
    check_out(parent, out)
    drafts = draft_family(parent, base_model, sizes, config or ModelSlicingConfig(), nested=nested)
    where: Mapping[str, Path | None] = dict.fromkeys(drafts)
    if out is not None:
        where = directories(drafts, out, replace=bool(options.get("overwrite") or options.get("resume")))
    said: set[str] = set()
    for draft in drafts.values() if out is None else ():  # each in one report on disk, but once in the log
        draft.warnings = [w for w in draft.warnings if w not in said]
        said.update(draft.warnings)
    return {name: deliver(draft, base_model, where[name], **options) for name, draft in drafts.items()}


def directories(drafts: Iterable[str], out: str | os.PathLike[str], *, replace: bool) -> dict[str, Path]:
    """Where each member goes.

    Raises:
        OutputError: one is there already, and is not to be replaced or resumed.
    """
    where = {name: Path(out, name) for name in drafts}
    there = [str(path) for path in where.values() if os.path.lexists(path)]
    if there and not replace:
        raise OutputError(f"{', '.join(there)}: exists; --overwrite replaces it")
    return where


def draft_family(
    parent: Parent, given: Any, sizes: Sequence[tuple[int, int]], config: ModelSlicingConfig, *, nested: bool
) -> dict[str, Draft]:
    """The drafts of all members, by name; arguments as of :func:`create_model_family`."""
    members = _members(sizes, config)
    if nested:
        _check_nested(config)
        config = replace(config, refit=Refit.NONE, norm_correction=False)
        members = {name: replace(m, refit=Refit.NONE, norm_correction=False) for name, m in members.items()}
    study = Study(parent, given, config)
    of = study.anatomy
    before = Sizes.of(of)
    problems, wanted = [], {}
    for name, member in members.items():
        try:
            wanted[name] = member.sizes(of)
        except RecipeError as error:
            problems += [f"{name}: {p}" for p in error.problems]
    if problems:
        raise RecipeError(problems)
    scores = study.scores()
    ranked = frozenset[str]().union(*[w.changed(before) for w in wanted.values()]) if nested else None
    rotation = study.rotation()
    drafts = {}
    for name, member in members.items():
        kept = choose(
            of,
            wanted[name],
            scores,
            selection=study.selection,
            preserve_first_last=member.preserve_first_last,
            ranked=ranked,
        )
        mended = Mended(scores.energy if member.norm_correction else {}, study.fitted(kept), rotation)
        draft = plan_slicing(of, kept, request_of(of, member, wanted[name]), mended)
        draft.seed = config.seed
        finish(draft, study, scores, kept)
        draft.facts["family"] = {"members": list(members), "nested": nested}
        drafts[name] = draft
    return drafts


def _members(sizes: Sequence[tuple[int, int]], config: ModelSlicingConfig) -> dict[str, ModelSlicingConfig]:
    """What is asked for of each member, by its name."""
    problems = [
        f"{key}: expected none, sizes say it of each member, got {value!r:.80}"
        for key, value in (
            ("target_layers", config.target_layers),
            ("target_hidden_size", config.target_hidden_size),
        )
        if value is not None
    ]
    found: dict[str, ModelSlicingConfig] = {}
    for size in sizes or ():
        try:
            layers, hidden = size
        except (TypeError, ValueError):
            problems.append(f"sizes: expected pairs of layers and hidden size, got {size!r:.80}")
            continue
        name = f"{layers}L_{hidden}D"
        if name in found:
            problems.append(f"sizes: {name} is there twice")
        found[name] = replace(config, target_layers=layers, target_hidden_size=hidden)
    if not found and not problems:
        problems.append("sizes: expected at least one pair of layers and hidden size, got none")
    if problems:
        raise RecipeError(problems)
    return found


def _check_nested(config: ModelSlicingConfig) -> None:
    """Refuses what a nested family cannot have."""
    problems = []
    if chosen("refit", Refit, config.refit) is Refit.LSTSQ:
        problems.append("refit: lstsq gives each member weights of its own: expected nested=False, or refit none")
    if config.rotate:
        problems.append("rotate: a rotation turns what members share: expected nested=False, or no rotation")
    if chosen("layer_selection", LayerSelection, config.layer_selection) is LayerSelection.UNIFORM:
        problems.append("layer_selection: uniform keeps other layers for each number of them: expected nested=False")
    if problems:
        raise RecipeError(problems)
