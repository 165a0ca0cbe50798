"""Regular expressions out of files: only such as are matched in a bounded time."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

STEPS = 500_000_000
"""Most steps that all matching may take in the worst case: a few seconds."""

COMPILING = 25_000
"""Steps that take as long as compiling a pattern."""

_TOKEN = re.compile(
    r"(?P<atom>\\[^a-zA-Z0-9]|\\[dDwWsS]|\[\^?\]?(?:\\.|[^\[\]\\])*\]|[^\\\[\](){}*+?|^$])"
    r"|(?P<repeat>(?:[*+?]|\{[0-9]{0,3},?[0-9]{0,3}\})\??)|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<or>\|)|[\^$]"
)


class Patterns:
    """A table from regular expressions to values, asked as peft does.

    A pattern matches a module's name where it matches all of it, or all of it from behind a dot on; the first pattern
    that does counts, in the order of the file.

    Args:
        table: values by pattern: letters, classes, groups with alternatives, and repeats of single characters.
        modules: all names that will be asked for.

    Raises:
        ValueError: a pattern is something else, or matching may take too long.
    """

    def __init__(self, table: Mapping[str, Any], modules: Collection[str]) -> None:
        self._rules = []
        steps = 0
        for pattern, value in table.items():
            steps += _steps(pattern, modules)
            if steps > STEPS:
                raise ValueError(f"{pattern!r:.200} may take too long to match")
            try:
                self._rules.append((re.compile(rf"(?:.*\.)?(?:{pattern})"), value))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern!r:.200} is not a regular expression: {error}") from None

    def find(self, module: str, default: Any) -> Any:
        """The value for a module."""
        return next((value for pattern, value in self._rules if pattern.fullmatch(module)), default)


def _steps(pattern: str, modules: Collection[str]) -> int:
    """How many ways a matcher that goes back may try, for all modules together."""
    at = repeats = 0
    paths, ways, last = 1, [1], ""
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        kind = token.lastgroup or "" if token is not None else "odd"
        if token is None or (kind == "repeat" and last != "atom") or (kind == "close" and len(ways) == 1):
            raise ValueError(
                f"{pattern!r:.200}: only letters, classes, groups with alternatives and repeats of single characters "
                "are read in a pattern"
            )
        repeats += kind == "repeat"
        if kind == "open":
            ways.append(1)
        elif kind == "or":
            ways[-1] += 1
        elif kind == "close":
            paths *= ways.pop()
        at, last = token.end(), kind
    if paths.bit_length() > 64 or repeats > 8:
        return STEPS + 1
    longest = max(map(len, modules), default=0) + 1
    starts = max((m.count(".") for m in modules), default=0) + 1
    return COMPILING + len(modules) * starts * paths * math.prod(ways) * math.comb(longest + repeats, repeats)
