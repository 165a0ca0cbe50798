"""Whole tensors in device memory: all launches of a batch, in one order that nothing on the way can change.

The steps of a method are methods here; each adds launches to one call, whose tables go to the device in one copy. What
a step finds stays there for the next: sums, thresholds, coefficients. So between the first launch and the last nobody
waits for the host, and the number of launches depends on the method, not on how many tensors there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from . import combine, consensus, gram, l1, selection, solve, votes
from ._call import Call, Gpu, Place
from ._keep import Keep, cuts
from ._launch import I64, bounds, tiles_of
from ._types import Types

Array = npt.NDArray[Any]

LANES = 128
"""Vectors of one program of a solve."""

FOLDED = 32
"""Sums of one program of a fold: its time is that of its longest one, so few share a program."""

NOBODY = 1 << 62
"""Where no sum has failed to be finite."""


class Vectors(NamedTuple):
    """Sums of vectors: of tensors, or of their rows.

    Attributes:
        sums: f64 ``[V, C]``.
        first: int64 ``[S + 1]`` vectors before each tensor, on the device.
        here: the same on the host.
    """

    sums: Place
    first: Place
    here: I64


class Sequence:
    """The launches of one batch of whole tensors."""

    def __init__(
        self,
        gpu: Gpu,
        segments: Any,
        order: I64 | None = None,
        *,
        per_row: bool = False,
        wide: bool = False,
        wide_sums: bool = False,
    ) -> None:
        """Takes the tensors.

        Args:
            gpu: where they are.
            segments: whole tensors; parameters have a row for each, in this order.
            order: in which they are laid out; None keeps the given one.
            per_row: sums and parameters belong to rows of the tensors.
            wide: the work is fp64, whatever the inputs are.
            wide_sums: it is from what is kept of task vectors on.
        """
        self.call = Call(gpu)
        self.types = Types(segments.dtypes, wide=wide, wide_sums=wide_sums)
        self._order = order
        self._per_row = per_row
        self._out = int(segments.out_dtype.code)
        self.table = table = segments.table.copy() if order is None else segments.table[order]
        self._tiles_here = tiles_of(table, per_row=per_row)
        table[:, 5] = np.arange(len(table))
        table[:, 6] = self._tiles_here[:-1]
        self._sent: Place | None = None
        self._addressed: list[tuple[Place, I64, int]] = []
        self._tiles: Place | None = None
        self._bad: Place | None = None
        self._selected: Place | None = None
        given = segments.nonfinite
        self._nonfinite = given if len(given) and not isinstance(given, np.ndarray) else None
        self._back: tuple[Place, Place] | None = None

    # ---- what steps share ----------------------------------------------------------------------------------

    def _table(self) -> Place:
        """The segments on the device; their parameter rows are final once the first kernel asks."""
        if self._sent is None:
            self._sent = self._rows(self.table)
        return self._sent

    def _rows(self, rows: I64, first: int = 0) -> Place:
        """Some rows of the table, those from ``first`` on, on the device."""
        place = self.call.put(rows)
        self._addressed.append((place, rows, first))
        return place

    def _ordered(self, array: Array) -> Array:
        """Rows of a table of parameters in the order of the layout."""
        return array if self._order is None else array[self._order]

    def _work(self, array: Array) -> Place:
        return self.call.put(self.types.work(self._ordered(array)))

    def _sums(self, array: Array) -> Place:
        return self.call.put(self.types.sums(self._ordered(array)))

    def _tile_prefix(self) -> Place:
        if self._tiles is None:
            self._tiles = self.call.put(self._tiles_here)
        return self._tiles

    def _wrong(self) -> Place:
        """Where solves put the first vector whose sums are not finite."""
        if self._bad is None:
            self._bad = self.call.put(np.full(1, NOBODY))
        return self._bad

    def _counters(self) -> Any:
        """Where non-finite results are counted: the caller's tensor of the device, where its order is the layout's."""
        if self._nonfinite is not None and self._order is None:
            return self._nonfinite
        counters = self.call.zeros((len(self.table),), np.int64)
        if self._nonfinite is not None:
            self._back = self.call.put(self._order), counters
        return counters

    def _fold(self, partials: Place, vectors: I64) -> Vectors:
        """Tiles added in order."""
        columns = partials.shape[1]
        first = self.call.put(vectors)
        sums = self.call.room((int(vectors[-1]), columns), np.float64)
        programs = -(-int(vectors[-1]) * columns // FOLDED)
        args = (sums, partials, self._tile_prefix(), first, len(self.table))
        self.call.launch(solve.fold_kernel, (programs,), args, columns, FOLDED, num_warps=1, maxnreg=255)
        return Vectors(sums, first, vectors)

    # ---- sums and what follows from them ---------------------------------------------------------------------

    def gram(self, *, delta: bool, diff: bool) -> Vectors:
        """Inner products of each tensor, or row."""
        k = len(self.types.codes) - delta
        partials = self.call.room((int(self._tiles_here[-1]), k * (k + 1) // 2 + diff), np.float64)
        about = {"delta": delta, "diff": diff, "per_row": self._per_row}
        for walk in self.types.tiles(self.table, "gram", per_row=self._per_row):
            gram.gram(self.call, partials, self._table(), walk, **about, **self.types.about)
        vectors = np.zeros(len(self.table) + 1, np.int64)
        length, row = self.table[:, 1], np.maximum(self.table[:, 3], 1)
        np.cumsum(length // row if self._per_row else length > 0, out=vectors[1:])
        return self._fold(partials, vectors)

    def slerp(self, vectors: Vectors, numbers: Array, *, every: bool) -> tuple[Place, Place]:
        """Coefficients ``[V, 2]`` and scales of each vector; numbers ``[S, 2]`` (t, threshold)."""
        total = int(vectors.here[-1])
        table, grid = self.call.put(self._ordered(numbers)), (-(-total // LANES),)
        coef = self.call.room((total, 2), self.types.float)
        apart = self.call.zeros((len(self.table) if every else 1,), np.int32)
        some = (vectors.sums, table, vectors.first, len(self.table))
        if every:
            self.call.launch(solve.apart_kernel, grid, (apart, *some), LANES, num_warps=LANES // 32)
        flags = (self.types.wide, every, LANES)
        self.call.launch(solve.slerp_kernel, grid, (coef, self._wrong(), *some, apart), *flags, num_warps=LANES // 32)
        return coef, self.call.room((total, 2), self.types.float)

    def model_stock(self, vectors: Vectors, numbers: Array, *, angle: bool, clamp: bool) -> tuple[Place, Place]:
        """Coefficients ``[V, 1 + N]``, ones, and scales ``[V, 2]`` (t, N); numbers ``[S, 1]`` (floor)."""
        total, models = int(vectors.here[-1]), len(self.types.codes) - 1
        scale = self.call.room((total, 2), self.types.float)
        coef = self.call.put(np.ones((total, 1 + models), self.types.float))
        args = (
            scale,
            self._wrong(),
            vectors.sums,
            self.call.put(self._ordered(numbers)),
            vectors.first,
            len(self.table),
        )
        flags = (models, angle, clamp, self.types.wide, LANES)
        self.call.launch(solve.model_stock_kernel, (-(-total // LANES),), args, *flags, num_warps=LANES // 32)
        return coef, scale

    def combine(self, coef: Any, scale: Any, *, delta: bool, div: bool, first: I64 | None = None) -> None:
        """The weighted sum, from tables of the host or of the device.

        Args:
            coef: ``[P, M]``.
            scale: ``[P, 2]``.
            delta: as of the kernel.
            div: as of the kernel.
            first: ``[S]`` a tensor's first row of the tables, which have one per vector; None: one per tensor.
        """
        if first is not None:
            self.table[:, 5] = first
            self._sent = None
        places = [p if isinstance(p, Place) else self._work(p) for p in (coef, scale)]
        about = {"out": self._out, "delta": delta, "div": div, "per_row": self._per_row}
        nonfinite = self._counters()
        for walk in self.types.blocks(self.table, "combine", self._out, per_row=self._per_row):
            combine.combine(self.call, self._table(), walk, *places, nonfinite, **about, **self.types.about)

    # ---- task vectors ----------------------------------------------------------------------------------------

    def deltas(self, deltas: Any) -> selection.Deltas:
        """How task vectors are formed, on the device."""
        index, bern = self.call.put(deltas.models), self.call.put(self._ordered(deltas.bernoulli))
        return selection.Deltas(index, bern, int(deltas.round_code), bool(deltas.drop))

    def select(self, deltas: selection.Deltas, ranks: I64, *, ties: str, together: bool) -> Keep:
        """Thresholds and tie cuts; ``ranks [S, N]``, one threshold for all tensors where ``together``."""
        call, types, table = self.call, self.types, self._table()
        found = selection.select(
            call, types, self.table, table, self._rows, self._tile_prefix(), deltas, self._ordered(ranks),
            ties=ties, together=together,
        )  # fmt: skip
        self._selected = found[2]
        return self._trimmed(deltas, found, spread=ties == "spread")

    def given(self, deltas: selection.Deltas, thr: Array, cut: I64, *, ties: str) -> Keep:
        """The same from what is known: thresholds ``[S, N]`` and cuts ``[S, N, 3]``."""
        found = np.concatenate([bounds(thr, wide=self.types.wide)[:, :, None], cut], axis=2)
        queries = self.call.put(np.arange(len(found))), self.call.zeros((len(found),), np.int64)
        places = (*queries, self.call.put(self._ordered(found)))
        return self._trimmed(deltas, places, spread=ties == "spread")

    def selected(self) -> list[tuple[Array, I64]]:
        """Thresholds and cuts that the last run selected, of each tensor, in the order of the caller; waits."""
        assert self._selected is not None
        found = self.array(self._selected)
        if self._order is not None:
            found = found[np.argsort(self._order)]
        return [(row[:, 0].astype(np.uint64), row[:, 1:].copy()) for row in found]

    def _trimmed(self, deltas: selection.Deltas, found: tuple[Place, Place, Place], *, spread: bool) -> Keep:
        """The keep pipeline of thresholds and cuts that are on the device."""
        call, types = self.call, self.types
        size = (len(self.table), len(types.codes) - 1)
        outs = call.room(size, types.key), call.room(size, np.int64), call.room(size, np.int32)
        about = {"round_code": deltas.round_code, "drop": deltas.drop}
        cuts(call, outs, self._table(), found, deltas.models, deltas.bernoulli, **about, **types.about)
        flags = deltas.round_code, deltas.drop, True, spread
        return Keep((deltas.models, deltas.bernoulli, *outs), flags, types.wide_sums)

    def untrimmed(self, deltas: selection.Deltas) -> Keep:
        """The keep pipeline without a trim."""
        nothing = [self.call.room((1,), t) for t in (self.types.key, np.int64, np.int32)]
        places = (deltas.models, deltas.bernoulli, *nothing)
        flags = deltas.round_code, deltas.drop, False, False
        return Keep(places, flags, self.types.wide_sums)  # type: ignore[arg-type]

    def rescale(self, keep: Keep, factors: Place, weights: Array) -> Place:
        """L1 norms before and after ``keep``, and the factors ``[S, N, 3]`` that restore them; the sums."""
        models = len(self.types.codes) - 1
        sums = self.call.room((int(self._tiles_here[-1]), 2 * models), np.float64)
        for walk in self.types.tiles(self.table, "l1", lanes=True):
            l1.l1(self.call, sums, self._table(), walk, keep, **self.types.about)
        total = self._fold(sums, np.arange(len(self.table) + 1)).sums
        lanes = len(self.table) * models
        args = (factors, self._wrong(), total, self.call.put(self._ordered(weights)), lanes)
        grid, flags = (-(-lanes // LANES),), (self.types.wide_sums, LANES)
        self.call.launch(solve.rescale_kernel, grid, args, *flags, num_warps=LANES // 32)
        return total

    def majority(self, keep: Keep, factors: Place, scale: Place, rules: Any, *, together: bool) -> None:
        """The sign that most elements of a tensor (or of all) elect, into ``scale [S, 3]``."""
        counts = self.call.room((int(self._tiles_here[-1]), 2), np.int64)
        about = {"elect": int(rules.votes.elect), "split": bool(rules.votes.split)}
        for walk in self.types.tiles(self.table, "votes", lanes=True):
            votes.votes(self.call, counts, self._table(), walk, keep, factors, **about, **self.types.about)
        tensors = len(self.table)
        first = np.array([0, tensors]) if together else np.arange(tensors + 1)
        args = (scale, counts, self._tile_prefix(), self.call.put(first))
        self.call.launch(solve.majority_kernel, (len(first) - 1,), args, self.types.wide_sums, 1024, num_warps=4)

    def tables(self, rules: Any) -> tuple[Place, Place]:
        """Factors ``[S, N, 3]`` and scale ``[S, 3]`` of a consensus, for steps to change."""
        return self._sums(rules.votes.factors), self._sums(rules.scale)

    def consensus(self, keep: Keep, factors: Place, scale: Place, rules: Any) -> None:
        """The merge itself."""
        share = consensus.shares(rules, self.types.sums)
        if len(share) > 1:
            share = self._ordered(share)
        walk = self.types.blocks(self.table, "consensus", self._out, lanes=True)
        places = factors, scale, self.call.put(share), self._counters()
        about = consensus.flags(rules, self._out)
        consensus.consensus(self.call, self._table(), walk, keep, *places, **about, **self.types.about)

    # ---- running ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Launches everything; see :meth:`fastmerge.kernels._call.Call.run`."""
        self.call.run()
        if self._back is not None:
            order, counters = (self.call.tensor(p) for p in self._back)
            self._nonfinite.index_add_(0, order, counters)

    def move(self, segments: Any) -> None:
        """The same for other tensors, that differ in addresses and keys alone (and are aligned alike)."""
        table = segments.table if self._order is None else segments.table[self._order]
        for place, rows, first in self._addressed:
            some = rows.copy()
            given = table[first : first + len(rows)]
            some[:, 0], some[:, 4], some[:, 7:] = given[:, 0], given[:, 4], given[:, 7:]
            self.call.rewrite(place, some)

    def wrong(self) -> int | None:
        """The first vector (of L1 norms: tensor times models plus model) whose sums are not finite; waits where asked.

        In the order of the layout.
        """
        if self._bad is None:
            return None
        found = np.zeros(1, np.int64)
        self.call.bring((self._bad, found))
        return int(found[0]) if found[0] < NOBODY else None

    def array(self, place: Place) -> Array:
        """What a call has found; waits."""
        out = np.zeros(place.shape, place.dtype)
        self.call.bring((place, out))
        return out
