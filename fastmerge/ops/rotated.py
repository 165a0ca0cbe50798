"""Products of a weight with a matrix that is at hand, a run at a time.

In fp64 by the BLAS of numpy, always in the same tiles, which the run only chooses from: any chunking gives the same
bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np

from fastmerge.dtypes import F64, DType
from fastmerge.ops.made import array, load
from fastmerge.ops.sources import Bring, workspace
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"

TILE = 64
"""Rows of a result that are made at a time."""

PANEL = 256
"""Rows of a source that are multiplied at a time."""


@dataclass(frozen=True, eq=False)
class TurnedColumns:
    """``W diag(g) R``: each row of a weight in other coordinates, behind a norm's gains.

    Attributes:
        source: W, ``[O, D]``.
        matrix: R, fp64 ``[D, K]``.
        gain: ``[D]``: weights of the norm; None for gains of one.
        plus_one: gains are one plus the weight (Gemma).
    """

    source: Source
    matrix: Array
    gain: Source | None = None
    plus_one: bool = False

    dtype: ClassVar[DType] = F64

    @property
    def shape(self) -> tuple[int, ...]:
        """``[O, K]``."""
        return (self.source.shape[0], self.matrix.shape[1])

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The weight, and the gains."""
        return (self.source,) if self.gain is None else (self.source, self.gain)

    @property
    def workspace(self) -> int:
        """A tile of rows as they are stored, widened and turned; the gains; what the sources take."""
        deep, wide = map(int, self.matrix.shape)
        return 8 * (TILE * (3 * deep + 2 * wide) + 3 * deep) + max(map(workspace, self.inputs))

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """Tiles of rows, each as a whole."""
        deep, width = self.matrix.shape
        gain = 1.0
        if self.gain is not None:
            gain = load(bring, self.gain, 0, deep).astype(np.float64) + float(self.plus_one)  # type: ignore[assignment]

        def tile(row: int, count: int) -> Array:
            rows = np.zeros((TILE, deep))
            rows[:count] = load(bring, self.source, row * deep, count * deep).reshape(count, deep)
            rows *= gain
            made: Array = rows @ self.matrix
            return made

        _tiles(tile, self.shape[0], width, array(address, n, np.float64), e0)


@dataclass(frozen=True, eq=False)
class TurnedRows:
    """``L W``: what writes to the residual stream, in other coordinates.

    Attributes:
        source: W, ``[D, I]`` or ``[D]``.
        matrix: L, fp64 ``[K, D]``.
    """

    source: Source
    matrix: Array

    dtype: ClassVar[DType] = F64

    @property
    def shape(self) -> tuple[int, ...]:
        """``[K, I]`` or ``[K]``."""
        return (len(self.matrix), *self.source.shape[1:])

    @property
    def inputs(self) -> tuple[Source, ...]:
        """The weight."""
        return (self.source,)

    @property
    def workspace(self) -> int:
        """A panel of the weight as it is stored and widened, and a tile three times; what the source takes."""
        width = math.prod(self.shape[1:])
        return 8 * (3 * PANEL * width + 3 * TILE * width + TILE * PANEL) + workspace(self.source)

    def fill(self, bring: Bring, e0: int, n: int, address: int) -> None:
        """For each tile of rows all of the weight, a panel after the other."""
        deep, width = self.matrix.shape[1], math.prod(self.shape[1:])

        def tile(row: int, count: int) -> Array:
            made = np.zeros((TILE, width))
            for k in range(0, deep, PANEL):
                size = min(PANEL, deep - k)
                left = np.zeros((TILE, size))
                left[:count] = self.matrix[row : row + count, k : k + size]
                panel = load(bring, self.source, k * width, size * width).astype(np.float64).reshape(size, width)
                made += left @ panel
            return made

        _tiles(tile, len(self.matrix), width, array(address, n, np.float64), e0)


def _tiles(tile: Any, rows: int, width: int, out: Array, e0: int) -> None:
    """Makes the tiles that a run touches, and keeps what is in it."""
    end = e0 + out.size
    for row in range(e0 // width // TILE * TILE, -(-end // width) if out.size else 0, TILE):
        count = min(TILE, rows - row)
        made = tile(row, count).reshape(-1)
        first, last = max(e0, row * width), min(end, (row + count) * width)
        out[first - e0 : last - e0] = made[first - row * width : last - row * width]
