"""``fastmerge upcycle``, ``depth-upscale`` and ``grow``."""

from __future__ import annotations

from typing import Any

import click

from fastmerge import dna
from fastmerge.commands.dna.options import fields, given
from fastmerge.commands.dna.running import io, run

_HELP = {"help_option_names": ["-h", "--help"]}
_IO = ("memory", "shard_size", "backend", "resume", "overwrite", "dry_run", "as_json", "quiet")


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What configures the request, and what says how it is written."""
    how = {name: options.pop(name) for name in _IO if name in options}
    return given(options), how


@click.command(context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.UpcyclingConfig)
@io
def upcycle(model: str, out: str, **options: Any) -> None:
    """Make a mixture of experts OUT of the dense MODEL, each expert a copy of its MLP."""
    settings, how = split(options)
    run(dna.plan_upcycle(dna.Parent.open(model), dna.UpcyclingConfig(**settings)), out, **how)


@click.command("depth-upscale", context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.DepthUpscaleConfig, leave=("skip_embed_and_head",))
@io
def depth_upscale(model: str, out: str, **options: Any) -> None:
    """Make a deeper model OUT of MODEL by repeating layers."""
    settings, how = split(options)
    run(dna.plan_depth_upscale(dna.Parent.open(model), dna.DepthUpscaleConfig(**settings)), out, **how)


@click.command(context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.ModelGrowthConfig)
@io
def grow(model: str, out: str, **options: Any) -> None:
    """Make a wider or deeper model OUT that computes what MODEL computes.

    Method net2wider grows channels, units and heads; net2deeper puts in layers that change nothing at first.
    """
    settings, how = split(options)
    config, parent = dna.ModelGrowthConfig(**settings), dna.Parent.open(model)
    if config.method == dna.GrowthMethod.NET2DEEPER.value:
        run(dna.plan_depth_growth(parent, config), out, **how)
    else:
        # Random units are as large as those that are there, which takes reading the weights; a dry run reads headers.
        rms = dict.fromkeys(parent.tensors, 1.0) if how["dry_run"] else dna.fresh_rms(parent, config)
        run(dna.plan_width(parent, config, rms=rms), out, **how)


ALL = {command.name: command for command in (upcycle, depth_upscale, grow)}
"""The commands of this module, by name."""
