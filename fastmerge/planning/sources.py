"""From the tensors of models to the sources of ops: adapters are applied, quantised weights are weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Checkpoint, TensorInfo
from fastmerge.checkpoint.header import listing
from fastmerge.dtypes import BF16, F32, DType
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Source
from fastmerge.planning import tied

if TYPE_CHECKING:
    from fastmerge.checkpoint.adapter import Adapter, Update
    from fastmerge.checkpoint.quantised import Quantised

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
"""Types whose values bfloat16 holds exactly."""

_PEFT = "merge the adapter into its base with peft first"
_BOTH = (
    "is one of two tied ends: as peft merges it, the update is in both, so that the merged model computes something "
    "else than base and adapter side by side"
)


class ModelSources:
    """The sources of one model of a plan.

    Args:
        checkpoint: the model.
        model: its position among the plan's checkpoints.
        adapter: what is applied to it; None for nothing.
        at: the adapter's position among them.

    Attributes:
        unchanged: every tensor is read as it is.
        tensors: those of the model by name; with an adapter that unties them, tied ones under each of their names.
        config: of the model; where tied tensors were untied, it says that they were tied.
        problems: what of the adapter fits nothing in the model: applied in part, it would be wrong without a word.
        warnings: what people should know of the adapter.
    """

    def __init__(self, checkpoint: Checkpoint, model: int, adapter: Adapter | None = None, at: int = -1) -> None:
        self._files = checkpoint.tensors
        self._quantised = checkpoint.quantised
        self._about = checkpoint.about
        self._model = model
        self._adapter = adapter
        self._at = at
        self.tensors: Mapping[str, TensorInfo] = _weights(checkpoint) if self._quantised else checkpoint.tensors
        self.config: Mapping[str, Any] = checkpoint.config
        self.problems: list[str] = []
        self.warnings: list[str] = []
        dtypes = {info.dtype.name for info in checkpoint.tensors.values()}
        self.unchanged = adapter is None and not dtypes & FLOAT8 and not self._quantised
        self._updates: dict[str, Update] = {}
        self._replaced: Mapping[str, TensorInfo] = {}
        self._transposed: dict[str, bool] = {}
        self._stored: dict[str, str] = {}  # name of the file's tensor, of tied ones that have none of their own
        if adapter is not None:
            self._updates, self._replaced = dict(adapter.updates), adapter.replaced
            self.warnings += adapter.checkpoint.warnings
            ends = list(dict.fromkeys(tied.candidates([*self.tensors, *sorted(self._changed)])))
            self._headless(ends, adapter.checkpoint.ref, checkpoint.ref)
            for family in tied.families(ends):
                self._untie(family, adapter.checkpoint, checkpoint.ref)
            if not self.problems:
                self._check(adapter, checkpoint.ref)

    @property
    def _changed(self) -> set[str]:
        return self._updates.keys() | self._replaced.keys()

    def changes(self, info: TensorInfo) -> bool:
        """Whether the adapter makes another tensor of one of :attr:`tensors`."""
        return info.name in self._updates or info.name in self._replaced

    @property
    def dropped(self) -> dict[str, list[str]]:
        """Tensors of the model's files in whose place others come, by rule."""
        there = self._files.keys() | self._quantised.keys()
        names = [n for n in self._replaced if n in there and n not in self._stored.values()]
        rest = [i.name for n, w in self._quantised.items() for i in (*w.rest, *(w.parts if n in names else ()))]
        rest += [i.name for i in self._about]
        plain = [n for n in names if n not in self._quantised]
        found = {"replaced by the adapter": plain, "says nothing of the values of weights": rest}
        return {rule: these for rule, these in found.items() if these}

    def _untie(self, family: tied.Family, adapter: Checkpoint, base: str) -> None:
        """What becomes of tied tensors of which the adapter changes some.

        A low-rank update of one is an update of the tensor that all are, as peft merges it. A trained copy of one
        is a tensor of its own, and what the others are stays, unless the adapter has the same copy for all of them.
        """
        changed = [n for n in family.names if n in self._changed]
        stored = [n for n in family.names if n in self.tensors]
        says = tied.tied(self.config)
        if not changed or not stored or says is False or (says is None and len(stored) > 1):
            return
        trained = [n for n in changed if n in self._replaced and n not in self._updates]
        if len(stored) == 1 and stored[0] in trained and set(trained) == set(changed) == set(family.names):
            first, *others = (self._replaced[n] for n in trained)
            if all(tied.same(adapter, first, other) for other in others):
                self._replaced = {n: i for n, i in self._replaced.items() if n not in trained or n == stored[0]}
                return
        if trained:
            for name in changed:
                if name not in self.tensors:
                    self._stored[name] = stored[0]
                    self.tensors = {**self.tensors, name: self.tensors[stored[0]]._replace(name=name)}
            self.config = {**self.config, "tie_word_embeddings": True}
        elif len(changed) > 1 or len(stored) > 1:
            self.problems.append(
                f"{adapter.ref}: low-rank updates of {listing(changed)}, which {base!r} ties "
                f"({listing(family.names)}): {_PEFT}"
            )
        elif changed != stored:
            name = changed[0]
            self.warnings.append(f"{adapter.ref}: {name} {_BOTH}")
            self._updates = {stored[0] if n == name else n: u for n, u in self._updates.items()}
            self._replaced = {stored[0] if n == name else n: i for n, i in self._replaced.items()}

    def _headless(self, ends: list[str], ref: str, base: str) -> None:
        """An embedding that the adapter changes, and a head of the model's that is tied to it and has no name here."""
        classes = self.config.get("architectures")
        names = [n for n in classes if isinstance(n, str)] if isinstance(classes, list) else []
        if tied.tied(self.config) is False or not any(n.endswith(tied.HEADED) for n in names):
            return
        if len(ends) != 1:
            return
        if ends[0] in self._updates:
            self.warnings.append(f"{ref}: {ends[0]} {_BOTH}")
        elif ends[0] in self._replaced:
            self.problems.append(
                f"{ref}: {ends[0]} is the adapter's own, and {base!r} ties its head to the one that it replaces: "
                f"{_PEFT}"
            )

    def _check(self, adapter: Adapter, base: str) -> None:
        """Everything that the adapter changes must be there, and fit."""
        ref, model_type = adapter.checkpoint.ref, self.config.get("model_type")
        if absent := sorted(self._changed - self.tensors.keys()):
            self.problems.append(f"{ref}: {base!r} has no such tensors: {listing(absent)}")
        said: dict[str, list[str]] = {}
        for name in sorted(self._changed & self.tensors.keys()):
            info, own, update = self.tensors[name], self._replaced.get(name), self._updates.get(name)
            if own is not None and (own.shape != info.shape or _computed(own) != _computed(info)):
                said.setdefault(f"{_shown(own)} does not fit {_shown(info)}", []).append(name)
            if update is None:
                continue
            transposed = update.transposes(name, info.shape, model_type, flag=adapter.flag)
            if transposed is None or not _computed(info):
                b = "lora_B.bias" if update.b is None else f"lora_B {list(update.b.shape)} x lora_A"
                given = f"{b} {list(update.a.shape[update.b is None :])}"
                said.setdefault(f"{given} does not fit {_shown(info)}", []).append(name)
            elif transposed and update.magnitude is not None:
                said.setdefault(f"DoRA of a layer that is stored [in, out] is not supported: {_PEFT}", []).append(name)
            self._transposed[name] = bool(transposed)
        self.problems += [f"{ref}: {what} of {base!r}: {listing(names)}" for what, names in said.items()]

    def source(self, info: TensorInfo, *, copied: bool = False) -> tuple[Source, DType]:
        """Where a tensor comes from, and the type that counts for the type of the result: that of the model.

        Args:
            info: one of :attr:`tensors`.
            copied: nothing is computed from it, so its bytes are wanted as they are.
        """
        from fastmerge.ops.made import Constant, LowRank, Wide
        from fastmerge.ops.row_lengths import RowLengths

        name, own, update = info.name, self._replaced.get(info.name), self._updates.get(info.name)
        found = self._found(self._stored.get(name, name)) if own is None else self._own(own)
        copied = copied and own is None and update is None
        dtype = BF16 if info.dtype.name in FLOAT8 and not copied else info.dtype
        source: Source = Wide(found) if found.dtype.name in FLOAT8 and not copied else found
        if update is not None:
            b = Constant(1.0, F32, (1, 1)) if update.b is None else self._own(update.b)
            source = LowRank(source, b, self._own(update.a), update.scale, self._transposed[name])
            if update.magnitude is not None:
                source = RowLengths(source, self._own(update.magnitude))
        return source, dtype

    def _found(self, name: str) -> Source:
        """A tensor of the model, as its files have it."""
        weight = self._quantised.get(name)
        return FileRange(self._files[name], self._model) if weight is None else dequantised(weight, self._model)

    def _own(self, info: TensorInfo) -> FileRange:
        return FileRange(info, self._at)


def dequantised(weight: Quantised, model: int) -> Source:
    """A quantised weight as a source."""
    from fastmerge.ops.quantised import Dequantised, coding

    zero, divisor = (None if info is None else FileRange(info, model) for info in (weight.zero, weight.divisor))
    how = coding(weight.code, weight.stored, weight.block)
    codes, scale = FileRange(weight.codes, model), FileRange(weight.scale, model)
    return Dequantised(codes, scale, how, weight.shape, weight.transposed, zero, divisor)


def _weights(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The tensors of a quantised model as weights: where codes are, in the type that the model computes with."""
    weights = {w.codes.name: w for w in checkpoint.quantised.values()}
    rest = {i.name for w in weights.values() for i in (*w.parts, *w.rest)} | {i.name for i in checkpoint.about}
    out: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if (weight := weights.get(name)) is not None:
            out[weight.name] = info._replace(name=weight.name, dtype=weight.dtype, shape=weight.shape)
        elif name not in rest:
            out[name] = info
    return out


def _computed(info: TensorInfo) -> bool:
    return info.dtype.mergeable or info.dtype.name in FLOAT8


def _shown(info: TensorInfo) -> str:
    return f"{info.dtype.name} {list(info.shape)}"
