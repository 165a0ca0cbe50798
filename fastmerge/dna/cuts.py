"""Parts of a tensor as sources of their own, read from where they lie."""

from __future__ import annotations

from math import prod
from typing import cast

import numpy as np

from fastmerge.ops.made import Rows
from fastmerge.ops.sources import FileRange, Memory
from fastmerge.ops.spec import Source


def rows(source: Source, first: int, count: int) -> Source:
    """Rows ``first .. first + count`` of a tensor ``[R, ...]``: ``[count, ...]``, contiguous where that was."""
    width = prod(source.shape[1:])
    if isinstance(source, FileRange | Memory):
        return _run(source, first * width, (count, *source.shape[1:]))
    return Rows((source,), np.arange(first, first + count))


def columns(source: Source, part: int, parts: int) -> Source:
    """One of so many equal parts of the columns of ``[R, C]``: ``[R, C / parts]``."""
    r, c = source.shape
    if parts == 1:
        return source
    flat = _run(cast("FileRange | Memory", source), 0, (r * parts, c // parts))
    return Rows((flat,), np.arange(r) * parts + part)


def _run(source: FileRange | Memory, first: int, shape: tuple[int, ...]) -> Source:
    """Elements from one on, of another shape."""
    size = source.dtype.size
    if isinstance(source, Memory):
        return Memory(source.address + first * size, source.dtype, shape)
    info = source.info
    return FileRange(
        info._replace(shape=shape, offset=info.offset + first * size, nbytes=prod(shape) * size), source.model
    )
