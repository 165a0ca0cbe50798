"""Rows to outputs: sources, types, shapes, parameters. The loop that must stay cheap."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, cast

from fastmerge.checkpoint import of_fields
from fastmerge.dtypes import BF16, BY_NAME, F16, F32, DType, promote
from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.keys import checked_seed, tensor_key
from fastmerge.methods.base import Method
from fastmerge.methods.parameters import Resolver
from fastmerge.methods.passthrough import COPY, Passthrough
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Op, Source, Spec
from fastmerge.planning.inputs import Found, Inputs
from fastmerge.planning.packing import AS_BASE
from fastmerge.planning.rows import Models, Row, reference
from fastmerge.planning.shapes import Shapes
from fastmerge.recipe import ModelRef, Part, Recipe
from fastmerge.recipe.problems import dotted

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo
    from fastmerge.planning.vocabulary import Vocabulary

SHOWN = 200
"""Problems listed in one error; more are counted."""

_COPIER = Passthrough(scale=(None,))

_KIND = itemgetter(1, 2)
"""Type and shape of a tensor."""


class _Drawn(NamedTuple):
    """Of a row that not all models have as it goes in.

    Attributes:
        types: of the sources.
        wanted: types that count for the type of the result.
        made: whether any source is computed.
    """

    types: tuple[DType, ...]
    wanted: tuple[DType, ...]
    made: bool


_Key = tuple[tuple[tuple[DType, tuple[int, ...]], ...], _Drawn | None, tuple[object, ...]]
"""All that a row's spec depends on: types and shapes, how its inputs are made, what its names say of parameters."""


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
            raise RecipeError(list(self.recipe))
        shapes = self.shapes.lines()
        if self.other:
            raise CheckpointError(self.other + shapes)
        if shapes:
            raise ShapeError(shapes)


