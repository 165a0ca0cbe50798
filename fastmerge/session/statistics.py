"""What passes over the models have found, kept for the next render: thresholds, inner products, magnitudes."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fastmerge.ops.consensus.program import Trim
from fastmerge.ops.kernels import Deltas, Kernels
from fastmerge.ops.segments import TILE, Segments, segment_table
from fastmerge.ops.selection.ranks import Counted, Ranks, counted, small
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op
from fastmerge.runtime.devices import cores
from fastmerge.runtime.workers import each

MOST = 256 << 20
"""Bytes of results of passes that are kept; those that were not used for longest go first."""

AFTER = 4
"""How many densities of a tensor are found by passes before a table for all densities is made, which costs about as
much as eight passes."""

TILES = 16
"""Tiles that a thread counts at a time."""


class Statistics:
    """Statistics by what they are of: the inputs of an op, and what was asked (:meth:`Program.asks`).

    Args:
        kernels: that count magnitudes; None where there are none, and then no tables are made.
    """

    def __init__(self, kernels: Kernels | None) -> None:
        self._kernels = kernels
        self._found: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._nbytes = 0
        self._asked: dict[Hashable, set[Hashable]] = {}
        self._ranks: dict[Hashable, list[Ranks] | None] = {}

    def of(self, ops: Sequence[Op], asks: Sequence[Hashable]) -> list[Any]:
        """What is known of each op, () where nothing was asked; None where a pass must find it."""
        wanted = [(op.inputs, ask) for op, ask in zip(ops, asks, strict=True)]
        self._tables([(op, ask) for op, ask in zip(ops, asks, strict=True) if self._often((op.inputs, ask))])
        return [self._one(key) for key in wanted]

    def keep(self, ops: Sequence[Op], asks: Sequence[Hashable], found: Sequence[Any]) -> None:
        """Keeps what a pass found."""
        for op, ask, one in zip(ops, asks, found, strict=True):
            if ask is None:
                continue
            nbytes = sum(a.nbytes for a in one) if isinstance(one, tuple) else one.nbytes
            old = self._found.pop((op.inputs, ask), (None, 0))
            self._found[op.inputs, ask] = one, nbytes
            self._nbytes += nbytes - old[1]
        while self._nbytes > MOST:
            self._nbytes -= self._found.popitem(last=False)[1][1]

    def close(self) -> None:
        """Forgets everything."""
        for kept in (self._found, self._asked, self._ranks):
            kept.clear()

    def _one(self, key: tuple[Any, Hashable]) -> Any:
        if key[1] is None:
            return ()
        if key in self._found:
            self._found.move_to_end(key)
            return self._found[key][0]
        inputs, ask = key
        ranks = self._ranks.get((inputs, ask.round_base)) if isinstance(ask, Trim) else None
        if ranks is None or not isinstance(ask, Trim):
            return None
        found = [r.find(k, ask.ties) for r, k in zip(ranks, ask.ranks, strict=True)]
        return np.array([thr for thr, _ in found], np.uint64), np.array([cut for _, cut in found], np.int64)

    def _often(self, key: tuple[Any, Hashable]) -> bool:
        """Whether so many densities of a tensor were asked for that a table of all is due."""
        inputs, ask = key
        if not isinstance(ask, Trim) or key in self._found or (inputs, ask.round_base) in self._ranks:
            return False
        seen = self._asked.setdefault((inputs, ask.round_base), set())
        seen.add(ask.ranks)
        return len(seen) > AFTER and self._kernels is not None

    def _tables(self, due: Sequence[tuple[Op, Any]]) -> None:
        """Counts the magnitudes of task vectors, on all cores."""
        work = [(op, ask, e0) for op, ask in due for e0 in range(0, op.spec.numel, TILES * TILE)]
        done = iter(each(self._count, work, threads=cores(), name="count"))
        for op, ask in due:
            parts = [next(done) for _ in range(0, op.spec.numel, TILES * TILE)]
            models = [[*itertools.chain(*column)] for column in zip(*parts, strict=True)]
            fine = bool(models) and all(small(tiles, op.spec.numel) for tiles in models)
            self._ranks[op.inputs, ask.round_base] = [Ranks(tiles) for tiles in models] if fine else None

    def _count(self, piece: tuple[Op, Trim, int]) -> list[list[Counted]]:
        """For each model the counts of some tiles of an op."""
        (op, ask, first), kernels = piece, self._kernels
        assert kernels is not None
        spec, models = op.spec, len(op.inputs) - 1
        code = spec.dtypes[0].code if ask.round_base else -1
        deltas = Deltas(code, False, np.zeros(models, np.int32), np.full((1, models), 65536, np.int32))
        out: list[list[Counted]] = [[] for _ in range(models)]
        for e0 in range(first, min(first + TILES * TILE, spec.numel), TILE):
            n = min(TILE, spec.numel - e0)
            inputs = [[s.address + e0 * s.dtype.size] for s in op.inputs if isinstance(s, Memory)]
            table = segment_table([op], [0], [e0], [n], [[0]], inputs)
            keys = np.empty((n, models), np.uint64 if spec.double else np.uint32)
            kernels.delta_keys(Segments(table, spec.dtypes, spec.out_dtype), deltas, keys)
            for tiles, column in zip(out, np.ascontiguousarray(keys.T), strict=True):
                tiles.append(counted(column))
        return out
