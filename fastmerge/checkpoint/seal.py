"""What a finished output says of itself: checksums of its files, in its report, and of the report.

``details.files`` of the report holds ``[bytes, xxh3_64]`` of every file beside the report; of a shard they are its
header's, as ``details.checksums`` has those of its data. ``digest`` is the checksum of all else in the report. They
find damage and edits; whoever wants to deceive can write them anew.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import xxhash

from fastmerge.checkpoint.formats import parse_config
from fastmerge.checkpoint.system import open_regular, read_regular

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

REPORT_NAME = "merge_report.json"
CARD_NAME = "README.md"
"""Written for people to edit: what became of it is no fault."""

MAX_REPORT = 1 << 30
_BLOCK = 1 << 20
_MAX_PARTS = 4

Mark = tuple[int, str]
"""Bytes and their xxh3_64, in hex."""


def plain_name(name: str) -> bool:
    """Whether a name is that of a file of the output, perhaps in plain directories (``1_Pooling/config.json``)."""
    parts = name.split("/")
    return len(parts) <= _MAX_PARTS and all(part.strip(".") and "\0" not in part for part in parts)


def blocks(path: Path, most: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, or the first ``most``, a block at a time.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    fd = open_regular(path)
    try:
        at = 0
        while block := os.pread(fd, _BLOCK if most is None else min(_BLOCK, most - at), at):
            yield block
            at += len(block)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise
    finally:
        os.close(fd)


def mark(data: bytes | Path, most: int | None = None) -> Mark:
    """Bytes and checksum of a text, or of (the first ``most`` bytes of) a file.

    Raises:
        OSError: the file cannot be read.
    """
    digest, size = xxhash.xxh3_64(), 0
    for block in [data] if isinstance(data, bytes) else blocks(data, most):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def digest(facts: Mapping[str, Any]) -> str:
    """Checksum of everything in a report but its own ``digest``; layout and order of its text do not matter."""
    rest = json.loads(json.dumps({key: value for key, value in facts.items() if key != "digest"}))
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def read_report(directory: Path) -> dict[str, Any] | None:
    """The report of an output; None where there is nothing that could be one.

    Raises:
        ValueError: there is something else under its name.
    """
    path = directory / REPORT_NAME
    if not os.path.lexists(path):
        return None
    try:
        facts = parse_config(read_regular(path, MAX_REPORT).decode())
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ValueError(f"{path}: not a merge report: {said}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("details", {}), dict):
        raise ValueError(f"{path}: not a merge report")  # noqa: TRY004  as for all that is none
    return facts


def files_of(facts: Mapping[str, Any]) -> dict[str, Mark] | None:
    """Files and their marks as a report has them; None where it has none, or something else in their place."""
    found = facts.get("details", {}).get("files")
    if not isinstance(found, dict):
        return None
    for name, entry in found.items():
        size, checksum = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if type(size) is not int or type(checksum) is not str or not plain_name(name):
            return None
    return {name: (entry[0], entry[1]) for name, entry in found.items()}


def changes(directory: Path, files: Mapping[str, Mark]) -> list[str]:
    """What became of the files of an output; of shards, of their headers."""
    found = []
    for name, (size, checksum) in files.items():
        path = directory / name
        if name == CARD_NAME:
            continue
        if not os.path.lexists(path):
            found.append(f"{path}: is missing")
            continue
        try:
            now = mark(path, size if name.endswith(".safetensors") else None)
        except (OSError, ValueError) as error:
            found.append(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
            continue
        if now != (size, checksum):
            what = "its header differs" if name.endswith(".safetensors") else "differs"
            found.append(f"{path}: {what} from what the merge wrote")
    return found
