"""Several recipes in one file, as mergekit-multi takes them: a document with a ``name`` is a model of the others.

The result is the document without a name; where all have one, the last that no other uses. The order of the documents
does not matter. A name goes before a directory or a Hub id that is called the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from fastmerge.errors import RecipeError
from fastmerge.recipe.checks import places
from fastmerge.recipe.problems import Problems, misspelt
from fastmerge.recipe.refs import exists
from fastmerge.recipe.tree import Loc, Map, kind

if TYPE_CHECKING:
    from fastmerge.recipe import Recipe

_RESERVED = frozenset({"base", "union"})
"""What a tokenizer's source means otherwise."""


class Document(NamedTuple):
    """A recipe of a file of several.

    Attributes:
        name: what others call its result; None where it has none.
        recipe: by itself.
        problems: what was found in it.
        uses: names of the documents whose results are its models.
    """

    name: str | None
    recipe: Recipe
    problems: Problems
    uses: tuple[str, ...]


def read_all(trees: Sequence[Map], read: Callable[[Map], tuple[Recipe | None, Problems]]) -> list[Document]:
    """The documents of a file, each behind those that it uses.

    Args:
        trees: of the documents; their ``name`` is taken out.
        read: checks one.

    Raises:
        RecipeError: with the problems of all.
    """
    given = [tree.pop("name", None) for tree in trees]
    pairs = [read(tree) for tree in trees]
    first: dict[str | None, int] = {}
    for i, (name, tree, (_, problems)) in enumerate(zip(given, trees, pairs, strict=True)):
        if (wrong := _wrong(name)) is not None:
            problems.add(("name",), wrong)
            continue
        if name in first:
            line = trees[first[name]].lines.get("name") if name is not None else trees[first[name]].line
            where = f" (as on line {line})" if line is not None else ""
            again = f"{name!r} names another document already" if name is not None else _NAMELESS
            problems.add(("name",) if "name" in tree.lines else (), f"{again}{where}")
            continue
        first[name] = i
        if name is not None and exists(name):
            problems.warn(
                ("name",),
                f"{name!r} is a path on this machine as well: here it is this document; './{name}' is the path",
            )
    names = {name: i for name, i in first.items() if name is not None}
    uses = {i: _uses(recipe, names, problems) for i, (recipe, problems) in enumerate(pairs) if recipe is not None}
    order = _sorted(uses, names, pairs)
    if found := [text for _, problems in pairs for text in problems.found]:
        raise RecipeError(found)
    out = []
    for i in order:
        recipe, problems = pairs[i]
        if recipe is None:
            raise RecipeError("not a recipe")
        out.append(Document(given[i], recipe, problems, tuple(uses[i])))
    return out


_NAMELESS = "another document has no name either: one of them is the result, and the others need a 'name'"


def _wrong(name: object) -> str | None:
    """What is wrong with the name of a document."""
    if name is None:
        return None
    if not isinstance(name, str):
        return f"expected a name; got {kind(name)}"
    if not name.strip() or name != name.strip() or not name.isprintable():
        return f"expected a name; got {name!r}"
    if any(c in name for c in "@+") or name.endswith("/") or name.startswith("model:"):
        return f"expected a name that other documents can write as a model: without '@', '+', 'model:'; got {name!r}"
    return f"{name!r} means something else as the source of a tokenizer" if name in _RESERVED else None


def _uses(recipe: Recipe, names: Mapping[str, int], problems: Problems) -> dict[str, Loc]:
    """The documents that a recipe uses, and where it does first."""
    out: dict[str, Loc] = {}
    for loc, ref in places(recipe):
        for adapter in ref.adapters:
            if adapter.path in names:
                problems.add(loc, f"{adapter.path!r} is a document of this file: its result is a model, no adapter")
        if ref.path not in names:
            near = misspelt(ref.path, names)
            if near and "/" not in ref.path and not exists(ref.path):
                problems.add(
                    loc, f"no document of this file is called {ref.path!r} (did you mean {near!r}?), and no path"
                )
        elif ref.revision is not None:
            problems.add(loc, f"{ref.path!r} is a document of this file, which has no revision {ref.revision!r}")
        else:
            out.setdefault(ref.path, loc)
    return out


def _sorted(
    uses: Mapping[int, Mapping[str, Loc]],
    names: Mapping[str, int],
    pairs: Sequence[tuple[object, Problems]],
) -> list[int]:
    """Positions of the documents, each behind those that it uses; adds a problem for each ring of them."""
    done: dict[int, None] = {}
    calls = {i: name for name, i in names.items()}
    for start in range(len(pairs)):
        way: list[tuple[int, Iterator[tuple[str, Loc]]]] = [(start, iter(uses.get(start, {}).items()))]
        while way:
            here, left = way[-1]
            step = next(left, None) if here not in done else None
            if step is None:
                done[here] = None
                way.pop()
                continue
            target, loc = names[step[0]], step[1]
            on = [i for i, _ in way]
            if target in on:
                ring = " -> ".join(calls[i] for i in [*on[on.index(target) :], target])
                pairs[here][1].add(loc, f"the documents use each other in a ring: {ring}")
            elif target not in done:
                way.append((target, iter(uses.get(target, {}).items())))
    return list(done)


def needed(document: Document, every: Sequence[Document]) -> list[Document]:
    """What a document uses, and what that uses; in the order of ``every``, which has each behind what it uses."""
    names = set(document.uses)
    for other in reversed(every):
        if other.name in names:
            names.update(other.uses)
    return [other for other in every if other.name in names]


def result(every: Sequence[Document]) -> Recipe:
    """The recipe of what a file makes, with its stages.

    Raises:
        RecipeError: where the recipes are read strictly and a document is there for nothing.
    """
    used = {name for document in every for name in document.uses}
    ends = [d for d in every if d.name not in used]
    found = next((d for d in ends if d.name is None), ends[-1])
    warnings: list[str] = []
    for other in every:
        if other is not found and other not in needed(found, every):
            other.problems.warn(("name",), "nothing uses this document: it is not merged")
            other.problems.check()
            warnings += other.problems.origin.warnings
    origin = found.recipe.origin
    if not warnings or origin is None:
        return found.recipe
    return replace(found.recipe, origin=replace(origin, warnings=(*origin.warnings, *warnings)))
