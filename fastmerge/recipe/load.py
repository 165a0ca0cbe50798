"""From a file, a text or a mapping to a checked recipe: every problem is found before the first is raised."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic_core import ValidationError

from fastmerge.checkpoint.system import read_regular
from fastmerge.errors import RecipeError
from fastmerge.methods.base import REQUIRED, Method, Param
from fastmerge.recipe import stray
from fastmerge.recipe import tree as yamltree
from fastmerge.recipe.modules import hoist
from fastmerge.recipe.problems import Problems, hint
from fastmerge.recipe.schema import Shape, validate
from fastmerge.recipe.settings import Parameters, Rule, Setting, read
from fastmerge.recipe.tree import Loc, Map, Seq, kind

IGNORED = frozenset({"int8_mask"})
"""mergekit's parameters that never change a result: accepted at every level of every method."""

LIFTED = frozenset({("slerp", "t")})
"""Shared parameters that models may state too, as long as they all state the same."""

OTHER_COMMANDS = {
    "experts": "mergekit-moe",
    "shared_experts": "mergekit-moe",
    "gate_mode": "mergekit-moe",
    "genome": "mergekit-evolve",
    "evaluator": "search",
    "executor": "farm run",
    "recipes": "farm run",
}
"""Keys that only the files of other commands have."""

S = TypeVar("S", bound=Shape)


