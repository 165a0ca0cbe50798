"""The kernel backend in C++: one single-threaded call at a time, with the GIL released."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fastmerge.ops.replicate import Copies
from fastmerge.ops.segments import F64, I64, Segments
from fastmerge.philox import normal_lines

I32 = npt.NDArray[np.int32]

_CODES: dict[tuple[int, ...], I32] = {}


def codes(segments: Segments) -> I32:
    """Input types as the kernels take them."""
    key = tuple(d.code for d in segments.dtypes)
    if key not in _CODES:
        _CODES[key] = np.array(key, np.int32)
    return _CODES[key]


def nonfinite(segments: Segments) -> I64:
    """The caller's counters of non-finite outputs, or ones to throw away."""
    return segments.nonfinite if len(segments.nonfinite) == len(segments) else np.zeros(len(segments), np.int64)


class NativeKernels:
    """The functions of the extension, with :class:`Segments` in place of table, types and counters.

    Every table is fp64 and rounded once to the work type by the kernel. ``keep`` stands for seven arguments:
    round_code, drop, trim, model_index ``int32 [N]``, bern ``int32 [P, N]``, thr ``uint64 [P, N]``,
    cut ``int64 [P, N, 3]``; ``deltas`` for four of them: round_code, drop, model_index, bern.
    """

    def __init__(self) -> None:
        """Loads the extension.

        Raises:
            ImportError: where it was not built.
        """
        from fastmerge import _native

        self._native: Any = _native

    @staticmethod
    def supports(spec: Any) -> str | None:
        """Every family has its kernels here."""
        del spec
        return None

    def combine(self, segments: Segments, coef: F64, scale: F64, *, delta: bool, per_row: bool) -> None:
        """Weighted sums into the output addresses; ``coef [P, M]``, ``scale [P, 2]`` (lambda, divisor)."""
        s = segments
        self._native.combine(s.table, codes(s), s.out_dtype.code, coef, scale, delta, per_row, nonfinite(s))

    def gram(self, segments: Segments, partials: F64, *, delta: bool, diff: bool, per_row: bool) -> None:
        """Inner products of every tile into ``partials [R, pairs]``, from row ``stats`` of each piece on."""
        self._native.gram(segments.table, codes(segments), partials, delta, diff, per_row)

    def fold(self, partials: F64, first: I64) -> F64:
        """Ordered fp64 sums of the row ranges that start at ``first [G + 1]``: ``[G, C]``."""
        out: F64 = self._native.fold(partials, first)
        return out

    def delta_keys(self, segments: Segments, *deltas_and_keys: Any) -> None:
        """``deltas``, then the magnitude keys, ``uint32 [L, N]`` (``uint64`` where the work type is fp64)."""
        self._native.delta_keys(segments.table, codes(segments), *deltas_and_keys)

    def count(self, segments: Segments, *deltas_and_lists: Any) -> None:
        """``deltas``, lo, hi, then counts, keys, where, used: keys above, at and inside brackets, per tile.

        Those strictly inside are listed up to the capacity; shapes and types stand in ``_native.pyi``.
        """
        self._native.count(segments.table, codes(segments), *deltas_and_lists)

    def kth(self, segments: Segments, *deltas_and_ranks: Any) -> None:
        """``deltas``, ranks, then thr, found: thresholds of whole tensors; those that stay open have 0 ties."""
        self._native.kth(segments.table, codes(segments), *deltas_and_ranks)

    def l1(self, segments: Segments, *keep_and_sums: Any) -> None:
        """``keep``, then ``sums [R, N, 2]``: |d| and |kept d| of every tile."""
        self._native.l1(segments.table, codes(segments), *keep_and_sums)

    def votes(self, segments: Segments, *keep_and_votes: Any) -> None:
        """``keep``, elect, split, ``f [P, N, 3]``, then ``counts [R, 2]``: positive and negative votes."""
        self._native.votes(segments.table, codes(segments), *keep_and_votes)

    def consensus(self, segments: Segments, *keep_and_rules: Any) -> None:
        """``keep``, elect, split, zero, merge, ``f [P, N, 3]``, ``scale [P, 3]``: the merge of deltas."""
        s = segments
        self._native.consensus(s.table, codes(s), s.out_dtype.code, *keep_and_rules, nonfinite(s))

    def replicate(self, copies: Copies) -> None:
        """Every expert of every source, with noise where its sigma is not 0; see :class:`Copies`."""
        self._native.replicate(copies.table, copies.in_dtype.code, copies.out_dtype.code, normal_lines())
