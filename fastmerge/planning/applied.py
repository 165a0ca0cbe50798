"""Adapters on the tensors of one model: what all of them together change, and the sources that have it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastmerge.checkpoint.header import listing
from fastmerge.checkpoint.update import Update
from fastmerge.dtypes import F32
from fastmerge.ops.gathered import Columns, Part
from fastmerge.ops.joined import Joined
from fastmerge.ops.low_rank import LowRank
from fastmerge.ops.made import Constant, Rows
from fastmerge.ops.row_lengths import ColumnLengths, RowLengths
from fastmerge.ops.sources import FileRange
from fastmerge.planning import tied
from fastmerge.planning.pieces import Piece, Places, aligned, shown

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint, TensorInfo
    from fastmerge.checkpoint.adapter import Adapter
    from fastmerge.checkpoint.update import Tokens
    from fastmerge.ops.spec import Source

_WEIGHTED = "only low-rank updates take a weight; 'task_arithmetic' of base+adapter weighs whole models"
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


class Applied(NamedTuple):
    """An adapter that is applied to a model.

    Attributes:
        adapter: opened.
        at: its position among the plan's checkpoints.
        weight: of its updates.
    """

    adapter: Adapter
    at: int
    weight: float = 1.0


class Changes:
    """What adapters do to a model; updates of several are added, in the adapters' order.

    Args:
        base: the model.
        adapters: at least one.

    Attributes:
        ref: the adapters, for messages.
        replaced: by name the tensor that comes in the place of the model's, and the adapter's position.
        tokens: by name the rows that come in the places of the model's, and the adapter's position.
        problems: what cannot be applied.
        warnings: what people should know.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[Applied]) -> None:
        self._base = base
        self._adapters = adapters
        self.ref = ", ".join(dict.fromkeys(a.adapter.checkpoint.ref for a in adapters))
        self.problems: list[str] = []
        self.warnings = [w for a in adapters for w in a.adapter.checkpoint.warnings]
        self._updates: list[dict[str, Update]] = []
        self.replaced: dict[str, tuple[TensorInfo, Applied]] = {}
        self.tokens: dict[str, tuple[Tokens, Applied]] = {}
        self._pieces: dict[str, list[tuple[Piece, Applied]]] = {}
        for by in adapters:
            names = self._names(by.adapter)
            updates = {names.get(n, n): u for n, u in by.adapter.updates.items()}
            own = {names.get(n, n): i for n, i in by.adapter.replaced.items()}
            replaced = {n: (i, by) for n, i in own.items() if not (n in updates and self._copy(n, i, by))}
            tokens = {names.get(n, n): (t, by) for n, t in by.adapter.tokens.items()}
            self._whole(by, [*replaced, *tokens, *(n for n, u in updates.items() if u.magnitude)])
            twice = [n for n in (*replaced, *tokens) if n in self.replaced or n in self.tokens]
            if twice:
                self.problems.append(f"{self.ref}: several adapters have their own {listing(twice)}")
            self._updates.append(updates)
            self.replaced |= replaced
            self.tokens |= tokens

    @property
    def updates(self) -> set[str]:
        """Names of tensors that have low-rank updates."""
        return {name for mine in self._updates for name in mine}

    @property
    def names(self) -> set[str]:
        """All names of tensors that are changed."""
        return self.updates | self.replaced.keys() | self.tokens.keys()

    def _copy(self, name: str, info: TensorInfo, by: Applied) -> bool:
        """Whether a whole tensor beside an update is the base's: peft keeps a copy of an embedding that it trains.

        Looked at only where it matters: what several adapters have, or what has a weight, is then an update alone.
        """
        if len(self._adapters) == 1 and by.weight == 1:
            return False
        mine = self._base.tensors.get(name)
        return mine is not None and tied.same(self._base, mine, info, by.adapter.checkpoint)

    def _whole(self, by: Applied, names: list[str]) -> None:
        """What no weight goes with."""
        if names and by.weight != 1:
            self.problems.append(f"{by.adapter.checkpoint.ref}: weight {by.weight:g} of {listing(names)}: {_WEIGHTED}")

    def _names(self, adapter: Adapter) -> dict[str, str]:
        """Names as the model writes them for those of an adapter that differ by a prefix."""
        tensors = self._base.tensors
        shapes: dict[str, tuple[int, ...]] = {n: i.shape for n, i in adapter.replaced.items()}
        shapes |= {n: (len(t.rows), *t.info.shape[1:]) for n, t in adapter.tokens.items()}
        shapes |= {n: _shape(u) for n, u in adapter.updates.items()}
        if all(name in tensors for name in shapes):
            return {}
        renamed = {old: new for old, new in aligned(shapes.items(), tensors).items() if old != new}
        if renamed:
            old, new = next(iter(renamed.items()))
            more = f", and {len(renamed) - 1} more" if len(renamed) > 1 else ""
            self.warnings.append(f"{adapter.checkpoint.ref}: {old!r} is taken for {new!r} of {self._base.ref!r}{more}")
        return renamed

    def rename(self, old: str, new: str) -> None:
        """Takes all that is said of a tensor as said of another one."""
        mappings: list[dict[str, Any]] = [self.replaced, self.tokens, *self._updates]
        for mapping in mappings:
            if old in mapping:
                mapping[new] = mapping.pop(old)

    def move_tokens(self, name: str, stored: Sequence[str]) -> None:
        """Takes rows of one tensor as rows of those that the model stores it as."""
        found = self.tokens.pop(name)
        self.tokens |= dict.fromkeys(stored, found)

    def same(self, a: str, b: str) -> bool:
        """Whether two whole tensors are the same."""
        (first, one), (second, other) = self.replaced[a], self.replaced[b]
        return tied.same(one.adapter.checkpoint, first, second, other.adapter.checkpoint)

    def fit(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Finds everything's place in the tensors of the model: all must be there, and fit.

        Args:
            tensors: of the model, tied ones under every name that the adapters change.
        """
        absent = {n for n in (*self.replaced, *self.tokens) if n not in tensors}
        said: dict[str, list[str]] = {}
        model_type = self._base.config.get("model_type")
        for by, updates in zip(self._adapters, self._updates, strict=True):
            places = Places(tensors, model_type, updates, flag=by.adapter.flag)
            absent.update(places.absent)
            for what, names in places.unfit.items():
                said.setdefault(what, []).extend(names)
            for name, pieces in places.pieces.items():
                self._pieces.setdefault(name, []).extend((piece, by) for piece in pieces)
                if not _computed(tensors[name]):
                    said.setdefault(f"an update does not fit {shown(tensors[name])}", []).append(name)
        for name, (own, _) in self.replaced.items():
            info = tensors.get(name)
            if info is not None and (own.shape != info.shape or _computed(own) != _computed(info)):
                said.setdefault(f"{shown(own)} does not fit {shown(info)}", []).append(name)
        for name, (tokens, _) in self.tokens.items():
            info = tensors.get(name)
            if info is not None and not _rows_fit(tokens, info):
                given = f"rows up to {max(tokens.rows, default=0)} of {shown(tokens.info)}"
                said.setdefault(f"{given} do not fit {shown(info)}", []).append(name)
            if name in self._pieces or name in self.replaced:
                said.setdefault("rows of tokens of a tensor that is changed otherwise too", []).append(name)
        for name, found in self._pieces.items():
            regions = [(first, first + math.prod(shape)) for first, shape in _regions(found)]
            if len(self._adapters) > 1 and any(p.update.magnitude for p, _ in found) and len(found) > len(regions):
                said.setdefault("DoRA, which no other update can be added to", []).append(name)
            if any(end > begin for (_, end), (begin, _) in itertools.pairwise(regions)):
                said.setdefault("updates of all experts at once and of single ones", []).append(name)
        if absent:
            self.problems.append(f"{self.ref}: {self._base.ref!r} has no such tensors: {listing(sorted(absent))}")
        self.problems += [
            f"{self.ref}: {what} of {self._base.ref!r}: {listing(sorted(names))}"
            for what, names in sorted(said.items())
        ]

    def touch(self, name: str) -> bool:
        """Whether a tensor of the model is changed."""
        return name in self._pieces or name in self.replaced or name in self.tokens

    def own(self, name: str) -> FileRange | None:
        """What comes in the place of a tensor of the model; None for nothing."""
        if name not in self.replaced:
            return None
        info, by = self.replaced[name]
        return FileRange(info, by.at)

    def applied(self, name: str, source: Source) -> Source:
        """A tensor with all that is done to it.

        Args:
            name: of a tensor that is changed.
            source: the model's, or what comes in its place.
        """
        if name in self.tokens:
            tokens, by = self.tokens[name]
            index = np.arange(source.shape[0])
            index[list(tokens.rows)] = source.shape[0] + np.arange(len(tokens.rows))
            return Rows((source, FileRange(tokens.info, by.at)), index)
        pieces = self._pieces.get(name, [])
        if not pieces:
            return source
        shape, numel = source.shape, math.prod(source.shape)
        if pieces[0][0].shape == shape:
            return _updated(source, pieces)
        parts: list[Source] = []
        at = 0
        for (first, matrix), found in _regions(pieces).items():
            if at < first:
                parts.append(Part(source, at, (first - at,)))
            parts.append(_updated(Part(source, first, matrix), found))
            at = first + math.prod(matrix)
        if at < numel:
            parts.append(Part(source, at, (numel - at,)))
        return Joined(tuple(parts), shape)


def _regions(
    pieces: Sequence[tuple[Piece, Applied]],
) -> dict[tuple[int, tuple[int, ...]], list[tuple[Piece, Applied]]]:
    """Pieces by where they begin and how large they are, in the order of the tensor."""
    out: dict[tuple[int, tuple[int, ...]], list[tuple[Piece, Applied]]] = {}
    for piece, by in sorted(pieces, key=lambda found: found[0].first):
        out.setdefault((piece.first, piece.shape), []).append((piece, by))
    return out


def _updated(source: Source, found: Sequence[tuple[Piece, Applied]]) -> Source:
    """A matrix, or a bias, with its updates."""
    for piece, by in found:
        update = piece.update
        rank = update.a.shape[0] // update.experts
        a: Source = FileRange(update.a, by.at)
        b: Source = Constant(1.0, F32, (1, 1)) if update.b is None else FileRange(update.b, by.at)
        if update.experts > 1:
            a = Part(a, piece.expert * rank * update.a.shape[1], (rank, update.a.shape[1]))
            b = Columns((b,), np.arange(rank) * update.experts + piece.expert)
        rows = piece.shape[-1] if piece.transposed else piece.shape[0]
        if update.b is not None and rows < update.matrix[0]:
            b = Part(b, piece.row * rank, (rows, rank))
        source = LowRank(source, b, a, update.scale * by.weight, piece.transposed)
        if update.magnitude is not None:
            lengths = ColumnLengths if piece.transposed else RowLengths
            source = lengths(source, FileRange(update.magnitude, by.at))
    return source


def _shape(update: Update) -> tuple[int, ...]:
    """That of the tensor that an update belongs to, ``[out, in]``."""
    if update.b is None:
        return update.a.shape[1:]
    matrix = update.matrix[::-1] if update.embedding else update.matrix
    return (update.experts, *matrix) if update.experts > 1 else matrix


def _rows_fit(tokens: Tokens, info: TensorInfo) -> bool:
    """Whether a tensor has the rows of which an adapter has its own."""
    wide = len(info.shape) == 2 and info.shape[1:] == tokens.info.shape[1:]
    return wide and max(tokens.rows, default=0) < info.shape[0] and _computed(info)


def _computed(info: TensorInfo) -> bool:
    return info.dtype.mergeable or info.dtype.name in _FLOAT8
