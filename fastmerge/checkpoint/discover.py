"""Which files make up a model: one file, an index and its shards, or a plain directory."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import formats
from fastmerge.checkpoint.header import LISTED, MAX_TENSORS, check_count, listing, name_problem, parse_json
from fastmerge.checkpoint.layout import INDEX_NAME
from fastmerge.checkpoint.system import read_regular
from fastmerge.errors import CheckpointError

MAX_JSON = 100_000_000
"""Bytes of an index or a config."""

SINGLE = "model.safetensors"
_NUMBERED = r"(?P<stem>.+)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.safetensors"
_INDEX = ".safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_PATH = frozenset("/\\\0")
_BLOB = r"[0-9a-f]{2}/[0-9a-f]{64}"


@dataclass
class Found:
    """Files of a model before any header is read.

    Attributes:
        directory: where config and tokenizer are looked for.
        files: weight files, in order.
        weight_map: tensor to file name as the index has it; None without an index.
        problems: everything that forbids using it.
        warnings: what a user should know.
    """

    directory: Path
    files: list[Path] = field(default_factory=list)
    weight_map: dict[str, str] | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find(path: Path) -> Found:
    """The files behind a path that exists; problems are collected, not raised."""
    if path.is_dir():
        return _directory(path)
    found = Found(path.parent)
    if path.name.endswith(_INDEX):
        _indexed(found, path)
    elif path.name == _ADAPTER:
        found.problems.append(formats.adapter(path))
    elif path.suffix == ".safetensors":
        found.files.append(path)
    else:
        found.problems.append(formats.other(path))
    return found


def contained(path: Path, directory: Path) -> bool:
    """Whether a file of a model, links followed, lies in the model's directory.

    A snapshot in the Hugging Face cache links to the blobs of its repository, and those to the blobs that
    all repositories share; both count as inside. Weights, index and config are read wherever their links lead:
    what is there must be of that kind. It matters for files whose bytes are copied unseen.
    """
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    if real.is_relative_to(root):
        return True
    if root.parent.name != "snapshots" or not root.parent.parent.name.startswith("models--"):
        return False
    repo = root.parent.parent
    if real.parent == repo / "blobs":
        return True
    shared = repo.parent / "blobs"
    return real.is_relative_to(shared) and re.fullmatch(_BLOB, str(real.relative_to(shared))) is not None


def read_json(path: Path, *, strict: bool) -> dict[str, Any]:
    """A JSON file whose root is an object.

    Args:
        path: the file.
        strict: refuse duplicate keys and NaN; configs in the wild have both.

    Raises:
        CheckpointError: unreadable, too large, not JSON, or no object.
    """
    try:
        raw = read_regular(path, MAX_JSON + 1)
        if len(raw) > MAX_JSON:
            raise CheckpointError(f"{path}: expected at most {MAX_JSON} bytes")
        check_count(raw)
        text = raw.decode()
        content = parse_json(text) if strict else formats.parse_config(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _directory(path: Path) -> Found:
    found = Found(path)
    names = sorted(f.name for f in path.iterdir() if not f.name.startswith("."))
    weights = [n for n in names if n.endswith(".safetensors")]
    if _ADAPTER in weights:
        weights.remove(_ADAPTER)
        if weights:
            found.warnings.append(f"{path / _ADAPTER}: a LoRA adapter beside a model; not used")
    indices = [n for n in names if n.endswith(_INDEX)]
    if not weights and not indices:
        found.problems.append(formats.nothing(path, names))
    elif INDEX_NAME in indices or len(indices) == 1:
        _indexed(found, path / (INDEX_NAME if INDEX_NAME in indices else indices[0]))
        used = set((found.weight_map or {}).values())
        if SINGLE in weights and SINGLE not in used:
            found.problems.append(
                f"{path}: holds both an index and a {SINGLE} that the index does not name, so which weights are "
                f"meant is unclear: name the index or the file itself, or remove the stale one"
            )
        rest = [n for n in weights if n not in used and n != SINGLE]
        if rest and not found.problems:
            found.warnings.append(f"{path}: files that the index does not name are not used: {listing(rest)}")
    elif indices:
        found.problems.append(f"{path}: several indices: {listing(indices)}: name the one that is meant")
    else:
        _plain(found, weights)
    return found


def _plain(found: Found, weights: list[str]) -> None:
    """A directory without an index: one file, one set of numbered shards, or every file."""
    path = found.directory
    sets: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in weights:
        match = re.fullmatch(_NUMBERED, name)
        if match:
            sets[match["stem"], int(match["count"])].add(int(match["number"]))
    for (stem, count), numbers in sets.items():
        missing = [n for n in range(1, min(count, 100_000) + 1) if n not in numbers]
        if missing or count != len(numbers):
            names = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in missing]
            found.problems.append(f"{path}: {len(numbers)} of {count} shards, missing: {listing(names)}")
    if len(sets) > 1 or (sets and SINGLE in weights):
        found.problems.append(
            f"{path}: several models without an index: {listing(weights)}: name the file that is meant"
        )
    chosen = weights
    if SINGLE in weights:
        chosen = [SINGLE]
    elif sets:
        chosen = [n for n in weights if re.fullmatch(_NUMBERED, n)]
    rest = [n for n in weights if n not in chosen]
    if rest:
        found.warnings.append(f"{path}: not used, as they are not part of {chosen[0]}: {listing(rest)}")
    _take(found, chosen)


def _indexed(found: Found, index: Path) -> None:
    try:
        content = read_json(index, strict=True)
    except CheckpointError as error:
        found.problems.extend(error.problems)
        return
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        found.problems.append(f"{index}: weight_map: expected a map from tensor names to file names")
        return
    if len(weight_map) > MAX_TENSORS:
        found.problems.append(f"{index}: {len(weight_map)} tensors; expected at most {MAX_TENSORS}")
        return
    found.problems += _some(f"{index}: ", filter(None, map(name_problem, weight_map)))
    # One plain file name, so that nothing is ever joined to a path that leads elsewhere.
    names = set(weight_map.values())
    bad = {n for n in names if not n.endswith(".safetensors") or n.startswith(".") or not _PATH.isdisjoint(n)}
    good = sorted(names - bad)
    holders = {name: tensor for tensor, name in weight_map.items() if name in bad}
    found.problems += _some(
        f"{index}: weight_map: ",
        (
            f"tensor {tensor!r} is said to be in {name!r}; "
            f"expected the name of a *.safetensors file in the same directory"
            for name, tensor in sorted(holders.items())
        ),
    )
    missing = [n for n in good if not os.path.lexists(found.directory / n)]
    if missing:
        found.problems.append(f"{index}: shards that the index names are missing: {listing(missing)}")
    found.weight_map = weight_map
    _take(found, [n for n in good if n not in set(missing)])


def _some(head: str, problems: Iterable[str]) -> list[str]:
    """The first problems of one kind, and how many more there are."""
    found = [head + text for text in problems]
    return found if len(found) <= LISTED else [*found[:LISTED], f"{head}and {len(found) - LISTED} more like these"]


def _take(found: Found, names: list[str]) -> None:
    found.files += [found.directory / name for name in names]
