"""Exact k-th magnitudes without a sort: a sample, a bracket, a count, and a proof.

For every tensor (or the whole model) and every model the k-th largest key ``bits(|d|)`` is wanted.

0. Small tensors that lie in memory whole take one call of ``kth``, almost always; what follows is for the rest.
1. Small ones are read whole and partitioned.
2. For the others a sample of scattered blocks gives a bracket of keys ``[lo, hi]`` that holds the k-th with
   near certainty, and little else.
3. One pass over everything counts the keys above, at and below the ends of the bracket, and lists those
   strictly inside. Where the k-th is an end, or is inside and the list is complete, it is now *known*.
4. Else the counts say on which side it is, or that it is inside: the bracket moves or narrows, and step 3
   repeats. Every second pass after the third halves the range of possible keys, so it ends.

Bracket ends are keys too, because of checkpoints: deltas of bf16 weights take a few hundred values, and a
bracket is then often a single one, with a tenth of all elements on it and nothing to list.

Elements at the threshold are cut by :class:`Select` as the rule on ties says: counts per tile tell in which
tile the last kept one lies, and the kernels count on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.keys import threshold
from fastmerge.ops.kernels import Brackets, Deltas, Found, Kernels
from fastmerge.ops.segments import E0, GROUP, I64, LENGTH, TILE, Segments
from fastmerge.ops.selection.brackets import Span, blocks, bracket, narrow, within
from fastmerge.ops.spec import Op
from fastmerge.ops.tiles import Partial, gather, number

if TYPE_CHECKING:
    import numpy.typing as npt

U64: TypeAlias = "npt.NDArray[np.uint64]"

ALL_TILES = 1 << 62
"""A tile number beyond every tile: all ties are kept."""

EXHAUSTIVE = TILE
"""Elements up to which everything is read in place of a sample."""

SMALL = 1 << 21
"""Elements up to which a backend is asked for the threshold of a whole tensor in one call."""

LISTED = 1 << 20
"""Keys per model that a pass may list in all; where more lie inside, every n-th is kept to narrow by."""


@dataclass(slots=True)
class _Query:
    """One k-th magnitude: of one model, in one tensor or in all of them (in tie order)."""

    model: int
    groups: list[int]
    size: int
    span: Span
    sample: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(0, np.uint64))
    spread: float = 1.0
    ends: tuple[int, int] = (0, 0)
    expected: float = 0.0
    passes: int = 0
    found: bool = False


class Select:
    """Finds thresholds and tie cuts; the consensus program runs its passes."""

    def __init__(self, groups: Sequence[Op], ranks: I64, ties: str, *, whole_model: bool, thr: U64, cut: I64) -> None:
        """Decides what needs no data.

        Args:
            groups: tensors of one work type.
            ranks: ``[P, N]`` how many elements to keep; with ``whole_model``, of all tensors together.
            ties: ``index``, ``all`` or ``spread``.
            whole_model: one threshold per model for all tensors; ties count by name, then by element.
            thr: ``[P, N]`` receives thresholds; starts at 0 (keep everything).
            cut: ``[P, N, 3]`` receives (cut_tile, cut_rank, tie_T); starts at (all, 0, -1).
        """
        self._groups = groups
        self._ties = ties
        self._thr, self._cut = thr, cut
        self._models = ranks.shape[1]
        self._listed: int = min(LISTED, max(1 << 16, 3 * LISTED // max(3, self._models)))
        double = groups[0].spec.double
        self._key = np.uint64 if double else np.uint32
        self._largest = (1 << 63 if double else 1 << 31) - 1
        self._never = (1 << 64 if double else 1 << 32) - 1
        self._numel = np.array([g.spec.numel for g in groups], np.int64)
        self._tiles = -(-self._numel // TILE)
        self._whole_model = whole_model
        self._ranks = ranks
        size = np.full(len(groups), self._numel.sum()) if whole_model else self._numel
        none = (ranks <= 0) & (size > 0)[:, None]
        if none.any():
            thr[none], cut[none] = self._never, (0, 0, -1)
        self._open = (ranks > 0) & (ranks < size[:, None])
        self._queries: list[_Query] = []
        self._sampling = False
        self._begun = False

    @property
    def done(self) -> bool:
        """True once every threshold is known."""
        return not (self._queries if self._begun else self._open.any())

    def resident(self, segments: Segments, kernels: Kernels, deltas: Deltas) -> None:
        """Finds thresholds of small tensors that the segments hold whole, before the first pass."""
        small = segments.table[:, LENGTH] <= SMALL
        if self._whole_model or not small.any():
            return
        if not small.all():
            segments = segments.pieces(segments.table[small])
        found = np.zeros((*self._open.shape, 4), np.int64)
        thr = np.zeros(self._open.shape, np.uint64)
        kernels.kth(segments, deltas, self._ranks * self._open, thr, found)
        keep, tied, tile, rank = (found[:, :, i] for i in range(4))
        known = tied > 0
        np.copyto(self._thr, thr, where=known)
        self._open &= ~known
        some = known & (keep < tied) & (thr > 0)  # zeros add nothing, kept or not
        if self._ties == "index":
            np.copyto(self._cut[:, :, 0], tile, where=some)
            np.copyto(self._cut[:, :, 1], rank, where=some)
            np.copyto(self._cut[:, :, 2], -1, where=some)
        elif self._ties == "spread":
            for g, i in np.argwhere(some).tolist():
                self._cut[g, i] = (0, 0, threshold(keep[g, i] / tied[g, i]))

    def _begin(self) -> None:
        """Makes the queries of what is open and plans the first pass."""
        self._begun = self._sampling = True
        if self._whole_model:
            sets = [sorted(range(len(self._groups)), key=lambda g: self._groups[g].name.encode())]
        else:
            sets = [[g] for g in np.flatnonzero(self._open.any(axis=1)).tolist()]
        for members in sets:
            size = int(self._numel[members].sum())
            for i in np.flatnonzero(self._open[members[0]]).tolist():
                span = Span(int(self._ranks[members[0], i]), size, 0, self._largest)
                self._queries.append(_Query(i, members, size, span))
        self._read(self._plan_sample())

    # ---- passes ----------------------------------------------------------------------------------------

    def pieces(self) -> I64 | None:
        """The pieces of the due pass; None where they are everything."""
        if not self._begun:
            self._begin()
        whole = len(self._wanted) == len(self._groups) and np.array_equal(self._wanted[:, 2], self._numel)
        return None if whole else self._wanted

    def statistics(self, segments: Segments, kernels: Kernels, deltas: Deltas) -> Partial:
        """Keys of a sample, or counts and lists of a bracket pass."""
        asked = self._asked[segments.table[:, GROUP]]
        if not asked.all():
            segments = segments.pieces(segments.table[asked])
        if self._sampling:
            keys = np.empty((int(segments.table[:, LENGTH].sum()), self._models), self._key)
            kernels.delta_keys(segments, deltas, keys)
            return Partial(segments.table[:, [GROUP, E0, LENGTH]].copy(), keys)
        numbered, spans, tiles = number(segments)
        total = int(segments.table[:, LENGTH].sum())
        share = total / max(1, int(self._wanted[:, 2].sum()))
        rooms = [step * max(1024, int(2 * self._listed * share)) for step in self._steps]
        cap = max(1024, min(total // 16, max(rooms)))
        counts = np.empty((tiles, self._models, 4), np.int64)
        keys = np.empty((self._models, cap), self._key)
        where = np.empty((self._models, cap, 2), np.int64)
        used = np.zeros(self._models, np.int64)
        kernels.count(numbered, deltas, Brackets(self._lo, self._hi), Found(counts, keys, where, used))
        offset = int(spans[:, 1].sum())  # a different first one in each call, so that thinning has no bias
        lists = []
        for i in range(self._models):
            step = self._steps[i]
            some = slice(offset % step, min(int(used[i]), cap, rooms[i]), step)
            lists.append((keys[i, some].copy(), where[i, some].copy()))
        return Partial(spans, counts, lists)

    def advance(self, partials: Sequence[Partial]) -> None:
        """Ends a pass: writes what is known and plans the next one."""
        if self._sampling:
            self._end_sample(partials)
            self._sampling = False
        else:
            self._end_count(partials)
        self._queries = [q for q in self._queries if not q.found]
        if self._queries:
            self._plan_count()

    def _read(self, pieces: I64) -> None:
        """Sets what the next pass reads."""
        self._wanted = pieces
        self._asked = np.zeros(len(self._groups), bool)
        self._asked[pieces[:, 0]] = True

    # ---- sampling --------------------------------------------------------------------------------------

    def _plan_sample(self) -> I64:
        """Whole tensors where they are small, else scattered blocks over each query's tensors."""
        wanted: list[I64] = []
        for members in dict.fromkeys(tuple(q.groups) for q in self._queries):
            sizes = self._numel[list(members)]
            if sizes.sum() <= EXHAUSTIVE:
                wanted.append(np.stack([np.array(members), np.zeros_like(sizes), sizes], axis=1))
            else:
                wanted.append(blocks(np.array(members, np.int64), sizes))
        return np.concatenate(wanted) if wanted else np.zeros((0, 3), np.int64)

    def _end_sample(self, partials: Sequence[Partial]) -> None:
        rows = np.concatenate([p.spans for p in partials])
        keys = np.concatenate([p.values for p in partials])
        columns = np.ascontiguousarray(keys.T)
        place = np.full((len(self._groups), 2), -1, np.int64)  # set of tensors with one threshold, place in it
        sets = list(dict.fromkeys(tuple(q.groups) for q in self._queries))
        for n, members in enumerate(sets):
            place[list(members)] = np.stack([np.full(len(members), n), np.arange(len(members))], axis=1)
        owner, member = place[rows[:, 0]].T
        order = np.lexsort((rows[:, 1], member, owner))
        edges = np.searchsorted(owner[order], np.arange(len(sets) + 1))
        ends = np.cumsum(rows[:, 2])
        queries: dict[tuple[int, ...], list[_Query]] = {}
        for q in self._queries:
            queries.setdefault(tuple(q.groups), []).append(q)
        for n, members in enumerate(sets):
            mine = order[edges[n] : edges[n + 1]]
            lengths = rows[mine, 2]
            parts = [columns[:, e - m : e] for e, m in zip(ends[mine].tolist(), lengths.tolist(), strict=True)]
            some = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1) if parts else columns[:, :0]
            for q in queries[members]:
                column = some[q.model]
                if len(column) == q.size:
                    self._end_whole(q, column)
                else:
                    q.sample = np.sort(column)
                    q.spread = _spread(column, q.sample, lengths, q)

    def _end_whole(self, q: _Query, keys: npt.NDArray[Any]) -> None:
        """All keys of a query, in tie order."""
        at = int(np.partition(keys, q.size - q.span.k)[q.size - q.span.k])
        missing = q.span.k - int(np.count_nonzero(keys > at))
        sizes, tiles = self._numel[q.groups], self._tiles[q.groups]
        member = np.repeat(np.arange(len(sizes)), tiles)
        tile = np.arange(len(member)) - (np.cumsum(tiles) - tiles)[member]
        starts = (np.cumsum(sizes) - sizes)[member] + tile * TILE
        counts = np.add.reduceat(keys == at, starts, dtype=np.int64)
        self._known(q, at, missing, int(counts.sum()), member, tile, counts)

    # ---- counting --------------------------------------------------------------------------------------

    def _plan_count(self) -> None:
        """Brackets for all open queries; groups without one are not read."""
        shape = (len(self._groups), self._models)
        self._lo = np.full(shape, self._never, np.uint64)
        self._hi = np.full(shape, self._never, np.uint64)
        expected = [0.0] * self._models
        for q in self._queries:
            q.passes += 1
            q.ends, q.expected = bracket(q.span, q.sample, q.spread, q.passes, self._room(q))
            self._lo[q.groups, q.model], self._hi[q.groups, q.model] = q.ends
            expected[q.model] += q.expected
        self._steps = [max(1, int(-(-e // self._listed))) for e in expected]
        groups = np.array(sorted({g for q in self._queries for g in q.groups}), np.int64)
        self._read(np.stack([groups, np.zeros_like(groups), self._numel[groups]], axis=1))

    def _room(self, q: _Query) -> int:
        """How many keys a list of this query may safely hold."""
        return max(512, min(self._listed, q.size // 32))

    def _end_count(self, partials: Sequence[Partial]) -> None:
        read = np.zeros(len(self._groups), np.int64)
        read[self._wanted[:, 0]] = self._tiles[self._wanted[:, 0]]
        counts = gather(partials, read)
        first = np.cumsum(read) - read
        lists = [
            (np.concatenate([p.extra[i][0] for p in partials]), np.concatenate([p.extra[i][1] for p in partials]))
            for i in range(self._models)
        ]
        for q in self._queries:
            tiles = np.concatenate([np.arange(first[g], first[g] + read[g]) for g in q.groups])
            member = np.repeat(np.arange(len(q.groups)), read[q.groups])
            mine = counts[tiles, q.model]
            keys, where = lists[q.model]
            own = np.isin(where[:, 0], q.groups) if len(q.groups) < len(self._groups) else slice(None)
            self._decide(q, mine, member, keys[own], where[own])

    def _decide(self, q: _Query, counts: I64, member: I64, keys: npt.NDArray[Any], where: I64) -> None:
        """Ends a query if its counts allow, else moves or narrows the range of its key."""
        above, at_hi, at_lo, inside = (int(c) for c in counts.sum(axis=0))
        lo, hi = q.ends
        k = q.span.k
        tile = np.concatenate([np.arange(n) for n in np.bincount(member, minlength=len(q.groups))])
        if above < k <= above + at_hi:
            self._known(q, hi, k - above, at_hi, member, tile, counts[:, 1])
        elif above + at_hi < k <= above + at_hi + inside and len(keys) == inside:
            rank = k - above - at_hi
            at = int(np.partition(keys, inside - rank)[inside - rank])
            missing = rank - int(np.count_nonzero(keys > at))
            tied = where[keys == at]
            order = np.empty(len(self._groups), np.int64)
            order[q.groups] = np.arange(len(q.groups))
            ones = np.ones(len(tied), np.int64)
            self._known(q, at, missing, len(tied), order[tied[:, 0]], tied[:, 1] // TILE, ones)
        elif above + at_hi + inside < k <= above + at_hi + inside + at_lo:
            self._known(q, lo, k - above - at_hi - inside, at_lo, member, tile, counts[:, 2])
        else:
            q.span = narrow(q.span, q.ends, above, at_hi, inside, at_lo)
            if above + at_hi < k <= above + at_hi + inside and len(keys) > len(within(q.sample, q.span)):
                # Thinned lists are fair samples; those that overflowed hold the first keys of each call.
                fair = len(keys) * self._steps[q.model] > 0.9 * inside
                q.sample, q.spread = np.sort(keys), 1.0 if fair else 4.0

    # ---- results ---------------------------------------------------------------------------------------

    def _known(self, q: _Query, at: int, keep: int, tied: int, member: I64, tile: I64, count: I64) -> None:
        """Writes a threshold, and where among its ties the kept ones end.

        Args:
            q: the query.
            at: its k-th largest key.
            keep: how many of the elements at it belong to the k largest.
            tied: how many there are.
            member: which of the query's groups each count belongs to.
            tile: its tile in that group.
            count: ties there.
        """
        q.found = True
        self._thr[q.groups, q.model] = at
        if self._ties == "all" or keep >= tied or at == 0:
            return  # the table already says so; and zeros add nothing, kept or not
        if self._ties == "spread":
            self._cut[q.groups, q.model] = (0, 0, threshold(keep / tied))
            return
        order = np.lexsort((tile, member))
        member, tile, count = member[order], tile[order], count[order]
        ends = np.cumsum(count)
        last = int(np.searchsorted(ends, keep, side="right"))
        stop = int(member[last])
        rank = keep - int(ends[last] - count[last])
        # Counts that are listed one by one may share the last tile.
        same = (member[:last] == stop) & (tile[:last] == tile[last])
        rank += int(count[:last][same].sum())
        self._cut[q.groups[stop], q.model] = (int(tile[last]), rank, -1)
        self._cut[q.groups[stop + 1 :], q.model] = (0, 0, -1)


def _spread(keys: npt.NDArray[Any], ordered: npt.NDArray[Any], lengths: I64, q: _Query) -> float:
    """How much wider than for independent elements a bracket must be: blocks of a tensor differ.

    The share of large keys is taken per block; its scatter between blocks, against that of independent draws,
    is the design effect of cluster sampling.
    """
    n = len(keys)
    pivot = ordered[n - 1 - int(q.span.k / q.size * (n - 1))]
    lengths = lengths[lengths > 0]
    per_block = np.add.reduceat(keys > pivot, np.cumsum(lengths) - lengths, dtype=np.int64) / lengths
    p = float(np.count_nonzero(keys > pivot)) / n
    alone = p * (1 - p) / float(lengths.mean())
    return max(1.0, float(np.sqrt(per_block.var() / alone))) if alone > 0 else 1.0
