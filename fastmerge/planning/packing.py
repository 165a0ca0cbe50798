"""``out_dtype: as-base``: results in the types of the base, and quantised where it is."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.checkpoint import of_fields
from fastmerge.checkpoint.formats import settings
from fastmerge.checkpoint.header import listing
from fastmerge.dtypes import BF16, F16, F32, DType
from fastmerge.methods.passthrough import COPY, Passthrough
from fastmerge.ops.sources import FileRange, Packed, Range
from fastmerge.ops.spec import Op, Source, Spec
from fastmerge.planning.names import kind
from fastmerge.planning.sources import FLOAT8

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint, Place, TensorInfo
    from fastmerge.checkpoint.quantised import Quantised
    from fastmerge.ops.packing import Packing, Rule
    from fastmerge.recipe import Recipe

AS_BASE = "as-base"
"""Value of ``out_dtype``."""

_INSTEAD = "'out_dtype: bfloat16' writes weights that are not quantised"
_LAYERS = re.compile(r"(^|[.\\])\d+([.\\]|$)")
_COPIER = Passthrough(scale=(None,))


class Entry(NamedTuple):
    """One tensor of the output's files.

    Attributes:
        name: of the tensor.
        dtype: of its elements.
        shape: of the tensor.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]


class BaseFormat:
    """How the base stores its weights, and results therefore are.

    Args:
        recipe: checked.
        base: the model that gives the output its configuration.
        model: its position among the plan's checkpoints.

    Attributes:
        problems: results that cannot be written as the base stores them.
        warnings: what people should know about the output.
        entries: for each result that is written as codes and scales both of these, by the name of its op.
    """

    def __init__(self, recipe: Recipe, base: Checkpoint, model: int) -> None:
        self._base = base
        self._model = model
        self._moved = any(part.ranges for part in recipe.parts)
        self._kinds = {kind(name): weight for name, weight in base.quantised.items()}
        self._said = settings(base.config)
        self._specs: dict[tuple[object, ...], Spec] = {}
        self._packings: dict[tuple[object, ...], Packing] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.entries: dict[str, tuple[Entry, Entry]] = {}
        if base.quantised:
            self._check()

    def _check(self) -> None:
        """What of the base's format says something of single layers, or of values."""
        if not self._said:
            self.problems.append(
                f"{self._base.ref}: out_dtype: as-base: its config.json does not say how its weights are quantised: "
                f"no library could read the result: {_INSTEAD}"
            )
        about = [i for w in self._base.quantised.values() for i in w.rest if not i.name.endswith("_shape")]
        about += self._base.about
        if self._moved:
            named = [text for text in _strings(self._said) if _LAYERS.search(text)]
            rest = [i.name for w in self._base.quantised.values() for i in w.rest] + [i.name for i in self._base.about]
            if named or rest:
                what = f"modules by their layers: {listing(named)}" if named else f"tensors of layers: {listing(rest)}"
                self.problems.append(
                    f"{self._base.ref}: out_dtype: as-base: its quantisation names {what}, and 'slices' move layers: "
                    f"{_INSTEAD}"
                )
        elif about:
            names = listing([i.name for i in about])
            self.warnings.append(f"{self._base.ref}: scales of activations are taken over from the base: {names}")

    def apply(self, made: Iterable[Op]) -> list[Op]:
        """The ops of results as the base stores them."""
        out: list[Op] = []
        lost: dict[str, list[str]] = {}
        names: set[str] = set()
        for op in made:
            weight = self._weight(op.name)
            if weight is None:
                info = self._base.tensors.get(op.name)
                if info is not None and info.dtype.name in FLOAT8 and info.dtype is not op.spec.out_dtype:
                    lost.setdefault("float8 weights without scales are copied only", []).append(op.name)
                out.append(op)
                continue
            names.add(op.name)
            if copied := self._copied(op, weight):
                out += copied
            elif problem := self._problem(op, weight):
                lost.setdefault(problem, []).append(op.name)
            else:
                out.append(self._packed(op, weight))
        self.problems += [f"out_dtype: as-base: {what}: {listing(n)}: {_INSTEAD}" for what, n in lost.items()]
        if not self._moved:
            if missing := [n for n in self._base.quantised if n not in names]:
                self.problems.append(
                    f"out_dtype: as-base: quantised weights of the base that are not in the output: "
                    f"{listing(missing)}: {_INSTEAD}"
                )
            rest = [i for n in sorted(names & self._base.quantised.keys()) for i in self._base.quantised[n].rest]
            out += [self._copy(i.name, FileRange(i, self._model)) for i in (*rest, *self._base.about)]
        return out

    def _weight(self, name: str) -> Quantised | None:
        """How the base stores a result of this name: as the tensor, or as those of other layers."""
        if name in self._base.tensors or not self._moved:
            return self._base.quantised.get(name)
        return self._base.quantised.get(name) or self._kinds.get(kind(name))

    def _copied(self, op: Op, weight: Quantised) -> list[Op]:
        """Copies of codes and scales that are stored as the base's are and of which nothing is computed."""
        from fastmerge.ops.quantised import Dequantised

        source = op.inputs[0]
        method = op.spec.method
        if len(op.inputs) > 1 or type(source) is not Dequantised:
            return []
        if not isinstance(method, Passthrough) or method.scale[0] is not None:
            return []
        mine = (source.codes, source.scale, source.zero, source.divisor)
        wanted = (weight.codes, weight.scale, weight.zero, weight.divisor)
        coding = source.coding
        alike = (coding.code, coding.block, source.transposed) == (weight.code, weight.block, weight.transposed)
        kinds = [(s and (s.dtype, s.shape)) == (i and (i.dtype, i.shape)) for s, i in zip(mine, wanted, strict=True)]
        if not alike or not all(kinds):
            return []
        pairs = [(s, i) for s, i in zip(mine, wanted, strict=True) if s is not None and i is not None]
        return [self._copy(self._name(op, weight, info), source) for source, info in pairs]

    def _copy(self, name: str, source: Source) -> Op:
        key = (source.dtype, source.shape)
        if key not in self._specs:
            self._specs[key] = Spec(COPY, source.shape, (source.dtype,), source.dtype)
        return Op(name, self._specs[key], 0, (source,))

    def _problem(self, op: Op, weight: Quantised) -> str | None:
        """Why a result cannot be written as the base stores it."""
        from fastmerge.ops.packing import WRITTEN

        if weight.code not in WRITTEN or weight.divisor is not None:
            what = "NVFP4" if weight.divisor is not None else weight.code
            return f"weights that are merged are written as float8_e4m3fn and MXFP4 only, and the base's are {what}"
        if op.spec.shape != weight.shape:
            return f"expected the base's shape {list(weight.shape)}, got {list(op.spec.shape)}"
        return None

    def _packed(self, op: Op, weight: Quantised) -> Op:
        """The op that computes the same, and whose result is written as codes and scales."""
        packing = self._packing(weight)
        plain = op.spec.grain == "copy"
        inputs = op.inputs[:1] if plain else op.inputs
        if weight.transposed:
            inputs = tuple(map(_turned, inputs))
        shape = inputs[0].shape
        key = (op.spec, id(packing))
        if key not in self._specs:
            types = tuple(s.dtype for s in inputs)
            method, models = (_COPIER, None) if plain else (op.spec.method, op.spec.models)
            base = op.spec.has_base and not plain
            self._specs[key] = Spec(method, shape, types, F32, has_base=base, models=models, packing=packing)
        codes, scale = (
            Entry(self._name(op, weight, info), info.dtype, info.shape) for info in (weight.codes, weight.scale)
        )
        self.entries[op.name] = codes, scale
        return op._replace(spec=self._specs[key], inputs=inputs)

    def _packing(self, weight: Quantised) -> Packing:
        from fastmerge.ops import packing
        from fastmerge.ops.quantised import coding

        how = coding(weight.code, weight.stored, weight.block), weight.scale.dtype, self._rule(weight)
        if how not in self._packings:
            self._packings[how] = packing.Packing(*how)
        return self._packings[how]

    def _name(self, op: Op, weight: Quantised, info: TensorInfo) -> str:
        return op.name + info.name.removeprefix(weight.name)

    def _rule(self, weight: Quantised) -> Rule:
        """By which the format's own library chooses scales."""
        if weight.code == "float4_e2m1fn":
            return "mx"
        if weight.scale.dtype not in (F32, BF16, F16) or self._said.get("scale_fmt") == "ue8m0":
            return "power"
        return "reciprocal" if weight.layout == "fp8" else "divide"


