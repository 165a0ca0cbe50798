"""From the tensors of models to the sources of ops: adapters are applied, quantised weights are weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import Checkpoint, TensorInfo
from fastmerge.checkpoint.header import listing
from fastmerge.dtypes import BF16, DType, promote
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Source
from fastmerge.planning import tied

if TYPE_CHECKING:
    from fastmerge.checkpoint.adapter import Adapter
    from fastmerge.checkpoint.quantised import Quantised
    from fastmerge.planning.applied import Changes

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
"""Types whose values bfloat16 holds exactly."""

MADE = -1
"""In place of a file of a tensor that is made from others, in another layout."""

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
        adapters: what is applied to it: each with its position among the plan's checkpoints, and its weight.

    Attributes:
        unchanged: every tensor is read as it is.
        tensors: those of the model by name; with an adapter that unties them, tied ones under each of their names.
        config: of the model; where tied tensors were untied, it says that they were tied.
        problems: what of the adapters fits nothing in the model: applied in part, they would be wrong without a word.
        warnings: what people should know of the adapters.
    """

    def __init__(self, checkpoint: Checkpoint, model: int, adapters: Sequence[tuple[Adapter, int, float]] = ()) -> None:
        self._files = checkpoint.tensors
        self._quantised = checkpoint.quantised
        self._about = checkpoint.about
        self._model = model
        self.tensors: Mapping[str, TensorInfo] = _weights(checkpoint) if self._quantised else checkpoint.tensors
        self.config: Mapping[str, Any] = checkpoint.config
        self.problems: list[str] = []
        self.warnings: list[str] = []
        dtypes = {dtype.name for dtype in {*map(attrgetter("dtype"), checkpoint.tensors.values())}}
        self.unchanged = self._plain = not adapters and not dtypes & FLOAT8 and not self._quantised
        self._changes: Changes | None = None
        self._relaid: Mapping[str, tuple[Mapping[str, TensorInfo], Callable[[Callable[[str], Source]], Source]]] = {}
        self._ranges: dict[str, FileRange] = {}
        self._stored: dict[str, str] = {}  # name of the file's tensor, of tied ones that have none of their own
        if adapters:
            from fastmerge.planning.applied import Applied, Changes

            self._changes = changes = Changes(checkpoint, [Applied(*adapter) for adapter in adapters])
            self.problems, self.warnings = changes.problems, changes.warnings
            ends = list(dict.fromkeys(tied.candidates([*self.tensors, *sorted(changes.names)])))
            self._headless(ends, changes, checkpoint.ref)
            for family in tied.families(ends):
                self._untie(family, changes, checkpoint.ref)
            if not self.problems:
                changes.fit(self.tensors)

    def relay(
        self, made: Mapping[str, tuple[Mapping[str, TensorInfo], Callable[[Callable[[str], Source]], Source]]]
    ) -> None:
        """Takes note of tensors that are made from others: which ones by name, and what makes the source of theirs."""
        self._relaid = made
        self.unchanged = self.unchanged and not made

    def files(self, info: TensorInfo) -> list[str]:
        """The tensors of the model's files that one of :attr:`tensors` is, or is made from."""
        return [info.name] if info.file != MADE else [i.name for i in self._relaid[info.name][0].values()]

    def changes(self, info: TensorInfo) -> bool:
        """Whether an adapter makes another tensor of one of :attr:`tensors`."""
        return info.file != MADE and self._changes is not None and self._changes.touch(info.name)

    def parts(self, a: TensorInfo, b: TensorInfo) -> bool:
        """Whether an adapter does something to one of two tensors that it does not do to the other."""
        changed = [info.name for info in (a, b) if self.changes(info)]
        tokens = self._changes.tokens if self._changes is not None else {}
        return bool(changed) and not (len(changed) == 2 and tokens.get(a.name, a) is tokens.get(b.name, b))

    @property
    def dropped(self) -> dict[str, list[str]]:
        """Tensors of the model's files in whose place others come, by rule."""
        own = self._changes.replaced if self._changes is not None else {}
        there = self._files.keys() | self._quantised.keys()
        names = [n for n in own if n in there and n not in self._stored.values()]
        rest = [i.name for n, w in self._quantised.items() for i in (*w.rest, *(w.parts if n in names else ()))]
        rest += [i.name for i in self._about]
        plain = [n for n in names if n not in self._quantised]
        found = {"replaced by the adapter": plain, "says nothing of the values of weights": rest}
        return {rule: these for rule, these in found.items() if these}

    def _untie(self, family: tied.Family, changes: Changes, base: str) -> None:
        """What becomes of tied tensors of which adapters change some.

        A low-rank update of one is an update of the tensor that all are, as peft merges it, and so are rows of tokens.
        A trained copy of one is a tensor of its own, and what the others are stays, unless the adapter has the same
        copy for all of them.
        """
        changed = [n for n in family.names if n in changes.names]
        stored = [n for n in family.names if n in self.tensors]
        says = tied.tied(self.config)
        if not changed or not stored or says is False or (says is None and len(stored) > 1):
            return
        rows = [n for n in changed if n in changes.tokens]
        if rows:
            if changed != rows[:1]:
                self.problems.append(
                    f"{changes.ref}: rows of tokens and other changes of {listing(changed)}, which {base!r} ties: "
                    f"{_PEFT}"
                )
            changes.move_tokens(rows[0], stored)
            return
        trained = [n for n in changed if n in changes.replaced and n not in changes.updates]
        if len(stored) == 1 and stored[0] in trained and set(trained) == set(changed) == set(family.names):
            first, *others = trained
            if all(changes.same(first, other) for other in others):
                for name in trained:
                    if name != stored[0]:
                        del changes.replaced[name]
                return
        if trained:
            for name in changed:
                if name not in self.tensors:
                    self._stored[name] = stored[0]
                    self.tensors = {**self.tensors, name: self.tensors[stored[0]]._replace(name=name)}
            self.config = {**self.config, "tie_word_embeddings": True}
        elif len(changed) > 1 or len(stored) > 1:
            self.problems.append(
                f"{changes.ref}: low-rank updates of {listing(changed)}, which {base!r} ties "
                f"({listing(family.names)}): {_PEFT}"
            )
        elif changed != stored:
            self.warnings.append(f"{changes.ref}: {changed[0]} {_BOTH}")
            changes.rename(changed[0], stored[0])

    def _headless(self, ends: list[str], changes: Changes, base: str) -> None:
        """An embedding that an adapter changes, and a head of the model's that is tied to it and has no name here."""
        classes = self.config.get("architectures")
        names = [n for n in classes if isinstance(n, str)] if isinstance(classes, list) else []
        if tied.tied(self.config) is False or not any(n.endswith(tied.HEADED) for n in names):
            return
        if len(ends) != 1:
            return
        if ends[0] in changes.updates:
            self.warnings.append(f"{changes.ref}: {ends[0]} {_BOTH}")
        elif ends[0] in changes.replaced:
            self.problems.append(
                f"{changes.ref}: {ends[0]} is the adapter's own, and {base!r} ties its head to the one that it "
                f"replaces: {_PEFT}"
            )

    def source(self, info: TensorInfo, *, copied: bool = False) -> tuple[Source, DType]:
        """Where a tensor comes from, and the type that counts for the type of the result: that of the model.

        Args:
            info: one of :attr:`tensors`.
            copied: nothing is computed from it, so its bytes are wanted as they are.
        """
        if info.file == MADE:
            infos, build = self._relaid[info.name]
            if self._plain:
                return build(lambda name: self._range(infos[name].name)), info.dtype
            parts = {name: self.source(i) for name, i in infos.items()}
            return build(lambda name: parts[name][0]), functools.reduce(promote, {d for _, d in parts.values()})
        if self._plain:
            return FileRange(self._files[info.name], self._model), info.dtype
        from fastmerge.ops.made import Wide

        name, changed = info.name, self.changes(info)
        own = self._changes.own(name) if changed and self._changes is not None else None
        found: Source = self._found(self._stored.get(name, name)) if own is None else own
        copied = copied and not changed
        dtype = BF16 if info.dtype.name in FLOAT8 and not copied else info.dtype
        source: Source = Wide(found) if found.dtype.name in FLOAT8 and not copied else found
        if changed and self._changes is not None:
            source = self._changes.applied(name, source)
        return source, dtype

    def _range(self, name: str) -> Source:
        """A tensor of a file, of which thousands of others may be made."""
        known = self._ranges.get(name)
        if known is None:
            known = self._ranges[name] = FileRange(self._files[name], self._model)
        return known

    def _found(self, name: str) -> Source:
        """A tensor of the model, as its files have it."""
        weight = self._quantised.get(name)
        return FileRange(self._files[name], self._model) if weight is None else dequantised(weight, self._model)


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
