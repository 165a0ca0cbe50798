"""Byte sizes as people write them."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.tensors import python_values

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)

DEFAULT_MEMORY = 8 * 1000**3
"""Budget where the user names none: this, or half of the memory that is free, whichever is less."""

PROCESS = 300 * 1000**2
"""What the process may take beside its budget."""


def parse_bytes(text: str | float) -> int:
    """``"8GB"`` -> 8000000000, ``"64MiB"`` -> 67108864, ``2e9`` -> 2000000000.

    Raises:
        RecipeError: for anything else.
    """
    given: Any = python_values(text)
    if isinstance(given, int | float) and 0 <= given < math.inf:
        return int(given)
    match = _PATTERN.fullmatch(given) if isinstance(given, str) else None
    if not match:
        raise RecipeError(f"size {text!r}: expected a number of bytes such as 8GB, 512MiB or 5000000000")
    number, unit, binary, _ = match.groups()
    base = 1024 if binary else 1000
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * base**power)


def show_bytes(nbytes: float) -> str:
    """``12_345_678`` -> ``"12.3 MB"``: three digits, in bytes, kB, MB, GB or TB."""
    value, unit = float(nbytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value >= 999.5:
            value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def default_memory(root: str | os.PathLike[str] = "/") -> int:
    """The budget of a run that names none: half of what is free, and beside it room for the process itself.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    free = available(root)
    return max(min(DEFAULT_MEMORY, free // 2, free - PROCESS), free // 8)


def available(root: str | os.PathLike[str] = "/") -> int:
    """Bytes that this process may still take: of the machine, and of every control group that it is in.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    root = Path(root)
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found = int(line.split()[1]) * 1024
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        mount = root / "sys/fs/cgroup"
        if "memory" in controllers.split(","):
            names, group = ("memory.limit_in_bytes", "memory.usage_in_bytes"), mount / "memory"
        elif not controllers:
            names, group = ("memory.max", "memory.current"), mount
            if not (mount / "cgroup.controllers").exists():
                group = mount / "unified"  # both versions side by side
        else:
            continue
        # In a container the path may be the host's, which is not mounted there: what exists of it counts, from
        # the group itself up to the root, as each may have the tightest limit.
        inside = group / path.strip("/")
        for level in (inside, *inside.parents):
            if level.is_relative_to(group):
                found = min(found, _left(level, *names))
    return max(found, 0)


def _left(group: Path, limit: str, usage: str) -> int:
    """Bytes below the limit of one control group; what the page cache holds there can go."""
    most = _number(_text(group / limit))
    if most is None:
        return sys.maxsize
    used = _number(_text(group / usage)) or 0
    facts = dict(line.split()[:2] for line in _text(group / "memory.stat").splitlines() if len(line.split()) == 2)
    cache = _number(facts.get("total_inactive_file") or facts.get("inactive_file") or "") or 0
    return most - max(used - cache, 0)


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
