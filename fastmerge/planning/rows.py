"""Which input tensors meet in which output tensor: names only, in the order in which they are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint import of_fields
from fastmerge.dtypes import F32
from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.planning.layers import Layers, displaced, headless, incomplete, sizes
from fastmerge.planning.names import align, kind, unwrapped
from fastmerge.planning.sources import ModelSources
from fastmerge.planning.structure import Stack, Structure, is_last_norm, is_post, is_pre, roots, structure
from fastmerge.recipe import ModelRef, Part, Recipe

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint, TensorInfo
    from fastmerge.checkpoint.adapter import Adapter
    from fastmerge.planning.layouts import Relaid
    from fastmerge.planning.modules import Modules

_STORED = attrgetter("dtype", "nbytes")


class Row(NamedTuple):
    """One output tensor to be.

    Attributes:
        name: in the output.
        part: index of the part of the recipe whose sources it comes from.
        inputs: its name in each source of the part; one name where all are the same.
        t: place of its layer in its slice, 0 .. 1, for gradients.
    """

    name: str
    part: int
    inputs: tuple[str, ...] | str
    t: float = 0.0


class Models:
    """The opened models of a recipe, with what is derived from their headers at most once."""

    def __init__(self, checkpoints: Mapping[ModelRef, Checkpoint], adapters: Mapping[ModelRef, Adapter]) -> None:
        self.checkpoints = checkpoints
        self.adapters = adapters
        at = {ref: len(checkpoints) + i for i, ref in enumerate(adapters)}
        self.sources = {
            ref: ModelSources(c, i, [(adapters[a.bare], at[a.bare], a.weight) for a in ref.adapters])
            for i, (ref, c) in enumerate(checkpoints.items())
        }
        self._tensors = {ref: s.tensors for ref, s in self.sources.items()}
        self._structures: dict[ModelRef, Structure] = {}
        self._orders: dict[ModelRef, list[str]] = {}
        self._layers: dict[tuple[ModelRef | None, Stack], Layers] = {}
        self.alike = False
        """Whether all models that are merged have the same names; known once they are aligned."""

    def align(self, recipe: Recipe) -> list[str]:
        """Gives all models that are merged the names of one of them: the base, else the first.

        Returns:
            A line for each model whose names were changed.

        Raises:
            CheckpointError: where a model has no name in common with that one.
        """
        refs = list(dict.fromkeys(s.model for part in recipe.parts for s in part.sources))
        first = recipe.base_model if recipe.base_model in refs else refs[0]
        layout = recipe.layout or "base"
        self.alike = self._names_alike(refs, self._tensors[first])
        if self.alike and layout == "base" and self._same_stacks(refs, first):
            return []
        out, problems = [], []
        for ref in refs:
            names = unwrapped(self._tensors[ref])
            if names is not None:
                self._tensors[ref] = {names[n]: info for n, info in self._tensors[ref].items()}
                out.append(f"{str(ref)!r}: names are read without what wrappers left ('module.', '_orig_mod.')")
        from fastmerge.planning.layouts import relay

        out += relay(self, [first, *(ref for ref in refs if ref != first)], layout)
        whole = self._tensors[first]
        for ref in refs:
            own = self._tensors[ref]
            if own.keys() == whole.keys() or not whole or not own:
                continue
            found = align(whole, own)
            if found.rules:
                self._tensors[ref] = {found.names[n]: info for n, info in own.items()}
                out.append(f"{str(ref)!r}: names are read as {str(first)!r} writes them: {'; '.join(found.rules)}")
            if self._tensors[ref].keys().isdisjoint(whole.keys()):
                problems.append(
                    f"{str(ref)!r} has no tensor name in common with {str(first)!r} ({_example(own)} here, "
                    f"{_example(whole)} there): not the same architecture, or names that no prefix explains"
                )
        if problems:
            raise CheckpointError(problems)
        self.alike = self._names_alike(refs, self._tensors[first])
        return out

    def _names_alike(self, refs: Iterable[ModelRef], whole: Mapping[str, TensorInfo]) -> bool:
        every = [self._tensors[ref] for ref in refs]
        return all(own is whole or own.keys() == whole.keys() for own in every)

    def tensors(self, ref: ModelRef) -> Mapping[str, TensorInfo]:
        """Tensors of a model, by the names that the reference uses once :meth:`align` has matched them."""
        return self._tensors[ref]

    def reshape(self, ref: ModelRef, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Gives tensors of a model the shapes in which they go in, with rows for other tokens."""
        tensors = self._tensors[ref]
        self._tensors[ref] = {**tensors, **{n: tensors[n]._replace(shape=shape) for n, shape in shapes.items()}}

    def _same_stacks(self, refs: Sequence[ModelRef], first: ModelRef) -> bool:
        """Whether fused experts of models with the same names have the same shapes: some are stored transposed."""
        stacks = [n for n in self._tensors[first] if n.endswith("experts.gate_up_proj")]
        return all(self._tensors[r][n].shape == self._tensors[first][n].shape for r in refs for n in stacks)

    def relay(self, ref: ModelRef, done: Relaid) -> None:
        """Gives a model the tensors that it has in another layout of its experts."""
        self._tensors[ref] = done.tensors
        self.sources[ref].relay(done.made)

    def exact(self, ref: ModelRef) -> frozenset[str]:
        """Tensors that a model of 16-bit floats holds in float32 all the same, as they lose too much by rounding."""
        sizes: Counter[str] = Counter()
        for (dtype, nbytes), count in Counter(map(_STORED, self.checkpoints[ref].tensors.values())).items():
            sizes[dtype.name] += nbytes * count
        if not sizes["float32"] or 2 * (sizes["bfloat16"] + sizes["float16"]) < sizes["float32"]:
            return frozenset()
        return frozenset(n for n, i in self.tensors(ref).items() if i.dtype is F32)

    def config(self, ref: ModelRef) -> Mapping[str, Any]:
        """Its config.json."""
        return self.sources[ref].config

    def structure(self, ref: ModelRef) -> Structure:
        """Its stacks of layers."""
        if ref not in self._structures:
            found = self.checkpoints[ref]
            self._structures[ref] = structure(self.tensors(ref), found.config)
        return self._structures[ref]

    def layers(self, ref: ModelRef, stack: Stack) -> Layers:
        """The layers of one of its stacks."""
        key = (None if self.alike else ref, stack)
        if key not in self._layers:
            self._layers[key] = Layers(stack, self.order(ref))
        return self._layers[key]

    def order(self, ref: ModelRef) -> list[str]:
        """Its tensor names as they lie in its files."""
        if ref not in self._orders:
            self._orders[ref] = list(self.tensors(ref))
        return self._orders[ref]


