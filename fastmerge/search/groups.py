"""Parts of a model that have a gene of their own, and the filters of a recipe that find them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastmerge.errors import RecipeError
from fastmerge.planning.structure import structure

KEYS = frozenset({"layers", "modules", "each"})
REST = "rest"
"""What is in no other group."""


class Rule(NamedTuple):
    """What a recipe says of some tensors: the first rule whose filter is a part of a tensor's name counts.

    Attributes:
        filter: part of names; empty for what is left.
        group: the group that these tensors are in.
    """

    filter: str
    group: str


def rules(wanted: Mapping[str, Any], tensors: Sequence[str]) -> list[Rule]:
    """The rules for the groups that ``layers``, ``modules`` and ``each`` ask for, in their order.

    Args:
        wanted: ``layers``: number of groups of consecutive layers; ``modules``: parts of names; ``each``: ``tensor``.
        tensors: names of all tensors.

    Raises:
        RecipeError: they ask for what the names do not have.
    """
    if "each" in wanted:
        if wanted["each"] != "tensor" or len(KEYS & wanted.keys()) > 1:
            raise RecipeError(f"each: expected 'tensor' and neither layers nor modules, got {wanted['each']!r:.80}")
        return [Rule(name, name) for name in _long_first(tensors)]
    count, modules = wanted.get("layers"), wanted.get("modules")
    stack = structure(tensors, {}).main if count is not None else None
    if count is not None:
        if stack is None:
            raise RecipeError("layers: the tensor names show no list of layers, or several of the same size")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= stack.count:
            raise RecipeError(f"layers: expected the number of groups, from 1 to {stack.count}; got {count!r:.80}")
    if modules is not None and (
        not isinstance(modules, Sequence)
        or isinstance(modules, str)
        or not modules
        or not all(isinstance(m, str) and m for m in modules)
    ):
        raise RecipeError(f"modules: expected a list of parts of tensor names, got {modules!r:.80}")
    if missing := [m for m in modules or () if not any(m in name for name in tensors)]:
        raise RecipeError(f"modules: no tensor has {', '.join(map(repr, missing))} in its name")
    owner: dict[str, str] = {}
    made: dict[Rule, None] = {}
    for name in tensors:
        found = stack.split(name) if stack is not None else None
        layer = found[0] if found is not None and stack is not None and found[0] < stack.count else None
        module = next((m for m in modules or () if m in name), None)
        if (stack is not None and layer is None) or (modules is not None and module is None):
            owner[name] = REST
            continue
        parts, pattern = [], ""
        if stack is not None and layer is not None:
            parts, pattern = [_of(layer, int(count or 1), stack.count)], f"{stack.prefix}.{layer}."
        if module is not None:
            parts, pattern = [*parts, module], pattern + module
        owner[name] = ".".join(parts)
        made[Rule(pattern, owner[name])] = None
    rest = [Rule("", REST)] if REST in owner.values() else []
    if all(_first(name, [*made, *rest]) == owner[name] for name in tensors):
        return [*made, *rest]
    # Parts of names do not tell the groups apart: whole names do, where longer ones are looked for first.
    return [Rule(name, owner[name]) for name in _long_first([n for n in tensors if owner[n] != REST])] + rest


def _of(layer: int, count: int, layers: int) -> str:
    """The group of consecutive layers that a layer is in; their sizes differ by one at most."""
    group = ((layer + 1) * count - 1) // layers
    first, end = group * layers // count, (group + 1) * layers // count
    return f"layers.{first}" if end - first == 1 else f"layers.{first}-{end - 1}"


def _first(name: str, every: Sequence[Rule]) -> str | None:
    return next((rule.group for rule in every if rule.filter in name), None)


def _long_first(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda n: -len(n))