def text_of(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[list[Map], str]:
    """The trees of the documents of a recipe, and the name that errors use for it.

    Args:
        source: a file (a path, or a string that has no line break and is no YAML mapping), YAML text, or
            a mapping.

    Raises:
        RecipeError: where the file cannot be read or holds anything but YAML mappings.
    """
    if isinstance(source, Mapping):
        return [yamltree.locate(source)], "recipe"
    if isinstance(source, str) and ("\n" in source or _looks_like_yaml(source)):
        return yamltree.parse(source, "recipe"), "recipe"
    path = Path(source)
    if "\0" in str(path):
        raise RecipeError(f"{str(path)!r}: neither a path nor a recipe")
    try:
        data = read_regular(path, yamltree.MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except UnicodeEncodeError:
        raise RecipeError(f"{str(path)!r}: neither a path nor a recipe") from None
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


def build(
    cls: type[S], tree: Map, name: str, methods: Mapping[str, type[Method]], *, strict: bool = False
) -> tuple[S | None, Problems]:
    """The recipe in a tree, and what is wrong with it so far.

    Keys that do not exist are reported and left out, so that the rest is still checked.
    """
    problems = Problems(name, tree, strict=strict)
    foreign = next((key for key in OTHER_COMMANDS if key in tree), None)
    if foreign and "merge_method" not in tree:
        command = OTHER_COMMANDS[foreign]
        there = "not supported yet" if command == "mergekit-evolve" else f"'fastmerge {command}' takes it"
        problems.add((foreign,), f"this is a file for {command}, which merges by no 'merge_method': {there}")
        return None, problems
    hoist(tree, problems)
    wanted = tree.get("merge_method")
    method = methods.get(wanted) if isinstance(wanted, str) else None
    if isinstance(wanted, str) and method is None:
        known = ", ".join(sorted(methods))
        problems.add(("merge_method",), f"unknown method {wanted!r}{hint(wanted, methods)}; known: {known}")
    data = _Levels(tree, method, methods, problems).data()
    try:
        return cls(**validate(data)), problems
    except ValidationError as e:
        mended = True
        for error in e.errors(include_url=False):
            at = tuple(p for p in error["loc"] if isinstance(p, int | str))
            if at[0] == "modules" and len(at) > 1:
                loc: Loc = ("modules", [*tree["modules"]][int(at[1])], *at[2:])
            else:
                loc = at
            if error["type"] == "extra_forbidden":
                _extra(data, at, loc, method, problems)
                mended = mended and _remove(data, at)
            else:
                problems.add(loc, message(error))
                mended = False
    try:
        return (cls(**validate(data)) if mended else None), problems
    except ValidationError:
        return None, problems


def _extra(data: Any, at: Loc, loc: Loc, method: type[Method] | None, problems: Problems) -> None:
    """Says what a key that the grammar does not have is likely to be; ``at`` is its place in the data."""
    key = str(loc[-1])
    if key in IGNORED:
        problems.warn(loc, "ignored: it never changes a result (its place is under 'parameters:')")
        return
    container = next((p for p in reversed(at[:-1]) if isinstance(p, str)), "")
    for part in at[:-1]:
        data = data[part]
    stray.key(problems, loc, container, data, method)


def message(error: Any) -> str:
    """What is wrong, of one error of pydantic's."""
    match error["type"]:
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
    if not isinstance(data, dict) or loc[-1] not in data:
        return False
    del data[loc[-1]]
    return True


class _Levels:
    """Reads every ``parameters`` of a tree.

    Args:
        tree: of the recipe.
        method: its method; None where it is unknown.
        methods: all of them.
        problems: takes whatever is wrong.
    """

    def __init__(
        self, tree: Map, method: type[Method] | None, methods: Mapping[str, type[Method]], problems: Problems
    ) -> None:
        self._tree = tree
        self._method = method
        self._methods = methods
        self._problems = problems
        self._declared = {p.name: p for p in method.params} if method else {}
        self._free = IGNORED | {name for of, name in LIFTED if method and of == method.name}
        preset = tree.get("preset")
        known = method is not None and isinstance(preset, str) and preset in method.presets
        self._defaults = method.defaults(preset if known else None) if method else {}

    def data(self) -> dict[str, Any]:
        """A copy of the tree in which every ``parameters`` is read."""
        data: dict[str, Any] = self._level(self._tree, (), None)
        top = data.get("parameters", Parameters())
        self._members(data, (), (top,))
        if isinstance(data.get("modules"), Map):
            modules = []
            for name, item in data["modules"].items():
                loc = ("modules", name)
                out = self._level(item, loc, None)
                if isinstance(out, dict):
                    if "name" in out:
                        stray.key(self._problems, (*loc, "name"), "modules", out)
                    self._members(out, loc, (out.get("parameters", Parameters()), top))
                    out["name"] = name
                modules.append(out)
            data["modules"] = modules
        if isinstance(data.get("tokenizer"), Map):
            data["tokenizer"] = dict(data["tokenizer"])
        return data

    def _members(self, owner: dict[str, Any], loc: Loc, above: tuple[Parameters, ...]) -> None:
        """Reads the parameters of the models, slices and sources in a recipe or a module."""
        if isinstance(owner.get("models"), Seq):
            owner["models"] = [self._level(item, at, above) for item, at in _each(owner, "models", loc)]
        if isinstance(owner.get("slices"), Seq):
            slices = []
            for item, at in _each(owner, "slices", loc):
                out = self._level(item, at, None)
                if isinstance(out, dict) and isinstance(out.get("sources"), Seq):
                    common = (out.get("parameters", Parameters()), *above)
                    out["sources"] = [self._level(source, of, common) for source, of in _each(out, "sources", at)]
                slices.append(out)
            owner["slices"] = slices

    def _level(self, node: Any, loc: Loc, common: Sequence[Parameters] | None) -> Any:
        """A mapping with its ``parameters`` read; ``common`` are the levels above the one of a model."""
        if not isinstance(node, Map):
            return node
        out = dict(node)
        if "parameters" in out:
            out["parameters"] = self._parameters(out["parameters"], (*loc, "parameters"), common)
        return out

    def _parameters(self, raw: Any, loc: Loc, common: Sequence[Parameters] | None) -> Parameters:
        if raw is None:
            return Parameters()
        if not isinstance(raw, Map):
            self._problems.add(loc, f"expected a mapping of parameters; got {_shown(raw)}")
            return Parameters()
        items: dict[str, Setting] = {}
        for name, value in raw.items():
            here = (*loc, name)
            param = self._declared.get(name)
            if self._method and param is None and name not in IGNORED:
                stray.parameter(self._problems, here, self._method, self._methods, raw)
                continue
            if value is None and param and self._defaults[name] is None:
                continue  # null stands for the default where that is a legal value
            setting = read(value, param, here, self._problems)
            if param and param.scope == "shared" and common is not None and name not in self._free:
                self._shared(setting, param, here, common)
            else:
                items[name] = setting or Setting((Rule(0),))  # a wrong value is not a missing one
        return Parameters(items)

    def _shared(self, setting: Setting | None, param: Param, here: Loc, common: Sequence[Parameters]) -> None:
        """Says what becomes of a shared parameter of one model, which mergekit ignores: nothing."""
        default = Setting((Rule(self._defaults[param.name]),))
        effect: Setting = next((level[param.name] for level in common if param.name in level), default)
        if setting == effect:
            self._problems.warn(here, "shared by all models, ignored for one; it is what the others have too")
        elif setting is not None:
            what = f"ignored for one model: all models share {param.name!r}"
            now = f" ({effect.plain()!r} is in effect)" if effect != Setting((Rule(REQUIRED),)) else ""
            place = "its place is under the 'parameters:' of the recipe or the slice"
            self._problems.warn(here, f"{what}{now}; {place}")


def _each(owner: dict[str, Any], key: str, loc: Loc) -> Iterator[tuple[Any, Loc]]:
    if isinstance(owner.get(key), Seq):
        yield from ((item, (*loc, key, i)) for i, item in enumerate(owner[key]))
