"""From a file, a text or a mapping to a checked recipe: every problem is found before the first is raised."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from fastmerge.checkpoint.system import read_regular
from fastmerge.errors import RecipeError
from fastmerge.methods.base import Method
from fastmerge.recipe import tree as yamltree
from fastmerge.recipe.problems import Problems, hint
from fastmerge.recipe.schema import KEYS, Shape
from fastmerge.recipe.settings import Parameters, Rule, Setting, read
from fastmerge.recipe.tree import Loc, Map, Seq, kind

IGNORED = frozenset({"int8_mask"})
"""mergekit's parameters that never change a result: accepted at every level of every method."""

LIFTED = frozenset({("slerp", "t")})
"""Shared parameters that models may state too, as long as they all state the same."""

S = TypeVar("S", bound=Shape)


def text_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[Map, str]:
    """The tree of a recipe and the name that errors use for it.

    Args:
        source: a file (a path, or a string that has no line break and is no YAML mapping), YAML text, or
            a mapping.

    Raises:
        RecipeError: where the file cannot be read or is no YAML mapping.
    """
    if isinstance(source, Mapping):
        return yamltree.locate(source), "recipe"
    if isinstance(source, str) and ("\n" in source or _looks_like_yaml(source)):
        return yamltree.parse(source, "recipe"), "recipe"
    path = Path(source)
    if "\0" in str(path):
        raise RecipeError(f"{str(path)!r}: neither a path nor a recipe")
    try:
        data = read_regular(path, yamltree.MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as e:
        raise RecipeError(f"{path}: cannot read the recipe: {e.strerror}") from None
    except UnicodeDecodeError as e:
        if len(data) <= yamltree.MAX_BYTES:
            raise RecipeError(f"{path}: not UTF-8 text (byte {e.start})") from None
        text = data.decode("utf-8", "replace")
    return yamltree.parse(text, str(path)), str(path)


def _looks_like_yaml(text: str) -> bool:
    if ": " not in text and not text.lstrip().startswith("{"):
        return False
    return not os.path.isfile(text)  # noqa: PTH113  Path.is_file raises for names that are too long


def build(cls: type[S], tree: Map, name: str, methods: Mapping[str, type[Method]]) -> tuple[S | None, Problems]:
    """The recipe in a tree, and what is wrong with it so far.

    Keys that do not exist are reported and left out, so that the rest is still checked.
    """
    problems = Problems(name, tree)
    wanted = tree.get("merge_method")
    method = methods.get(wanted) if isinstance(wanted, str) else None
    if isinstance(wanted, str) and method is None:
        known = ", ".join(sorted(methods))
        problems.add(("merge_method",), f"unknown method {wanted!r}{hint(wanted, methods)}; known: {known}")
    data = _with_parameters(tree, method, problems)
    try:
        return cls.model_validate(data), problems
    except ValidationError as e:
        mended = True
        for error in e.errors(include_url=False):
            loc = tuple(p for p in error["loc"] if isinstance(p, int | str))
            problems.add(loc, _message(error, loc, method))
            mended = mended and error["type"] == "extra_forbidden" and _remove(data, loc)
    try:
        return (cls.model_validate(data) if mended else None), problems
    except ValidationError:
        return None, problems


def _message(error: Any, loc: Loc, method: type[Method] | None) -> str:
    key = loc[-1] if loc else ""
    match error["type"]:
        case "extra_forbidden":
            container = next((str(p) for p in reversed(loc[:-1]) if isinstance(p, str)), "")
            if container in ("models", "slices", "sources", "") and method and key in {p.name for p in method.params}:
                return f"{key!r} is a parameter of {method.name!r}: put it under 'parameters:'"
            known = KEYS.get(container, ())
            return f"unknown key{hint(str(key), known)}; known here: {', '.join(known)}"
        case "missing":
            return "this key is required"
        case "value_error":
            return str(error["ctx"]["error"])
        case "model_type" | "dict_type":
            return f"expected a mapping; got {_shown(error['input'])}"
        case "tuple_type":
            return f"expected a list; got {_shown(error['input'])}"
        case _:
            text = str(error["msg"]).replace("Input should be", "expected")
            return f"{text[0].lower()}{text[1:]}; got {_shown(error['input'])}"


def _shown(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float) else kind(value)


def _remove(data: Any, loc: Loc) -> bool:
    for part in loc[:-1]:
        data = data[part]
    return isinstance(data, dict) and data.pop(str(loc[-1]), None) is not None


def _with_parameters(tree: Map, method: type[Method] | None, problems: Problems) -> dict[str, Any]:
    """A copy of the tree in which every ``parameters`` is read."""

    def level(node: Any, loc: Loc, scope: Literal["shared", "model"]) -> Any:
        if not isinstance(node, Map):
            return node
        out = dict(node)
        if "parameters" in out:
            out["parameters"] = _level(out["parameters"], method, (*loc, "parameters"), scope, problems)
        return out

    def each(owner: dict[str, Any], key: str, loc: Loc) -> Iterator[tuple[Any, Loc]]:
        if isinstance(owner.get(key), Seq):
            yield from ((item, (*loc, key, i)) for i, item in enumerate(owner[key]))

    data: dict[str, Any] = level(tree, (), "shared")
    if isinstance(data.get("models"), Seq):
        data["models"] = [level(item, loc, "model") for item, loc in each(data, "models", ())]
    if isinstance(data.get("slices"), Seq):
        slices = []
        for item, loc in each(data, "slices", ()):
            out = level(item, loc, "shared")
            if isinstance(out, dict) and isinstance(out.get("sources"), Seq):
                out["sources"] = [level(source, at, "model") for source, at in each(out, "sources", loc)]
            slices.append(out)
        data["slices"] = slices
    if isinstance(data.get("tokenizer"), Map):
        data["tokenizer"] = dict(data["tokenizer"])
    return data


def _level(
    raw: Any, method: type[Method] | None, loc: Loc, scope: Literal["shared", "model"], problems: Problems
) -> Parameters:
    if raw is None:
        return Parameters()
    if not isinstance(raw, Map):
        problems.add(loc, f"expected a mapping of parameters; got {_shown(raw)}")
        return Parameters()
    declared = {p.name: p for p in method.params} if method else {}
    items: dict[str, Setting] = {}
    for name, value in raw.items():
        here = (*loc, name)
        param = declared.get(name)
        if method and param is None and name not in IGNORED:
            known = ", ".join(declared) or "none"
            problems.add(here, f"unknown parameter of {method.name!r}{hint(name, declared)}; known: {known}")
            continue
        if method and param and param.scope == "shared" and scope == "model" and (method.name, name) not in LIFTED:
            problems.add(here, "shared by all models: put it under the 'parameters:' of the recipe or the slice")
            continue
        setting = read(value, param, here, problems)
        items[name] = setting or Setting((Rule(0),))  # a wrong value is not a missing one
    return Parameters(items)
