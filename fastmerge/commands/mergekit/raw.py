"""mergekit-pytorch: files of tensors, whatever they belong to, merged name by name."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmerge import planning
from fastmerge.checkpoint import Checkpoint
from fastmerge.checkpoint.formats import PICKLES
from fastmerge.checkpoint.header import listing
from fastmerge.commands import display
from fastmerge.commands.mergekit.merging import run, without_card
from fastmerge.commands.mergekit.single import SingleFile, bytes_of, room
from fastmerge.dtypes import BY_NAME
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.recipe import ModelRef, Recipe
from fastmerge.sizes import parse_bytes

if TYPE_CHECKING:
    from fastmerge.commands.mergekit.flags import Settings

_NOT_HERE = ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template")


def merge(config: str, out: str, settings: Settings, *, intersection: bool, union: bool, allow_pickle: bool) -> None:
    """Merges files of tensors; the output holds weights and the report, nothing else.

    Args:
        config: a recipe with ``models``, each a ``.safetensors`` file, an index or a directory.
        out: the new directory.
        settings: of the flags.
        intersection: leave out tensors that some model lacks.
        union: merge such tensors from the models that have them.
        allow_pickle: read pickled files as well.

    Raises:
        RecipeError: the recipe asks for more than tensors.
        CheckpointError: models lack tensors and neither flag is given, or a file cannot be read.
    """
    recipe = Recipe.load(config, strict=settings.strict)
    odd = [key for key in _NOT_HERE if getattr(recipe, key)]
    if odd:
        raise RecipeError(
            [
                f"{recipe.at((key,))}: raw files of tensors have no such thing: fastmerge merge, or leave it out"
                for key in odd
            ]
        )
    if union and not intersection:
        recipe = replace(recipe, missing="merge")
    with _opened(recipe, Path(out), allow_pickle=allow_pickle) as models:
        chosen = models
        if intersection or not union:
            chosen, lacking = _common(models)
            if lacking and not intersection:
                raise CheckpointError(
                    [f"{ref}: lacks {listing(names)}" for ref, names in lacking.items()]
                    + ["-i leaves out what some model lacks, -u merges it from the others"]
                )
            if lacking and not settings.quiet:
                count = len(set().union(*lacking.values()))
                display.say(f"fastmerge: {count} tensors that some model lacks are left out", err=True)
        planned = planning.plan(recipe, seed=settings.seed, shard_size=parse_bytes(settings.shard_size), models=chosen)
        planned = without_card(replace(planned, config=None, carry=()))
        run(planned, out, settings)


def _common(models: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], dict[str, list[str]]]:
    """The models with the tensors that all have, and by model what it lacks of those that any has."""
    every = dict.fromkeys(name for model in models.values() for name in model.tensors)
    lacking = {ref: [n for n in every if n not in model.tensors] for ref, model in models.items()}
    gone = set().union(*lacking.values())
    kept = {
        ref: replace(m, tensors={n: i for n, i in m.tensors.items() if n not in gone}) if gone else m
        for ref, m in models.items()
    }
    return kept, {ref: names for ref, names in lacking.items() if names}


@contextlib.contextmanager
def _opened(recipe: Recipe, out: Path, *, allow_pickle: bool) -> Iterator[dict[str, Checkpoint]]:
    """The models by reference, without what lies beside them; pickled ones as temporary files beside the output."""
    pickles = [ref for ref in recipe.refs if Path(ref.path).suffix in PICKLES and Path(ref.path).is_file()]
    if pickles and not allow_pickle:
        raise CheckpointError(
            [f"{ref}: a pickle, and loading one can run code: --allow-pickle reads tensors alone" for ref in pickles]
        )
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(_beside(out))) if pickles else out
        models: dict[str, Checkpoint] = {}
        for i, ref in enumerate(recipe.refs):
            if ref.lora is not None:
                raise RecipeError(f"{ref}: an adapter needs a model, not a file of tensors: fastmerge merge")
            path = _unpickled(ref, where / f"{i}.safetensors") if ref in pickles else ref.path
            model = Checkpoint.open(path, revision=None if ref in pickles else ref.revision)
            # The files around are another program's: no config.json or tokenizer has a say here.
            models[str(ref)] = replace(model, ref=str(ref), path=model.files[0].path, config={}, warnings=())
        yield models


def _beside(out: Path) -> tempfile.TemporaryDirectory[str]:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.unpickled-")


def _unpickled(ref: ModelRef, target: Path) -> str:
    """Writes the tensors of a pickle as safetensors; in the format before torch 1.6 all are in memory at once.

    Raises:
        CheckpointError: no pickle of tensors by name, or one that does more than that.
    """
    import torch

    try:
        state: Any = torch.load(ref.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(ref.path))
    except Exception as error:  # noqa: BLE001 - of many types, by what is wrong with the file
        first = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{ref}: cannot be loaded with weights_only: {first[:200]}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    wrong = [n for n, t in state.items() if not isinstance(t, torch.Tensor)] if isinstance(state, dict) else ["it"]
    if wrong:
        raise CheckpointError(f"{ref}: expected a mapping from names to tensors; no tensors: {listing(wrong)}")
    with SingleFile(target, room((n, t.dim()) for n, t in state.items())) as file:
        for name, tensor in state.items():
            file.add(name, BY_NAME[str(tensor.dtype).removeprefix("torch.")], tensor.shape, bytes_of(tensor))
    # As old as the pickle, so that --resume knows it again.
    times = Path(ref.path).stat()
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    return str(target)
