"""mergekit's options: what they come to here, and how its command line says them, both without loading mergekit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fastmerge.planning.carry import is_tokenizer

if TYPE_CHECKING:
    from fastmerge.planning import Plan
    from fastmerge.recipe import Recipe


def device(options: Any) -> str:
    """Where to compute, as ``device`` of :func:`fastmerge.merge`; the CPU for accelerators without kernels."""
    asked = str(options.device or "cpu")
    if options.multi_gpu or options.gpu_rich or asked == "auto":
        return "auto"
    return asked if asked.startswith("cuda") else "cuda" if options.cuda else "cpu"


def beside(planned: Plan, options: Any) -> Plan:
    """The plan, whose output has only those files beside the weights that the options leave."""
    recipe = cast("Recipe", planned.recipe)
    if not options.copy_tokenizer and recipe.tokenizer_source is None and recipe.tokenizer is None:
        carry = tuple([c for c in planned.carry if not is_tokenizer(c[0])])
        planned = dataclasses.replace(planned, carry=carry)
    if not options.write_model_card:
        planned = dataclasses.replace(planned, card=False, fingerprint=f"{planned.fingerprint}-bare")
    return planned


class Command(NamedTuple):
    """A command line of ``mergekit-yaml``.

    Attributes:
        config: the recipe's file.
        out: the output directory.
        options: with the fields and defaults of ``mergekit.options.MergeOptions``.
    """

    config: str
    out: str
    options: Any


def parse(words: Sequence[str]) -> Command | None:
    """Reads the command line of ``mergekit-yaml``; None for what mergekit is to read, and to answer, itself."""
    import click

    from fastmerge.commands.mergekit.flags import FLAGS, YAML, option
    from fastmerge.errors import RecipeError
    from fastmerge.sizes import parse_bytes

    places = [click.Argument([name]) for name in ("config", "out")]
    command = click.Command(YAML, params=[*places, *[option(f, YAML) for f in FLAGS]], add_help_option=False)
    try:
        values = command.make_context(YAML, list(words)).params
        values["out_shard_size"] = parse_bytes(values["out_shard_size"])
    except (click.ClickException, RecipeError):
        return None
    return Command(values.pop("config"), values.pop("out"), SimpleNamespace(**values))
