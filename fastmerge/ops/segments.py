"""Tables of pieces of tensors: the argument of every kernel call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from fastmerge.dtypes import DType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastmerge.ops.spec import Op

TILE = 65_536
"""Elements per tile of every ordered sum (design law L2)."""

LANES = 2_048
"""Running sums inside a tile; lane ``j`` adds elements ``j, j + 2048, ...``."""

OUT, LENGTH, E0, ROW, KEY, GROUP, STATS, HEADER = range(8)
"""Columns of a segment row: address of the result (0: none), elements, logical index of the first element in the whole
tensor, row length, Philox key (bits), index of the tensor in its job, first row of partial results, first input."""

I64: TypeAlias = "npt.NDArray[np.int64]"
F64: TypeAlias = "npt.NDArray[np.float64]"


def _no_counters() -> I64:
    import numpy as np

    return np.zeros(0, np.int64)


@dataclass(slots=True)
class Segments:
    """A table of pieces of tensors, the argument of every kernel call.

    ``table`` is int64 ``[S, 7 + M + E - 1]``, one row per piece: the columns above, then one input address per model,
    base first, then the addresses of the results after the first, where there are more (E: ``outputs``).
    All rows share the input types, the output type and the numbers of inputs and outputs. A piece starts at a multiple
    of the tile, or of the row for methods that work by row, unless a program asked for it otherwise.
    Kernels add their non-finite outputs to ``nonfinite`` ``[S]``, which is empty where nobody asks; on a GPU it is a
    tensor of the device, so that counting does not wait. Results that are ``far`` are more than caches hold: kernels
    may write them past these. Of an input that is ``coded`` the address is that of its codes and scales
    (:mod:`fastmerge.ops.coded`), the same for all elements: kernels find them by their logical indices.
    """

    table: I64
    dtypes: tuple[DType, ...]
    out_dtype: DType
    nonfinite: I64 = field(default_factory=_no_counters)
    far: bool = False
    coded: tuple[bool, ...] = ()

    @property
    def steps(self) -> list[int]:
        """Bytes from an element of each input to the next."""
        sizes = [d.size for d in self.dtypes]
        return [0 if c else n for n, c in zip(sizes, self.coded, strict=True)] if self.coded else sizes

    def pieces(self, table: I64, nonfinite: I64 | None = None) -> Segments:
        """Other pieces of the same inputs; nobody asks for their non-finite outputs unless counters are given."""
        counters = _no_counters() if nonfinite is None else nonfinite
        return Segments(table, self.dtypes, self.out_dtype, counters, coded=self.coded)

    @property
    def outputs(self) -> int:
        """Results per piece."""
        return int(self.table.shape[1]) - HEADER - len(self.dtypes) + 1

    def __len__(self) -> int:
        return len(self.table)


def segment_row(op: Op, group: int, e0: int, length: int, out: int, inputs: Sequence[int]) -> list[int]:
    """One row of a segment table; the key is stored as the bits of a signed integer."""
    key = op.key
    return [out, length, e0, op.spec.row, key - ((key >> 63) << 64), group, 0, *inputs]


def segment_table(
    ops: Sequence[Op],
    groups: Sequence[int],
    firsts: Sequence[int],
    lengths: Sequence[int],
    outs: Sequence[Sequence[int]],
    inputs: Sequence[Sequence[int]],
) -> I64:
    """The table of a piece of each op; column by column, as there may be tens of thousands.

    Args:
        ops: of the pieces; of the same numbers of inputs and outputs.
        groups: index of each tensor in its job.
        firsts: first element of each piece.
        lengths: elements of each piece.
        outs: addresses of the results, a sequence per output.
        inputs: addresses of the inputs, a sequence per input.
    """
    import numpy as np

    rows = [op.spec.row for op in ops]
    keys = [key - ((key >> 63) << 64) if (key := op.key) else 0 for op in ops]
    columns = [outs[0], lengths, firsts, rows, keys, groups, [0] * len(ops), *inputs, *outs[1:]]
    return np.array(columns, np.int64).T.copy()
