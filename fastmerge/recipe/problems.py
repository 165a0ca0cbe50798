"""All problems of a recipe, each with file, line and place, raised together."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastmerge.errors import SHOWN, RecipeError, hint, printable
from fastmerge.recipe.tree import Loc, line_at

CLOSE = 0.7
"""Likeness of two words from which one is taken for a misspelling of the other."""

CLOSE_TO_GIVEN = 0.8
"""The same, where the other one is there as well."""


def misspelt(word: str, known: Iterable[str], given: Container[str] = ()) -> str | None:
    """The key that ``word`` very likely was meant to be, or None.

    A key that is there already (``given``) is meant once more only where the two are even closer.
    """
    import difflib

    matcher = difflib.SequenceMatcher(b=word.lower())
    best, found = 0.0, None
    for name in known:
        if sorted(name) == sorted(word.lower()):
            return name  # letters that changed places: "modles" is nearer to "models" than to "modules"
        matcher.set_seq1(name)
        least = max(best, CLOSE_TO_GIVEN if name in given else CLOSE)
        if matcher.real_quick_ratio() >= least and matcher.quick_ratio() >= least and matcher.ratio() >= least:
            best, found = matcher.ratio(), name
    return found


def dotted(loc: Loc) -> str:
    """``models[1].parameters.density``."""
    out = ""
    for part in loc:
        name = f"[{part}]" if isinstance(part, int) else part[:80]
        out += name if isinstance(part, int) or not out else f".{name}"
    return out


@dataclass(frozen=True, slots=True)
class Origin:
    """The file of a recipe, the lines of its parts, and what was said about them.

    All are equal: recipes are equal where they mean the same.
    """

    name: str = field(compare=False)
    tree: Any = field(compare=False, repr=False)
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def line(self, loc: Loc) -> int | None:
        """Of the deepest part of ``loc`` that exists."""
        return line_at(self.tree, loc)

    def at(self, loc: Loc) -> str:
        """``recipe.yml:4: models[1].parameters``."""
        line, place = self.line(loc), dotted(loc)
        head = f"{self.name}:{line}" if line is not None else self.name
        return printable(f"{head}: {place}" if place else head)


class Problems:
    """Collects what is wrong; knows the file and the lines of its parts.

    Args:
        name: of the file.
        tree: of the recipe.
        strict: whether a warning is a problem like any other.
    """

    def __init__(self, name: str, tree: Any, *, strict: bool = False) -> None:
        self._place = Origin(name, tree)
        self._strict = strict
        self._found: dict[tuple[int, str], None] = {}
        self._noted: dict[tuple[int, str], None] = {}
        for line, text in getattr(tree, "notes", ()):
            (self._found if strict else self._noted)[line, printable(text)] = None

    def add(self, loc: Loc, message: str) -> None:
        """One problem at a place of the tree; saying the same twice is saying it once."""
        self._found[self._place.line(loc) or 0, printable(f"{self._place.at(loc)}: {message}")] = None

    def warn(self, loc: Loc, message: str) -> None:
        """Something to look at that does not stop the merge, unless the recipe is read strictly."""
        text = printable(f"{self._place.at(loc)}: {message}")
        (self._found if self._strict else self._noted)[self._place.line(loc) or 0, text] = None

    @property
    def origin(self) -> Origin:
        """Where the recipe stands, with the warnings so far in the order of the lines."""
        texts = _in_order(self._noted)
        more = [f"{printable(self._place.name)}: ... and {len(texts) - SHOWN:,} more warnings"]
        return Origin(self._place.name, self._place.tree, tuple(texts[:SHOWN] + more[: len(texts) > SHOWN]))

    @property
    def found(self) -> list[str]:
        """Everything that is wrong so far, in the order of the lines."""
        return _in_order(self._found)

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self) -> None:
        """Raises everything found, in the order of the lines.

        Raises:
            RecipeError: where anything was added.
        """
        if self._found:
            raise RecipeError(self.found)


def _in_order(found: Iterable[tuple[int, str]]) -> list[str]:
    return [text for _, text in sorted(found, key=lambda f: f[0])]


__all__ = ["Origin", "Problems", "dotted", "hint", "misspelt"]
