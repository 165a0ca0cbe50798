"""``fastmerge upcycle``, ``depth-upscale``, ``grow``, ``slice``, ``family`` and ``compare``."""

from __future__ import annotations

from typing import Any

import click

from fastmerge import dna
from fastmerge.commands import display
from fastmerge.commands.dna.options import fields, given
from fastmerge.commands.dna.running import io, run

_HELP = {"help_option_names": ["-h", "--help"]}
_IO = ("memory", "shard_size", "backend", "resume", "overwrite", "dry_run", "as_json", "quiet")


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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
    settings, how = _split(options)
    run(dna.plan_upcycling(dna.Parent.open(model), dna.UpcyclingConfig(**settings)), out, **how)


@click.command("depth-upscale", context_settings=_HELP)
@click.argument("model")
@click.argument("out", type=click.Path())
@fields(dna.DepthUpscaleConfig)
@io
def depth_upscale(model: str, out: str, **options: Any) -> None:
    """Make a deeper model OUT of the layers of MODEL."""
    settings, how = _split(options)
    run(dna.plan_depth_upscale(dna.Parent.open(model), dna.DepthUpscaleConfig(**settings)), out, **how)