def _turned(source: Source) -> Source:
    """Matrices the other way round, as the base stores them."""
    from fastmerge.ops.joined import Transposed
    from fastmerge.ops.quantised import Dequantised

    if type(source) is Dequantised and source.transposed:
        coding = source.coding
        stored = (*source.shape[:-2], coding.rows, coding.columns)
        return dataclasses.replace(source, shape=stored, transposed=False)
    return Transposed(source)


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value of a configuration."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _strings(inner)


def placed(
    made: Iterable[Op], places: Mapping[str, Place], packed: Mapping[str, tuple[Entry, Entry]]
) -> tuple[Op, ...]:
    """The ops in the order of the output's bytes, with their places."""
    order = {name: i for i, name in enumerate(places)}
    out: list[tuple[int, Op]] = []
    for op in made:
        if op.name not in packed:
            out.append((order[op.name], op._replace(targets=(places[op.name],))))
            continue
        codes, scale = (entry.name for entry in packed[op.name])
        target = Packed(Range(*places[codes]), Range(*places[scale]))
        out.append((order[codes], op._replace(targets=(target,))))
    return tuple(op for _, op in sorted(out, key=lambda pair: pair[0]))


def entries(made: Iterable[Op], packed: Mapping[str, tuple[Entry, Entry]]) -> list[Entry]:
    """The tensors of the output's files."""
    fields = [(op.name, op.spec.out_dtype, op.spec.shape) for op in made]
    plain = map(of_fields, itertools.repeat(Entry), fields)
    if not packed:
        return [*plain]
    return [entry for one in plain for entry in packed.get(one.name) or (one,)]
