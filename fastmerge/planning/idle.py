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
    from fastmerge.recipe import Part, Recipe
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
    parts = [part for part in recipe.parts if part.levels]
    counts = [part.ranges[0][1] - part.ranges[0][0] if part.ranges else 0 for part in parts]
    out = []
    for loc, level in levels(recipe):
        for name, setting in level.items():
            for i, rule in enumerate(setting.rules if setting.gradient else ()):
                values = len(rule.value) if isinstance(rule.value, tuple) else 0
                layers = 0
                for k, part in enumerate(parts):
                    n = min(len(part.loc), len(loc) - 1)
                    if part.loc[:n] == loc[:n] and values > 1:
                        counts[k] = counts[k] or _layers(part, modules)
                        layers = max(layers, counts[k])
                if 0 < layers < values:
                    what = f"a gradient of {values} values over {layers} layers: some are passed over"
                    out.append(f"{recipe.at((*loc, name, i))}: {what}")
    return out


def _layers(part: Part, modules: Modules) -> int:
    """Of the model whose order a merge of whole models follows; 0 where there are none."""
    return next((s.count for s in modules.stacks(part.sources[0].model, part.module)), 0)
