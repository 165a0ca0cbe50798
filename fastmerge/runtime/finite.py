"""The books of NaN and Inf."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastmerge.dtypes import DType
from fastmerge.errors import OutputError
from fastmerge.ops.segments import E0, HEADER, LENGTH, OUT, Segments
from fastmerge.ops.spec import Op
from fastmerge.runtime.schedule import Unit

if TYPE_CHECKING:
    import numpy.typing as npt

NanPolicy = Literal["warn", "error", "zero"]
"""What to do with NaN and Inf in outputs; see :class:`NonFinite`."""


class NonFinite:
    """Keeps the books of NaN and Inf.

    A non-finite output element with a non-finite input at its place is counted and reported (``warn``), refused
    (``error``) or stored as 0 (``zero``). One whose own inputs are all finite is an error in every case: the
    merge overflowed (fp16) or divided by zero, or a NaN elsewhere in the tensor spoilt its statistics.
    """

    def __init__(self, policy: NanPolicy) -> None:
        self.policy = policy
        self.found: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def check(self, ops: Sequence[Op], unit: Unit, segments: Segments) -> None:
        """Looks at what the kernels counted; almost always nothing.

        Raises:
            OutputError: by the policy, or for values that no input explains.
        """
        if not segments.nonfinite.any():
            return
        for s in np.flatnonzero(segments.nonfinite).tolist():
            op = ops[unit.pieces[s][0]]
            row = segments.table[s].tolist()
            more = HEADER + len(segments.dtypes)
            outs = [(a, _nonfinite(a, row[LENGTH], segments.out_dtype)) for a in (row[OUT], *row[more:])]
            given = np.zeros(row[LENGTH], bool)
            coded = segments.coded or [False] * len(segments.dtypes)
            for address, dtype, codes in zip(row[HEADER:more], segments.dtypes, coded, strict=True):
                if codes:
                    from fastmerge.ops.coded import values_at

                    given |= ~np.isfinite(values_at(address, row[E0], row[LENGTH]))
                else:
                    given |= _nonfinite(address, row[LENGTH], dtype)
            made = sum(int((bad & ~given).sum()) for _, bad in outs)
            total = sum(int(bad.sum()) for _, bad in outs)
            if made:
                raise OutputError(
                    f"{op.name}: the merge made {made} NaN or Inf values out of finite inputs "
                    f"(stored as {segments.out_dtype.name}); expected finite ones: try out_dtype float32"
                )
            if self.policy == "error":
                raise OutputError(f"{op.name}: {total} NaN or Inf values from its inputs (--nan error)")
            if self.policy == "zero":
                for address, bad in outs:
                    _bits(address, row[LENGTH], segments.out_dtype)[0][bad] = 0
            with self._lock:
                self.found[op.name] += total


def _bits(address: int, n: int, dtype: DType) -> tuple[npt.NDArray[Any], int]:
    """Elements in memory as unsigned integers, and the mask of their exponents."""
    word, exponent = {
        0: (np.uint64, 0x7FF0000000000000),
        1: (np.uint32, 0x7F800000),
        2: (np.uint16, 0x7C00),
        3: (np.uint16, 0x7F80),
    }[dtype.code]
    memory: Any = (ctypes.c_char * (n * dtype.size)).from_address(address)
    return np.frombuffer(memory, np.dtype(word)), exponent


def _nonfinite(address: int, n: int, dtype: DType) -> npt.NDArray[np.bool_]:
    """Which elements are NaN or Inf: all bits of the exponent are set."""
    bits, exponent = _bits(address, n, dtype)
    return np.asarray((bits & bits.dtype.type(exponent)) == exponent)
