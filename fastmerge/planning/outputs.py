"""Rows to outputs: sources, types, shapes, parameters. The loop that must stay cheap."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastmerge.checkpoint import of_fields
from fastmerge.dtypes import BY_NAME, DType, promote
from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.methods.base import Method
from fastmerge.methods.parameters import Resolver
from fastmerge.methods.passthrough import COPY, Passthrough
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Op, Source, Spec
from fastmerge.philox import checked_seed, tensor_key
from fastmerge.planning.missing import fate
from fastmerge.planning.rows import Models, Row
from fastmerge.recipe import ModelRef, Part, Recipe
from fastmerge.recipe.problems import dotted

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo

SHOWN = 200
"""Problems listed in one error; more are counted."""

_COPIER = Passthrough(scale=(None,))

_EMBEDDINGS = tuple(
    f"{name}.weight" for name in ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
)


@dataclass
class Notes:
    """What was found on the way."""

    recipe: dict[str, None] = field(default_factory=dict)
    shapes: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    warnings: dict[str, None] = field(default_factory=dict)
    missing: dict[tuple[str, tuple[str, ...]], list[str]] = field(default_factory=dict)
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
        if self.other:
            raise CheckpointError(_cut(self.other + self.shapes))
        if self.shapes:
            raise ShapeError(_cut(self.shapes))

    def warn_missing(self) -> None:
        """One warning for each kind of tensor that some models lack."""
        for (what, refs), names in self.missing.items():
            more = f", ... ({len(names)} tensors)" if len(names) > 3 else ""
            self.warnings[f"missing from {', '.join(map(repr, refs))}: {', '.join(names[:3])}{more}: {what}"] = None


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
        self.notes = Notes()
        self.position = {ref: i for i, ref in enumerate(recipe.refs)}
        wanted = recipe.out_dtype or recipe.dtype
        self.wanted = BY_NAME[wanted] if wanted else None
        self.parts = [_Part(recipe, part, self) for part in recipe.parts]
        self._specs: dict[tuple[object, ...], Spec | None] = {}

    def build(self, rows: Sequence[Row]) -> tuple[Op, ...]:
        """The outputs of all rows.

        Raises:
            RecipeError, CheckpointError, ShapeError: with everything that stands in the way.
        """
        out: list[Op] = []
        lacking = [[0] * len(part.refs) for part in self.parts]
        totals = Counter([row.part for row in rows])
        for row in rows:
            part = self.parts[row.part]
            found = part.find(row)
            if not all(found):
                for i, info in enumerate(found):
                    lacking[row.part][i] += info is None
                found, single = self._incomplete(row, part, found)
                who = tuple([i for i in part.order if found[i] is not None])
                if not who:
                    continue
            else:
                who, single = part.order, part.alone
            infos = tuple([info for i in who if (info := found[i]) is not None])
            made = self._op(row, part, who, infos, single=single)
            if made is not None:
                out.append(made)
        for i, (part, lacks) in enumerate(zip(self.parts, lacking, strict=True)):
            for ref, n in zip(part.refs, lacks, strict=True):
                if 2 * n > totals[i]:
                    self.notes.other.insert(
                        0, f"{str(ref)!r} lacks {n} of {totals[i]} tensors: it does not look like the same architecture"
                    )
        lost = [dict.fromkeys(part.resolver.unmatched()) for part in self.parts]
        used = {
            f for part, names in zip(self.parts, lost, strict=True) for f in part.resolver.filters if f not in names
        }
        idle = list(dict.fromkeys(f for names in lost for f in names if f not in used))
        for pattern in idle[:SHOWN]:
            self.notes.warnings[f"the filter {pattern!r} matches no tensor name"] = None
        if len(idle) > SHOWN:
            self.notes.warnings[f"{len(idle) - SHOWN:,} more filters match no tensor name"] = None
        self.notes.warn_missing()
        self.notes.check()
        return tuple(out)

    def _incomplete(
        self, row: Row, part: _Part, found: list[TensorInfo | None]
    ) -> tuple[list[TensorInfo | None], bool]:
        """What there is of a tensor that some models lack (none: no output), and whether one alone passes through."""
        refs = [str(ref) for ref, info in zip(part.refs, found, strict=True) if info is None]
        tied = [self._tied(ref, row, info, found) for ref, info in zip(part.refs, found, strict=True)]
        if any(t is not i for t, i in zip(tied, found, strict=True)):
            self.notes.untied = True
            what = "the tied embedding takes its place"
            self.notes.missing.setdefault((what, tuple(refs)), []).append(row.name)
            found = tied
            refs = [str(ref) for ref, info in zip(part.refs, found, strict=True) if info is None]
        decision = fate(self.method, [info is not None for info in found], part.base)
        nothing: list[TensorInfo | None] = [None] * len(found)
        if decision == "merge" and not refs:
            return found, False
        if decision == "error":
            base = part.base is not None and found[part.base] is None
            why = "the base must have it" if base else f"{self.method.name!r} needs more of its inputs"
            self.notes.other.append(f"{row.name}: missing from {', '.join(map(repr, refs))}: {why}")
            return nothing, False
        what = {
            "merge": "the others are merged",
            "single": "taken over from the one model that has it",
            "drop": "too few models have it; it is not in the output",
        }[decision]
        self.notes.missing.setdefault((what, tuple(refs)), []).append(row.name)
        return nothing if decision == "drop" else found, decision == "single"

    def _tied(
        self, ref: ModelRef, row: Row, info: TensorInfo | None, found: Sequence[TensorInfo | None]
    ) -> TensorInfo | None:
        """The embedding of a model that has no head of its own, where it fits in its place."""
        if info is not None or not row.name.endswith("lm_head.weight"):
            return info
        tensors = self.models.tensors(ref)
        shape = next(i.shape for i in found if i is not None)
        embeddings = [i for name, i in tensors.items() if name.endswith(_EMBEDDINGS)]
        return embeddings[0] if len(embeddings) == 1 and embeddings[0].shape == shape else None

    def _op(
        self, row: Row, part: _Part, who: tuple[int, ...], infos: tuple[TensorInfo, ...], *, single: bool
    ) -> Op | None:
        """One op from the tensors ``infos`` of the sources ``who`` of its part, base first."""
        shape = infos[0].shape
        for other in infos:
            if other.shape != shape:
                self._shapes(row, part, who, infos)
                return None
        inputs: tuple[Source, ...]
        if part.plain:
            inputs = tuple([of_fields(FileRange, (f, part.positions[i])) for i, f in zip(who, infos, strict=True)])
            wanted = types = tuple([i.dtype for i in infos])
            made = False
        else:
            copied = len(infos) == 1 and self.wanted is None
            pairs = [part.inputs[i].source(info, copied=copied) for i, info in zip(who, infos, strict=True)]
            inputs, wanted = tuple([s for s, _ in pairs]), tuple([d for _, d in pairs])
            types = tuple([s.dtype for s in inputs])
            made = any(type(s) is not FileRange for s in inputs)
        key = (row.part, who, single, types, wanted, made, shape, part.outcome(row))
        if key not in self._specs:
            self._specs[key] = self._spec(row, part, who, types, wanted, shape, single=single, made=made)
        spec = self._specs[key]
        if spec is None:
            if not all(d.mergeable for d in types):
                self._refuse(row, part, who, types)
            return None
        number = tensor_key(self.seed, row.name) if spec.method.random else 0
        return of_fields(Op, (row.name, spec, number, inputs, ()))

    def _spec(
        self,
        row: Row,
        part: _Part,
        who: tuple[int, ...],
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
            who: which of these.
            types: of the sources.
            wanted: types that count for the type of the result, where the recipe does not name one.
            shape: of all.
            single: whether one model's tensor is taken over.
            made: whether any source is computed, so that there are no bytes to copy.
        """
        if not all(d.mergeable for d in types):
            copied = len(set(types)) == 1 and (self.wanted is None or not types[0].name.startswith("float"))
            return Spec(COPY, shape, types, types[0]) if copied else None
        dtype = self.wanted or functools.reduce(promote, wanted)
        method: Method = _COPIER
        if not single:
            try:
                method = part.method(row, who)
            except RecipeError as e:
                self.notes.recipe |= dict.fromkeys(f"{row.name}: {p}" for p in e.problems)
                return None
        if isinstance(method, Passthrough) and dtype is types[0] and method.scale[0] is None and not made:
            return Spec(COPY, shape, types, dtype)
        has_base = not single and part.base is not None
        models = (0,) if single else tuple([part.index[i] for i in who[has_base:]])
        spec = Spec(method, shape, types, dtype, has_base=has_base, models=models)
        problems = method.check(spec)
        self.notes.recipe |= dict.fromkeys(f"{row.name}: {p}" for p in problems)
        if not problems:
            self.notes.warnings |= dict.fromkeys(method.warn(spec))
        return spec

    def _refuse(self, row: Row, part: _Part, who: Sequence[int], types: Sequence[DType]) -> None:
        """Says why types that nothing is computed on are not copied."""
        shown = ", ".join(f"{str(part.refs[i])!r} {d.name}" for i, d in zip(who, types, strict=True))
        self.notes.other.append(f"{row.name}: types that cannot be merged: {shown}")

    def _shapes(self, row: Row, part: _Part, who: Sequence[int], infos: Sequence[TensorInfo]) -> None:
        shown = ", ".join(f"{str(part.refs[i])!r} {list(f.shape)}" for i, f in zip(who, infos, strict=True))
        shapes = {info.shape for info in infos}
        vocabulary = len({s[1:] for s in shapes}) == 1 and all(s and s[0] > 1000 for s in shapes)
        lower = row.name.lower()
        hint = ""
        if vocabulary or any(word in lower for word in ("embed", "wte", "lm_head")):
            hint = (
                "; vocabularies of different size (padding or added tokens) need 'tokenizer' work that is not "
                "supported yet: resize the models to one vocabulary first"
            )
        self.notes.shapes.append(f"{row.name}: shapes differ: {shown}{hint}")


