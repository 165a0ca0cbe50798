"""Recipes of several documents: what one makes is a model of others, and is in no file.

Each document is planned by itself, with the results of those before it as models: names, types and shapes are those of
their layouts, and the small files (configuration, tokenizer) lie in a directory that is there while this plans. Then
the plans are joined: where an op reads a tensor of a stage, its source becomes the op that makes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import Checkpoint, ShardFile, TensorInfo
from fastmerge.checkpoint.formats import parse_config
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.ops.sources import FileRange, Made, Result, results_of
from fastmerge.ops.spec import Op, Source, Spec
from fastmerge.planning import tied
from fastmerge.planning.packing import AS_BASE
from fastmerge.planning.plan import Plan
from fastmerge.recipe import Recipe

Documents = Sequence[tuple[str, Plan]]
"""The plans of the documents, each by itself and behind those that it uses; the result has no name."""


def chain(
    recipe: Recipe, models: Mapping[str, Checkpoint], plan: Callable[[Recipe, Mapping[str, Checkpoint]], Plan]
) -> Plan:
    """Plans a recipe and its stages.

    Args:
        recipe: with stages.
        models: models that are open already, by reference.
        plan: plans one document with the given models.

    Raises:
        RecipeError, CheckpointError, ShapeError: of any document, by its name.
    """
    documents: list[tuple[str, Plan]] = []
    warnings: dict[str, None] = {}
    located = set(recipe.warnings)
    given = dict(models)
    origins: dict[Path, Path | bytes] = {}
    homes: dict[str, str] = {}

    def shown(name: str, text: str) -> str:
        for home, of in homes.items():
            text = text.replace(home, of)
        return f"{name}: {text}" if name else text

    with tempfile.TemporaryDirectory(prefix="fastmerge-") as scratch:
        for name, stage in (*recipe.stages, ("", recipe)):
            if name and stage.out_dtype == AS_BASE:
                raise RecipeError(f"{name}: out_dtype: as-base: what a stage makes is not written: expected a type")
            try:
                made = plan(stage, given)
            except (RecipeError, CheckpointError) as error:
                raise type(error)([shown(name, text) for text in error.problems]) from None
            carry = tuple((n, origins.get(f, f) if isinstance(f, Path) else f) for n, f in made.carry)
            made = dataclasses.replace(made, carry=carry)
            documents.append((name, made))
            warnings |= {t if t in located else shown(name, t): None for t in made.warnings}
            opened = zip(made.recipe.refs, made.checkpoints, strict=False)
            given |= {str(ref): c for ref, c in opened if not ref.adapters}  # an adapter may repeat the layers
            if name:
                home = Path(scratch) / f"{len(homes):03}"  # none begins another
                homes[str(home)] = name
                origins |= _small_files(made, home)
                given[name] = _checkpoint(name, home, made)
    ops, checkpoints = join(documents)
    every = hashlib.blake2b("".join(p.fingerprint for _, p in documents).encode(), digest_size=16)
    return dataclasses.replace(
        made,
        checkpoints=checkpoints,
        ops=ops,
        warnings=tuple(warnings),
        fingerprint=every.hexdigest(),
        documents=tuple(documents),
    )


def _small_files(made: Plan, home: Path) -> dict[Path, Path | bytes]:
    """Writes what is no weights, and says where it came from."""
    out: dict[Path, Path | bytes] = {}
    home.mkdir()
    for name, data in made.carry:
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            shutil.copyfile(data, path)
        out[path] = data
    if made.config:
        (home / "config.json").write_text(json.dumps(made.config))
    return out


def _checkpoint(name: str, home: Path, made: Plan) -> Checkpoint:
    """What the directory would be opened as that a plan makes."""
    files = []
    for shard in made.layout.shards:
        digest = hashlib.sha256(shard.header[8:]).hexdigest()
        files.append(ShardFile(home / shard.name, shard.size, (0, 0, shard.size, 0), digest, {"format": "pt"}))
    tensors = {}
    for op in made.ops:
        place = made.layout.places[op.name]
        tensors[op.name] = TensorInfo(op.name, op.spec.out_dtype, op.spec.shape, *place)
    config = parse_config(json.dumps(made.config)) if made.config else {}
    return Checkpoint(name, home, tuple(files), tensors, config, alike=_alike(made))


def _alike(made: Plan) -> dict[str, str]:
    """Tied tensors that are computed alike from equal inputs: the name of the first of them."""
    ends = set(tied.candidates([op.name for op in made.ops]))
    found: list[Op] = []
    out = {}
    for op in made.ops if len(ends) > 1 else ():
        if op.name not in ends:
            continue
        first = next((other for other in found if _same(made, other, op)), None)
        if first is None:
            found.append(op)
        else:
            out[op.name] = first.name
    return out


def _same(made: Plan, a: Op, b: Op) -> bool:
    def what(op: Op) -> tuple[Any, ...]:
        spec = op.spec
        return (spec.method, spec.shape, spec.dtypes, spec.out_dtype, spec.has_base, spec.models, op.key)

    if a.spec.grain == "model" or what(a) != what(b):
        return False
    for x, y in zip(a.inputs, b.inputs, strict=True):
        if x is y:
            continue
        if not (isinstance(x, FileRange) and isinstance(y, FileRange) and x.model == y.model):
            return False
        if x.info != y.info and not tied.same(made.checkpoints[x.model], x.info, y.info):
            return False
    return True


def join(documents: Documents) -> tuple[tuple[Op, ...], tuple[Checkpoint, ...]]:
    """The ops of the last document, over the files of the models of all, and those models."""
    opened: dict[tuple[str, str], tuple[int, Checkpoint]] = {}
    made: dict[str, dict[str, Source]] = {}
    ops: list[Op] = []
    for name, plan in documents:
        positions = []
        for c in plan.checkpoints:
            stage = made.get(c.ref) if c.alike is not None else None  # others are lent by a caller
            at, _ = (-1, c) if stage is not None else opened.setdefault((c.ref, str(c.path)), (len(opened), c))
            positions.append((at, stage))

        def move(source: FileRange, positions: list[tuple[int, dict[str, Source] | None]] = positions) -> Source:
            at, stage = positions[source.model]
            return FileRange(source.info, at) if stage is None else stage[source.info.name]

        specs: dict[tuple[object, ...], Spec] = {}
        moved = [op._replace(inputs=tuple([_each(s, move) for s in op.inputs])) for op in plan.ops]
        ops = [_copied(op, specs) if op.spec.grain == "copy" else _taken(op, specs) for op in moved]
        together = tuple(op for op in ops if op.spec.grain == "model")
        made[name] = {op.name: _result(op, together) for op in ops}
    return tuple(ops), tuple(c for _, c in opened.values())


def _each(value: Any, move: Callable[[FileRange], Source]) -> Any:
    """A source with the files moved that it is made from."""
    if type(value) is FileRange:
        return move(value)
    if type(value) is tuple:
        return tuple([_each(v, move) for v in value])
    if isinstance(value, Made):
        old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
        return type(value)(**{name: _each(v, move) for name, v in old.items()})
    return value


def _result(op: Op, together: tuple[Op, ...]) -> Source:
    """What stands for the tensor that an op makes: what it copies, or the op."""
    if op.spec.grain == "copy" and len(op.inputs) == 1:
        return op.inputs[0]
    return Result(op, together if op.spec.grain == "model" else ())


def _taken(op: Op, specs: dict[tuple[object, ...], Spec]) -> Op:
    """An op with a spec that only ops share whose inputs are made alike: what they take of memory depends on that."""
    made = tuple([r.op.spec for s in op.inputs if type(s) is not FileRange for r in results_of(s)])
    if not made:
        return op
    key = (op.spec, made)
    if key not in specs:
        specs[key] = copy(op.spec)
    return op._replace(spec=specs[key])


def _copied(op: Op, specs: dict[tuple[object, ...], Spec]) -> Op:
    """An op that copies: of what a stage makes, the op that makes it; what a stage compares is compared here."""
    first = op.inputs[0]
    if isinstance(first, Result) and len(op.inputs) == 1 and not first.together:
        return first.op._replace(name=op.name, targets=op.targets)
    inputs: list[Source] = []
    for source in op.inputs:
        inputs += source.op.inputs if isinstance(source, Result) and source.op.spec.grain == "copy" else (source,)
    spec, count = op.spec, len(inputs)
    if count != len(op.inputs):
        if (spec, count) not in specs:
            specs[spec, count] = Spec(spec.method, spec.shape, spec.dtypes[:1] * count, spec.out_dtype)
        spec = specs[spec, count]
    return op._replace(spec=spec, inputs=tuple(inputs))
