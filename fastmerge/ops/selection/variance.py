"""Which elements of a tensor vary most among its models: those of the largest sums of squared differences of pairs.

That is their variance but for a factor. One pass counts the elements that vary at all, of which a share is kept; the
rest is :mod:`fastmerge.ops.selection.select`, with one key for all models of an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmerge.ops.kernels import Brackets, Deltas, Found, Keep, Kernels
from fastmerge.ops.segments import I64, TILE, Segments
from fastmerge.ops.selection.select import ALL_TILES, Select
from fastmerge.ops.spec import Op
from fastmerge.ops.tiles import Partial, gather, number


class Variance:
    """Finds one threshold per tensor, and where among its ties the kept ones end: the first ones stay.

    Attributes:
        keep: as kernels take it; complete once :attr:`done`.
    """

    def __init__(self, ops: Sequence[Op], shares: Sequence[float], kernels: Kernels) -> None:
        """Takes the ops, of each the share of its varying elements that is kept (1: all elements), and the backend."""
        count, models = len(ops), len(ops[0].spec.models)
        self._ops, self._kernels = ops, kernels
        self._shares = shares
        self._key = np.uint64 if ops[0].spec.double else np.uint32
        self._tiles = np.array([-(-op.spec.numel // TILE) for op in ops], np.int64)
        ones = np.full((count, models), 65536, np.int32)
        deltas = Deltas(-1, False, np.arange(models, dtype=np.int32), ones, variance=True)
        cut = np.empty((count, 1, 3), np.int64)
        cut[:] = (ALL_TILES, 0, -1)
        self.keep = Keep(deltas, True, np.zeros((count, 1), np.uint64), cut)
        self._select: Select | None = None

    @property
    def done(self) -> bool:
        """True once every threshold is known."""
        return self._select is not None and self._select.done

    def resident(self, segments: Segments) -> None:
        """Thresholds of tensors that the segments hold whole, as far as one call finds them."""
        if len(segments) < len(self._ops):
            return
        self._rank(gather([self._varying(segments)], self._tiles))
        assert self._select is not None
        if not self._select.done:
            self._select.resident(segments, self._kernels, self.keep.deltas)

    def pieces(self) -> I64 | None:
        """The pieces of the due pass; None where they are everything."""
        return None if self._select is None else self._select.pieces()

    def statistics(self, segments: Segments) -> Any:
        """How many elements vary, or what selection asks for."""
        if self._select is None:
            return self._varying(segments)
        return self._select.statistics(segments, self._kernels, self.keep.deltas)

    def advance(self, partials: Sequence[Any]) -> None:
        """Ends a pass."""
        if self._select is None:
            self._rank(gather(partials, self._tiles))
        else:
            self._select.advance(partials)

    def _varying(self, segments: Segments) -> Partial:
        """The elements of every tile that vary."""
        numbered, spans, tiles = number(segments)
        zero = np.zeros((len(self._ops), 1), np.uint64)
        counts, used = np.empty((tiles, 1, 4), np.int64), np.zeros(1, np.int64)
        found = Found(counts, np.empty((1, 0), self._key), np.empty((1, 0, 2), np.int64), used)
        self._kernels.count(numbered, self.keep.deltas, Brackets(zero, zero), found)
        return Partial(spans, counts[:, 0, 0])

    def _rank(self, varying: I64) -> None:
        """How many elements stay of each tensor: the share of those that vary."""
        found = np.concatenate([[0], np.cumsum(varying)])[np.concatenate([[0], np.cumsum(self._tiles)])]
        each = zip(np.diff(found).tolist(), self._shares, self._ops, strict=True)
        ranks = np.array([[op.spec.numel if share >= 1 else int(n * share)] for n, share, op in each], np.int64)
        keep = self.keep
        self._select = Select(self._ops, ranks, "index", whole_model=False, thr=keep.thr, cut=keep.cut)