class Sources:
    """The sources of one part of the recipe, prepared for the loop."""

    def __init__(self, recipe: Recipe, part: Part, models: Models) -> None:
        self.refs = [s.model for s in part.sources]
        self.base = self.refs.index(part.base) if part.base is not None else None
        self.first = self.refs.index(reference(recipe, part))
        self.module = part.module
        self.tensors = [models.tensors(ref) for ref in self.refs]
        order = list(range(len(self.refs)))
        if self.base is not None:
            order.insert(0, order.pop(self.base))
        self.order = tuple(order)

    def columns(self, rows: Sequence[Row]) -> list[list[TensorInfo | None]]:
        """For each source, base first, its tensors of rows of the part; None where it has none."""
        names: list[Any] = [row.inputs for row in rows]
        one = set(map(type, names)) == {str}
        if one:  # models of one family share one table
            tables = [self.tensors[i] for i in self.order]
            found = {id(table): [*map(table.get, names)] for table in {id(t): t for t in tables}.values()}
            return [found[id(table)] for table in tables]
        return [[*map(self.tensors[i].get, [self.name(row, i) for row in rows])] for i in self.order]

    def name(self, row: Row, i: int) -> str:
        """Its name in one source."""
        return row.inputs if isinstance(row.inputs, str) else row.inputs[i]


def _example(names: Iterable[str]) -> str:
    """A name that tells how a model writes its names: one of a layer, where there is one."""
    names = list(names)
    return next((n for n in names if kind(n) != n), names[0])


def reference(recipe: Recipe, part: Part) -> ModelRef:
    """The model whose file order a part's outputs follow: the base where it is a source, else the first."""
    sources = [s.model for s in part.sources]
    wanted = part.base or recipe.base_model
    return wanted if wanted in sources else sources[0]


