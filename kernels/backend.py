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

from . import combine, consensus, count, delta_keys, gram, l1, votes
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
    several GPUs. Segment tables carry addresses of the device's memory. ``keep`` stands for seven arguments, as in
    the native backend: round_code, drop, trim, model_index ``[N]``, bern ``[P, N]``, thr ``[P, N]``,
    cut ``[P, N, 3]``. Every row of an output array belongs to a piece of the call.
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

    def _keep(self, s: Any, wide: bool, keep: tuple[Any, ...]) -> tuple[Keep, Callable[..., Any]]:
        """Tables of the keep pipeline on the device, and how work items split by the tie rule."""
        round_code, drop, trim, index, bern, thr, cut = keep
        codes = pack([d.code for d in s.dtypes])
        index, bern = self._put(index), self._put(bern)
        table = self._put(s.table)
        below = self._put(bounds(thr, wide=wide))
        tie = self._put(cut[:, :, 2].astype(np.int32))
        spread = bool(trim and (cut[:, :, 2] >= 0).any())
        found = torch.empty((len(s.table), len(s.dtypes) - 1), dtype=torch.int64, device=self.device)
        if trim and len(s.table):
            args = (found, table, bern, index, below, self._put(cut))
            cuts(*args, inputs=len(s.dtypes), codes=codes, round_code=round_code, drop=drop, wide=wide)

        def split(items: Any) -> list[tuple[bool, bool, I64]]:
            some = np.zeros(len(items.plain), bool)
            if trim:
                some = undecided(s.table, items.plain, thr, cut, wide=wide)
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

    @staticmethod
    def supports(spec: Any) -> str | None:
        """Every family has its kernels here."""
        del spec
        return None

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
            for plain, some in items.variants():
                combine.combine(
                    table, some, coef, scale, bad, out=out, delta=bool(delta), div=div, plain=plain, **about
                )  # fmt: skip
        self._bring((bad, given))

    def gram(self, segments: Any, partials: Any, *, delta: bool, diff: bool, per_row: bool) -> None:
        """Inner products of every tile into ``partials [R, pairs]``, from row ``stats`` of each piece on."""
        s, (codes, _, about) = segments, self._types(segments)
        items = tile_items(s.table, codes, block=CONFIGS["gram"]["BLOCK"], per_row=per_row)
        with self._running():
            out, table = self._room(partials), self._put(s.table)
            for plain, some in items.variants():
                gram.gram(out, table, some, delta=bool(delta), diff=bool(diff), plain=plain, **about)
        self._bring((out, partials))

    @staticmethod
    def fold(partials: Array, first: I64) -> npt.NDArray[np.float64]:
        """Ordered fp64 sums of the row ranges that start at ``first [G + 1]``: ``[G, C]``.

        On the host: they are few (one row per 65,536 elements), and a round trip to the device would be the second
        one of the pass.
        """
        return fold_here(partials, first)

    def delta_keys(self, segments: Any, round_code: int, drop: bool, model_index: Any, bern: Any, out: Any) -> None:
        """Magnitude keys of all elements, ``uint32 [L, N]`` (``uint64`` where the work type is fp64)."""
        codes, _, about = self._types(segments)
        table = segments.table.copy()
        table[:, 6] = np.cumsum(table[:, 1]) - table[:, 1]  # the output row is where the piece's keys start
        items = element_items(table, codes, -1, block=config("delta_keys")["BLOCK"], lanes=True, rows=True)
        with self._running():
            keys = self._room(out)
            args = (self._put(table), self._put(model_index), self._put(bern))
            for plain, some in items.variants():
                delta_keys.delta_keys(
                    keys, args[0], some, *args[1:], round_code=int(round_code), drop=bool(drop), plain=plain, **about
                )  # fmt: skip
        self._bring((keys, out))

    def count(
        self,
        segments: Any,
        round_code: int,
        drop: bool,
        model_index: Any,
        bern: Any,
        lo: Array,
        hi: Array,
        counts: Any,
        keys: Any,
        where: Any,
        used: Any,
    ) -> None:
        """Keys above, at and inside brackets, per tile; those strictly inside are listed up to the capacity.

        Of the lists, only what is used comes back: a second, short wait, where anything was listed at all.
        """
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["count"]["BLOCK"], lanes=True)
        with self._running():
            outs = [self._room(counts), self._room(keys), self._room(where), self._put(used)]
            ins = [self._put(a) for a in (model_index, bern, bounds(lo, wide=wide), bounds(hi, wide=wide))]
            table = self._put(segments.table)
            for plain, some in items.variants():
                count.count(
                    *outs, table, some, *ins, round_code=int(round_code), drop=bool(drop), plain=plain, **about
                )  # fmt: skip
        self._bring((outs[0], counts), (outs[3], used))
        if not isinstance(used, torch.Tensor):
            full = np.minimum(used, keys.shape[1]).tolist()
            pairs = ((outs[1], keys), (outs[2], where))
            self._bring(*((there[i, :n], array[i, :n]) for there, array in pairs for i, n in enumerate(full)))

    def l1(self, segments: Any, *keep_and_sums: Any) -> None:
        """``keep``, then ``sums [R, N, 2]``: |d| and |kept d| of every tile."""
        *keep, sums = keep_and_sums
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["l1"]["BLOCK"], lanes=True)
        with self._running():
            out = self._room(sums)
            tables, split = self._keep(segments, wide, tuple(keep))
            for plain, cut, some in split(items):
                l1.l1(out, self._put(segments.table), some, tables, plain=plain, cut=cut, **about)
        self._bring((out, sums))

    def votes(self, segments: Any, *keep_and_votes: Any) -> None:
        """``keep``, elect, split, ``f [P, N, 3]``, then ``counts [R, 2]``: positive and negative votes."""
        *keep, elect, split_vote, f, counts = keep_and_votes
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["votes"]["BLOCK"], lanes=True)
        about |= {"elect": int(elect), "split": bool(split_vote)}
        with self._running():
            out = self._room(counts)
            tables, split = self._keep(segments, wide, tuple(keep))
            f = self._work(f, wide)
            for plain, cut, some in split(items):
                votes.votes(out, self._put(segments.table), some, tables, f, plain=plain, cut=cut, **about)
        self._bring((out, counts))

    def consensus(self, segments: Any, *keep_and_rules: Any) -> None:
        """``keep``, elect, split, zero, merge, ``f [P, N, 3]``, ``scale [P, 3]``: the merge of deltas."""
        *keep, elect, split_vote, zero, merge, f, scale = keep_and_rules
        s, (codes, wide, about) = segments, self._types(segments)
        out = int(s.out_dtype.code)
        items = element_items(s.table, codes, out, block=config("consensus")["BLOCK"], lanes=True)
        about |= {"out": out, "elect": int(elect), "split": bool(split_vote), "zero": int(zero), "merge": int(merge)}
        about["div"] = elect == consensus.NONE and bool((scale[:, 1] != 1).any())
        with self._running():
            bad, given = self._bad(s)
            tables, split = self._keep(s, wide, tuple(keep))
            kind = np.float64 if wide else np.float32
            few = elect != consensus.NONE and merge == consensus.MEAN and f.shape[1] <= consensus.SETS.value
            share = self._put(consensus.shares(f, scale, kind) if few else np.zeros((1, 1), kind))
            table, f, scale = self._put(s.table), self._work(f, wide), self._work(scale, wide)
            for plain, cut, some in split(items):
                consensus.consensus(table, some, tables, f, scale, share, bad, plain=plain, cut=cut, **about)
        self._bring((bad, given))
