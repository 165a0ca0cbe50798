"""The Triton kernels as one object: segment tables and numpy parameters in, launches out.

The same methods and arguments as the native backend. Tables are rounded to the work type here, once, and put on
the device; results that are numpy arrays are copied back, all of a call with one wait, and only for what the call
itself launched. An output that is already a tensor on the device is written in place and nothing waits: that is how
a stream keeps a GPU busy. Kernels run on the current stream of the calling thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from . import combine, consensus, count, delta_keys, gram, kth, l1, votes
from ._keep import cuts
from ._launch import (
    CONFIGS,
    I64,
    Keep,
    bounds,
    config,
    element_items,
    fold_here,
    interpreted,
    pack,
    signed,
    tile_items,
    undecided,
    upload,
)

Array = npt.NDArray[Any]


class TritonKernels:
    """Kernel backend on a CUDA device; on CPU addresses in Triton's interpreter (``TRITON_INTERPRET=1``).

    ``cuda`` without a number is the current device of the thread that calls, so one object serves the workers of
    several GPUs. Segment tables carry addresses of the device's memory. Arguments are the records of
    ``fastmerge/ops/kernels.py``, known here by their fields alone. Every row of an output array belongs to a piece of
    the call.
    """

    # Triton compiles and loads at the first launch and sets up a loaded kernel in steps that another thread can see;
    # the interpreter patches the language while a kernel runs. Nobody waits for a device inside.
    _turn = threading.Lock()

    def __init__(self, device: str | torch.device = "cuda") -> None:
        """Chooses the device.

        Raises:
            RuntimeError: for the CPU without the interpreter.
        """
        self.device = torch.device(device)
        if self.device.type == "cpu" and not interpreted():
            raise RuntimeError(
                "Triton kernels run on the CPU only with TRITON_INTERPRET=1, set before the first import"
            )
        self._own = threading.local()

    # ---- helpers ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """The device's context, and the launches of one call without those of others in between."""
        if self.device.type == "cpu":
            with self._turn, np.errstate(all="ignore"):
                yield
        else:
            with self._turn, torch.cuda.device(self.device):
                yield

    def _put(self, array: Any) -> torch.Tensor:
        return upload(array, self.device)

    def _work(self, array: Array, wide: bool) -> torch.Tensor:
        """An fp64 table rounded once to the work type."""
        with np.errstate(all="ignore"):
            return self._put(array.astype(np.float64 if wide else np.float32))

    def _room(self, array: Any) -> torch.Tensor:
        """A tensor on the device like an output that is written whole; its contents are not copied there."""
        if isinstance(array, torch.Tensor) or self.device.type == "cpu":
            return self._put(array)
        return torch.empty_like(torch.from_numpy(signed(array)), device=self.device)

    def _bring(self, *results: tuple[torch.Tensor, Any]) -> None:
        """Copies (contiguous tensor, caller's array) pairs back: one wait, for what this thread has launched.

        The copies have a stream of their own, so that kernels that others launch meanwhile neither wait for them nor
        are waited for.
        """
        pairs = [(t, a) for t, a in results if not isinstance(a, torch.Tensor) and a.size]
        if self.device.type == "cpu":
            for there, array in pairs:
                if not np.may_share_memory(there.numpy(), array):
                    np.copyto(array, there.numpy().view(array.dtype))
            return
        if not pairs:
            return
        with torch.cuda.device(self.device):
            side = self._side()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                landed = [torch.empty_like(t, device="cpu", pin_memory=True) for t, _ in pairs]
                for here, (there, _) in zip(landed, pairs, strict=True):
                    here.copy_(there, non_blocking=True)
                done = torch.cuda.Event(blocking=True)
                done.record()
        done.synchronize()
        for here, (_, array) in zip(landed, pairs, strict=True):
            np.copyto(array, here.numpy().view(array.dtype))

    def _side(self) -> torch.cuda.Stream:
        """This thread's stream for results on the current device."""
        known: dict[int, torch.cuda.Stream] = self._own.__dict__.setdefault("streams", {})
        index = torch.cuda.current_device()
        if index not in known:
            known[index] = torch.cuda.Stream()
        return known[index]

    def _keep(self, s: Any, wide: bool, keep: Any) -> tuple[Keep, Callable[..., Any]]:
        """Tables of the keep pipeline on the device, and how work items split by the tie rule."""
        round_code, drop, trim, thr, cut = keep.deltas.round_code, keep.deltas.drop, keep.trim, keep.thr, keep.cut
        codes = pack([d.code for d in s.dtypes])
        index, bern = self._put(keep.deltas.models), self._put(keep.deltas.bernoulli)
        table = self._put(s.table)
        below = self._put(bounds(thr, wide=wide))
        tie = self._put(cut[:, :, 2].astype(np.int32))
        spread = bool(trim and (cut[:, :, 2] >= 0).any())
        found = torch.empty((len(s.table), len(s.dtypes) - 1), dtype=torch.int64, device=self.device)
        if trim and len(s.table):
            args = (found, table, bern, index, below, self._put(cut))
            cuts(*args, inputs=len(s.dtypes), codes=codes, round_code=round_code, drop=drop, wide=wide)

        def split(items: Any) -> list[tuple[bool, bool, I64]]:
            some = np.zeros(len(items.unmasked), bool)
            if trim:
                some = undecided(s.table, items.unmasked, thr, cut, wide=wide)
            out: list[tuple[bool, bool, I64]] = items.split(some)
            return out

        flags = (int(round_code), bool(drop), bool(trim), spread)
        return Keep((index, bern, below, found, tie), flags), split

    @staticmethod
    def _types(s: Any) -> tuple[list[int], bool, dict[str, Any]]:
        """Type codes, whether the work is fp64, and the arguments that describe both to a launcher."""
        codes = [int(d.code) for d in s.dtypes]
        wide = 0 in codes
        return codes, wide, {"inputs": len(codes), "codes": pack(codes), "wide": wide}

    def _bad(self, s: Any) -> tuple[torch.Tensor, Any]:
        """Counters of non-finite outputs on the device, and the caller's; ones to throw away where it has none."""
        if len(s.nonfinite) == len(s.table):
            return self._put(s.nonfinite), s.nonfinite
        return torch.zeros(len(s.table), dtype=torch.int64, device=self.device), np.zeros(0, np.int64)

    def supports(self, spec: Any) -> str | None:
        """Why a spec's program would miss a kernel here; None where it has all."""
        lacking = [name for name in spec.method.needs if not hasattr(self, name)]
        return f"the Triton backend has no kernel {lacking[0]!r}" if lacking else None

    # ---- kernels ---------------------------------------------------------------------------------------

    def combine(self, segments: Any, coef: Any, scale: Any, *, delta: bool, per_row: bool) -> None:
        """Weighted sums into the output addresses; ``coef [P, M]``, ``scale [P, 2]`` (lambda, divisor)."""
        s, (codes, wide, about) = segments, self._types(segments)
        out = int(s.out_dtype.code)
        items = element_items(s.table, codes, out, block=config("combine")["BLOCK"], per_row=per_row)
        with self._running():
            bad, given = self._bad(s)
            div = bool((scale[:, 1] != 1).any())
            table, coef, scale = self._put(s.table), self._work(coef, wide), self._work(scale, wide)
            for unmasked, some in items.variants():
                combine.combine(
                    table, some, coef, scale, bad, out=out, delta=bool(delta), div=div, unmasked=unmasked, **about
                )  # fmt: skip
        self._bring((bad, given))

    def gram(self, segments: Any, partials: Any, *, delta: bool, diff: bool, per_row: bool) -> None:
        """Inner products of every tile into ``partials [R, pairs]``, from row ``stats`` of each piece on."""
        s, (codes, _, about) = segments, self._types(segments)
        items = tile_items(s.table, codes, block=CONFIGS["gram"]["BLOCK"], per_row=per_row)
        with self._running():
            out, table = self._room(partials), self._put(s.table)
            for unmasked, some in items.variants():
                gram.gram(out, table, some, delta=bool(delta), diff=bool(diff), unmasked=unmasked, **about)
        self._bring((out, partials))

    @staticmethod
    def fold(partials: Array, first: I64) -> npt.NDArray[np.float64]:
        """Ordered fp64 sums of the row ranges that start at ``first [G + 1]``: ``[G, C]``.

        On the host: they are few (one row per 65,536 elements), and a round trip to the device would be the second
        one of the pass.
        """
        return fold_here(partials, first)

    def delta_keys(self, segments: Any, deltas: Any, out: Any) -> None:
        """Magnitude keys of all elements, ``uint32 [L, N]`` (``uint64`` where the work type is fp64)."""
        codes, _, about = self._types(segments)
        table = segments.table.copy()
        table[:, 6] = np.cumsum(table[:, 1]) - table[:, 1]  # the output row is where the piece's keys start
        items = element_items(table, codes, -1, block=config("delta_keys")["BLOCK"], lanes=True, rows=True)
        with self._running():
            keys = self._room(out)
            args = (self._put(table), self._put(deltas.models), self._put(deltas.bernoulli))
            about |= {"round_code": int(deltas.round_code), "drop": bool(deltas.drop)}
            for unmasked, some in items.variants():
                delta_keys.delta_keys(keys, args[0], some, *args[1:], unmasked=unmasked, **about)
        self._bring((keys, out))

    def count(self, segments: Any, deltas: Any, brackets: Any, found: Any) -> None:
        """Keys above, at and inside brackets, per tile; those strictly inside are listed up to the capacity.

        Of the lists, only what is used comes back: a second, short wait, where anything was listed at all.
        """
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["count"]["BLOCK"], lanes=True)
        about |= {"round_code": int(deltas.round_code), "drop": bool(deltas.drop)}
        bounded = [bounds(a, wide=wide) for a in (brackets.low, brackets.high)]
        with self._running():
            outs = [self._room(found.counts), self._room(found.keys), self._room(found.where), self._put(found.used)]
            ins = [self._put(a) for a in (deltas.models, deltas.bernoulli, *bounded)]
            table = self._put(segments.table)
            for unmasked, some in items.variants():
                count.count(*outs, table, some, *ins, unmasked=unmasked, **about)
        self._bring((outs[0], found.counts), (outs[3], found.used))
        if not isinstance(found.used, torch.Tensor):
            full = np.minimum(found.used, found.keys.shape[1]).tolist()
            pairs = ((outs[1], found.keys), (outs[2], found.where))
            self._bring(*((there[i, :n], array[i, :n]) for there, array in pairs for i, n in enumerate(full)))

    def kth(self, segments: Any, deltas: Any, ranks: Any, thr: Any, found: Any) -> None:
        """Thresholds of whole tensors that fit the registers of one program; larger ones stay open."""
        _, wide, about = self._types(segments)
        table = segments.table
        small = np.ascontiguousarray(table[table[:, 1] <= kth.MOST >> wide])
        if not len(small) or not ranks[small[:, 5]].any():
            return
        about |= {"round_code": int(deltas.round_code), "drop": bool(deltas.drop)}
        with self._running():
            outs = self._put(thr), self._put(found)
            tables = [self._put(a) for a in (small, deltas.models, deltas.bernoulli, np.ascontiguousarray(ranks))]
            kth.kth(*outs, *tables, most=int(small[:, 1].max()), **about)
        self._bring((outs[0], thr), (outs[1], found))

    def l1(self, segments: Any, keep: Any, sums: Any) -> None:
        """``sums [R, N, 2]``: |d| and |kept d| of every tile."""
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["l1"]["BLOCK"], lanes=True)
        with self._running():
            out = self._room(sums)
            tables, split = self._keep(segments, wide, keep)
            for unmasked, cut, some in split(items):
                l1.l1(out, self._put(segments.table), some, tables, unmasked=unmasked, cut=cut, **about)
        self._bring((out, sums))

    def votes(self, segments: Any, keep: Any, election: Any, counts: Any) -> None:
        """``counts [R, 2]``: positive and negative votes of every tile."""
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["votes"]["BLOCK"], lanes=True)
        about |= {"elect": int(election.elect), "split": bool(election.split)}
        with self._running():
            out = self._room(counts)
            tables, split = self._keep(segments, wide, keep)
            f = self._work(election.factors, wide)
            for unmasked, cut, some in split(items):
                votes.votes(out, self._put(segments.table), some, tables, f, unmasked=unmasked, cut=cut, **about)
        self._bring((out, counts))

    def consensus(self, segments: Any, keep: Any, rules: Any) -> None:
        """The merge of task vectors: ``factors [P, N, 3]``, ``scale [P, 3]``."""
        s, (codes, wide, about) = segments, self._types(segments)
        elect, merge, f, scale = int(rules.votes.elect), int(rules.merge), rules.votes.factors, rules.scale
        out = int(s.out_dtype.code)
        items = element_items(s.table, codes, out, block=config("consensus")["BLOCK"], lanes=True)
        about |= {"out": out, "elect": elect, "split": bool(rules.votes.split), "zero": int(rules.zero), "merge": merge}
        about["div"] = elect == consensus.NONE and bool((scale[:, 1] != 1).any())
        with self._running():
            bad, given = self._bad(s)
            tables, split = self._keep(s, wide, keep)
            work = np.float64 if wide else np.float32
            few = elect != consensus.NONE and merge == consensus.MEAN and f.shape[1] <= consensus.SETS.value
            share = self._put(consensus.shares(f, scale, work) if few else np.zeros((1, 1), work))
            table, f, scale = self._put(s.table), self._work(f, wide), self._work(scale, wide)
            for unmasked, cut, some in split(items):
                consensus.consensus(table, some, tables, f, scale, share, bad, unmasked=unmasked, cut=cut, **about)
        self._bring((bad, given))