def whole(recipe: Recipe, part: Part, at: int, models: Models, modules: Modules, *, gradient: bool) -> list[Row]:
    """Rows of a part that merges whole models: every tensor name of any source that is in its module.

    Args:
        recipe: checked.
        part: of it.
        at: position of the part.
        models: opened, and aligned.
        modules: of the recipe.
        gradient: whether the place of layers matters.

    Raises:
        RecipeError: where a gradient needs layers and the reference has none.
    """
    first = reference(recipe, part)
    names = dict.fromkeys(models.order(first))
    others = [s.model for s in part.sources if s.model != first]
    for ref in others if not models.alike else ():
        if models.tensors(ref).keys() - names.keys():
            names |= dict.fromkeys(n for n in models.order(ref) if n not in names)
    if recipe.modules:
        names = {n: None for n in names if modules.of(n) == part.module}
    if not gradient:
        return [*map(of_fields, repeat(Row), zip(names, repeat(at), names, repeat(0.0)))]
    found = models.structure(first)
    if not found.stacks:
        raise RecipeError(f"a gradient needs layers, and the tensor names of {str(first)!r} show none")
    return [Row(name, at, name, found.gradient(name)) for name in names]


class Stacked(NamedTuple):
    """Rows of re-stacked layers.

    Attributes:
        rows: in the order of the output.
        layers: for each output layer the reference model of its slice and the layer there.
        stack: of the first slice's reference model.
    """

    rows: list[Row]
    layers: list[tuple[ModelRef, int]]
    stack: Stack


def sliced(recipe: Recipe, module: str, models: Models, modules: Modules) -> Stacked:
    """Rows of a module (:data:`fastmerge.recipe.REST`: all that is in no other one) that is merged by slices.

    Layers are renumbered from 0 in the order of the slices. Tensors before the layers come from the first
    slice's sources, those after from the last slice's (:func:`fastmerge.planning.structure.is_pre`).

    Raises:
        RecipeError: with every range that does not fit, and models whose layers are not found or named alike.
    """
    return _Slicer(recipe, module, models, modules).stacked()


class _Slicer:
    """The work of :func:`sliced`."""

    def __init__(self, recipe: Recipe, module: str, models: Models, modules: Modules) -> None:
        parts = recipe.parts
        self.at = [i for i, part in enumerate(parts) if part.module == module and part.ranges]
        self.parts = [parts[i] for i in self.at]
        self.models = models
        self.modules = modules if recipe.modules else None
        self.module = module
        self.strict = getattr(recipe, "missing", None) != "merge"
        self.sources = [_reference_first(recipe, part) for part in self.parts]
        self.stacks = _stacks(recipe, self.parts, models, modules)
        self.made: list[set[str]] = []
        self.before: dict[str, bool] = {}
        for refs in (self.sources[0], self.sources[-1]):
            for ref in refs:
                self.before |= {n: pre for n, pre in self.outside(ref) if n not in self.before}

    def stacked(self) -> Stacked:
        rows = [Row(n, self.at[0], n) for n in self.names(0) if self.before.get(n) is True]
        layers: list[tuple[ModelRef, int]] = []
        for i, part in enumerate(self.parts):
            rows += self.slice(i, len(layers))
            ref = self.sources[i][0]
            at = [s.model for s in part.sources].index(ref)
            layers += [(ref, layer) for layer in range(*part.ranges[at])]
        self.check(layers)
        last = len(self.parts) - 1
        main = self.stacks[self.sources[last][0]]
        for n in self.names(last):
            if self.before.get(n) is False:
                split = main.split(n)
                # layers beyond the stack (multi-token prediction) keep their distance from its end
                out = n if split is None else f"{main.prefix}.{split[0] - main.count + len(layers)}.{split[1]}"
                rows.append(Row(out, self.at[last], n))
        stack = self.stacks[self.sources[0][0]]
        return Stacked(self.as_in_file(rows) if len(self.parts) == 1 else rows, layers, stack)

    def check(self, layers: Sequence[tuple[ModelRef, int]]) -> None:
        """Refuses layers that fit no one model.

        Raises:
            CheckpointError: where a layer lacks what all layers of one of the models have.
            ShapeError: where the layers of two models have different sizes.
        """
        models = {str(ref): self.models.layers(ref, stack) for ref, stack in self.stacks.items()}
        found = [(str(ref), layer, suffixes) for (ref, layer), suffixes in zip(layers, self.made, strict=True)]
        problems = []
        if self.strict:
            problems = incomplete(models, found) + headless(models, self.made[0]) + displaced(models, found)
        if problems:
            raise CheckpointError(problems)
        tensors = {str(ref): self.models.tensors(ref) for ref in self.stacks}
        problems = sizes(models, tensors, {str(ref): self.models.config(ref) for ref in self.stacks})
        if problems:
            raise ShapeError(problems)

    def names(self, i: int) -> Iterable[str]:
        """All names of the sources of a part, the reference's first."""
        return dict.fromkeys(n for ref in self.sources[i] for n in self.models.order(ref) if self.inside(n))

    def inside(self, name: str) -> bool:
        """Whether a tensor is in the module."""
        return self.modules is None or self.modules.of(name) == self.module

    def outside(self, ref: ModelRef) -> Iterator[tuple[str, bool]]:
        """Names outside the main stack, and whether they come before it."""
        main = self.stacks[ref]
        towers = roots(self.models.structure(ref)) if self.modules is None else {}
        own = towers.get(main.prefix, "")
        others = tuple(f"{root}." for prefix, root in towers.items() if prefix != main.prefix)
        places = [place for place in self.models.layers(ref, main).places if self.inside(place[0])]
        ends = [n for n, i, _ in places if i < 0 and (not own or n.startswith(own + "."))]
        last_norm = not any(map(is_last_norm, ends))
        before = True
        for name, i, _ in places:
            if 0 <= i < main.count:
                before = False
            elif i >= 0:
                yield name, False
            else:
                apart = bool(own) and not name.startswith(own + ".") and not is_post(name.split(".")[0])
                tower = name.startswith(others) if others else False
                yield name, is_pre(name, before_layers=before, other_tower=apart or tower, last_norm=last_norm)

    def slice(self, i: int, offset: int) -> Iterator[Row]:
        """Rows of one slice, as they lie in the reference model's files."""
        part = self.parts[i]
        starts = [a for a, _ in part.ranges]
        start_of = {s.model: a for s, a in zip(part.sources, starts, strict=True)}
        length = part.ranges[0][1] - part.ranges[0][0]
        made: list[set[str]] = [set() for _ in range(length)]
        self.made += made
        for ref in self.sources[i]:
            stack, start = self.stacks[ref], start_of[ref]
            for _, layer, suffix in self.models.layers(ref, stack).places:
                k = layer - start
                if layer < 0 or not 0 <= k < length or suffix in made[k]:
                    continue
                made[k].add(suffix)
                inputs = tuple([f"{stack.prefix}.{a + k}.{suffix}" for a in starts])
                t = k / (length - 1) if length > 1 else 1.0
                yield Row(f"{stack.prefix}.{offset + k}.{suffix}", self.at[i], inputs, t)

    def as_in_file(self, rows: list[Row]) -> list[Row]:
        """Rows of a single slice in the order of the reference model's files."""
        ref = self.sources[0][0]
        rank = {n: i for i, n in enumerate(self.models.order(ref))}
        at = [s.model for s in self.parts[0].sources].index(ref)
        return sorted(rows, key=lambda r: rank.get(r.inputs if isinstance(r.inputs, str) else r.inputs[at], len(rank)))


