"""The page of a merged model: what its models changed, where they disagree, and what the merge took over."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Checkpoint
from fastmerge.errors import OutputError, RecipeError
from fastmerge.pages import figures
from fastmerge.pages.document import Document
from fastmerge.pages.overlap import Overlap, measure, together
from fastmerge.planning.names import kind
from fastmerge.recipe import ModelRef, Recipe
from fastmerge.report import Report
from fastmerge.sizes import show_bytes

if TYPE_CHECKING:
    from fastmerge.recipe import Recipe as AnyRecipe

_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<number>\d+)\.")

RESULT = "merge"
"""What the result is called beside its models."""


def page(directory: str | os.PathLike[str]) -> Document:
    """The page of a directory that :func:`fastmerge.merge` wrote; reads it, its base and its models once.

    Args:
        directory: with its ``merge_report.json``; the models are still where they were.

    Raises:
        OutputError: there is no report.
        RecipeError: the merge has no base, or no other model; or matplotlib is missing.
        CheckpointError: a model is not there any more, or cannot be read.
    """
    report = Report.load(directory)
    recipe, base_ref, refs = _models(Path(directory), report)
    paths = _paths(report, recipe)
    base = Checkpoint.open(paths[base_ref])
    models = [Checkpoint.open(paths[ref]) for ref in refs]
    result = Checkpoint.open(directory)
    values = measure(base, models, result)
    if not values:
        raise RecipeError(f"{directory}: no tensor has one shape in the base, the models and the result")
    names = [*_short([str(ref) for ref in refs]), RESULT]
    made = Document(
        f"Merge: {Path(directory).resolve().name}",
        f"{recipe.merge_method} of {', '.join(names[:-1])} over {Path(base_ref.path).name}; {len(values):,} of "
        f"{len(result.tensors):,} tensors are in all of them",
    )
    _together(made, names, together(list(values.values())))
    stacks = _layers(values)
    for stack, layers in stacks.items():
        _curves(made, names, layers, stack if len(stacks) > 1 else "")
    _kinds(made, names, values)
    made.heading("Recipe")
    made.code(recipe.to_yaml())
    _run(made, report)
    return made


def _models(directory: Path, report: Report) -> tuple[AnyRecipe, ModelRef, list[ModelRef]]:
    """The recipe, its base and its other models."""
    text = report.details.get("recipe")
    if not isinstance(text, str):
        raise OutputError(f"{directory}: its merge_report.json names no recipe")
    recipe = Recipe.load(text)
    if recipe.stages:
        raise RecipeError(f"{directory}: a merge in stages: the page of each stage needs its directory")
    if recipe.base_model is None:
        raise RecipeError(f"{directory}: {recipe.merge_method} has no base_model, from which changes could be counted")
    refs = [ref for ref in recipe.refs if ref != recipe.base_model]
    adapted = [str(ref) for ref in recipe.refs if ref.lora is not None]
    if adapted:
        raise RecipeError(f"{directory}: {adapted[0]!r} is in no file: `fastmerge lora bake` makes one")
    if not refs:
        raise RecipeError(f"{directory}: has no model beside its base")
    return recipe, recipe.base_model, refs


def _paths(report: Report, recipe: AnyRecipe) -> dict[ModelRef, Path]:
    """Where each model was."""
    inputs = report.details.get("inputs")
    if not isinstance(inputs, list) or len(inputs) < len(recipe.refs):
        raise OutputError(f"{report.out}: its merge_report.json does not name its inputs")
    return {ref: Path(entry["path"]) for ref, entry in zip(recipe.refs, inputs, strict=False)}


def _short(names: Sequence[str]) -> list[str]:
    """The last parts of paths, where these tell models apart."""
    last = [Path(name).name or name for name in names]
    return last if len(set(last)) == len(last) else list(names)


def _together(made: Document, names: Sequence[str], whole: Overlap) -> None:
    """The whole model in a table of lengths and one of cosines."""
    made.heading("The whole model")
    count = len(names)
    made.table(
        ["", "length of its change, of the base", *[f"cosine with {name}" for name in names]],
        [
            [name, whole.length(i), *("" if i == j else _number(whole.cosine(i, j)) for j in range(count))]
            for i, name in enumerate(names)
        ],
    )
    if count > 2:
        share = whole.conflict / max(whole.numel, 1)
        made.text(f"Sign conflict: {share:.1%} of the elements are raised by one model and lowered by another.")
    made.text(f"Kept: in {whole.kept / max(whole.numel, 1):.1%} of the elements the merge is not the base.")


def _layers(values: Mapping[str, Overlap]) -> dict[str, dict[int, Overlap]]:
    """Of each layer of each stack."""
    found: dict[str, dict[int, list[Overlap]]] = defaultdict(lambda: defaultdict(list))
    for name, value in values.items():
        layer = _LAYER.match(name)
        if layer is not None:
            found[layer["stack"]][int(layer["number"])].append(value)
    return {
        stack: {n: together(parts) for n, parts in sorted(layers.items())}
        for stack, layers in found.items()
        if len(layers) > 1
    }


def _curves(made: Document, names: Sequence[str], layers: Mapping[int, Overlap], stack: str) -> None:
    """Four figures of a stack."""
    made.heading(f"By layer{f' of {stack}' if stack else ''}")
    numbers, parts = list(layers), list(layers.values())
    suffix = f"-{stack}" if stack else ""

    def draw(name: str, lines: Mapping[str, Sequence[float]], label: str, caption: str) -> None:
        if lines:
            made.figure(f"{name}{suffix}", figures.curves(numbers, lines, label), caption)

    count = len(names)
    lengths = {name: [p.length(i) for p in parts] for i, name in enumerate(names)}
    draw("length", lengths, "|change| / |base|", "Length of each model's change of the base")
    with_merge = {names[i]: [p.cosine(i, count - 1) for p in parts] for i in range(count - 1)}
    draw("taken", with_merge, "cosine", "Cosine of the merge's change with that of each model")
    between = {f"{names[i]}, {names[j]}": [p.cosine(i, j) for p in parts] for i in range(count - 1) for j in range(i)}
    draw("agreement", between, "cosine", "Cosine of the changes of two models")
    shares = {"kept": [p.kept / max(p.numel, 1) for p in parts]}
    if count > 2:
        shares["sign conflict"] = [p.conflict / max(p.numel, 1) for p in parts]
    draw(
        "shares", shares, "share of the elements", "Elements that the merge changes, and those on which models disagree"
    )


def _kinds(made: Document, names: Sequence[str], values: Mapping[str, Overlap]) -> None:
    """A table by kind of tensor."""
    kinds: dict[str, list[Overlap]] = defaultdict(list)
    for name, value in values.items():
        kinds[kind(name)].append(value)
    made.heading("By kind of tensor")
    totals = {name: together(parts) for name, parts in kinds.items()}
    made.table(
        ["", *names, "sign conflict", "kept"],
        [
            [
                name,
                *(total.length(i) for i in range(len(names))),
                f"{total.conflict / max(total.numel, 1):.1%}",
                f"{total.kept / max(total.numel, 1):.1%}",
            ]
            for name, total in sorted(totals.items(), key=lambda item: -item[1].length(len(names) - 1))
        ],
    )
    made.text("Lengths of changes, of the base.")


def _run(made: Document, report: Report) -> None:
    """How the merge went."""
    made.heading("Run")
    rows: list[list[Any]] = [
        ["seconds", round(report.seconds, 2)],
        ["read", show_bytes(report.bytes_read)],
        ["written", show_bytes(report.bytes_written)],
        ["bound by", report.bottleneck],
        ["backend", f"{report.backend} on {', '.join(report.devices)}"],
        ["fingerprint", report.fingerprint],
    ]
    made.table(["", ""], rows)
    for text in report.warnings:
        made.text(f"Warning: {text}")


def _number(value: float) -> Any:
    return "none" if math.isnan(value) else value
