"""Checks a merged model: headers, checksums of weights and files, NaN and Inf, and the recipe it came from."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import Checkpoint, ShardFile, seal
from fastmerge.checkpoint.seal import REPORT_NAME as REPORT
from fastmerge.commands.sweep import Range, Swept, sweep

SHOWN = 20
"""Wrong entries of a report that are named one by one."""

Entry = tuple[str, int, int, str]
"""File, offset, bytes and checksum of what a merge wrote."""


@dataclass
class Verification:
    """What was found.

    Attributes:
        directory: the model.
        tensors, nbytes: how much was read.
        checked, unchecked: bytes whose checksum the merge recorded, and bytes without one.
        nonfinite: NaN and Inf values per tensor, where there are any.
        problems: everything wrong; empty for a good model.
        recipe: canonical recipe from the shards' metadata; None where fastmerge did not write the model.
    """

    directory: str
    tensors: int = 0
    nbytes: int = 0
    checked: int = 0
    unchecked: int = 0
    nonfinite: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    recipe: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong. NaN and Inf alone are reported, not wrong: inputs may hold them."""
        return not self.problems

    def facts(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"ok": self.ok, **self.__dict__}

    def __str__(self) -> str:
        lines = [
            f"{self.directory}: {'good' if self.ok else 'BAD'}; {self.tensors} tensors, {self.nbytes / 1e9:.3f} GB",
            f"checksums  {self.checked / 1e9:.3f} GB match the merge's own, {self.unchecked / 1e9:.3f} GB have none",
            f"NaN, Inf   {sum(self.nonfinite.values())} values in {len(self.nonfinite)} tensors",
            *(f"           {name}: {n}" for name, n in list(self.nonfinite.items())[:20]),
            f"recipe     {self.recipe or 'not recorded: not written by fastmerge'}",
            *(f"problem    {text}" for text in self.problems),
        ]
        return "\n".join(lines)


def verify(directory: str | os.PathLike[str]) -> Verification:
    """Reads a whole model once and checks it.

    Args:
        directory: a model on disk, written by fastmerge or not.

    Raises:
        CheckpointError: where the headers alone are damaged; every problem is listed.
    """
    found = Verification(str(directory))
    model = Checkpoint.open(directory, quantised=True)
    found.tensors = len(model.tensors)
    recipes = {f.metadata.get("fastmerge_recipe") for f in model.files}
    if len(recipes) > 1:
        found.problems.append("the shards come from different recipes: stale files of another merge")
    found.recipe = next(iter(recipes), None)
    found.nbytes = sum(info.nbytes for info in model.tensors.values())
    entries, files = _entries(found, _report(found, model))
    swept = sweep(model, files, [Range(*entry[:3]) for entry in entries])
    found.nonfinite = {name: swept.nonfinite[name] for name in model.tensors if swept.nonfinite[name]}
    _compare(found, entries, swept)
    found.unchecked = max(0, found.nbytes - found.checked)
    return found


def _report(found: Verification, model: Checkpoint) -> dict[str, Any] | None:
    """The merge's own report, compared with itself and with the files that it names; whatever it holds, no error."""
    directory = Path(found.directory)
    path = directory / REPORT
    try:
        facts = seal.read_report(directory)
    except ValueError as error:
        found.problems.append(str(error))
        return None
    if facts is None:
        if any("fastmerge" in file.metadata for file in model.files):
            found.problems.append(f"{path}: is missing: only the merge that wrote the model knew its checksums")
        return None
    if facts.get("digest") != seal.digest(facts):
        found.problems.append(f"{path}: was edited: it differs from its own checksum")
    files = seal.files_of(facts)
    if files is None:
        found.problems.append(f"{path}: names no files")
        return facts
    found.problems += seal.changes(directory, files)
    found.problems += [
        f"{directory / name}: was not there when the merge ended"
        for name in sorted(os.listdir(directory))  # noqa: PTH208  names
        if name.endswith((".safetensors", ".safetensors.index.json")) and name not in files
    ]
    return facts


def _compare(found: Verification, entries: Sequence[Entry], swept: Swept) -> None:
    """What the merge recorded, with what was read."""
    ends: dict[str, int] = defaultdict(int)
    for i, ((name, offset, nbytes, expected), checksum) in enumerate(zip(entries, swept.checksums, strict=True)):
        end = offset + nbytes
        # A resumed merge may have recorded overlapping ranges; each byte counts once.
        found.checked += max(0, end - max(offset, ends[name]))
        ends[name] = max(ends[name], end)
        if i in swept.unread:
            found.problems.append(f"{name}: bytes {offset} to {end} cannot be read: {swept.unread[i]}")
        elif checksum != expected:
            found.problems.append(f"{name}: bytes {offset} to {end} differ from what the merge wrote")


def _entries(found: Verification, facts: dict[str, Any] | None) -> tuple[list[Entry], dict[str, ShardFile]]:
    """The report's ranges that lie inside files of the model, and those files; whatever it holds, no error."""
    directory = Path(found.directory)
    path = directory / REPORT
    if facts is None:
        return [], {}
    listed = facts.get("details", {}).get("checksums")
    if not isinstance(listed, list):
        found.problems.append(f"{path}: not a merge report: without checksums")
        return [], {}
    known: dict[str, ShardFile | None] = {}
    entries: list[Entry] = []
    wrong: list[str] = []
    for i, entry in enumerate(listed):
        reason = _refused(directory, entry, known)
        if reason:
            wrong.append(f"{path}: checksum {i}: {reason}")
        else:
            entries.append(tuple(entry))
    found.problems += wrong[:SHOWN]
    if len(wrong) > SHOWN:
        found.problems.append(f"{path}: {len(wrong) - SHOWN} more entries are wrong")
    return sorted(entries, key=lambda e: (e[0], e[1])), {name: file for name, file in known.items() if file}


def _refused(directory: Path, entry: Any, known: dict[str, ShardFile | None]) -> str | None:
    """Why one entry of the report cannot be checked; ``known`` remembers the files."""
    if not isinstance(entry, list) or len(entry) != 4:
        return "expected [file, offset, bytes, checksum]"
    name, offset, nbytes, expected = entry
    # JSON's true is an int of Python's: types are compared, not classes.
    if type(name) is not str or type(offset) is not int or type(nbytes) is not int or type(expected) is not str:
        return "expected [file, offset, bytes, checksum]"
    if name not in known:
        known[name] = _file(directory, name)
    file = known[name]
    if file is None:
        return f"{name[:80]!r} is not a file of this model"
    if offset < 0 or nbytes < 0 or offset + nbytes > file.size:
        start, length = str(offset)[:24], str(nbytes)[:24]
        return f"{name}: {length} bytes at {start} are not inside the file of {file.size} bytes"
    return None


def _file(directory: Path, name: str) -> ShardFile | None:
    """A file of the directory; None where the name is a path or names no file."""
    if os.path.basename(name) != name:  # noqa: PTH119  a name from a file stays a name
        return None
    path = directory / name
    try:
        if not path.is_file():
            return None
        info = path.stat()
    except (OSError, ValueError):
        return None
    return ShardFile(path, info.st_size, (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns), "", {})
