"""Byte sizes as people write them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from fastmerge.errors import RecipeError
from fastmerge.tensors import plain

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)

DEFAULT_MEMORY = 8 * 1000**3
"""Budget where the user names none: this, or half of the memory that is free, whichever is less."""


def parse_bytes(text: str | float) -> int:
    """``"8GB"`` -> 8000000000, ``"64MiB"`` -> 67108864, ``2e9`` -> 2000000000.

    Raises:
        RecipeError: for anything else.
    """
    given: Any = plain(text)
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


def default_memory() -> int:
    """The budget of a run that names none."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min(DEFAULT_MEMORY, available // 2)
