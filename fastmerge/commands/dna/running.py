"""What all commands of DNA transfer do with a draft: show it, or write it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fastmerge.commands import display

if TYPE_CHECKING:
    from fastmerge.dna.draft import Draft

LONG = 100
"""Characters of a value that a dry run shows."""


def io(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that writes a model."""
    for option in reversed((
        click.option("--memory", help="Budget for data in flight, e.g. 8GB.  [default: 8GB or half of what is free]"),
        click.option("--shard-size", default="5GB", show_default=True, help="Largest output file, in bytes."),
        click.option("--backend", type=click.Choice(["auto", "native", "reference"]), help="What computes."),
        click.option("--resume", is_flag=True, help="Continue an interrupted run."),
        click.option("--overwrite", is_flag=True, help="Replace an existing output, atomically."),
        click.option("--dry-run", is_flag=True, help="Show what would be made; write nothing."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option("--quiet", "-q", is_flag=True, help="Print errors only."),
    )):  # fmt: skip
        command = option(command)
    return command


def run(draft: Draft, out: str, *, dry_run: bool, as_json: bool, quiet: bool, **how: Any) -> None:
    """Shows a draft, or writes it to a directory."""
    if dry_run:
        facts = described(draft)
        if as_json:
            display.show_json(facts, indent=2)
            return
        display.say(table(facts))
        for text in draft.warnings:
            display.say(f"warning: {text}", err=True)
        return
    import json

    from fastmerge.dna.results import write

    report = write(draft, out, progress=None if quiet or as_json else display.progress, **how)
    if as_json:
        display.show_json(json.loads(report.to_json()), indent=2)
    elif not quiet:
        display.say(report)


def described(draft: Draft) -> dict[str, Any]:
    """What a draft comes to: tensors by what makes them, bytes, and what changes in config.json."""
    draft.check()
    ways: Counter[str] = Counter()
    for op, slots in draft.pieces:
        kind = "copied" if op.spec.grain == "copy" else "replicated" if len(slots) > 1 else "made"
        ways[kind] += len({s.name for s in slots})
    before, after = draft.parents[0].config, draft.config
    changes = {
        key: [before.get(key), after.get(key)]
        for key in [*before, *(k for k in after if k not in before)]
        if before.get(key) != after.get(key)
    }
    return {
        "operation": draft.request.operation,
        "models": list(draft.request.refs),
        "options": dict(draft.request.options),
        "tensors": len(draft.tensors),
        **dict(ways),
        "bytes_out": sum(t.dtype.nbytes(_count(t.shape)) for t in draft.tensors.values()),
        "config": changes,
        "facts": draft.facts,
        "warnings": draft.warnings,
    }


def table(facts: dict[str, Any]) -> str:
    """The same for people."""
    from fastmerge.sizes import show_bytes

    ways = ", ".join(f"{facts[k]} {k}" for k in ("copied", "made", "replicated") if facts.get(k))
    lines = [
        f"{facts['operation']} of {', '.join(facts['models'])}",
        f"  {'tensors':<22} {facts['tensors']} ({ways})",
        f"  {'output':<22} {show_bytes(facts['bytes_out'])}",
    ]
    for key, (old, new) in facts["config"].items():
        lines.append(f"  {key:<22} {_short(old)} -> {_short(new)}")
    for key, value in facts["facts"].items():
        lines.append(f"  {key:<22} {_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= LONG else f"{text[:LONG]}..."


def _count(shape: tuple[int, ...]) -> int:
    from math import prod

    return prod(shape)
