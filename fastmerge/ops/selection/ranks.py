"""Every k-th magnitude of a tensor from one look at it: which keys it has, how often, and in which tiles.

Task vectors of 16-bit checkpoints take few values: a tile of 65,536 elements has some hundred different magnitudes.
A table of them is a few hundredths of the tensor, and holds what :class:`fastmerge.ops.selection.select.Select` finds
for any rank: the threshold, and where among its ties the kept ones end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.keys import threshold
from fastmerge.ops.segments import I64
from fastmerge.ops.selection.select import ALL_TILES

if TYPE_CHECKING:
    import numpy.typing as npt

SHARE = 16
"""A table has at most one entry, of 8 bytes and sometimes a key, for so many elements, or few; or there is none."""

FEW = 4096
"""Entries that any table may have."""

Counted: TypeAlias = "tuple[npt.NDArray[Any], I64]"
"""The different keys of a tile, and how often it has each."""


class Ranks:
    """The magnitudes of one task vector.

    Args:
        tiles: :func:`counted` of each tile, in order.
    """

    def __init__(self, tiles: Sequence[Counted]) -> None:
        keys = np.concatenate([k for k, _ in tiles])
        counts = np.concatenate([c for _, c in tiles])
        number = np.repeat(np.arange(len(tiles)), [len(k) for k, _ in tiles])
        order = np.lexsort((number, ~keys))  # from the largest key down, ties by tile
        keys = keys[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._keys = keys[first]
        self._first = np.append(first, len(keys))
        self._ends = np.cumsum(np.add.reduceat(counts[order], first))
        self._counts, self._tiles = counts[order].astype(np.int32), number[order].astype(np.int32)

    def find(self, rank: int, ties: str) -> tuple[int, tuple[int, int, int]]:
        """The threshold of a rank and its cut.

        Args:
            rank: how many elements stay.
            ties: ``index``, ``all`` or ``spread``.
        """
        everything = (ALL_TILES, 0, -1)
        if rank >= int(self._ends[-1]):
            return 0, everything
        if rank <= 0:
            return int(np.iinfo(self._keys.dtype).max), (0, 0, -1)
        i = int(np.searchsorted(self._ends, rank))
        above = int(self._ends[i - 1]) if i else 0
        at, keep, tied = int(self._keys[i]), rank - above, int(self._ends[i]) - above
        if ties == "all" or keep >= tied or at == 0:
            return at, everything  # zeros add nothing, kept or not
        if ties == "spread":
            return at, (0, 0, threshold(keep / tied))
        mine = slice(int(self._first[i]), int(self._first[i + 1]))
        ends = np.cumsum(self._counts[mine])
        last = int(np.searchsorted(ends, keep, side="right"))
        return at, (int(self._tiles[mine][last]), keep - (int(ends[last - 1]) if last else 0), -1)


def counted(keys: npt.NDArray[Any]) -> Counted:
    """Of the keys of a tile."""
    found, counts = np.unique(keys, return_counts=True)
    return found, counts.astype(np.int64)


def small(tiles: Sequence[Counted], size: int) -> bool:
    """Whether a table of a tensor of so many elements is worth its memory."""
    return sum([len(k) for k, _ in tiles]) <= max(size // SHARE, FEW)
