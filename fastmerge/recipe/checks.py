"""Checks that need the whole recipe: counts of inputs, duplicates, required parameters, tokenizers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from fastmerge.methods.base import REQUIRED, Method, Param
from fastmerge.recipe.load import LIFTED
from fastmerge.recipe.problems import Problems, hint
from fastmerge.recipe.refs import UNION, ModelRef
from fastmerge.recipe.schema import Input, Module, Shape, Slice, Source
from fastmerge.recipe.settings import Parameters, Setting
from fastmerge.recipe.tree import Loc

if TYPE_CHECKING:
    from fastmerge.recipe import Recipe

Owner = TypeVar("Owner", "Recipe", Module)
AnInput = TypeVar("AnInput", bound=Input)

BUILT_IN_TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")


REST = ""
"""What no named module of a recipe is about: everything where it names none."""


UNNAMED: Loc = ("modules",)
"""The place of the part that takes over what the modules of a recipe leave."""


class Part(NamedTuple):
    """What is merged together: all of a model, or one slice of the output.

    Attributes:
        sources: the inputs in the recipe's order; a base that only ``base_model`` names comes last.
        base: the base, one of the sources; None where the method has none or treats it as an input.
        levels: parameters of the slice, the module and the recipe, the highest level first.
        ranges: layers ``[first, end)`` of each source; empty for whole models.
        loc: where it stands in the recipe.
        module: which tensors it is about; :data:`REST` is all that no other part is about.
    """

    sources: tuple[Input, ...]
    base: ModelRef | None
    levels: tuple[Parameters, ...]
    ranges: tuple[tuple[int, int], ...]
    loc: Loc
    module: str


def parts(recipe: Shape, method: type[Method]) -> tuple[Part, ...]:
    """The recipe as parts: one for ``models``, one per slice otherwise; so for each module.

    What no module is about is the last part then: the base's, else the first model's.
    """
    out: list[Part] = []
    levels: tuple[Parameters, ...]
    for module in recipe.every_module:
        name = REST if module.name == "default" else module.name
        for i, s in enumerate(module.slices):
            base = _base(s.base_model or recipe.base_model, method)
            ranges = tuple(source.layer_range for source in s.sources)
            levels = (s.parameters, module.parameters, recipe.parameters)
            out.append(Part(s.sources, base, levels, ranges, (*module.loc, "slices", i), name))
        if not module.slices:
            sources, base = list(module.models), recipe.base_model
            if base is not None and base not in {s.model for s in sources}:
                if _is_pair(recipe, module, method):
                    base = sources[0].model
                else:
                    sources.append(Input(model=base))
            levels = (module.parameters, recipe.parameters)
            out.append(Part(tuple(sources), _base(base, method), levels, (), (*module.loc, "models"), name))
    if all(part.module != REST for part in out):
        donor = recipe.base_model or out[0].sources[0].model
        out.append(Part((Input(model=donor),), donor, (), (), UNNAMED, REST))
    return tuple(out)


def donor_only_base(recipe: Shape, method: type[Method]) -> bool:
    """Whether ``base_model`` gives configuration and tokenizer only, and the first model is the base."""
    modules = recipe.every_module
    listed = {m.model for module in modules for m in module.models}
    return recipe.base_model not in (None, *listed) and any(_is_pair(recipe, m, method) for m in modules)


def _is_pair(recipe: Shape, module: Module, method: type[Method]) -> bool:
    # mergekit refuses slerp of two models beside a third as base; people write it for "between these two"
    listed = [m.model for m in module.models]
    return method.name == "slerp" and len(listed) == 2 and recipe.base_model not in listed


def _base(base: ModelRef | None, method: type[Method]) -> ModelRef | None:
    return None if method.contract.base == "ignored" else base


def check(recipe: Recipe, method: type[Method] | None, problems: Problems) -> Recipe:
    """Adds whatever is wrong; returns the recipe with lifted parameters moved to their level."""
    sound = sum(map(bool, (recipe.models, recipe.slices, recipe.modules))) == 1
    if not sound:
        loc: Loc = ("modules",) if recipe.modules else ("slices",) if recipe.slices else ()
        problems.add(loc, "expected exactly one of 'models', 'slices' and 'modules'")
    for module in recipe.modules:
        if not module.name.strip() or bool(module.models) == bool(module.slices):
            what = "exactly one of 'models' and 'slices'" if module.name.strip() else "a name"
            problems.add(("modules", module.name), f"expected {what}")
            sound = False
    _duplicates(recipe, problems)
    _slices(recipe, problems)
    recipe = _tokenizer(recipe, problems)
    if method is None:
        return recipe
    presets = dict.fromkeys(["mergekit", *method.presets])
    if recipe.preset is not None and recipe.preset not in presets:
        near = hint(recipe.preset, presets)
        problems.add(("preset",), f"{method.name!r} has no preset {recipe.preset!r}{near}; known: {', '.join(presets)}")
    recipe = _lift(recipe, method, problems)
    if sound:
        for part in parts(recipe, method):
            if part.loc == UNNAMED:
                continue
            _contract(recipe, part, method, problems)
            _of_the_base(part, method, problems)
            if recipe.preset is None or recipe.preset in presets:
                _required(recipe, part, method, problems)
    return recipe


def _duplicates(recipe: Shape, problems: Problems) -> None:
    lists: list[tuple[Loc, Sequence[Input]]] = []
    for module in recipe.every_module:
        lists.append(((*module.loc, "models"), module.models))
        lists += [((*module.loc, "slices", i, "sources"), s.sources) for i, s in enumerate(module.slices)]
    for loc, inputs in lists:
        seen: set[ModelRef] = set()
        for i, item in enumerate(inputs):
            if item.model in seen:
                problems.add((*loc, i, "model"), f"model {str(item.model)!r} is listed twice")
            seen.add(item.model)
    written: dict[str, ModelRef] = {}
    for ref in refs(recipe):
        first = written.setdefault(_same(ref), ref)
        if first != ref:
            problems.add((), f"one model is written in two ways: {str(first)!r} and {str(ref)!r}")


def _same(ref: ModelRef) -> str:
    """Equal for references to one model."""
    model = f"{os.path.normpath(os.path.expanduser(ref.path))}@{ref.revision}"  # noqa: PTH111
    return "+".join([model, *(f"{_same(adapter)}:{adapter.weight}" for adapter in ref.adapters)])


def _slices(recipe: Shape, problems: Problems) -> None:
    every = [((*m.loc, "slices", i, "sources"), s.sources) for m in recipe.every_module for i, s in enumerate(m.slices)]
    for loc, sources in every:
        ranges = [source.layer_range for source in sources]
        lengths = [b - a for a, b in ranges]
        if not lengths:
            problems.add(loc, "a slice needs at least one source")
        elif len(set(lengths)) > 1:
            shown = ", ".join(map(str, lengths))
            problems.add(loc, f"all sources of a slice need equally many layers; got {shown}")
        elif len(set(ranges)) > 1:
            shown = ", ".join(f"[{a}, {b})" for a, b in ranges)
            what = f"merges different layers with each other ({shown}) into {lengths[0]} layers"
            problems.warn(loc, f"{what}; layers that follow each other are slices of their own")


def _tokenizer(recipe: Recipe, problems: Problems) -> Recipe:
    """The recipe with either form of asking for a tokenizer written as ``tokenizer_source``.

    ``tokenizer`` stays where it says more than that.
    """
    if recipe.tokenizer is not None and recipe.tokenizer_source is not None:
        problems.add(("tokenizer",), "give either 'tokenizer' or 'tokenizer_source', not both")
    block = recipe.tokenizer
    source = recipe.tokenizer_source if block is None else block.source
    if source is not None and source != UNION:
        source = _whose(recipe, source)  # any model, as in mergekit
    if block is not None:
        tokens = {}
        for name, token in block.tokens.items():
            of = token.source
            if of is not None and of.model is not None:
                at = ("tokenizer", "tokens", name, "source")
                of = replace(of, model=_member(recipe, of.model, at, problems))
            tokens[name] = replace(token, source=of)
        more = bool(tokens) or block.pad_to_multiple_of is not None
        block = replace(block, source=source, tokens=tokens) if more else None
    template = recipe.chat_template
    named = ("auto", *BUILT_IN_TEMPLATES)
    if template and template not in named and (len(template) < 20 or "{" not in template):
        problems.add(("chat_template",), f"expected {', '.join(named)} or a Jinja template; got {template[:40]!r}")
    return replace(recipe, tokenizer=block, tokenizer_source=source)


def _whose(recipe: Shape, source: ModelRef) -> ModelRef:
    """The model that a tokenizer, or a row of one, comes from: ``base`` is the base, or else the first model."""
    known = refs(recipe)
    if source == ModelRef("base") and known and source not in known:
        return known[0]
    source = replace(source, path=source.path.removeprefix("model:"))
    if source in known:
        return source
    # The tokenizer of model+adapter is the model's.
    return next((ref for ref in known if ref.bare == source.bare), source.bare)


def _member(recipe: Shape, source: ModelRef, loc: Loc, problems: Problems) -> ModelRef:
    """The same, of a model that has rows here."""
    found, known = _whose(recipe, source), refs(recipe)
    if found not in known:
        problems.add(loc, f"{str(found)!r} is not a model of this recipe{hint(str(found), [str(r) for r in known])}")
    return found


def refs(recipe: Shape) -> tuple[ModelRef, ...]:
    """All models: the base first, then in the order of their first appearance."""
    return tuple(dict.fromkeys(ref for _, ref in places(recipe)))


def places(recipe: Shape) -> Iterator[tuple[Loc, ModelRef]]:
    """Where each model stands: the base, then the others in their order."""
    if recipe.base_model is not None:
        yield ("base_model",), recipe.base_model
    for module in recipe.every_module:
        for i, m in enumerate(module.models):
            yield (*module.loc, "models", i, "model"), m.model
        for i, s in enumerate(module.slices):
            if s.base_model is not None:
                yield (*module.loc, "slices", i, "base_model"), s.base_model
            for k, source in enumerate(s.sources):
                yield (*module.loc, "slices", i, "sources", k, "model"), source.model


def levels(recipe: Shape) -> Iterator[tuple[Loc, Parameters]]:
    """Every ``parameters`` of a recipe, with its place."""
    yield ("parameters",), recipe.parameters
    for module in recipe.every_module:
        yield (*module.loc, "parameters"), module.parameters
        for i, m in enumerate(module.models):
            yield (*module.loc, "models", i, "parameters"), m.parameters
        for i, s in enumerate(module.slices):
            yield (*module.loc, "slices", i, "parameters"), s.parameters
            for k, source in enumerate(s.sources):
                yield (*module.loc, "slices", i, "sources", k, "parameters"), source.parameters


def _lift(recipe: Recipe, method: type[Method], problems: Problems) -> Recipe:
    """Moves a shared parameter that every model states alike to the level that shared parameters are read from."""
    names = [p.name for p in method.params if (method.name, p.name) in LIFTED]
    for name in names:
        modules = tuple(_lifted_in(m, name, m.loc, problems) for m in recipe.modules)
        recipe = _lifted_in(recipe, name, (), problems)
        recipe = replace(recipe, modules=modules)
    return recipe


def _lifted_in(owner: Owner, name: str, loc: Loc, problems: Problems) -> Owner:
    """A recipe or a module with a parameter of its models, and of the sources of its slices, moved up."""
    models, level = _lifted(owner.models, owner.parameters, name, (*loc, "models"), problems)
    slices = []
    for i, s in enumerate(owner.slices):
        sources, own = _lifted(s.sources, s.parameters, name, (*loc, "slices", i, "sources"), problems)
        slices.append(replace(s, sources=sources, parameters=own))
    return replace(owner, models=models, parameters=level, slices=tuple(slices))


def _lifted(
    inputs: Sequence[AnInput], level: Parameters, name: str, loc: Loc, problems: Problems
) -> tuple[tuple[AnInput, ...], Parameters]:
    given = [(i, m.parameters[name]) for i, m in enumerate(inputs) if name in m.parameters]
    if not given:
        return tuple(inputs), level
    wanted: Setting = level.get(name, given[0][1])
    for i, setting in given:
        if setting != wanted:
            problems.add(
                (*loc, i, "parameters", name),
                f"one {name!r} is shared by both models; got {setting.plain()!r} here and {wanted.plain()!r} elsewhere",
            )
    stripped = tuple(
        replace(m, parameters=Parameters({k: v for k, v in m.parameters.items() if k != name})) for m in inputs
    )
    return stripped, Parameters({**level, name: wanted})


def _contract(recipe: Shape, part: Part, method: type[Method], problems: Problems) -> None:
    contract = method.contract
    listed = {s.model for s in part.sources}
    if contract.base == "required" and part.base is None:
        problems.add(("slices",) if recipe.slices else (), f"{method.name!r} needs a 'base_model'")
        return
    if part.base is not None and part.base not in listed:
        problems.add((*part.loc, "sources"), f"the base {str(part.base)!r} must be one of the sources of each slice")
        return
    count = len(part.sources) - (part.base is not None)
    if count == 0 and part.base is not None and contract.least == 1 and contract.most is None:
        problems.warn(part.loc, f"no model beside the base {str(part.base)!r}: the result is that model")
        return
    if count < contract.least or (contract.most is not None and count > contract.most):
        what = "input" if contract.base == "ignored" else "model"
        beside = "" if part.base is None else f" beside the base {str(part.base)!r}"
        joined = ""
        if contract.base == "ignored" and part.loc[-1] == "models" and recipe.base_model == part.sources[-1].model:
            joined = " (the base_model joins as an input: this method has no base)"
        expected = _count(contract.least, contract.most, what)
        problems.add(part.loc, f"{method.name!r} takes {expected}{beside}; got {count}{joined}")


def _of_the_base(part: Part, method: type[Method], problems: Problems) -> None:
    """Warns of parameters that the base states and only the other models have, as a weight beside a base."""
    declared = {p.name for p in method.params if p.scope == "model"}
    for i, source in enumerate(part.sources):
        for name in source.parameters if source.model == part.base else ():
            if name in declared:
                loc = (*part.loc, "sources", i) if isinstance(source, Source) else (*part.loc, i)
                what = f"ignored: the base {str(source.model)!r} has no {name!r}, the models beside it have"
                problems.warn((*loc, "parameters", name), what)


def _count(least: int, most: int | None, what: str) -> str:
    if most is None:
        return f"at least {least} {what}{'s' * (least != 1)}"
    if least == most:
        return f"exactly {least} {what}{'s' * (least != 1)}"
    return f"{least} to {most} {what}s"


def _required(recipe: Recipe, part: Part, method: type[Method], problems: Problems) -> None:
    defaults = method.defaults(recipe.preset)
    for param in method.params:
        if defaults[param.name] is not REQUIRED or _given(part.levels, param):
            continue
        if param.scope == "shared":
            problems.add(part.loc, f"{method.name!r} needs the parameter {param.name!r}")
            continue
        for i, source in enumerate(part.sources):
            if source.model != part.base and not _given((source.parameters,), param):
                loc = (*part.loc, "sources", i) if isinstance(source, Source) else (*part.loc, i)
                problems.add(loc, f"{method.name!r} needs the parameter {param.name!r} for {str(source.model)!r}")


def _given(levels: Iterable[Parameters], param: Param) -> bool:
    return any(level.get(param.name) not in (None, Setting(())) for level in levels)


__all__ = ["REST", "UNNAMED", "Part", "Slice", "check", "donor_only_base", "levels", "parts", "refs"]
