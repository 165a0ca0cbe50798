"""What a run has found so far: one JSON file, replaced atomically after every item, so that a killed run continues.

A run belongs to what it measures: the sources, the GPU and the versions. The same command finds the newest
unfinished file with the same identity and goes on there; where anything differs it begins a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.plan import ROOT

SOURCES = ("csrc", "fastmerge", "kernels", "bench", "tests", "CMakeLists.txt")

IDENTITY = ("sources", "gpu", "driver", "python", "torch", "triton", "dry")
"""Facts that a resumed run must share with what it continues."""


def sources() -> str:
    """Hash of the files that are measured; a copy of a working tree has no commit to name."""
    digest = hashlib.blake2b(digest_size=8)
    for name in SOURCES:
        top = ROOT / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.suffix in {".py", ".pyi", ".cpp", ".cu", ".h", ".cuh", ".txt"} and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class State:
    """The results of one run.

    Attributes:
        path: its JSON file; the table lies beside it.
        facts: provenance.
        results: by part and item: ``status`` (ok, failed, absent, cut), ``seconds``, and ``row`` or ``reason``; of
            what was cut off both, and ``kept``, with which the next call goes on.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], results: dict[str, dict[str, dict[str, Any]]]) -> None:
        self.path = path
        self.facts = dict(facts)
        self.results = results

    @classmethod
    def open(cls, directory: Path, facts: Mapping[str, Any], *, fresh: bool) -> State:
        """The newest unfinished run with these facts, or a new one.

        Args:
            directory: where results lie.
            facts: provenance of this run.
            fresh: begin a new one in any case.
        """
        for path in sorted(directory.glob("gpu-*.json"), reverse=True):
            kept = None if fresh else unfinished(path)
            if kept is not None and all(kept["facts"].get(k) == facts.get(k) for k in IDENTITY):
                commands = [*kept["facts"].get("commands", []), facts["command"]]
                about = {**facts, "date": kept["facts"]["date"], "commands": commands}
                return cls(path, about, kept["results"])
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = directory / f"gpu-{stamp}.json"
        number = 1
        while path.exists():
            number += 1
            path = directory / f"gpu-{stamp}-{number}.json"
        return cls(path, {**facts, "commands": [facts["command"]]}, {})

    def entry(self, part: str, item: str) -> Mapping[str, Any] | None:
        """What is known of an item."""
        return self.results.get(part, {}).get(item)

    def known(self, part: str, item: str) -> bool:
        """Whether an item has its result; one that was cut off has not."""
        entry = self.entry(part, item)
        return entry is not None and entry["status"] != "cut"

    def row(self, part: str, item: str) -> Mapping[str, Any] | None:
        """What an item found, if it could run."""
        entry = self.entry(part, item)
        return entry["row"] if entry and entry["status"] == "ok" else None

    def record(self, part: str, item: str, entry: Mapping[str, Any]) -> None:
        """Keeps what an item found, on disk as well."""
        self.results.setdefault(part, {})[item] = dict(entry)
        self.save()

    def save(self, *, finished: bool = False) -> None:
        """Replaces the file; a kill leaves the old one or the new one."""
        text = json.dumps({"facts": self.facts, "finished": finished, "results": self.results}, indent=1)
        replace(self.path, text + "\n")


def unfinished(path: Path) -> dict[str, Any] | None:
    """What a run has kept; None where it is finished, or the file is none of ours, such as a half-copied one."""
    try:
        kept = json.loads(path.read_text())
        known = isinstance(kept["facts"]["commands"], list) and isinstance(kept["results"], dict)
        return kept if known and not kept["finished"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def replace(path: Path, text: str) -> None:
    """Writes a file under another name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.writing")
    with staging.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    staging.replace(path)
