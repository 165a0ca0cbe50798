"""Tables of pieces of tensors: the argument of every kernel call."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fastmerge.dtypes import DType

TILE = 65_536
"""Elements per tile of every ordered sum (design law L2)."""

LANES = 2_048
"""Running sums inside a tile; lane ``j`` adds elements ``j, j + 2048, ...``."""

HEADER = 7
"""Columns of a segment row before its input addresses: out, length, e0, row, key, group, stats."""

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class Segments:
    """A table of pieces of tensors, the argument of every kernel call.

    ``table`` is int64 ``[S, 7 + M]``, one row per piece; columns: 0 output address (0: none), 1 length in
    elements, 2 e0 (logical index of the first element in the whole tensor), 3 row length, 4 Philox key
    (bits), 5 index of the group, 6 scratch for the family, 7.. one input address per model, base first.
    All rows share the input types, the output type and the number of inputs. A piece starts at a multiple
    of the tile, or of the row for methods that work by row, unless a program asked for it otherwise.
    Kernels add their non-finite outputs to ``nonfinite`` ``[S]``, which is empty where nobody asks; on a GPU it is a
    tensor of the device, so that counting does not wait.
    """

    table: I64
    dtypes: tuple[DType, ...]
    out_dtype: DType
    nonfinite: I64 = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.table)
