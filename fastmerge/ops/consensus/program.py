"""Family consensus: select thresholds, sum magnitudes or votes where needed, then merge deltas."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from fastmerge.errors import RecipeError
from fastmerge.ops.consensus.rules import Consensus, kept, l1_factor
from fastmerge.ops.kernels import BLOCK, ELECT, MERGE, U32, U64, ZERO, Deltas, Keep, Kernels, Rules, Votes
from fastmerge.ops.per_spec import PerSpec
from fastmerge.ops.program import Bound, Launches, Program
from fastmerge.ops.segments import E0, F64, GROUP, I64, LENGTH, TILE, Segments
from fastmerge.ops.selection.select import ALL_TILES, Select
from fastmerge.ops.spec import Op, Spec
from fastmerge.ops.split import by_kind
from fastmerge.ops.tiles import Partial, gather, number

MOST_DRAWN = 1 << 24
"""Bytes of bits that a program keeps from the sums of magnitudes, so that a merge draws its random numbers once."""


class Trim(NamedTuple):
    """What the thresholds of a tensor depend on, beside its inputs.

    Attributes:
        ranks: how many elements each model keeps.
        ties: ``index``, ``all`` or ``spread``.
        round_base: task vectors are rounded to the base's type.
    """

    ranks: tuple[int, ...]
    ties: str
    round_base: bool


def program(ops: Sequence[Op], rules: PerSpec[Consensus], kernels: Kernels) -> Program:
    """The program of tensors of one method.

    Raises:
        RecipeError: where one threshold for the whole model is asked for, and the tensors' parameters differ.
    """
    if rules[0].whole_model and (rules[0].trim or rules[0].zero == "majority"):
        _same([(r.words, r.density, r.keep_count) for r in rules.all()], ops, "parameters")
        _same([op.spec.double for op in ops], ops, "precision (fp64 or not)")
        return ConsensusProgram(ops, rules, kernels)
    words = [r.words for r in rules.each]
    if words.count(words[0]) == len(words):
        return ConsensusProgram(ops, rules, kernels)
    return by_kind(
        [words[i] for i in rules.index.tolist()],
        lambda some: ConsensusProgram([ops[i] for i in some], rules.some(some), kernels),
    )


def _same(what: Sequence[object], ops: Sequence[Op], noun: str) -> None:
    for value, op in zip(what, ops, strict=True):
        if value != what[0]:
            raise RecipeError(
                f"trim_scope: model ranks all tensors together, so they must have the same {noun}; "
                f"{op.name} differs from {ops[0].name}"
            )


class ConsensusProgram(Program):
    """Passes: selection (as often as it takes), sums of magnitudes, votes; each only where needed."""

    def __init__(self, ops: Sequence[Op], rules: PerSpec[Consensus], kernels: Kernels) -> None:
        """Sets up the passes of tensors whose ``words`` agree."""
        first = rules[0]
        self._kernels = kernels
        self._ops = ops
        self._rules = rules
        self._words = first
        count, models = len(ops), len(first.weight)
        self._numel = rules.integers(lambda spec, _: spec.numel)
        self._tiles = -(-self._numel // TILE)
        self._factor = rules.rows(lambda r: r.rescale)
        self._majority = np.ones(count)
        self._models = np.array(first.models, np.int32)
        self._bernoulli = rules.integers(lambda _, r: r.bernoulli, np.int32)
        self._thr = np.zeros((count, models), np.uint64)
        self._cut = np.empty((count, models, 3), np.int64)
        self._cut[:] = (ALL_TILES, 0, -1)
        self._select: Select | None = None
        if first.trim:
            self._select = Select(
                ops, self._ranks(), first.ties, whole_model=first.whole_model, thr=self._thr, cut=self._cut
            )
        self._given = False
        self._drawn: dict[bytes, U32] | None = None
        if first.drop and self._numel.sum() * models // 8 <= MOST_DRAWN:
            self._drawn = {}
        self._due: list[Literal["select", "l1", "votes"]] = []
        if self._select is not None and not self._select.done:
            self._due.append("select")
        if first.l1 != "none":
            self._due.append("l1")
        if first.elect != "none" and first.zero == "majority":
            self._due.append("votes")
        self._tables: Rules | None = None if self._due else self._make_tables()

    def _deltas(self, segments: Segments) -> Deltas:
        code = segments.dtypes[0].code if self._words.round_base else -1
        return Deltas(code, self._words.drop, self._models, self._bernoulli)

    def _keep(self, segments: Segments, *, trim: bool = True, bits: U32 | None = None) -> Keep:
        trims = self._words.trim and trim
        return Keep(self._deltas(segments), trims, self._thr, self._cut, bits, wide_sums=self._wide_sums(segments))

    def _wide_sums(self, segments: Segments) -> bool:
        """Of a table, whose tensors are alike in this; those of a whole model need not be."""
        return len(segments) > 0 and self._rules[int(segments.table[0, GROUP])].wide_sums

    def _ranks(self) -> I64:
        """How many elements each (group, model) keeps; with one threshold for all, of the model's total."""
        total = int(self._numel.sum()) if self._words.whole_model else None

        def row(spec: Spec, rules: Consensus) -> list[int]:
            n = spec.numel if total is None else total
            return [kept(n, d, rules.keep_count) for d in rules.density]

        return self._rules.integers(row)

    def _votes(self) -> Votes:
        weight, count_weight = self._rules.rows(lambda r: r.weight), self._rules.rows(lambda r: r.count_weight)
        factors = np.empty((*weight.shape, 3))
        for column, values in enumerate((weight * self._factor, count_weight, self._factor)):
            factors[:, :, column] = values
        return Votes(ELECT[self._words.elect], self._words.split, factors)

    def _make_tables(self) -> Rules:
        scale = self._rules.rows(lambda r: (r.lam, r.div, 0.0))
        scale[:, 2] = self._majority
        return Rules(self._votes(), ZERO[self._words.zero], MERGE[self._words.merge], scale)

    def asks(self) -> Sequence[Hashable] | None:
        """Thresholds depend on the ranks, where no random numbers come before them and no other tensor counts."""
        words = self._words
        if not words.trim or words.drop or words.whole_model:
            return None
        return [Trim(tuple(row), words.ties, words.round_base) for row in self._ranks().tolist()]

    def found(self) -> Sequence[tuple[U64, I64]]:
        """Thresholds and cuts, a row of each per op."""
        return [(thr.copy(), cut.copy()) for thr, cut in zip(self._thr, self._cut, strict=True)]

    def give(self, found: Sequence[tuple[U64, I64]]) -> None:
        """Selection is over; what follows it is still due."""
        self._given = True
        for g, (thr, cut) in enumerate(found):
            self._thr[g], self._cut[g] = thr, cut
        if self._due[:1] == ["select"]:
            self._next()

    @property
    def ready(self) -> bool:
        """True once every table is known."""
        return not self._due

    def pieces(self) -> I64 | None:
        """Selection may ask for samples and for some tensors only; the other passes read everything."""
        return self._select.pieces() if self._select is not None and self._due[0] == "select" else None

    def bind(self, segments: Segments) -> Bound | None:
        """Every pass that is due, one behind the other; what they find stays on the device."""
        words, order, launcher = self._words, None, self._kernels.launcher
        if launcher is None:
            return None
        given = self._given
        if words.trim and words.whole_model:  # ties count by name
            order = np.array(sorted(range(len(self._ops)), key=lambda g: self._ops[g].name.encode()))
        elif words.trim and not given:
            order = np.argsort(launcher.ways(segments), kind="stable")
        s = launcher.sequence(segments, order, wide_sums=self._wide_sums(segments))
        made = self._make_tables()
        deltas = s.deltas(self._deltas(segments))
        keep = whole = s.untrimmed(deltas)
        factors, scale = s.tables(made)
        sums = None
        if given:
            keep = s.given(deltas, self._thr, self._cut, ties=words.ties)
        elif words.trim:
            keep = s.select(deltas, self._ranks(), ties=words.ties, together=words.whole_model)
        if words.l1 != "none":
            weights = self._rules.rows(lambda r: r.weight)
            sums = s.rescale(keep if words.l1 == "trim" else whole, factors, weights)
        if words.elect != "none" and words.zero == "majority":
            s.majority(keep, factors, scale, made, together=words.whole_model)
        s.consensus(keep, factors, scale, made)

        def check(s: Any, _: int, ops: Sequence[Op]) -> None:
            found = s.array(sums)  # in the order of the layout: the first one wrong there need not be the first op's
            back = range(len(ops)) if order is None else np.argsort(order)
            for op, at in zip(ops, back, strict=True):
                for before, after in found[at].reshape(-1, 2).tolist():
                    l1_factor(before, after, op.name)

        return Launches(s, self._ops, check, lambda s: s.selected())

    def resident(self, segments: Segments) -> None:
        """Thresholds of small tensors in one call."""
        if self._due[:1] == ["select"] and self._select is not None:
            self._select.resident(segments, self._kernels, self._deltas(segments))
            if self._select.done:
                self._next()

    def statistics(self, segments: Segments) -> Any:
        """One call of the pass that is due."""
        due = self._due[0]
        if due == "select" and self._select is not None:
            return self._select.statistics(segments, self._kernels, self._deltas(segments))
        numbered, spans, tiles = number(segments)
        if due == "l1":
            models = len(self._words.weight)
            sums, bits = np.empty((tiles, models, 2)), None
            if self._drawn is not None and self._kernels.launcher is None:
                blocks = -(-segments.table[:, LENGTH] // BLOCK)
                bits = np.empty((int(blocks.sum()), models, BLOCK // 32), np.uint32)
            self._kernels.l1(numbered, self._keep(segments, trim=self._words.l1 == "trim", bits=bits), sums)
            return Partial(spans, sums, (_pieces(segments), bits))
        counts = np.empty((tiles, 2), np.int64)
        self._kernels.votes(numbered, self._keep(segments), self._votes(), counts)
        return Partial(spans, counts)

    def advance(self, partials: Sequence[Any]) -> None:
        """Ends the pass that is due."""
        due = self._due[0]
        if due == "select" and self._select is not None:
            self._select.advance(partials)
            if not self._select.done:
                return
        elif due == "l1":
            if self._drawn is not None:
                self._drawn.update(p.extra for p in partials if p.extra[1] is not None)
            self._end_l1(gather(partials, self._tiles))
        else:
            self._end_votes(gather(partials, self._tiles))
        self._next()

    def _next(self) -> None:
        self._due.pop(0)
        if not self._due:
            self._tables = self._make_tables()

    def _fold(self, sums: F64) -> list[list[list[float]]]:
        """Magnitudes of each tensor and model, before and after, from those of tiles."""
        models = len(self._words.weight)
        first = np.concatenate([[0], np.cumsum(self._tiles)])
        totals = self._kernels.fold(np.ascontiguousarray(sums.reshape(len(sums), 2 * models)), first)
        found: list[list[list[float]]] = totals.reshape(-1, models, 2).tolist()
        return found

    def _end_l1(self, sums: F64) -> None:
        for g, row in enumerate(self._fold(sums)):
            for i, (before, after) in enumerate(row):
                self._factor[g, i] = l1_factor(before, after, self._ops[g].name)

    def _end_votes(self, counts: I64) -> None:
        owner = np.repeat(np.arange(len(self._ops)), self._tiles)
        more = np.zeros(len(self._ops), np.int64)
        np.add.at(more, owner, counts[:, 0] - counts[:, 1])
        if self._words.whole_model:
            more[:] = more.sum()
        self._majority = np.where(more > 0, 1.0, -1.0)

    def masked(self, segments: Segments, bits: U32, thinned: Sequence[int]) -> None:
        """Sums of magnitudes and the merge of whole tensors, where bits say what is kept of each model.

        Args:
            segments: every group whole.
            bits: as :class:`fastmerge.ops.kernels.Keep` has them.
            thinned: the models that have lost anything; the others keep their size.
        """
        keep = self._keep(segments, bits=bits)._replace(given=True)
        if self._words.l1 != "none":
            numbered, spans, tiles = number(segments)
            sums = np.empty((tiles, len(self._words.weight), 2))
            self._kernels.l1(numbered, keep, sums)
            totals = self._fold(gather([Partial(spans, sums)], self._tiles))
            for g, i in itertools.product(range(len(self._ops)), thinned):
                self._factor[g, i] = l1_factor(totals[g][i][0], totals[g][i][1], self._ops[g].name)
        self._kernels.consensus(segments, keep._replace(wide_sums=self._wide_sums(segments)), self._make_tables())

    def merge(self, segments: Segments, keep: Keep) -> None:
        """The merge of what is kept by a rule that is not theirs."""
        self._kernels.consensus(segments, keep._replace(wide_sums=self._wide_sums(segments)), self._make_tables())

    def apply(self, segments: Segments) -> None:
        """The merge itself."""
        if self._tables is None:
            raise AssertionError("apply before the statistics are complete")
        bits = self._drawn.pop(_pieces(segments), None) if self._drawn else None
        self._kernels.consensus(segments, self._keep(segments, bits=bits), self._tables)


def _pieces(segments: Segments) -> bytes:
    """Which elements the segments are, in their order."""
    return segments.table[:, [GROUP, E0, LENGTH]].tobytes()
