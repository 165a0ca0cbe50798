"""mergekit-moe: dense models into one mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastmerge.commands.mergekit import merging
from fastmerge.dna import results
from fastmerge.dna.mixtures.document import read
from fastmerge.dna.mixtures.moe import draft_of
from fastmerge.planning.carry import is_tokenizer

if TYPE_CHECKING:
    from fastmerge.commands.mergekit.flags import Settings

CONFIG = "mergekit_moe_config.yml"


def merge(config: str, out: str, settings: Settings, *, router: str | None, allow_same: bool, quantised: bool) -> None:
    """Merges.

    Args:
        config: mergekit-moe's YAML.
        out: the new directory.
        settings: of the flags.
        router: whose rows; None for what the file says.
        allow_same: take models or prompts that are the same for all experts.
        quantised: whether mergekit would load the base model in 4 or 8 bits.

    Raises:
        FastMergeError: as of :func:`fastmerge.dna.mixtures.moe.merge_to_moe`.
    """
    given = {"router": router, "seed": settings.seed, "allow_same": allow_same or None}
    found, said = read(config, strict=settings.strict, **{k: v for k, v in given.items() if v is not None})
    if quantised and not settings.quiet:
        click.echo(
            "fastmerge: --load-in-4bit and --load-in-8bit have no effect: the base runs in its own type", err=True
        )
    draft = draft_of(found, device=settings.device)
    draft.warnings[:0] = said
    if settings.card:
        draft.files[CONFIG] = Path(config).read_bytes()
    planned = results.plan(draft, shard_size=settings.shard_size)
    if not settings.tokenizer:
        planned = replace(planned, carry=tuple([c for c in planned.carry if not is_tokenizer(c[0])]))
    merging.run(planned, out, settings)
