"""The Triton kernels as one object: segment tables and numpy parameters in, launches out.

The same methods and arguments as the native backend. Tables are rounded to the work type here, once, and sent to the
device in one copy per call; results that are numpy arrays are copied back, all of a call with one wait. An output that
is already a tensor on the device is written in place and nothing waits. Kernels run on the current stream of the
calling thread. Tensors that are on the device whole take the shorter way of :mod:`fastmerge.kernels.sequence`, which
asks the host nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import combine, consensus, count, delta_keys, dot, gram, kth, l1, selection, votes
from ._call import INTERPRETED, Call, Gpu, Place
from ._keep import Keep, cuts
from ._launch import I64, bounds
from ._types import Types
from .sequence import Sequence

Array = npt.NDArray[Any]


class TritonKernels:
    """Kernel backend on a CUDA device; on CPU addresses in Triton's interpreter (``TRITON_INTERPRET=1``).

    ``cuda`` without a number is the current device of the thread that calls, so one object serves the workers of
    several GPUs. Segment tables carry addresses of the device's memory. Arguments are the records of
    ``fastmerge/ops/kernels.py``, known here by their fields alone. Every row of an output array belongs to a piece of
    the call.
    """

    def __init__(self, device: str | torch.device = "cuda") -> None:
        """Chooses the device.

        Raises:
            RuntimeError: for the CPU without the interpreter.
        """
        self.device = torch.device(device)
        if self.device.type == "cpu" and not INTERPRETED:
            raise RuntimeError(
                "Triton kernels run on the CPU only with TRITON_INTERPRET=1, set before the first import"
            )
        self.gpu = Gpu(self.device)

    def supports(self, spec: Any) -> str | None:
        """Why a spec's program would miss a kernel here; None where it has all."""
        lacking = [name for name in spec.method.wants() if not hasattr(self, name)]
        return f"the Triton backend has no kernel {lacking[0]!r}" if lacking else None

    @property
    def launcher(self) -> TritonKernels:
        """Itself."""
        return self

    def sequence(
        self,
        segments: Any,
        order: I64 | None = None,
        *,
        per_row: bool = False,
        wide: bool = False,
        wide_sums: bool = False,
    ) -> Sequence:
        """The launches of a batch of whole tensors; the program adds its steps. ``wide`` works in fp64."""
        return Sequence(self.gpu, segments, order, per_row=per_row, wide=wide, wide_sums=wide_sums)

    @staticmethod
    def ways(segments: Any) -> I64:
        """How thresholds of tensors are found, which is how they are laid out."""
        return selection.ways(Types(segments.dtypes), segments.table[:, 1])

    # ---- helpers ---------------------------------------------------------------------------------------

    def _out(self, call: Call, array: Any) -> Any:
        """Room for an output that is written whole; the tensor itself where it is on the device already."""
        return array if isinstance(array, torch.Tensor) else call.room(array.shape, array.dtype)

    def _bad(self, call: Call, s: Any) -> Any:
        """Counters of non-finite outputs; ones to throw away where the caller has none."""
        given = s.nonfinite
        return given if isinstance(given, torch.Tensor) and len(given) else call.zeros((len(s.table),), np.int64)

    @staticmethod
    def _finish(call: Call, *results: tuple[Any, Any]) -> None:
        """Runs a call and brings back what goes to the host."""
        call.run()
        call.bring(*((p, a) for p, a in results if isinstance(p, Place)))

    def _counted(self, call: Call, s: Any, bad: Any) -> None:
        """Runs a call and adds its counters to the caller's."""
        call.run()
        if len(s.nonfinite) and isinstance(bad, Place):
            here = np.zeros(len(s.table), np.int64)
            call.bring((bad, here))
            s.nonfinite += here

    def _keep(self, call: Call, s: Any, types: Types, keep: Any, table: Place) -> Keep:
        """Tables of the keep pipeline, per segment."""
        d, cut = keep.deltas, keep.cut
        index, bern = call.put(d.models), call.put(d.bernoulli)
        size = (len(s.table), len(s.dtypes) - 1)
        outs = call.room(size, types.key), call.room(size, np.int64), call.room(size, np.int32)
        if keep.trim and len(s.table):
            found = np.concatenate([bounds(keep.thr, wide=types.wide)[:, :, None], cut], axis=2)
            queries = call.put(s.table[:, 5]), call.zeros((len(s.table),), np.int64), call.put(found)
            about = {"round_code": int(d.round_code), "drop": bool(d.drop)}
            cuts(call, outs, table, queries, index, bern, **about, **types.about)
        spread = bool(keep.trim and (cut[:, :, 2] >= 0).any())
        flags = int(d.round_code), bool(d.drop), bool(keep.trim), spread
        return Keep((index, bern, *outs), flags, types.wide_sums)

    # ---- kernels ---------------------------------------------------------------------------------------

    def combine(
        self, segments: Any, coef: Array, scale: Array, *, delta: bool, per_row: bool, wide: bool = False
    ) -> None:
        """Weighted sums into the output addresses; ``coef [P, M]``, ``scale [P, 2]`` (lambda, divisor)."""
        s, types, call = segments, Types(segments.dtypes, wide=wide), Call(self.gpu)
        out, bad, table = int(s.out_dtype.code), self._bad(call, s), call.put(s.table)
        places = call.put(types.work(coef)), call.put(types.work(scale)), bad
        about = {"out": out, "delta": bool(delta), "div": bool((scale[:, 1] != 1).any()), "per_row": bool(per_row)}
        for walk in types.blocks(s.table, "combine", out, per_row=per_row):
            combine.combine(call, table, walk, *places, **about, **types.about)
        self._counted(call, s, bad)

    def gram(self, segments: Any, partials: Any, *, delta: bool, diff: bool, per_row: bool) -> None:
        """Inner products of every tile into ``partials [R, pairs]``, from row ``stats`` of each piece on."""
        s, types, call = segments, Types(segments.dtypes), Call(self.gpu)
        out, table = self._out(call, partials), call.put(s.table)
        about = {"delta": bool(delta), "diff": bool(diff), "per_row": bool(per_row)}
        for walk in types.tiles(s.table, "gram", per_row=per_row):
            gram.gram(call, out, table, walk, **about, **types.about)
        self._finish(call, (out, partials))

    def dot(self, segments: Any, partials: Any) -> None:
        """``sum g (x_i - b)`` of every tile into ``partials [R, N]``, from row ``stats`` of each piece on."""
        s, types, call = segments, Types(segments.dtypes), Call(self.gpu)
        out, table = self._out(call, partials), call.put(s.table)
        for walk in types.tiles(s.table, "dot"):
            dot.dot(call, out, table, walk, **types.about)
        self._finish(call, (out, partials))

    @staticmethod
    def fold(partials: Array, first: I64) -> npt.NDArray[np.float64]:
        """Ordered fp64 sums of the row ranges that start at ``first [G + 1]``: ``[G, C]``.

        On the host, for a tensor that the device has seen in pieces: they are few (one row per 65,536 elements).
        """
        return fold_here(partials, first)

    def delta_keys(self, segments: Any, deltas: Any, out: Any) -> None:
        """Magnitude keys of all elements, ``uint32 [L, N]`` (``uint64`` where the work type is fp64)."""
        types, call, table = Types(segments.dtypes), Call(self.gpu), segments.table.copy()
        table[:, 6] = np.cumsum(table[:, 1]) - table[:, 1]  # where the piece's keys start
        keys, there = self._out(call, out), call.put(table)
        tables = call.put(deltas.models), call.put(deltas.bernoulli)
        about = {"round_code": int(deltas.round_code), "drop": bool(deltas.drop)}
        for walk in types.blocks(table, "delta_keys", lanes=True):
            delta_keys.delta_keys(call, keys, there, walk, *tables, **about, **types.about)
        self._finish(call, (keys, out))

    def count(self, segments: Any, deltas: Any, brackets: Any, found: Any) -> None:
        """Keys above, at and inside brackets, per tile; those strictly inside are listed up to the capacity.

        Of the lists, only what is used comes back: a second, short wait, where anything was listed at all. ``where``
        gets the first element of the tile.
        """
        s, types, call = segments, Types(segments.dtypes), Call(self.gpu)
        models, cap = found.keys.shape
        table = call.put(s.table)
        counts = call.zeros(found.counts.shape, np.int64)
        keys, tiles = call.room(found.keys.shape, types.key), call.room(found.keys.shape, np.int32)
        used = call.zeros((models,), np.int64)
        ends = np.stack([bounds(a, wide=types.wide) for a in brackets], axis=2)
        regions = np.stack([np.arange(models) * cap, np.full(models, cap)], axis=1)
        queries = call.put(s.table[:, 5]), call.zeros((len(s.table),), np.int64), call.put(ends), call.put(regions)
        args = call.put(deltas.models), call.put(deltas.bernoulli), queries
        about = {"round_code": int(deltas.round_code), "drop": bool(deltas.drop)}
        for walk in types.tiles(s.table, "count", lanes=True):
            count.count(call, (counts, keys, tiles, used), table, walk, *args, **about, **types.about)
        call.run()
        more = np.zeros(models, np.int64)
        call.bring((counts, found.counts), (used, more))
        found.used[:] += more
        self._lists(call, s.table, found, (keys, tiles), more)

    @staticmethod
    def _lists(call: Call, table: I64, found: Any, places: tuple[Place, Place], used: Array) -> None:
        """Brings the used part of the lists, and says of each key in which tile it is."""
        cap = found.keys.shape[1]
        parts = [(p, i, int(n)) for p in places for i, n in enumerate(np.minimum(used, cap)) if n]
        arrays = [np.zeros(n, p.dtype) for p, _, n in parts]
        pairs = [(p._replace(offset=p.offset + i * cap * p.dtype.itemsize, shape=(n,)), a)
                 for (p, i, n), a in zip(parts, arrays, strict=True)]  # fmt: skip
        call.bring(*pairs)
        segment = np.repeat(np.arange(len(table)), -(-table[:, 1] // 65_536))
        for (p, i, n), a in zip(parts, arrays, strict=True):
            if p is places[0]:
                found.keys[i, :n] = a.view(found.keys.dtype)
                continue
            row = table[segment[a]]
            found.where[i, :n, 0] = row[:, 5]
            found.where[i, :n, 1] = row[:, 2] + (a - row[:, 6]) * 65_536

    def kth(self, segments: Any, deltas: Any, ranks: Any, thr: Any, found: Any) -> None:
        """Thresholds of whole tensors that fit the registers of one program; larger ones stay open."""
        types, table = Types(segments.dtypes), segments.table
        small = table[table[:, 1] <= kth.MOST >> types.wide]
        if not len(small) or not ranks[small[:, 5]].any():
            return
        call = Call(self.gpu)
        out = call.zeros((*thr.shape, 3), np.int64)
        tables = [call.put(a) for a in (small, deltas.models, deltas.bernoulli, ranks)]
        about = {"round_code": int(deltas.round_code), "drop": bool(deltas.drop)}
        kth.kth(call, out, *tables, most=int(small[:, 1].max()), **about, **types.about)
        here = np.zeros(out.shape, np.int64)
        self._finish(call, (out, here))
        known = here[:, :, 2] > 0
        np.copyto(thr, here[:, :, 0].astype(np.uint64), where=known)
        np.copyto(found, here[:, :, [1, 2, 2, 1]] * np.array([1, 1, 0, 1]), where=known[:, :, None])

    def l1(self, segments: Any, keep: Any, sums: Any) -> None:
        """``sums [R, N, 2]``: |d| and |kept d| of every tile."""
        s, types, call = segments, Types(segments.dtypes, wide_sums=keep.wide_sums), Call(self.gpu)
        out, table = self._out(call, sums), call.put(s.table)
        tables = self._keep(call, s, types, keep, table)
        for walk in types.tiles(s.table, "l1", lanes=True):
            l1.l1(call, out, table, walk, tables, **types.about)
        self._finish(call, (out, sums))

    def votes(self, segments: Any, keep: Any, election: Any, counts: Any) -> None:
        """``counts [R, 2]``: positive and negative votes of every tile."""
        s, types, call = segments, Types(segments.dtypes, wide_sums=keep.wide_sums), Call(self.gpu)
        out, table = self._out(call, counts), call.put(s.table)
        tables, f = self._keep(call, s, types, keep, table), call.put(types.sums(election.factors))
        about = {"elect": int(election.elect), "split": bool(election.split)}
        for walk in types.tiles(s.table, "votes", lanes=True):
            votes.votes(call, out, table, walk, tables, f, **about, **types.about)
        self._finish(call, (out, counts))

    def consensus(self, segments: Any, keep: Any, rules: Any) -> None:
        """The merge of task vectors: ``factors [P, N, 3]``, ``scale [P, 3]``."""
        s, types, call = segments, Types(segments.dtypes, wide_sums=keep.wide_sums), Call(self.gpu)
        out, bad, table = int(s.out_dtype.code), self._bad(call, s), call.put(s.table)
        tables = self._keep(call, s, types, keep, table)
        places = call.put(types.sums(rules.votes.factors)), call.put(types.sums(rules.scale))
        share = call.put(consensus.shares(rules, types.sums))
        walk = types.blocks(s.table, "consensus", out, lanes=True)
        about = consensus.flags(rules, out)
        consensus.consensus(call, table, walk, tables, *places, share, bad, **about, **types.about)
        self._counted(call, s, bad)


def fold_here(partials: npt.NDArray[np.float64], first: I64) -> npt.NDArray[np.float64]:
    """Ordered fp64 sums, from +0, of the row ranges of ``partials [R, C]`` that start at ``first [G + 1]``.

    Few long ranges are summed one by one, many short ones (rows) all at once.
    """
    out = np.zeros((len(first) - 1, partials.shape[1]))
    starts, counts = first[:-1], np.diff(first)
    most = int(counts.max(initial=0))
    with np.errstate(all="ignore"):
        if most > len(counts):
            for g, (start, end) in enumerate(zip(first[:-1].tolist(), first[1:].tolist(), strict=True)):
                if end > start:  # numpy adds up in order; + 0.0 makes the +0 of it that +0 + -0 is
                    out[g] = np.cumsum(partials[start:end], axis=0)[-1] + 0.0
            return out
        longest = np.argsort(-counts, kind="stable")
        left = int((counts > 0).sum())
        for k in range(most):
            while left and counts[longest[left - 1]] <= k:
                left -= 1
            some = longest[:left]
            out[some] += partials[starts[some] + k]
    return out
