"""All problems of a recipe, each with file, line and place, raised together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastmerge.errors import RecipeError, hint
from fastmerge.recipe.tree import Loc, line_at


def dotted(loc: Loc) -> str:
    """``models[1].parameters.density``."""
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


@dataclass(frozen=True, slots=True)
class Origin:
    """The file of a recipe and the lines of its parts. All are equal: recipes are equal where they mean the same."""

    name: str = field(compare=False)
    tree: Any = field(compare=False, repr=False)

    def line(self, loc: Loc) -> int | None:
        """Of the deepest part of ``loc`` that exists."""
        return line_at(self.tree, loc)

    def at(self, loc: Loc) -> str:
        """``recipe.yml:4: models[1].parameters``."""
        line, place = self.line(loc), dotted(loc)
        head = f"{self.name}:{line}" if line is not None else self.name
        return f"{head}: {place}" if place else head


class Problems:
    """Collects what is wrong; knows the file and the lines of its parts."""

    def __init__(self, name: str, tree: Any) -> None:
        self.origin = Origin(name, tree)
        self._found: dict[tuple[int, str], None] = {}

    def add(self, loc: Loc, message: str) -> None:
        """One problem at a place of the tree; saying the same twice is saying it once."""
        self._found[self.origin.line(loc) or 0, f"{self.origin.at(loc)}: {message}"] = None

    def __bool__(self) -> bool:
        return bool(self._found)

    def check(self) -> None:
        """Raises everything found, in the order of the lines.

        Raises:
            RecipeError: where anything was added.
        """
        if self._found:
            raise RecipeError([text for _, text in sorted(self._found, key=lambda f: f[0])])


__all__ = ["Origin", "Problems", "dotted", "hint"]
