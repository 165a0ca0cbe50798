"""``fastmerge lora``: adapters merged with each other, or into their base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from fastmerge.api import lora as api
from fastmerge.api.mixed import MIXED
from fastmerge.commands import display
from fastmerge.errors import RecipeError
from fastmerge.recipe import ModelRef, Recipe
from fastmerge.recipe.refs import exists, model_ref

_BAKES = ("sum", "task_arithmetic", "ties", "dare_linear", "dare_ties")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def lora() -> None:
    """Merge LoRA adapters with each other, or bake them into their base."""


@lora.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.argument("out", type=click.Path())
@click.option("--method", "kind", type=click.Choice(api.KINDS), default="cat", show_default=True,
              help="cat: the exact sum. svd: its best approximation of a rank. ..._svd: the method on the updates, "
                   "approximated (whole matrices: minutes for one of 4096 x 4096). Others: the method on A and on "
                   "B each, as in peft.")  # fmt: skip
@click.option("--rank", type=int, help="Of the result of svd and ..._svd.  [default: the largest of the adapters]")
@click.option("--density", type=float, help="Share that stays, for ties, dare and magnitude_prune.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random masks.")
@click.option("--memory", help="Budget for a layer, e.g. 8GB.  [default: 8GB or half of what is free]")
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def merge(adapters: tuple[str, ...], out: str, quiet: bool, **how: Any) -> None:
    """Merge adapters of one base into the new adapter OUT, which peft loads."""
    refs, weights = weighted(adapters)
    made = api.merge_adapters(refs, out, weights=weights, **how)
    if how["kind"] in MIXED and len(refs) > 1 and not quiet:
        text = "works on A and on B each, whose product is not the merge of the updates: see cat and svd"
        display.say(f"warning: {how['kind']} {text}", err=True)
    if not quiet:
        display.say(made)


@lora.command()
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[:WEIGHT]...")
@click.argument("out", type=click.Path())
@click.option("--method", type=click.Choice(_BAKES), default="sum", show_default=True,
              help="How adapters come together. sum: the base and all updates, each with its weight, rounded once. "
                   "Others: the method on the task vectors of base+adapter.")  # fmt: skip
@click.option("--density", type=float, help="Share that stays, for ties and dare.")
@click.option("--memory", help="Budget for data in flight, e.g. 8GB.  [default: 8GB or half of what is free]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, or cuda:0,cuda:1.")
@click.option("--seed", type=int, help="Seed of random masks.  [default: 0]")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output, atomically.")
@click.option("--dry-run", is_flag=True, help="Print the recipe; write nothing.")
@click.option("--quiet", "-q", is_flag=True, help="Print errors only.")
def bake(
    base: str,
    adapters: tuple[str, ...],
    out: str,
    method: str,
    density: float | None,
    dry_run: bool,
    quiet: bool,
    **how: Any,
) -> None:
    """Merge adapters into their base: the new model OUT, as a recipe of base+adapter makes it."""
    refs, weights = weighted(adapters)
    wanted = recipe(base, refs, weights, method, density)
    if dry_run:
        display.say(wanted.to_yaml())
        return
    from fastmerge.api.merge import merge as engine

    report = engine(wanted, out, progress=None if quiet else display.progress, **how)
    if not quiet:
        display.say(report)


def weighted(adapters: Sequence[str]) -> tuple[list[str], list[float]]:
    """``ADAPTER[:WEIGHT]`` as names and weights; what exists as a path is a path.

    Raises:
        RecipeError: a weight is not finite.
    """
    refs, weights = [], []
    for text in adapters:
        ref, weight = text, 1.0
        head, _, tail = text.rpartition(":")
        if head and not exists(text):
            try:
                ref, weight = head, float(tail)
            except ValueError:
                raise RecipeError(f"{text!r}: expected ADAPTER:WEIGHT with a number; got {tail!r}") from None
        if not math.isfinite(weight):
            raise RecipeError(f"{text!r}: expected a finite weight")
        refs.append(ref)
        weights.append(weight)
    return refs, weights


def recipe(base: str, adapters: Sequence[str], weights: Sequence[float], method: str, density: float | None) -> Recipe:
    """The recipe of a bake: the base with all adapters on it, or task vectors of ``base+adapter``.

    Raises:
        RecipeError: the base names an adapter, or the density does not go with the method.
    """
    try:
        model, loras = model_ref(base), [model_ref(a) for a in adapters]
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if twice := [str(r) for r in (model, *loras) if r.lora is not None]:
        raise RecipeError(f"{twice[0]}: expected one model or adapter")
    if density is not None and method in ("sum", "task_arithmetic"):
        raise RecipeError(f"density: {method} takes none; see --method")
    if method == "sum":
        if not all(weights):
            raise RecipeError("weight 0: leave the adapter out")
        first, *more = [replace(a, weight=w) for a, w in zip(loras, weights, strict=True)]
        tuned = replace(model, lora=first, more=tuple(more))
        return Recipe.load({"merge_method": "passthrough", "models": [{"model": tuned.plain()}]})
    each = [ModelRef(model.path, model.revision, a).plain() for a in loras]
    thinned = {} if density is None else {"density": density}
    models = [{"model": m, "parameters": {"weight": w, **thinned}} for m, w in zip(each, weights, strict=True)]
    return Recipe.load({"merge_method": method, "base_model": model.plain(), "models": models})


ALL = {"lora": lora}
"""The commands of this module, by name."""
