"""Checks a merged model: headers, checksums of the merge, NaN and Inf, and the recipe it came from."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from fastmerge import _native
from fastmerge.checkpoint import Checkpoint
from fastmerge.devices import cores
from fastmerge.errors import CheckpointError

BLOCK = 8 << 20
"""Bytes per read."""


@dataclass
class Verification:
    """What was found.

    Attributes:
        directory: the model.
        tensors, nbytes: how much was read.
        checked, unchecked: bytes whose checksum the merge recorded, and bytes without one (copied ranges).
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
    with ThreadPoolExecutor(cores()) as pool:
        for name, bad, size in pool.map(lambda n: _scan(model, n), model.tensors):
            found.nbytes += size
            if bad:
                found.nonfinite[name] = bad
        _checksums(found, pool)
    return found


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


def _checksums(found: Verification, pool: ThreadPoolExecutor) -> None:
    """Compares every range that the merge recorded."""
    path = Path(found.directory) / "merge_report.json"
    ranges: list[list[Any]] = []
    if path.exists():
        try:
            ranges = json.loads(path.read_text())["details"]["checksums"]
        except (ValueError, KeyError, TypeError):
            found.problems.append(f"{path}: not a merge report")
    ends: dict[str, int] = defaultdict(int)
    ranges.sort(key=lambda r: (r[0], r[1]))
    for (shard, offset, nbytes, _), good in zip(
        ranges, pool.map(lambda r: _matches(found.directory, r), ranges), strict=True
    ):
        # A resumed merge may have recorded overlapping ranges; each byte counts once.
        found.checked += max(0, offset + nbytes - max(offset, ends[shard]))
        ends[shard] = max(ends[shard], offset + nbytes)
        if not good:
            found.problems.append(f"{shard}: bytes {offset} to {offset + nbytes} differ from what the merge wrote")
    found.unchecked = found.nbytes - found.checked


def _matches(directory: str, entry: list[Any]) -> bool:
    shard, offset, nbytes, expected = entry
    with (Path(directory) / os.path.basename(shard)).open("rb") as f:  # noqa: PTH119  a name from a file stays a name
        f.seek(offset)
        return bool(xxhash.xxh3_64_hexdigest(f.read(nbytes)) == expected)
