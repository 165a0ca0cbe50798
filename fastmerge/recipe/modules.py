"""mergekit's ``modules:`` where it names all of a model (``default``), written as the recipe without it."""

from __future__ import annotations

from typing import Any

from fastmerge.recipe import stray
from fastmerge.recipe.problems import Problems
from fastmerge.recipe.tree import Map, Seq, kind


def hoist(tree: Map, problems: Problems) -> None:
    """Moves what the one module ``default`` holds to the top of the recipe."""
    modules = tree.get("modules")
    if not modules:
        tree.pop("modules", None)
        return
    if not isinstance(modules, Map):
        problems.add(("modules",), f"expected a mapping of modules by their names; got {kind(modules)}")
        tree.pop("modules")
        return
    module = modules.get("default")
    if len(modules) != 1 or not isinstance(module, Map):
        return
    for key, value in module.items():
        if key == "parameters" and isinstance(value, Map) and isinstance(tree.get(key), Map):
            tree.put(key, _over(value, tree[key]), module.lines[key])
        elif key not in ("models", "slices", "parameters"):
            stray.key(problems, ("modules", "default", key), "modules", module)
        elif tree.get(key):
            problems.add(("modules", "default", key), f"the recipe itself has {key!r} as well: expected one of them")
        elif value is not None:
            tree.put(key, value, module.lines[key])
    del tree["modules"]


def _over(upper: Map, lower: Map) -> Map:
    """Parameters of two levels as one: what the filters of the upper level miss, the lower level says."""
    out = Map(upper.line)
    for name in dict.fromkeys((*upper, *lower)):
        source = upper if name in upper else lower
        value = source[name]
        if name in upper and name in lower and all(r.get("filter") not in (None, "", "*") for r in _rules(value)):
            value = Seq(upper.lines[name])
            for rule in (*_rules(upper[name]), *_rules(lower[name])):
                value.append(rule)
                value.lines.append(getattr(rule, "line", None))
        out.put(name, value, source.lines[name])
    return out


def _rules(value: Any) -> list[Map]:
    """A parameter's value as ``{filter, value}`` entries."""
    if isinstance(value, Map):
        return [value]
    if isinstance(value, Seq) and all(isinstance(item, Map) for item in value):
        return list(value)
    rule = Map()
    rule.put("value", value, None)
    return [rule]
