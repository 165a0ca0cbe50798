"""Words of a request: an Enum's member or its value, whichever people write."""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from fastmerge.errors import RecipeError, hint

Choice = TypeVar("Choice", bound=Enum)


def chosen(key: str, kinds: type[Choice], given: object) -> Choice:
    """The member that is meant by a member, its value or its name.

    Raises:
        RecipeError: naming the key, the words there are, and what was given.
    """
    if isinstance(given, kinds):
        return given
    word = given.value if isinstance(given, Enum) else given
    for kind in kinds:
        if word in (kind.value, kind.name):
            return kind
    words = [str(kind.value) for kind in kinds]
    near = hint(word, words) if isinstance(word, str) else ""
    raise RecipeError(f"{key}: expected one of {', '.join(words)}, got {word!r:.80}{near}")