class Outputs:
    """Builds the outputs of a recipe.

    Args:
        recipe: checked.
        models: opened.
        seed: in effect.
        vocabulary: of the output, where it is not that of the models.

    Attributes:
        rows: for each spec whose method the parameters decide, a row that it was made for, and the sources that go in.
    """

    def __init__(self, recipe: Recipe, models: Models, seed: int, vocabulary: Vocabulary | None = None) -> None:
        self.recipe = recipe
        self.vocabulary = vocabulary if vocabulary is not None and vocabulary.changes else None
        self.models = models
        self.seed = checked_seed(seed)
        self.method = recipe.method
        self.notes = Notes()
        self.inputs = Inputs(recipe, models)
        self.position = {ref: i for i, ref in enumerate(recipe.refs)}
        wanted = recipe.out_dtype or recipe.dtype
        self.as_base = recipe.out_dtype == AS_BASE
        self.wanted = BY_NAME[wanted] if wanted and not self.as_base else None
        parts = recipe.parts
        self.order = tuple(dict.fromkeys(s.model for part in parts for s in part.sources))
        self.parts = [_Part(recipe, part, self) for part in parts]
        self.rows: dict[Spec, tuple[Row, tuple[int, ...]]] = {}
        self._specs: dict[tuple[object, ...], dict[_Key, Spec | None]] = {}

    def build(self, rows: Sequence[Row]) -> tuple[Op, ...]:
        """The outputs of all rows.

        Raises:
            RecipeError, CheckpointError, ShapeError: with everything that stands in the way.
        """
        out: list[Op] = []
        for found in self.inputs.find(rows):
            made = self._ops(self.parts[found.rows[0].part], found)
            out += made
            out += [op._replace(name=name) for op in made for name in found.copies]
        self.notes.other += self.inputs.problems
        self.notes.warnings |= self.inputs.warnings
        self.notes.untied = self.inputs.ties.untied
        self.notes.check()
        return tuple(out)

    def _ops(self, part: _Part, found: Found) -> list[Op]:
        """The ops of rows; column by column, as there may be tens of thousands."""
        rows, members, columns, single, _ = found
        single = single or part.alone
        if part.unchanged:
            pairs = zip(members, columns, strict=True)
            inputs: list[tuple[Source, ...]] = [*zip(*[_ranges(c, part.positions[i]) for i, c in pairs], strict=True)]
            drawn: Iterable[_Drawn | None] = itertools.repeat(None)
        else:
            inputs, drawn = self._drawn(part, rows, members, columns)
        kinds = zip(*[map(_KIND, column) for column in columns], strict=True)
        plain = part.resolver.constant and not part.exact
        outcomes = itertools.repeat(()) if plain else map(part.outcome, rows)
        keys = [*zip(kinds, drawn, outcomes)]  # noqa: B905  two may have no end
        known = self._specs.setdefault((rows[0].part, members, single), {})
        for row, key in zip(rows, keys, strict=True):
            if key not in known:
                known[key] = self._first(row, part, members, key, single=single)
        specs = [*map(known.__getitem__, keys)]
        if None in specs:
            for row, key, spec in zip(rows, keys, specs, strict=True):
                if spec is None:
                    self._refuse(row, part, members, key)
            return []  # nothing comes of any
        made = cast("list[Spec]", specs)
        names = [row[0] for row in rows]
        random = {spec for spec in set(made) if spec.method.random}
        numbers: Iterable[int] = itertools.repeat(0)
        if random:
            numbers = [tensor_key(self.seed, n) if s in random else 0 for n, s in zip(names, made, strict=True)]
        fields = zip(names, made, numbers, inputs, itertools.repeat(()))
        return [*map(of_fields, itertools.repeat(Op), fields)]

    def _drawn(
        self, part: _Part, rows: Sequence[Row], members: tuple[int, ...], columns: Sequence[Sequence[TensorInfo]]
    ) -> tuple[list[tuple[Source, ...]], list[_Drawn]]:
        """Inputs where a model has an adapter, 8-bit floats, or rows for other tokens."""
        copied = len(members) == 1 and self.wanted is None
        sources: list[list[Source]] = []
        wanted: list[list[DType]] = []
        for i, column in zip(members, columns, strict=True):
            if part.sources[i].unchanged and self.vocabulary is None:
                sources.append([*_ranges(column, part.positions[i])])
                wanted.append([info.dtype for info in column])
            else:
                pairs = [part.sources[i].source(info, copied=copied) for info in column]
                sources.append([source for source, _ in pairs])
                wanted.append([dtype for _, dtype in pairs])
        inputs = [*zip(*sources, strict=True)]
        if self.vocabulary is not None:
            inputs = self._other_rows(self.vocabulary, part, rows, members, columns, inputs)
        types = [tuple([s.dtype for s in mine]) for mine in inputs]
        made = [{*map(type, mine)} != {FileRange} for mine in inputs]
        fields = zip(types, zip(*wanted, strict=True), made, strict=True)
        return inputs, [*map(of_fields, itertools.repeat(_Drawn), fields)]

    def _other_rows(
        self,
        vocabulary: Vocabulary,
        part: _Part,
        rows: Sequence[Row],
        members: tuple[int, ...],
        columns: Sequence[Sequence[TensorInfo]],
        inputs: Sequence[tuple[Source, ...]],
    ) -> list[tuple[Source, ...]]:
        """Inputs with the rows that the tokens of the output have in them."""
        refs = [part.refs[i] for i in members]
        anchor = refs.index(part.anchor) if part.anchor in refs else None
        out = []
        for row, sources, *infos in zip(rows, inputs, *columns, strict=True):
            found = sources
            try:
                found = vocabulary.sources(row.name, refs, [i.name for i in infos], sources, anchor)
            except RecipeError as e:
                self.notes.recipe |= dict.fromkeys(e.problems)
            out.append(found)
        return out

    def _first(self, row: Row, part: _Part, members: tuple[int, ...], key: _Key, *, single: bool) -> Spec | None:
        """The spec of a row, and of all that are like it; None where something is wrong."""
        kinds, drawn, _ = key
        shape = kinds[0][1]
        if any(other != shape for _, other in kinds):
            return None
        types = tuple([dtype for dtype, _ in kinds])
        types, wanted, made = drawn or (types, types, False)
        return self._spec(row, part, members, types, wanted, shape, single=single, made=made)

    def _spec(
        self,
        row: Row,
        part: _Part,
        members: tuple[int, ...],
        types: tuple[DType, ...],
        wanted: tuple[DType, ...],
        shape: tuple[int, ...],
        *,
        single: bool,
        made: bool,
    ) -> Spec | None:
        """What is decided, and checked, once for all tensors like this one; None where something is wrong.

        Args:
            row: one of them.
            part: whose sources.
            members: which of these.
            types: of the sources.
            wanted: types that count for the type of the result, where the recipe does not name one.
            shape: of all.
            single: whether one model's tensor is taken over.
            made: whether any source is computed, so that there are no bytes to copy.
        """
        if not all(d.mergeable for d in types):
            copied = len(set(types)) == 1 and (self.wanted is None or not types[0].name.startswith("float"))
            copied = copied and (len(types) == 1 or not types[0].bits)
            return Spec(COPY, shape, types, types[0]) if copied else None
        plain = part.type_of(members, wanted) if self.as_base else functools.reduce(promote, wanted)
        dtype = F32 if part.keeps(row) else self.wanted or plain
        method: Method = _COPIER
        if not single:
            try:
                method = part.method(row, members)
            except RecipeError as e:
                self.notes.recipe |= dict.fromkeys(f"{row.name}: {p}" for p in e.problems)
                return None
        if isinstance(method, Passthrough) and dtype is types[0] and method.scale[0] is None and not made:
            return Spec(COPY, shape, types, dtype)
        has_base = not single and part.base is not None
        models = (0,) if single else tuple([part.index[i] for i in members[has_base:]])
        spec = Spec(method, shape, types, dtype, has_base=has_base, models=models)
        if not single:
            self.rows[spec] = row, members
        problems = method.check(spec)
        self.notes.recipe |= dict.fromkeys(f"{row.name}: {p}" for p in problems)
        if not problems:
            self.notes.warnings |= dict.fromkeys(method.warn(spec))
        return spec

    def _refuse(self, row: Row, part: _Part, members: Sequence[int], key: _Key) -> None:
        """Says why a row has no op: of different shapes, or of types on which nothing is computed, and not copied."""
        kinds, drawn, _ = key
        refs = [str(part.refs[i]) for i in members]
        if any(shape != kinds[0][1] for _, shape in kinds):
            self.notes.shapes.add(row.name, [(ref, shape) for ref, (_, shape) in zip(refs, kinds, strict=True)])
            return
        types = drawn.types if drawn else [dtype for dtype, _ in kinds]
        if not all(d.mergeable for d in types):
            shown = ", ".join(f"{ref!r} {d.name}" for ref, d in zip(refs, types, strict=True))
            self.notes.other.append(f"{row.name}: types that cannot be merged: {shown}")


