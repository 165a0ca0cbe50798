"""The run as a page of Markdown, beside its JSON: provenance, what was required, and every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu.bars import judge
from bench.gpu.plan import PARTS
from bench.gpu.state import State, replace

FACTS = ("gpu", "capability", "gpus", "gpu_memory_gb", "driver", "nvidia_smi", "cpu", "cores", "memory_gb", "kernel",
         "python", "torch", "torch_cuda", "triton", "versions", "commit", "sources", "commands")  # fmt: skip


def cell(value: object) -> str:
    """A value in a table."""
    return " ".join(text(value).split()).replace("|", "\\|") or "-"


def text(value: object) -> str:
    """A value, without the punctuation of Python."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value))
    if isinstance(value, dict):
        return " ".join(f"{k} {text(v)}" for k, v in value.items())
    return "-" if value is None else str(value)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; a column for every name that any row has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(n)) for n in names) + " |" for row in rows]
    return "\n".join(lines)


def rows_of(results: Mapping[str, Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of a part in groups that share their columns, and what could not run."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name, entry in results.items():
        row = {"item": name}
        if entry["status"] != "ok":
            row |= {"status": entry["status"], "reason": entry["reason"]}
        row |= entry.get("row", {})
        groups.setdefault(tuple(row), []).append({**row, "s": entry.get("seconds")})
    return list(groups.values())


def page(state: State, left: str) -> str:
    """The whole page.

    Args:
        state: of the run.
        left: what is left to run; empty where nothing is.
    """
    facts = state.facts
    title = f"# GPU run of {facts['date']}: {facts.get('gpu')}"
    lines = [title, ""]
    if facts["dry"]:
        lines += ["A dry run: toy sizes on the CPU. Nothing here is a measurement.", ""]
    if left:
        lines += [f"Not run yet: {left}.", ""]
    lines += [f"- {name}: {cell(facts[name])}" for name in FACTS if facts.get(name) is not None]
    lines += ["", "## Required", "", markdown(judge(state))]
    for name, part in PARTS.items():
        results = state.results.get(name)
        if results:
            lines += ["", f"## {name}: {part.about}"]
            for rows in rows_of(results):
                lines += ["", markdown(rows)]
    return "\n".join(lines) + "\n"


def write(state: State, left: str) -> None:
    """Saves the page beside the JSON, which is marked finished where nothing is left."""
    replace(state.path.with_suffix(".md"), page(state, left))
    state.save(finished=not left)
