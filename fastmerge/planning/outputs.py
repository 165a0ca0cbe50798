"""Rows to outputs: sources, types, shapes, parameters. The loop that must stay cheap."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint import of_fields
from fastmerge.dtypes import BY_NAME, DType, promote
from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.methods import METHODS
from fastmerge.methods.base import Group, Method
from fastmerge.philox import checked_seed
from fastmerge.planning.inputs import Inputs
from fastmerge.planning.plan import Output
from fastmerge.planning.rows import Models, Row
from fastmerge.planning.shapes import Shapes
from fastmerge.recipe import ModelRef, Part, Recipe
from fastmerge.recipe.resolve import Resolver

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo

SHOWN = 200
"""Problems listed in one error; more are counted."""


@dataclass
class Notes:
    """What was found on the way."""

    recipe: dict[str, None] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=Shapes)
    other: list[str] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)
    untied: bool = False

    def check(self) -> None:
        """Raises what was found.

        Raises:
            RecipeError: where parameters have no value or do not fit.
            ShapeError: where only shapes differ.
            CheckpointError: otherwise.
        """
        if self.recipe:
            raise RecipeError(_cut(list(self.recipe)))
        shapes = self.shapes.lines()
        if self.other:
            raise CheckpointError(_cut(self.other + shapes))
        if shapes:
            raise ShapeError(_cut(shapes))


class _Kind(NamedTuple):
    """What outputs of equal types, shape, sources and parameters share.

    Attributes:
        dtype: of the output.
        models: of the inputs; see :class:`Output`.
        method: what is computed; None for a copy.
        like: the group of one of them, which differ by name only; None for a copy.
    """

    dtype: DType
    models: tuple[int, ...]
    method: type[Method] | None
    like: Group | None


class Outputs:
    """Builds the outputs of a recipe.

    Args:
        recipe: checked.
        models: opened.
        seed: in effect.
    """

    def __init__(self, recipe: Recipe, models: Models, seed: int) -> None:
        self.recipe = recipe
        self.models = models
        self.seed = checked_seed(seed)
        self.method = recipe.method
        self.copier = METHODS["passthrough"]
        self.notes = Notes()
        self.inputs = Inputs(recipe, models)
        self.position = {ref: i for i, ref in enumerate(recipe.refs)}
        wanted = recipe.out_dtype or recipe.dtype
        self.wanted = BY_NAME[wanted] if wanted else None
        self.parts = [_Part(recipe, part, self) for part in recipe.parts]
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._copy_params = self.copier.defaults()

    def build(self, rows: Sequence[Row]) -> tuple[Output, ...]:
        """The outputs of all rows.

        Raises:
            RecipeError, CheckpointError, ShapeError: with everything that stands in the way.
        """
        out: list[Output] = []
        for row, who, infos, single, copies in self.inputs.find(rows):
            made = self._output(row, self.parts[row.part], who, infos, single=single)
            if made is not None:
                out.append(made)
                if copies:
                    out += [made._replace(name=name) for name in copies]
        self.notes.other += self.inputs.problems
        self.notes.warnings |= self.inputs.warnings
        self.notes.untied = self.inputs.ties.untied
        for part in self.parts:
            for pattern in part.resolver.unmatched():
                if not any(pattern in p.resolver.filters and pattern not in p.resolver.unmatched() for p in self.parts):
                    self.notes.warnings[f"the filter {pattern!r} matches no tensor name"] = None
        self.notes.check()
        return tuple(out)

    def _output(
        self, row: Row, part: _Part, who: tuple[int, ...], infos: tuple[TensorInfo, ...], *, single: bool
    ) -> Output | None:
        """One output from the tensors ``infos`` of the sources ``who`` of its part, base first."""
        shape = infos[0].shape
        for other in infos:
            if other.shape != shape:
                self._shapes(row, part, who, infos)
                return None
        types = tuple([i.dtype for i in infos])
        key = (row.part, who, single, types, shape, part.outcome(row))
        kind = self._kinds.get(key)
        if kind is None:
            if not all(d.mergeable for d in types):
                return self._as_it_is(row, part, who, infos)
            try:
                kind = self._kinds[key] = self._kind(row, part, who, infos, single=single)
            except RecipeError as e:
                self.notes.recipe |= dict.fromkeys(f"{row.name}: {p}" for p in e.problems)
                return None
        like = kind.like
        group = None if like is None else of_fields(Group, (row.name, *like[1:]))
        return of_fields(Output, (row.name, kind.dtype, shape, kind.models, infos, kind.method, group))

    def _kind(
        self, row: Row, part: _Part, who: tuple[int, ...], infos: tuple[TensorInfo, ...], *, single: bool
    ) -> _Kind:
        """What is decided, and checked, once for all tensors like this one.

        Raises:
            RecipeError: where parameters have no value.
        """
        types = tuple([i.dtype for i in infos])
        dtype = self.wanted or functools.reduce(promote, types)
        models = tuple([part.positions[i] for i in who])
        method = self.copier
        params: Mapping[str, Any] = {}
        own: tuple[Mapping[str, Any], ...] = (self._copy_params,)
        has_base = False
        indices: tuple[int, ...] = (0,)
        if not single:
            method = self.method
            params, own = part.parameters(row, who)
            has_base = part.base is not None
            indices = tuple([part.index[i] for i in who[has_base:]])
        if method is self.copier and dtype is types[0] and own[0].get("scale") is None:
            return _Kind(dtype, models, None, None)
        group = Group(row.name, infos[0].shape, types, dtype, params, own, has_base, indices, self.seed)
        problems = method.check(group)
        self.notes.recipe |= dict.fromkeys(f"{row.name}: {p}" for p in problems)
        if not problems:
            self.notes.warnings |= dict.fromkeys(method.warn(group))
        return _Kind(dtype, models, method, group)

    def _as_it_is(self, row: Row, part: _Part, who: Sequence[int], infos: tuple[TensorInfo, ...]) -> Output | None:
        """Integers, booleans and other types that nothing is computed on: copied where all agree."""
        dtypes = {i.dtype for i in infos}
        info = infos[0]
        if len(dtypes) > 1:
            shown = ", ".join(f"{str(part.refs[i])!r} {f.dtype.name}" for i, f in zip(who, infos, strict=True))
            self.notes.other.append(f"{row.name}: types that cannot be merged: {shown}")
            return None
        if info.dtype.name.startswith("float8") and (len(infos) > 1 or self.wanted is not None):
            self.notes.other.append(
                f"{row.name}: {info.dtype.name} weights need their scales to be merged or converted: not supported; "
                "dequantise the models first"
            )
            return None
        models = tuple([part.positions[i] for i in who])
        return Output(row.name, info.dtype, info.shape, models, infos, None, None)

    def _shapes(self, row: Row, part: _Part, who: Sequence[int], infos: Sequence[TensorInfo]) -> None:
        self.notes.shapes.add(row.name, [(str(part.refs[i]), f.shape) for i, f in zip(who, infos, strict=True)])


class _Part:
    """One part of the recipe, prepared for the loop."""

    def __init__(self, recipe: Recipe, part: Part, owner: Outputs) -> None:
        method: type[Method] = owner.method
        self.refs = [s.model for s in part.sources]
        self.positions = [owner.position[ref] for ref in self.refs]
        self.base = self.refs.index(part.base) if part.base is not None else None
        self.resolver = Resolver(method, part, recipe.parameters, method.defaults(recipe.preset))
        self.constant = not (self.resolver.filters or self.resolver.gradient)
        order = list(range(len(self.refs)))
        if self.base is not None:
            order.remove(self.base)
            order.insert(0, self.base)
        self.order = tuple(order)
        self.index = dict(enumerate(model_indices(recipe, part)))

    def outcome(self, row: Row) -> tuple[object, ...]:
        """All that a tensor's names and place say about its parameters: equal for equal ones."""
        resolver = self.resolver
        if self.constant:
            return ()
        t = row.t if resolver.gradient else 0.0
        if isinstance(row.inputs, str) and row.inputs == row.name:
            return (t, resolver.mask(row.name))
        return (t, resolver.mask(row.name), *map(resolver.mask, self.names(row)))

    def parameters(self, row: Row, who: Sequence[int]) -> tuple[Mapping[str, Any], tuple[Mapping[str, Any], ...]]:
        """Shared parameters, and those of each present source but the base, in the order of the sources."""
        resolver, names = self.resolver, self.names(row)
        t = row.t if resolver.gradient else 0.0
        own = tuple([resolver.own(i, resolver.mask(names[i]), t) for i in who if i != self.base])
        return resolver.shared(resolver.mask(row.name), t), own

    def names(self, row: Row) -> Sequence[str]:
        """The tensor's name in each source."""
        return (row.inputs,) * len(self.refs) if isinstance(row.inputs, str) else row.inputs


def model_indices(recipe: Recipe, part: Part) -> list[int]:
    """For each source of a part, its position among the recipe's non-base models: random numbers use it."""
    ordered: dict[ModelRef, None] = {}
    for p in recipe.parts:
        ordered |= dict.fromkeys(s.model for s in p.sources)
    if part.base is not None and recipe.base_model in ordered and not recipe.donor_only_base:
        ordered.pop(recipe.base_model)
        ordered[recipe.base_model] = None
    rank = {ref: i for i, ref in enumerate(ordered)}
    return [rank[s.model] for s in part.sources]


def _cut(problems: list[str]) -> list[str]:
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN} more"]