def _ranges(column: Sequence[TensorInfo], model: int) -> Iterator[FileRange]:
    """The tensors of one model as sources."""
    fields = zip(column, itertools.repeat(model))
    return map(of_fields, itertools.repeat(FileRange), fields)


class _Part:
    """One part of the recipe, prepared for the loop."""

    def __init__(self, recipe: Recipe, part: Part, owner: Outputs) -> None:
        method: type[Method] = owner.method
        self.refs = [s.model for s in part.sources]
        self.positions = [owner.position[ref] for ref in self.refs]
        self.sources = [owner.models.sources[ref] for ref in self.refs]
        self.unchanged = owner.vocabulary is None and all(i.unchanged for i in self.sources)
        self.anchor = part.base or recipe.base_model  # whose rows tokens have that others lack
        self.base = self.refs.index(part.base) if part.base is not None else None
        self.alone = self.base is not None and len(self.refs) == 1
        self.first = self.refs.index(reference(recipe, part))
        short = owner.wanted in (BF16, F16)
        self.exact = owner.models.exact(reference(recipe, part)) if short else frozenset()
        self.resolver = Resolver(
            method,
            [s.parameters for s in part.sources],
            part.levels,
            preset=recipe.preset,
            place=f"{dotted(part.loc)}: ",
            models=[str(ref) for ref in self.refs],
        )
        order = list(range(len(self.refs)))
        if self.base is not None:
            order.remove(self.base)
            order.insert(0, self.base)
        self.order = tuple(order)
        self.index = dict(enumerate(model_indices(recipe, part, owner.order)))

    def type_of(self, members: Sequence[int], wanted: Sequence[DType]) -> DType:
        """The type of the model whose names the output has, or else of the first that is there."""
        return wanted[members.index(self.first) if self.first in members else 0]

    def outcome(self, row: Row) -> tuple[object, ...]:
        """All that a tensor's names and place say about its parameters: equal for equal ones."""
        resolver, exact = self.resolver, self.keeps(row)
        if resolver.constant:
            return (exact,)
        t = row.t if resolver.gradient else 0.0
        if isinstance(row.inputs, str) and row.inputs == row.name:
            return (t, exact, resolver.mask(row.name))
        return (t, exact, resolver.mask(row.name), *map(resolver.mask, self.names(row)))

    def keeps(self, row: Row) -> bool:
        """Whether the result stays in float32, whatever type is wanted of the others."""
        return bool(self.exact) and self.names(row)[self.first] in self.exact

    def method(self, row: Row, members: tuple[int, ...]) -> Method:
        """The method with its parameters, for the present sources."""
        names = self.names(row)
        inputs = [(i, names[i]) for i in members if i != self.base]
        return self.resolver.method(row.name, inputs, row.t if self.resolver.gradient else 0.0)

    def names(self, row: Row) -> Sequence[str]:
        """The tensor's name in each source."""
        return (row.inputs,) * len(self.refs) if isinstance(row.inputs, str) else row.inputs


def model_indices(recipe: Recipe, part: Part, order: Sequence[ModelRef]) -> list[int]:
    """For each source of a part, its position among the recipe's non-base models: random numbers use it.

    Args:
        recipe: checked.
        part: of it.
        order: the models of all parts.
    """
    ordered = dict.fromkeys(order)
    if part.base is not None and recipe.base_model in ordered and not recipe.donor_only_base:
        ordered.pop(recipe.base_model)
        ordered[recipe.base_model] = None
    rank = {ref: i for i, ref in enumerate(ordered)}
    return [rank[s.model] for s in part.sources]


def _cut(problems: list[str]) -> list[str]:
    if len(problems) <= SHOWN:
        return problems
    return [*problems[:SHOWN], f"... and {len(problems) - SHOWN} more"]
