"""Plans: which output tensor from which inputs, decided from the recipe and the headers alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Checkpoint, Layout, Seen, layout, of_fields, without_gc
from fastmerge.dtypes import DType
from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from fastmerge.ops.spec import Op
from fastmerge.planning import carry as carrying
from fastmerge.planning import config_json as configuring
from fastmerge.planning import idle
from fastmerge.planning.modules import Modules
from fastmerge.planning.outputs import Outputs
from fastmerge.planning.packing import BaseFormat, entries, placed
from fastmerge.planning.plan import Plan
from fastmerge.planning.rows import Models, Row, Stacked, sliced, whole
from fastmerge.recipe import UNNAMED, ModelRef, Recipe
from fastmerge.recipe.problems import hint
from fastmerge.recipe.refs import UNION
from fastmerge.version import __version__

if TYPE_CHECKING:
    from fastmerge.checkpoint.adapter import Adapter
    from fastmerge.planning.restack import SourceLayer
    from fastmerge.planning.structure import Stack
    from fastmerge.planning.tokenizers import United
    from fastmerge.planning.vocabulary import Vocabulary

ENGINE = "1"
"""Version of the frozen arithmetic and of the plan: another one may give other bytes."""

SHARD_SIZE = 5_000_000_000


@without_gc()
def plan(
    recipe: Recipe,
    *,
    seed: int | None = None,
    shard_size: float = SHARD_SIZE,
    models: Mapping[str, Checkpoint] | None = None,
    strict: bool = False,
) -> Plan:
    """Decides everything about a merge before any weight is read.

    Args:
        recipe: what is wanted.
        seed: of the random numbers; the recipe's own, or 0, where None.
        shard_size: most bytes of an output shard.
        models: models that are open already, by reference as the recipe writes it; others are opened.
        strict: whether settings that come to nothing in these models are errors.

    Returns:
        The plan. Its warnings are for people; nothing in it is undecided.

    Raises:
        RecipeError: where the recipe does not fit the models.
        CheckpointError: where models are damaged, lack tensors, or hold types that cannot be merged.
        ShapeError: where tensors that must agree do not; all of them are listed.
    """
    if recipe.stages:
        from fastmerge.planning.stages import chain

        return chain(recipe, models or {}, lambda one, given: _plan(one, given, seed, shard_size, strict))
    return _plan(recipe, models or {}, seed, shard_size, strict)


def _plan(recipe: Recipe, models: Mapping[str, Checkpoint], seed: int | None, shard_size: float, strict: bool) -> Plan:
    """The plan of one document, whose stages are among the given models."""
    seed = seed if seed is not None else recipe.seed or 0
    opened = Models(*_open(recipe.refs, models))
    checkpoints = tuple(opened.checkpoints[ref] for ref in recipe.refs)
    warnings = dict.fromkeys((*recipe.warnings, *(text for c in checkpoints for text in c.warnings)))
    if problems := [text for ref in recipe.refs for text in opened.sources[ref].problems]:
        raise CheckpointError(problems)
    warnings |= dict.fromkeys(text for ref in recipe.refs for text in opened.sources[ref].warnings)
    warnings |= dict.fromkeys(opened.align(recipe))
    donor_ref = recipe.base_model or _first(recipe)
    donor = opened.checkpoints[donor_ref]
    tokenizer = donor
    vocabulary: Vocabulary | None = None
    united: United | None = None
    if recipe.tokenizer_source is not None:
        from fastmerge.planning.vocabulary import by_tokens

        if recipe.tokenizer_source != UNION:
            tokenizer = _giver(recipe, opened, models)
        vocabulary, united = by_tokens(recipe, opened, donor_ref, tokenizer)
    outputs = Outputs(recipe, opened, seed, vocabulary)
    modules = Modules(recipe, opened)
    _same_depth(recipe, opened, modules)
    rows: list[Row] = []
    stacks: dict[str, Stacked] = {}
    for i, part in enumerate(recipe.parts):
        if not part.ranges:
            found = whole(recipe, part, i, opened, modules, gradient=outputs.parts[i].resolver.gradient)
            if part.loc == UNNAMED:
                warnings |= dict.fromkeys(modules.note(found, part.sources[0].model))
            rows += found
        elif part.module not in stacks:
            stacks[part.module] = sliced(recipe, part.module, opened, modules)
            rows += stacks[part.module].rows
    try:
        made = outputs.build(rows)
    except ShapeError:
        if vocabulary is not None:
            raise
        from fastmerge.planning.vocabulary import by_number

        vocabulary = by_number(opened, donor_ref)
        if vocabulary is None:
            raise
        outputs = Outputs(recipe, opened, seed, vocabulary)
        made = outputs.build(rows)
    settings = idle.settings(recipe, [part.resolver for part in outputs.parts], opened, modules)
    if strict and settings:
        raise RecipeError(settings)
    warnings |= dict.fromkeys(settings)
    if not made:
        raise CheckpointError("nothing to merge: the models have no tensors")
    if recipe.donor_only_base:
        first = str(recipe.parts[0].base)
        warnings[
            f"base_model {str(recipe.base_model)!r} is not one of the two models: it gives configuration and tokenizer "
            f"only; t = 0 is {first!r}"
        ] = None
    stored = BaseFormat(recipe, donor, recipe.refs.index(donor_ref)) if outputs.as_base else None
    if stored is not None:
        made = tuple(stored.apply(made))
        if stored.problems:
            raise RecipeError(stored.problems)
        warnings |= dict.fromkeys(stored.warnings)
    packed = stored.entries if stored is not None else {}
    warnings |= dict.fromkeys(_compare(recipe, opened, donor_ref))
    config = None
    if donor.config:
        config, notes = configuring.rewrite(
            donor.config,
            dtype=None if stored is not None else _main_type(made),
            quantised=stored is not None and bool(donor.quantised),
            untied=outputs.notes.untied,
            stacks=_origins(list(stacks.values()), opened),
            structure=opened.structure(donor_ref) if stacks else None,
            names=[op.name for op in made],
        )
        warnings |= dict.fromkeys(notes)
    by_row = _by_row(recipe, opened, modules) if vocabulary is None else []
    files, notes = carrying.carry(recipe.chat_template, donor, tokenizer, checkpoints, by_row, config, united)
    if vocabulary is not None:
        warnings |= vocabulary.warnings
        if config is not None:
            from fastmerge.planning.embeddings import set_size

            warnings |= dict.fromkeys(set_size(config, vocabulary.size))
    warnings |= dict.fromkeys(notes)
    warnings |= outputs.notes.warnings
    adapters = tuple([a.checkpoint for a in opened.adapters.values()])
    checkpoints = (*checkpoints, *adapters)
    identities = [c.identity for c in checkpoints]
    text = recipe.canonical(identities, seed=seed)
    metadata = {"format": "pt", "fastmerge": ENGINE, "fastmerge_recipe": text}
    where = layout(entries(made, packed), shard_size=shard_size, metadata=metadata)
    return Plan(
        recipe=recipe,
        seed=seed,
        checkpoints=checkpoints,
        ops=_placed(made, where) if not packed else placed(made, where.places, packed),
        layout=where,
        config=config,
        carry=files,
        warnings=tuple(warnings),
        fingerprint=_fingerprint(
            text, checkpoints, where, config, vocabulary.digest if vocabulary is not None else None
        ),
        ties=outputs.inputs.ties,
        dropped=outputs.inputs.dropped,
        rows=outputs.rows,
    )


def _placed(made: Sequence[Op], where: Layout) -> tuple[Op, ...]:
    """The ops in the order of the output's bytes, with their places; column by column."""
    names, specs, keys, inputs, _ = zip(*made, strict=True)
    if names != tuple(where.places):
        named = dict(zip(names, made, strict=True))
        names, specs, keys, inputs, _ = zip(*map(named.__getitem__, where.places), strict=True)
    fields = zip(names, specs, keys, inputs, zip(where.places.values(), strict=True), strict=True)
    return tuple(map(of_fields, itertools.repeat(Op), fields))


