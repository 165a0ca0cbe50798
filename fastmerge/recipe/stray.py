"""Keys and parameters that nothing reads: harmless, or not what the author meant.

mergekit ignores them all without a word, so published recipes have some. A harmless one (``name:``, a parameter of
another method) is a warning; one that looks misspelt, or that would mean something elsewhere, is an error.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from fastmerge.methods.base import Method
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
    "modules": PLACES[""],
}


def key(problems: Problems, loc: Loc, container: str, given: Container[str]) -> None:
    """Judges a key that its mapping does not have.

    Args:
        problems: takes the verdict.
        loc: of the key.
        container: which mapping it stands in, as :data:`KEYS` calls them.
        given: all keys of that mapping.
    """
    name, known = str(loc[-1]), KEYS[container]
    there = {k for k in known if k in given}
    there.update(*(group for group in _EITHER if group & there))
    meant, place = misspelt(name, known, there), _elsewhere(name)
    listed = f"known here: {', '.join(known)}"
    if meant:
        problems.add(loc, f"unknown key (did you mean {meant!r}?); {listed}")
    elif place:
        problems.add(loc, f"this key belongs to {place}; {listed}")
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
    meant, place = misspelt(name, known, given), _elsewhere(name)
    if of_another:
        problems.warn(loc, f"{method.name!r} takes no {name!r}, ignored{hint(name, known)}; {listed}")
    elif meant:
        problems.add(loc, f"unknown parameter of {method.name!r} (did you mean {meant!r}?); {listed}")
    elif place:
        problems.add(loc, f"this key belongs to {place}, not under 'parameters:'; {listed}")
    else:
        problems.warn(loc, f"unknown parameter of {method.name!r}, ignored{hint(name, known)}; {listed}")


def _elsewhere(name: str) -> str | None:
    return next((PLACES[c] for c, keys in KEYS.items() if name in keys), _INSIDE.get(name))