class _Part:
    """One part of the recipe, prepared for the loop."""

    def __init__(self, recipe: Recipe, part: Part, owner: Outputs) -> None:
        method: type[Method] = owner.method
        self.refs = [s.model for s in part.sources]
        self.positions = [owner.position[ref] for ref in self.refs]
        self.inputs = [owner.models.inputs[ref] for ref in self.refs]
        self.plain = all(i.plain for i in self.inputs)
        self.base = self.refs.index(part.base) if part.base is not None else None
        self.alone = self.base is not None and len(self.refs) == 1
        self.resolver = Resolver(
            method,
            [s.parameters for s in part.sources],
            (part.parameters, recipe.parameters),
            preset=recipe.preset,
            place=f"{dotted(part.loc)}: ",
            models=[str(ref) for ref in self.refs],
        )
        self.tensors = [owner.models.tensors(ref) for ref in self.refs]
        order = list(range(len(self.refs)))
        if self.base is not None:
            order.remove(self.base)
            order.insert(0, self.base)
        self.order = tuple(order)
        self.index = dict(enumerate(model_indices(recipe, part)))

    def find(self, row: Row) -> list[TensorInfo | None]:
        """The tensor in each source."""
        if isinstance(row.inputs, str):
            name = row.inputs
            return [t.get(name) for t in self.tensors]
        return [t.get(n) for t, n in zip(self.tensors, row.inputs, strict=True)]

    def outcome(self, row: Row) -> tuple[object, ...]:
        """All that a tensor's names and place say about its parameters: equal for equal ones."""
        resolver = self.resolver
        if resolver.constant:
            return ()
        t = row.t if resolver.gradient else 0.0
        if isinstance(row.inputs, str) and row.inputs == row.name:
            return (t, resolver.mask(row.name))
        return (t, resolver.mask(row.name), *map(resolver.mask, self.names(row)))

    def method(self, row: Row, who: tuple[int, ...]) -> Method:
        """The method with its parameters, for the present sources."""
        names = self.names(row)
        inputs = [(i, names[i]) for i in who if i != self.base]
        return self.resolver.method(row.name, inputs, row.t if self.resolver.gradient else 0.0)

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
