"""A plan again, with other numbers: what a recipe's parameters say may change without anything else doing so."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastmerge.errors import RecipeError
from fastmerge.methods.parameters import Resolver
from fastmerge.ops.spec import Spec
from fastmerge.recipe.problems import dotted

if TYPE_CHECKING:
    from fastmerge.planning.plan import Plan
    from fastmerge.recipe import Recipe


def skeleton(recipe: Recipe) -> str:
    """A recipe without the numbers among its parameters: equal exactly where two recipes differ in these alone.

    Words, booleans, filters and the lengths of gradients are part of it; so are layers and seeds.
    """
    every = [(name, stage.plain()) for name, stage in recipe.stages]
    return json.dumps(_bare([every, recipe.plain()], inside=False))


def _bare(value: Any, *, inside: bool) -> Any:
    if isinstance(value, dict):
        return {k: _bare(v, inside=inside or k == "parameters") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(v, inside=inside) for v in value]
    number = inside and isinstance(value, int | float) and not isinstance(value, bool)
    return {"number": None} if number else value


def renumbered(plan: Plan, recipe: Recipe) -> dict[Spec, Spec] | None:
    """The specs of a plan with the numbers of a recipe of the same skeleton; the same ones where they are equal.

    Args:
        plan: of a recipe without stages.
        recipe: the other one.

    Returns:
        None where a tensor draws random numbers now and did not before, or the other way round: plan again.

    Raises:
        RecipeError: where its parameters do not fit; all problems at once.
    """
    resolvers: dict[int, tuple[Resolver, list[Any], int | None]] = {}
    problems: dict[str, None] = {}
    out: dict[Spec, Spec] = {}
    for spec, (row, members) in plan.rows.items():
        if row.part not in resolvers:
            resolvers[row.part] = _resolver(recipe, row.part)
        resolver, refs, base = resolvers[row.part]
        names = (row.inputs,) * len(refs) if isinstance(row.inputs, str) else row.inputs
        inputs = [(i, names[i]) for i in members if i != base]
        try:
            method = resolver.method(row.name, inputs, row.t if resolver.gradient else 0.0)
        except RecipeError as error:
            problems |= dict.fromkeys(f"{row.name}: {p}" for p in error.problems)
            continue
        if repr(method) == repr(spec.method):  # which tells -0.0 from 0.0
            out[spec] = spec
            continue
        new = Spec(method, spec.shape, spec.dtypes, spec.out_dtype, has_base=spec.has_base, models=spec.models)
        problems |= dict.fromkeys(f"{row.name}: {p}" for p in method.check(new))
        out[spec] = new
    if problems:
        raise RecipeError(list(problems))
    return out if all(new.method.random == old.method.random for old, new in out.items()) else None


def _resolver(recipe: Recipe, number: int) -> tuple[Resolver, list[Any], int | None]:
    """Of a part of a recipe, with its models and the position of its base among them."""
    part = recipe.parts[number]
    refs = [s.model for s in part.sources]
    resolver = Resolver(
        recipe.method,
        [s.parameters for s in part.sources],
        part.levels,
        preset=recipe.preset,
        place=f"{dotted(part.loc)}: ",
        models=[str(ref) for ref in refs],
    )
    return resolver, refs, refs.index(part.base) if part.base is not None else None