def _stacks(recipe: Recipe, parts: Sequence[Part], models: Models, modules: Modules) -> dict[ModelRef, Stack]:
    """The stack of layers of each source."""
    problems: list[str] = []
    stacks: dict[ModelRef, Stack] = {}
    name = parts[0].module
    for ref in dict.fromkeys(s.model for part in parts for s in part.sources):
        own = modules.stacks(ref, name)
        if own:
            stacks[ref] = own[0]
            continue
        shown = ", ".join(f"{s.prefix} ({s.count})" for s in models.structure(ref).stacks) or "none"
        which = f"'slices' of {name!r} need layers in that module" if name else "'slices' needs one stack of layers"
        fits = "" if name else " that fits config.json"
        more = "; 'modules' can name one of them" if not name and len(models.structure(ref).stacks) > 1 else ""
        problems.append(f"{str(ref)!r}: {which}{fits}; found {shown}{more}")
    first = next(iter(stacks.values()), None)
    for ref, stack in stacks.items():
        if first is not None and stack.prefix != first.prefix:
            problems.append(f"{str(ref)!r}: its layers are called {stack.prefix!r}, elsewhere {first.prefix!r}")
    for part in parts:
        for j, (source, (a, b)) in enumerate(zip(part.sources, part.ranges, strict=True)):
            known = stacks.get(source.model)
            if known is not None and b > known.count:
                where = recipe.at((*part.loc, "sources", j, "layer_range"))
                ref = source.model
                problems.append(f"{where}: [{a}, {b}) of {str(ref)!r}, which has {known.count} layers")
    if problems:
        raise RecipeError(problems)
    return stacks


def _reference_first(recipe: Recipe, part: Part) -> list[ModelRef]:
    first = reference(recipe, part)
    return [first, *(s.model for s in part.sources if s.model != first)]
