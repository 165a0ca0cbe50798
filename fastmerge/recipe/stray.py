"""Keys and parameters that nothing reads: harmless, or not what the author meant.

mergekit ignores them all without a word, so published recipes have some, and their results are those without them.
Such a key is a warning, with its place where it has one (``layer_range`` under ``models``, ``density`` at the top).
One that looks misspelt is an error, and so is one that would make a model another one (``revision`` beside ``model``).
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from fastmerge.methods.base import REQUIRED, Method
from fastmerge.recipe.problems import Problems, hint, misspelt
from fastmerge.recipe.schema import KEYS, PLACES
from fastmerge.recipe.tree import Loc

_EITHER = (frozenset({"models", "slices", "modules"}), frozenset({"tokenizer", "tokenizer_source"}))
_INSIDE = {
    "path": "'model: {model: {path: ..., revision: ...}}'",
    "revision": "'model: {model: {path: ..., revision: ...}}'",
    "lora": "'model: {model: ..., lora: ...}'",
    "filter": "an entry {filter, value} of a parameter",
    "value": "an entry {filter, value} of a parameter",
}
"""Keys below those of :data:`KEYS`: ignored, another model or other tensors would be merged than asked for."""

_OWN = ("x-", "_", ".")
"""Beginnings of keys that hold what anchors are put at; no misspellings."""


def key(
    problems: Problems, loc: Loc, container: str, given: Container[str], method: type[Method] | None = None
) -> None:
    """Judges a key that its mapping does not have.

    Args:
        problems: takes the verdict.
        loc: of the key.
        container: which mapping it stands in, as :data:`KEYS` calls them.
        given: all keys of that mapping.
        method: of the recipe, whose parameters may stand in the wrong place.
    """
    name, known = str(loc[-1]), KEYS[container]
    params = {p.name: p for p in method.params} if method and container != "tokenizer" else {}
    if method and name in params:
        said = f"{name!r} is a parameter of {method.name!r}: put it under 'parameters:'"
        if params[name].default is REQUIRED:
            problems.add(loc, said)
        else:
            problems.warn(loc, f"ignored here: {said}")
        return
    there = {k for k in known if k in given}
    there.update(*(group for group in _EITHER if group & there))
    meant = None if name.startswith(_OWN) else misspelt(name, known, there)
    listed = f"known here: {', '.join(known)}"
    if meant:
        problems.add(loc, f"unknown key (did you mean {meant!r}?); {listed}")
    elif name in _INSIDE:
        problems.add(loc, f"this key belongs to {_INSIDE[name]}; {listed}")
    elif place := _elsewhere(name):
        problems.warn(loc, f"ignored here: this key belongs to {place}; {listed}")
    else:
        problems.warn(loc, f"unknown key, ignored{hint(name, known)}; {listed}")


def parameter(
    problems: Problems, loc: Loc, method: type[Method], methods: Mapping[str, type[Method]], given: Container[str]
) -> None:
    """Judges a parameter that the recipe's method does not take; arguments as of :func:`key`."""
    name = str(loc[-1])
    known = {p.name for p in method.params}
    listed = f"known: {', '.join(p.name for p in method.params) or 'none'}"
    of_another = any(name == p.name for m in methods.values() for p in m.params)
    if of_another:
        problems.warn(loc, f"{method.name!r} takes no {name!r}, ignored{hint(name, known)}; {listed}")
    elif name in _INSIDE:
        problems.add(loc, f"this key belongs to {_INSIDE[name]}, not under 'parameters:'; {listed}")
    elif place := _elsewhere(name):
        problems.warn(loc, f"ignored here: this key belongs to {place}, not under 'parameters:'; {listed}")
    elif meant := misspelt(name, known, given):
        problems.add(loc, f"unknown parameter of {method.name!r} (did you mean {meant!r}?); {listed}")
    else:
        problems.warn(loc, f"unknown parameter of {method.name!r}, ignored{hint(name, known)}; {listed}")


def _elsewhere(name: str) -> str | None:
    return next((PLACES[c] for c, keys in KEYS.items() if name in keys), None)
