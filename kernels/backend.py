"""The Triton kernels as one object: segment tables and numpy parameters in, launches out.

The same methods and arguments as the native backend. Tables are rounded to the work type here, once, and put on
the device; results that are numpy arrays are copied back, which waits for the device. An output that is already a
tensor on the device is written in place and nothing waits: that is how a stream keeps a GPU busy.
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
    interpreted,
    pack,
    tile_items,
    undecided,
    upload,
)

Array = npt.NDArray[Any]


class TritonKernels:
    """Kernel backend on one CUDA device; on CPU addresses in Triton's interpreter (``TRITON_INTERPRET=1``).

    Segment tables carry addresses of the device's memory. ``keep`` stands for seven arguments, as in the native
    backend: round_code, drop, trim, model_index ``[N]``, bern ``[P, N]``, thr ``[P, N]``, cut ``[P, N, 3]``.
    """

    _turn = threading.Lock()  # the interpreter patches the language while a kernel runs

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

    # ---- helpers ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """The device's context, or the interpreter to ourselves and without numpy's warnings."""
        if self.device.type == "cpu":
            with self._turn, np.errstate(all="ignore"):
                yield
        else:
            with torch.cuda.device(self.device):
                yield

    def _put(self, array: Any) -> torch.Tensor:
        return upload(array, self.device)

    def _work(self, array: Any, wide: bool) -> torch.Tensor:
        """An fp64 table rounded once to the work type."""
        if isinstance(array, torch.Tensor):
            return array
        with np.errstate(all="ignore"):
            return self._put(np.asarray(array).astype(np.float64 if wide else np.float32))

    def _result(self, array: Any) -> tuple[torch.Tensor, Callable[[], None]]:
        """An output on the device, with its present contents, and what brings it back to the caller's array."""
        there = self._put(array)
        if isinstance(array, torch.Tensor):
            return there, lambda: None

        def back() -> None:
            here = there.cpu().numpy()
            if not np.shares_memory(here, array):
                np.copyto(array, here.view(array.dtype))

        return there, back

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

    def _bad(self, s: Any) -> tuple[torch.Tensor, Callable[[], None]]:
        """The caller's counters of non-finite outputs, or ones to throw away."""
        if len(s.nonfinite) == len(s.table):
            return self._result(s.nonfinite)
        return torch.zeros(len(s.table), dtype=torch.int64, device=self.device), lambda: None

    # ---- kernels ---------------------------------------------------------------------------------------

    def combine(self, segments: Any, coef: Any, scale: Any, *, delta: bool, per_row: bool) -> None:
        """Weighted sums into the output addresses; ``coef [P, M]``, ``scale [P, 2]`` (lambda, divisor)."""
        s, (codes, wide, about) = segments, self._types(segments)
        out = int(s.out_dtype.code)
        items = element_items(s.table, codes, out, block=config("combine")["BLOCK"], per_row=per_row)
        with self._running():
            bad, back = self._bad(s)
            div = isinstance(scale, torch.Tensor) or bool((scale[:, 1] != 1).any())
            table, coef, scale = self._put(s.table), self._work(coef, wide), self._work(scale, wide)
            for plain, some in items.variants():
                combine.combine(
                    table, some, coef, scale, bad, out=out, delta=bool(delta), div=div, plain=plain, **about
                )  # fmt: skip
            back()

    def gram(self, segments: Any, partials: Any, *, delta: bool, diff: bool, per_row: bool) -> None:
        """Inner products of every tile into ``partials [R, pairs]``, from row ``stats`` of each piece on."""
        s, (codes, _, about) = segments, self._types(segments)
        items = tile_items(s.table, codes, block=CONFIGS["gram"]["BLOCK"], per_row=per_row)
        with self._running():
            out, back = self._result(partials)
            table = self._put(s.table)
            for plain, some in items.variants():
                gram.gram(out, table, some, delta=bool(delta), diff=bool(diff), plain=plain, **about)
            back()

    def fold(self, partials: Any, first: Any) -> npt.NDArray[np.float64]:
        """Ordered fp64 sums of the row ranges that start at ``first [G + 1]``: ``[G, C]``."""
        with self._running():
            out = torch.empty((len(first) - 1, partials.shape[1]), dtype=torch.float64, device=self.device)
            gram.fold_rows(out, self._put(partials), self._put(first))
            return out.cpu().numpy()

    def delta_keys(self, segments: Any, round_code: int, drop: bool, model_index: Any, bern: Any, out: Any) -> None:
        """Magnitude keys of all elements, ``uint32 [L, N]`` (``uint64`` where the work type is fp64)."""
        codes, _, about = self._types(segments)
        table = segments.table.copy()
        table[:, 6] = np.cumsum(table[:, 1]) - table[:, 1]  # the output row is where the piece's keys start
        items = element_items(table, codes, -1, block=config("delta_keys")["BLOCK"], lanes=True, rows=True)
        with self._running():
            keys, back = self._result(out)
            args = (self._put(table), self._put(model_index), self._put(bern))
            for plain, some in items.variants():
                delta_keys.delta_keys(
                    keys, args[0], some, *args[1:], round_code=int(round_code), drop=bool(drop), plain=plain, **about
                )  # fmt: skip
            back()

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
        """Keys above, at and inside brackets, per tile; those strictly inside are listed up to the capacity."""
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["count"]["BLOCK"], lanes=True)
        with self._running():
            outs = [self._result(a) for a in (counts, keys, where, used)]
            ins = [self._put(a) for a in (model_index, bern, bounds(lo, wide=wide), bounds(hi, wide=wide))]
            table = self._put(segments.table)
            for plain, some in items.variants():
                count.count(
                    *(t for t, _ in outs), table, some, *ins, round_code=int(round_code), drop=bool(drop), plain=plain,
                    **about
                )  # fmt: skip
            for _, back in outs:
                back()

    def l1(self, segments: Any, *keep_and_sums: Any) -> None:
        """``keep``, then ``sums [R, N, 2]``: |d| and |kept d| of every tile."""
        *keep, sums = keep_and_sums
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["l1"]["BLOCK"], lanes=True)
        with self._running():
            out, back = self._result(sums)
            tables, split = self._keep(segments, wide, tuple(keep))
            for plain, cut, some in split(items):
                l1.l1(out, self._put(segments.table), some, tables, plain=plain, cut=cut, **about)
            back()

    def votes(self, segments: Any, *keep_and_votes: Any) -> None:
        """``keep``, elect, split, ``f [P, N, 3]``, then ``counts [R, 2]``: positive and negative votes."""
        *keep, elect, split_vote, f, counts = keep_and_votes
        codes, wide, about = self._types(segments)
        items = tile_items(segments.table, codes, block=CONFIGS["votes"]["BLOCK"], lanes=True)
        about |= {"elect": int(elect), "split": bool(split_vote)}
        with self._running():
            out, back = self._result(counts)
            tables, split = self._keep(segments, wide, tuple(keep))
            f = self._work(f, wide)
            for plain, cut, some in split(items):
                votes.votes(out, self._put(segments.table), some, tables, f, plain=plain, cut=cut, **about)
            back()

    def consensus(self, segments: Any, *keep_and_rules: Any) -> None:
        """``keep``, elect, split, zero, merge, ``f [P, N, 3]``, ``scale [P, 3]``: the merge of deltas."""
        *keep, elect, split_vote, zero, merge, f, scale = keep_and_rules
        s, (codes, wide, about) = segments, self._types(segments)
        out = int(s.out_dtype.code)
        items = element_items(s.table, codes, out, block=config("consensus")["BLOCK"], lanes=True)
        about |= {"out": out, "elect": int(elect), "split": bool(split_vote), "zero": int(zero), "merge": int(merge)}
        about["div"] = elect == consensus.NONE and bool((scale[:, 1] != 1).any())
        with self._running():
            bad, back = self._bad(s)
            tables, split = self._keep(s, wide, tuple(keep))
            kind = np.float64 if wide else np.float32
            few = elect != consensus.NONE and merge == consensus.MEAN and f.shape[1] <= consensus.SETS.value
            share = self._put(consensus.shares(f, scale, kind) if few else np.zeros((1, 1), kind))
            table, f, scale = self._put(s.table), self._work(f, wide), self._work(scale, wide)
            for plain, cut, some in split(items):
                consensus.consensus(table, some, tables, f, scale, share, bad, plain=plain, cut=cut, **about)
            back()
