"""mergekit-yaml and mergekit-multi: the engine's merge with what mergekit's flags come to."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastmerge.api import merge as engine
from fastmerge.checkpoint import without_gc
from fastmerge.commands import display
from fastmerge.errors import RecipeError
from fastmerge.planning.carry import is_tokenizer
from fastmerge.recipe import Recipe

if TYPE_CHECKING:
    from fastmerge.commands.mergekit.flags import Settings
    from fastmerge.planning import Plan


def yaml(config: str, out: str, settings: Settings) -> None:
    """Merges one recipe."""
    with without_gc():
        planned = engine.plan(config, seed=settings.seed, shard_size=settings.shard_size, strict=settings.strict)
        gc.freeze()  # as fastmerge merge: nothing of a plan is garbage before the end
    run(beside(planned, settings), out, settings)


def beside(planned: Plan, settings: Settings) -> Plan:
    """The plan, whose output has only those files beside the weights that the flags leave."""
    recipe = cast("Recipe", planned.recipe)
    if not settings.tokenizer and recipe.tokenizer_source is None and recipe.tokenizer is None:
        planned = replace(planned, carry=tuple([c for c in planned.carry if not is_tokenizer(c[0])]))
    return planned if settings.card else without_card(planned)


def without_card(planned: Plan) -> Plan:
    """The plan, whose output has no README.md and no mergekit_config.yml."""
    return replace(planned, card=False, fingerprint=f"{planned.fingerprint}-bare")


def run(planned: Plan, out: str, settings: Settings) -> None:
    """Merges what is planned. An empty directory is no output yet: mergekit's users make one."""
    report = engine.merge(
        planned,
        out,
        device=settings.device,
        memory=settings.memory,
        max_vram=settings.max_vram,
        resume=settings.resume,
        overwrite=settings.overwrite or (os.path.isdir(out) and not os.listdir(out)),  # noqa: PTH112, PTH208
        progress=None if settings.quiet else display.progress,
    )
    if not settings.quiet:
        display.say(report)


def multi(config: str, out: str | None, directory: str, settings: Settings, *, lazy: bool, keep: bool) -> None:
    """Merges the documents of a file that no other one of them uses, and with ``keep`` those that others use as well.

    Args:
        config: the file.
        out: where the merge without a name goes.
        directory: where those with a name go, each in a directory of its own.
        settings: of the flags.
        lazy: an output that this very merge finished is kept, and a stopped one continued; else all are done anew.
        keep: write stages, too. They are computed once more for those that use them.

    Raises:
        RecipeError: a merge without a name and no ``out``.
    """
    every = Recipe.load_all(config, strict=settings.strict)
    used = {name for _, recipe in every for name, _ in recipe.stages}
    chosen = [(name, recipe) for name, recipe in every if keep or name not in used]
    if out is None and any(name is None for name, _ in chosen):
        raise RecipeError(f"{config}: --out-path is needed for the merge without a name")
    settings = settings._replace(resume=settings.resume or lazy, overwrite=settings.overwrite or not lazy)
    places = [out if name is None else str(Path(directory, name)) for name, _ in chosen]
    planned = [
        beside(engine.plan(recipe, seed=settings.seed, shard_size=settings.shard_size), settings)
        for _, recipe in chosen
    ]
    for place, one in zip(places, planned, strict=True):
        run(one, str(place), settings)
