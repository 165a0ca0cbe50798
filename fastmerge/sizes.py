"""Byte sizes as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fastmerge.errors import RecipeError

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)

DEFAULT_MEMORY = 8 * 1000**3
"""Budget where the user names none: this, or half of the memory that is free, whichever is less."""


def parse_bytes(text: str | int) -> int:
    """``"8GB"`` -> 8000000000, ``"64MiB"`` -> 67108864.

    Raises:
        RecipeError: for anything else.
    """
    if isinstance(text, int):
        return text
    match = _PATTERN.fullmatch(text)
    if not match:
        raise RecipeError(f"size {text!r}: expected a number of bytes such as 8GB, 512MiB or 5000000000")
    number, unit, binary, _ = match.groups()
    base = 1024 if binary else 1000
    power = " kmgt".index(unit.lower()) if unit else 0
    return int(float(number) * base**power)


def default_memory() -> int:
    """The budget of a run that names none."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min(DEFAULT_MEMORY, available // 2)
