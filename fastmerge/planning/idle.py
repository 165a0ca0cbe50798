"""Settings of a recipe that come to nothing in its models: filters that match no tensor, values that no layer takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastmerge.errors import hint
from fastmerge.recipe.checks import levels

if TYPE_CHECKING:
    from fastmerge.methods.parameters import Resolver
    from fastmerge.planning.modules import Modules
    from fastmerge.planning.rows import Models
    from fastmerge.recipe import Recipe
    from fastmerge.recipe.tree import Loc

SHOWN = 200
"""Filters that are listed; more are counted."""


def settings(recipe: Recipe, resolvers: Sequence[Resolver], models: Models, modules: Modules) -> list[str]:
    """A warning for each of them.

    Args:
        recipe: whose they are.
        resolvers: of its parts, once all rows are planned.
        models: opened.
        modules: of the recipe.
    """
    lengths = _gradients(recipe, modules) if any(r.gradient for r in resolvers) else []
    return _filters(recipe, resolvers, models) + lengths


def _filters(recipe: Recipe, resolvers: Sequence[Resolver], models: Models) -> list[str]:
    """Filters that match no tensor in any part, with the nearest word of the tensors' names."""
    lost = [dict.fromkeys(r.unmatched()) for r in resolvers]
    used = {f for r, missed in zip(resolvers, lost, strict=True) for f in r.filters if f not in missed}
    idle = list(dict.fromkeys(f for missed in lost for f in missed if f not in used))
    if not idle:
        return []
    names = models.order(recipe.parts[0].sources[0].model)
    words = {w for n in names for w in n.split(".") if not w.isdigit()}
    where: dict[str, Loc] = {}
    for loc, level in levels(recipe):
        for name, setting in level.items():
            for i, rule in enumerate(setting.rules):
                if rule.filter is not None:
                    where.setdefault(rule.filter, (*loc, name, i))
    out = []
    for pattern in idle[:SHOWN]:
        at = f"{recipe.at(where[pattern])}: " if pattern in where else ""
        out.append(f"{at}the filter {pattern!r} matches no tensor name{hint(pattern, words)}")
    return out + [f"{len(idle) - SHOWN:,} more filters match no tensor name"] * (len(idle) > SHOWN)


def _gradients(recipe: Recipe, modules: Modules) -> list[str]:
    """Gradients with more values than there are layers, of which some are passed over."""
    layers: dict[Loc, int] = {}  # most layers of the parts below a place
    for part in recipe.parts:
        if part.ranges:
            count = part.ranges[0][1] - part.ranges[0][0]
        else:
            stacks = modules.stacks(part.sources[0].model, part.module) if part.levels else []
            count = stacks[0].count if stacks else 0
        for n in range(len(part.loc) + 1):
            layers[part.loc[:n]] = max(count, layers.get(part.loc[:n], 0))
    out = []
    for loc, level in levels(recipe):
        count = next(layers[loc[:n]] for n in range(len(loc) - 1, -1, -1) if loc[:n] in layers)
        for name, setting in level.items():
            for i, rule in enumerate(setting.rules):
                if isinstance(rule.value, tuple) and len(rule.value) > max(count, 1) and count:
                    what = f"a gradient of {len(rule.value)} values over {count} layers: some are passed over"
                    out.append(f"{recipe.at((*loc, name, i))}: {what}")
    return out
