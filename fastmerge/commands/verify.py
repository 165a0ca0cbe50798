"""Checks a merged model: headers, checksums of weights and files, NaN and Inf, and the recipe it came from."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastmerge import _native
from fastmerge.checkpoint import Checkpoint, seal
from fastmerge.checkpoint.seal import REPORT_NAME as REPORT
from fastmerge.errors import CheckpointError
from fastmerge.runtime.devices import cores
from fastmerge.runtime.workers import each

BLOCK = 8 << 20
"""Bytes per read."""

SHOWN = 20
"""Wrong entries of a report that are named one by one."""

Range = tuple[str, int, int, str]
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
    model = Checkpoint.open(directory)
    found.tensors = len(model.tensors)
    recipes = {f.metadata.get("fastmerge_recipe") for f in model.files}
    if len(recipes) > 1:
        found.problems.append("the shards come from different recipes: stale files of another merge")
    found.recipe = next(iter(recipes), None)
    for name, bad, size in each(lambda n: _scan(model, n), list(model.tensors), threads=cores(), name="verify"):
        found.nbytes += size
        if bad:
            found.nonfinite[name] = bad
    facts = _report(found, model)
    if facts is not None:
        _checksums(found, facts)
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


def _scan(model: Checkpoint, name: str) -> tuple[str, int, int]:
    """Counts NaN and Inf of one tensor."""
    info = model.tensors[name]
    if not info.dtype.mergeable:
        return name, 0, info.nbytes
    bad = 0
    buffer = np.empty(min(BLOCK, info.nbytes), np.uint8)
    with model.files[info.file].path.open("rb", buffering=0) as f:
        f.seek(info.offset)
        left = info.nbytes
        while left:
            got = f.readinto(buffer.data[: min(left, BLOCK)])
            if not got:
                raise CheckpointError(f"{model.files[info.file].path}: shrank while being read")
            whole = got - got % info.dtype.size
            f.seek(whole - got, os.SEEK_CUR)
            bad += _native.count_nonfinite(buffer.ctypes.data, whole // info.dtype.size, info.dtype.code)
            left -= whole
    return name, bad, info.nbytes


def _checksums(found: Verification, facts: dict[str, Any]) -> None:
    """Compares every range that the merge recorded; whatever the report holds, this raises nothing."""
    directory = Path(found.directory)
    ranges, wrong = _ranges(directory, facts)
    found.problems += wrong[:SHOWN]
    if len(wrong) > SHOWN:
        found.problems.append(f"{directory / REPORT}: {len(wrong) - SHOWN} more entries are wrong")
    ends: dict[str, int] = defaultdict(int)
    ranges.sort(key=lambda r: (r[0], r[1]))
    differ = each(lambda r: _differs(directory, r), ranges, threads=cores(), name="verify")
    for (shard, offset, nbytes, _), wrong_bytes in zip(ranges, differ, strict=True):
        # A resumed merge may have recorded overlapping ranges; each byte counts once.
        found.checked += max(0, offset + nbytes - max(offset, ends[shard]))
        ends[shard] = max(ends[shard], offset + nbytes)
        if wrong_bytes:
            found.problems.append(f"{shard}: bytes {offset} to {offset + nbytes} {wrong_bytes}")


def _ranges(directory: Path, facts: dict[str, Any]) -> tuple[list[Range], list[str]]:
    """The report's ranges that lie inside files of the model, and a line for everything that is not one."""
    path = directory / REPORT
    entries = facts.get("details", {}).get("checksums")
    if not isinstance(entries, list):
        return [], [f"{path}: not a merge report: without checksums"]
    sizes: dict[str, int | None] = {}
    ranges: list[Range] = []
    wrong: list[str] = []
    for i, entry in enumerate(entries):
        reason = _refused(directory, entry, sizes)
        if reason:
            wrong.append(f"{path}: checksum {i}: {reason}")
        else:
            ranges.append(tuple(entry))
    return ranges, wrong


def _refused(directory: Path, entry: Any, sizes: dict[str, int | None]) -> str | None:
    """Why one entry of the report cannot be checked; ``sizes`` remembers the files."""
    if not isinstance(entry, list) or len(entry) != 4:
        return "expected [file, offset, bytes, checksum]"
    name, offset, nbytes, expected = entry
    # JSON's true is an int of Python's: types are compared, not classes.
    if type(name) is not str or type(offset) is not int or type(nbytes) is not int or type(expected) is not str:
        return "expected [file, offset, bytes, checksum]"
    if name not in sizes:
        sizes[name] = _size(directory, name)
    size = sizes[name]
    if size is None:
        return f"{name[:80]!r} is not a file of this model"
    if offset < 0 or nbytes < 0 or offset + nbytes > size:
        start, length = str(offset)[:24], str(nbytes)[:24]
        return f"{name}: {length} bytes at {start} are not inside the file of {size} bytes"
    return None


def _size(directory: Path, name: str) -> int | None:
    """Bytes of a file of the directory; None where the name is a path or names no file."""
    if os.path.basename(name) != name:  # noqa: PTH119  a name from a file stays a name
        return None
    try:
        path = directory / name
        return path.stat().st_size if path.is_file() else None
    except (OSError, ValueError):
        return None


def _differs(directory: Path, entry: Range) -> str | None:
    """What is wrong with the bytes of one range; one block of memory, whatever the range."""
    name, offset, left, expected = entry
    digest = xxhash.xxh3_64()
    block = memoryview(bytearray(min(BLOCK, left)))
    try:
        with (directory / name).open("rb", buffering=0) as f:
            f.seek(offset)
            while left:
                got = f.readinto(block[: min(left, BLOCK)])
                if not got:
                    return "cannot be read: the file shrank"
                digest.update(block[:got])
                left -= got
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest.hexdigest() == expected else "differ from what the merge wrote"
