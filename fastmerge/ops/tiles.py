"""Tile sums of pieces: numbering them for a kernel, and putting them back in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastmerge.ops.segments import E0, GROUP, I64, LENGTH, ROW, STATS, TILE, Segments

if TYPE_CHECKING:
    import numpy.typing as npt


class Partial(NamedTuple):
    """Results of one statistics call.

    Attributes:
        spans: ``[S, 3]`` per piece: group, number of its first tile in the group, tiles.
        values: ``[R, ...]``, one row per tile of all pieces in order.
        extra: whatever else the pass collects.
    """

    spans: I64
    values: npt.NDArray[Any]
    extra: Any = None


def number(segments: Segments, *, per_row: bool = False) -> tuple[Segments, I64, int]:
    """Assigns rows of the partial results to pieces.

    Args:
        segments: pieces that start at tiles, or at rows for methods that work by row.
        per_row: tiles restart at each row.

    Returns:
        The same pieces with the ``stats`` column set, their spans, and the number of tiles.
    """
    table = segments.table.copy()
    length, e0 = table[:, LENGTH], table[:, E0]
    if per_row:
        row = np.maximum(table[:, ROW], 1)
        each = -(-row // TILE)
        tiles, first = length // row * each, e0 // row * each
    else:
        tiles, first = -(-length // TILE), e0 // TILE
    ends = np.cumsum(tiles)
    table[:, STATS] = ends - tiles
    spans = np.stack([table[:, GROUP], first, tiles], axis=1)
    return segments.pieces(table, segments.nonfinite), spans, int(tiles.sum())


def gather(partials: Sequence[Partial], tiles: I64) -> npt.NDArray[Any]:
    """All tile results in the order of groups and tiles, however the pieces were cut.

    Args:
        partials: of one pass, in any order.
        tiles: ``[G]`` tiles of each group; groups that the pass did not read have 0.

    Raises:
        ValueError: if the pieces do not cover exactly those tiles.
    """
    spans = np.concatenate([p.spans for p in partials])
    values = [p.values for p in partials]
    data = values[0] if len(values) == 1 else np.concatenate(values)
    starts = np.cumsum(spans[:, 2]) - spans[:, 2]
    want = (np.cumsum(tiles) - tiles)[spans[:, 0]] + spans[:, 1]
    counts = np.bincount(spans[:, 0], weights=spans[:, 2], minlength=len(tiles)).astype(np.int64)
    if not np.array_equal(counts, tiles):
        raise ValueError(f"pieces cover {counts.tolist()} tiles per tensor, expected {tiles.tolist()}")
    if np.array_equal(starts, want):
        return data
    out = np.empty_like(data)
    for a, b, n in zip(starts.tolist(), want.tolist(), spans[:, 2].tolist(), strict=True):
        out[b : b + n] = data[a : a + n]
    return out
