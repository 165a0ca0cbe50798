"""Family consensus: select thresholds, sum magnitudes or votes where needed, then merge deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastmerge.errors import RecipeError
from fastmerge.ops.consensus.rules import Consensus, kept, l1_factor
from fastmerge.ops.program import Program
from fastmerge.ops.segments import F64, I64, TILE, Segments
from fastmerge.ops.selection.select import ALL_TILES, Select
from fastmerge.ops.spec import Op
from fastmerge.ops.split import by_kind
from fastmerge.ops.tiles import Partial, gather, number

I32 = npt.NDArray[np.int32]

ELECT = {"none": 0, "mass": 1, "count": 2}
ZERO = {"plus": 0, "majority": 1, "base": 2}
MERGE = {"mean": 0, "sum": 1, "max": 2}


@dataclass(frozen=True)
class Keep:
    """What the kernels need to know to recompute the kept deltas: tables ``[P, N]``, see the native module."""

    round_base: bool
    drop: bool
    trim: bool
    models: I32
    bern: I32
    thr: npt.NDArray[np.uint64]
    cut: I64

    def arguments(self, segments: Segments, *, trim: bool = True) -> tuple[Any, ...]:
        """The seven keep arguments of a kernel call; ``trim`` False stops before the trim."""
        code = segments.dtypes[0].code if self.round_base else -1
        return code, self.drop, self.trim and trim, self.models, self.bern, self.thr, self.cut


def program(groups: Sequence[Op], specs: Sequence[Consensus], kernels: Any) -> Program:
    """The program of tensors of one method.

    Raises:
        RecipeError: where one threshold for the whole model is asked for, and the tensors' parameters differ.
    """
    if specs[0].whole_model and (specs[0].trim or specs[0].zero == "majority"):
        _same([(s.words, s.density, s.keep_count) for s in specs], groups, "parameters")
        _same([g.spec.double for g in groups], groups, "precision (fp64 or not)")
        return ConsensusProgram(groups, specs, kernels)
    return by_kind(
        [s.words for s in specs],
        lambda some: ConsensusProgram([groups[i] for i in some], [specs[i] for i in some], kernels),
    )


def _same(what: Sequence[object], groups: Sequence[Op], noun: str) -> None:
    for value, group in zip(what, groups, strict=True):
        if value != what[0]:
            raise RecipeError(
                f"trim_scope: model ranks all tensors together, so they must have the same {noun}; "
                f"{group.name} differs from {groups[0].name}"
            )


class ConsensusProgram(Program):
    """Passes: selection (as often as it takes), sums of magnitudes, votes; each only where needed."""

    def __init__(self, groups: Sequence[Op], specs: Sequence[Consensus], kernels: Any) -> None:
        """Sets up the passes of tensors whose ``words`` agree."""
        first = specs[0]
        self._kernels = kernels
        self._groups = groups
        self._specs = specs
        self._words = first
        count, models = len(groups), len(first.weight)
        self._tiles = np.array([-(-g.spec.numel // TILE) for g in groups], np.int64)
        self._factor = np.array([s.rescale for s in specs], np.float64)
        self._majority = np.ones(count)
        bern = np.array([s.bernoulli for s in specs], np.int32)
        thr = np.zeros((count, models), np.uint64)
        cut = np.empty((count, models, 3), np.int64)
        cut[:] = (ALL_TILES, 0, -1)
        indices = np.array(first.models, np.int32)
        self._keep = Keep(first.round_base, first.drop, first.trim, indices, bern, thr, cut)
        self._select: Select | None = None
        if first.trim:
            self._select = Select(groups, self._ranks(), first.ties, whole_model=first.whole_model, thr=thr, cut=cut)
        self._due: list[Literal["select", "l1", "votes"]] = []
        if self._select is not None and not self._select.done:
            self._due.append("select")
        if first.l1 != "none":
            self._due.append("l1")
        if first.elect != "none" and first.zero == "majority":
            self._due.append("votes")
        self._tables: tuple[F64, F64] | None = None if self._due else self._make_tables()

    def _ranks(self) -> I64:
        """How many elements each (group, model) keeps; with one threshold for all, of the model's total."""
        sizes = [g.spec.numel for g in self._groups]
        if self._words.whole_model:
            sizes = [sum(sizes)] * len(sizes)
        pairs = zip(sizes, self._specs, strict=True)
        return np.array([[kept(n, d, s.keep_count) for d in s.density] for n, s in pairs], np.int64)

    def _make_tables(self) -> tuple[F64, F64]:
        """``f`` [P, N, 3] (coefficient, gate, vote) and ``scale`` [P, 3] (lambda, divisor, majority sign)."""
        weight = np.array([s.weight for s in self._specs], np.float64)
        gate = np.array([s.gate for s in self._specs], np.float64)
        f = np.stack([weight * self._factor, gate, self._factor], axis=2)
        scale = np.array([(s.lam, s.div, m) for s, m in zip(self._specs, self._majority.tolist(), strict=True)])
        return np.ascontiguousarray(f), scale

    @property
    def ready(self) -> bool:
        """True once every table is known."""
        return not self._due

    def pieces(self) -> I64 | None:
        """Selection may ask for samples and for some tensors only; the other passes read everything."""
        return self._select.pieces() if self._select is not None and self._due[0] == "select" else None

    def settle(self, segments: Segments, native: Any) -> None:
        """Thresholds of small tensors in one call."""
        if self._due[:1] == ["select"] and self._select is not None:
            self._select.settle(segments, native, self._keep.arguments(segments)[:5])
            if self._select.done:
                self._next()

    def statistics(self, segments: Segments) -> Any:
        """One call of the pass that is due."""
        due = self._due[0]
        if due == "select" and self._select is not None:
            return self._select.statistics(segments, self._kernels, self._keep.arguments(segments)[:5])
        numbered, spans, tiles = number(segments)
        if due == "l1":
            sums = np.empty((tiles, len(self._words.weight), 2))
            keep = self._keep.arguments(segments, trim=self._words.l1 == "trim")
            self._kernels.l1(numbered, *keep, sums)
            return Partial(spans, sums)
        counts = np.empty((tiles, 2), np.int64)
        f, _ = self._make_tables()
        keep = self._keep.arguments(segments)
        self._kernels.votes(numbered, *keep, ELECT[self._words.elect], self._words.split, f, counts)
        return Partial(spans, counts)

    def advance(self, partials: Sequence[Any]) -> None:
        """Ends the pass that is due."""
        due = self._due[0]
        if due == "select" and self._select is not None:
            self._select.advance(partials)
            if not self._select.done:
                return
        elif due == "l1":
            self._end_l1(gather(partials, self._tiles))
        else:
            self._end_votes(gather(partials, self._tiles))
        self._next()

    def _next(self) -> None:
        self._due.pop(0)
        if not self._due:
            self._tables = self._make_tables()

    def _end_l1(self, sums: F64) -> None:
        models = len(self._words.weight)
        first = np.concatenate([[0], np.cumsum(self._tiles)])
        totals = self._kernels.fold(np.ascontiguousarray(sums.reshape(len(sums), 2 * models)), first)
        for g, row in enumerate(totals.reshape(-1, models, 2).tolist()):
            for i, (before, after) in enumerate(row):
                self._factor[g, i] = l1_factor(before, after)

    def _end_votes(self, counts: I64) -> None:
        owner = np.repeat(np.arange(len(self._groups)), self._tiles)
        more = np.zeros(len(self._groups), np.int64)
        np.add.at(more, owner, counts[:, 0] - counts[:, 1])
        if self._words.whole_model:
            more[:] = more.sum()
        self._majority = np.where(more > 0, 1.0, -1.0)

    def apply(self, segments: Segments) -> None:
        """The merge itself."""
        if self._tables is None:
            raise AssertionError("apply before the statistics are complete")
        w = self._words
        self._kernels.consensus(
            segments,
            *self._keep.arguments(segments),
            ELECT[w.elect],
            w.split,
            ZERO[w.zero],
            MERGE[w.merge],
            *self._tables,
        )