def _origins(stacks: Sequence[Stacked], models: Models) -> list[tuple[Stack, list[SourceLayer]]]:
    """For each stack that slices made, the model and layer that each of its layers comes from."""
    if not stacks:
        return []
    from fastmerge.planning.restack import SourceLayer

    return [
        (found.stack, [SourceLayer(str(ref), models.checkpoints[ref].config, i) for ref, i in found.layers])
        for found in stacks
    ]


def _first(recipe: Recipe) -> ModelRef:
    return recipe.parts[0].sources[0].model


def _open(
    refs: Sequence[ModelRef], given: Mapping[str, Checkpoint]
) -> tuple[dict[ModelRef, Checkpoint], dict[ModelRef, Adapter]]:
    """Opens what is not given, and the adapters; the problems of all come together."""
    out: dict[ModelRef, Checkpoint] = {}
    adapters: dict[ModelRef, Adapter] = {}
    problems: list[str] = []
    seen = Seen()
    for ref in refs:
        try:
            open_already = given.get(str(ref)) or given.get(str(ref.bare))
            out[ref] = open_already or Checkpoint.open(ref.path, revision=ref.revision, seen=seen, quantised=True)
        except CheckpointError as e:
            problems += e.problems
        for adapter in ref.adapters:
            from fastmerge.checkpoint.adapter import Adapter

            try:
                if adapter.bare not in adapters:
                    adapters[adapter.bare] = Adapter.open(adapter.path, revision=adapter.revision)
            except CheckpointError as e:
                problems += e.problems
    if problems:
        raise CheckpointError(problems)
    return _replicated(out, adapters), adapters


def _replicated(
    models: Mapping[ModelRef, Checkpoint], adapters: Mapping[ModelRef, Adapter]
) -> dict[ModelRef, Checkpoint]:
    """Models with their layers repeated where their adapters were trained on such ones.

    Raises:
        CheckpointError: adapters of one model repeat other layers, or the model does not have them.
    """
    out = dict(models)
    problems: list[str] = []
    for ref, model in models.items():
        runs = {adapters[a.bare].replication for a in ref.adapters}
        if len(runs) > 1:
            problems.append(f"{ref}: the adapters' layer_replication differs: {sorted(runs)}")
        elif any(runs):
            from fastmerge.planning.replication import replicated

            try:
                out[ref] = replicated(model, *runs)
            except (CheckpointError, RecipeError) as e:
                problems += [f"{ref}: {p}" for p in e.problems]
    if problems:
        raise CheckpointError(problems)
    return out


def _giver(recipe: Recipe, models: Models, given: Mapping[str, Checkpoint]) -> Checkpoint:
    """The model whose tokenizer a recipe takes; of one that is not merged only its small files.

    Raises:
        RecipeError: there is none.
    """
    source = recipe.tokenizer_source
    assert source is not None
    found = models.checkpoints.get(source) or given.get(str(source))
    if found is not None:
        return found
    try:
        return Checkpoint.open_files(source.path, revision=source.revision)
    except CheckpointError as e:
        where = recipe.at(("tokenizer",) if recipe.tokenizer is not None else ("tokenizer_source",))
        near = hint(str(source), [str(ref) for ref in recipe.refs])
        what = f"{where}: {str(source)!r} is not a model of this recipe{near}"
        raise RecipeError([f"{what}, nor any other: {p}" for p in e.problems]) from None


def _compare(recipe: Recipe, models: Models, donor: ModelRef) -> list[str]:
    """What the configurations of the models say otherwise than the donor's, and how they are quantised otherwise.

    Raises:
        RecipeError: where layers are taken over from a model in which they compute something else.
    """
    mine = models.checkpoints[donor].config
    configs = {ref: c.config for ref, c in models.checkpoints.items() if c.config != mine}
    out: list[str] = []
    if any(c.quantised for c in models.checkpoints.values()):
        from fastmerge.planning import quantisation

        every = [(str(ref), c) for ref, c in models.checkpoints.items()]
        out = quantisation.disagreements(str(donor), models.checkpoints[donor], every)
    if not configs:
        return out
    from fastmerge.planning import compare as comparing

    alone = {part.sources[0].model for part in recipe.parts if part.ranges and len(part.sources) == 1}
    problems = comparing.strangers(str(donor), mine, [(str(r), c) for r, c in configs.items() if r in alone])
    if problems:
        raise RecipeError(problems)
    return comparing.disagreements(str(donor), mine, [(str(r), c) for r, c in configs.items()]) + out


def _by_row(recipe: Recipe, models: Models, modules: Modules) -> list[Checkpoint]:
    """Models that give rows to the embeddings or the head of the output."""
    parts = modules.embedding(recipe.parts)
    refs = dict.fromkeys(s.model for part in (parts[0], parts[-1]) for s in part.sources)
    return [models.checkpoints[ref] for ref in refs]


def _same_depth(recipe: Recipe, models: Models, modules: Modules) -> None:
    """Models with different layer counts share most names; merging those would be wrong.

    Looks only where the names differ: equal names are equal layers.
    """
    if models.alike:
        return
    problems = []
    for part in recipe.parts:
        depths: dict[str, dict[str, int]] = {}
        for ref in () if part.ranges else [s.model for s in part.sources]:
            for stack in modules.stacks(ref, part.module, every=True):
                depths.setdefault(stack.prefix, {})[str(ref)] = stack.count
        for prefix, counts in depths.items():
            if len(set(counts.values())) > 1:
                shown = ", ".join(f"{ref!r} {n}" for ref, n in counts.items())
                problems.append(
                    f"{prefix}: the models have different numbers of layers: {shown}; 'slices' can pick layers"
                )
    if problems:
        raise CheckpointError(problems)


def _main_type(ops: Iterable[Op]) -> DType | None:
    """The floating-point type of most elements."""
    counts: Counter[DType] = Counter()
    for spec, count in Counter([op.spec for op in ops]).items():
        counts[spec.out_dtype] += spec.numel * count
    return max((d for d in counts if d.mergeable), key=counts.__getitem__, default=None)


def _fingerprint(
    recipe: str, checkpoints: Iterable[Checkpoint], layout: Layout, config: Any, vocabulary: str | None
) -> str:
    """128 bits over everything that decides the output directory's bytes."""
    digest = hashlib.blake2b(digest_size=16)

    def add(data: bytes) -> None:
        digest.update(struct.pack("<q", len(data)))
        digest.update(data)

    add(f"fastmerge {ENGINE} {__version__}".encode())
    add(recipe.encode())
    for c in checkpoints:
        add(json.dumps([[f.header_hash, f.size, f.identity[3]] for f in c.files]).encode())
    add(layout.digest.encode())
    add(configuring.canonical(config).encode())
    if vocabulary is not None:
        add(vocabulary.encode())
    return digest.hexdigest()


__all__ = ["Plan", "plan"]
