"""Reads tensors of two models side by side and measures how far they are apart: every byte once, past the cache."""

from __future__ import annotations

import ctypes
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastmerge import _native
from fastmerge.checkpoint import Checkpoint, Files, TensorInfo, system
from fastmerge.runtime.devices import Buffer, cores
from fastmerge.runtime.workers import each

BLOCK = 4 << 20
"""Most bytes of a read; each thread has memory for two."""

PAGE = 4096
"""Reads past the cache need memory and file to agree on their place in so many bytes."""


class Apart(NamedTuple):
    """How far two tensors are apart. Sums are of fp64, over pairs of finite values.

    Attributes:
        numel: pairs.
        same: whether types and bytes are equal.
        differ: pairs of unequal values; of types without arithmetic, of unequal bits.
        nonfinite: pairs with NaN or Inf.
        most: largest ``|x - y|``.
        xx, xy, yy, dd: sums of products, and of ``(x - y)^2``.
    """

    numel: int = 0
    same: bool = True
    differ: int = 0
    nonfinite: int = 0
    most: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    yy: float = 0.0
    dd: float = 0.0

    def __add__(self, other: object) -> Apart:
        """Of both together."""
        if not isinstance(other, Apart):
            return NotImplemented
        return Apart(
            self.numel + other.numel,
            self.same and other.same,
            self.differ + other.differ,
            self.nonfinite + other.nonfinite,
            max(self.most, other.most),
            *(p + q for p, q in zip(self[5:], other[5:], strict=True)),
        )

    @property
    def rms(self) -> float:
        """Root of the mean ``(x - y)^2``."""
        return math.sqrt(self.dd / max(self.numel - self.nonfinite, 1))

    @property
    def relative(self) -> float:
        """``|x - y| / |x|``; infinite where only x is 0."""
        if not self.dd:
            return 0.0
        return math.sqrt(self.dd / self.xx) if self.xx else math.inf

    @property
    def cosine(self) -> float:
        """``<x, y> / (|x| |y|)``; 1 of equal tensors, 0 where one is 0."""
        if not self.dd:
            return 1.0
        return max(-1.0, min(1.0, self.xy / math.sqrt(self.xx) / math.sqrt(self.yy))) if self.xx and self.yy else 0.0


def measure(a: Checkpoint, b: Checkpoint, pairs: Sequence[tuple[TensorInfo, TensorInfo]]) -> list[Apart]:
    """Measures pairs of tensors of equal shapes, the first of ``a``, the second of ``b``.

    Tensors at the same place of the same file are equal without a look.

    Raises:
        CheckpointError: a file cannot be read, shrank or was replaced.
    """
    pieces: list[tuple[int, int, int]] = []
    for i, (x, y) in enumerate(pairs):
        numel = math.prod(x.shape)
        if (a.files[x.file].identity, x.offset, x.dtype) == (b.files[y.file].identity, y.offset, y.dtype):
            continue
        if x.dtype.bits or y.dtype.bits:  # less than a byte each: all at once, as bytes
            pieces.append((i, 0, numel))
            continue
        step = BLOCK // max(x.dtype.size, y.dtype.size)
        pieces += [(i, start, min(step, numel - start)) for start in range(0, numel, step)]
    found: list[Apart | None] = [None] * len(pieces)
    left = deque(range(len(pieces)))
    most = max((max(p.dtype.nbytes(n) for p in pairs[i]) for i, _, n in pieces), default=0)
    with Files([a, b]) as files:

        def work(_: int) -> None:
            buffers = [Buffer.allocate(most + 2 * PAGE) for _ in range(2)]
            while True:
                try:
                    k = left.popleft()
                except IndexError:
                    return
                i, start, count = pieces[k]
                addresses = [
                    read(files, model, info, start, count, buffer.address)
                    for model, (info, buffer) in enumerate(zip(pairs[i], buffers, strict=True))
                ]
                found[k] = _compare(pairs[i], addresses, count)

        threads = max(1, min(cores(), len(pieces)))
        each(work, range(threads), threads=threads, name="diff")
    out = [Apart(math.prod(x.shape)) for x, _ in pairs]
    for (i, _, _), piece in zip(pieces, found, strict=True):
        if piece is not None:
            out[i] += piece._replace(numel=0)
    return out


def read(files: Files, model: int, info: TensorInfo, start: int, count: int, memory: int) -> int:
    """Reads elements of a tensor; their address, aligned to them.

    Args:
        files: opened.
        model: position of the tensor's among them.
        info: the tensor.
        start: first element.
        count: elements.
        memory: address of a buffer with two pages more than they have bytes.
    """
    begin, nbytes = info.offset + info.dtype.nbytes(start), info.dtype.nbytes(count)
    address = memory + begin % PAGE
    row = np.array([[files.fd(model, info.file), begin, address, nbytes]], np.int64)
    files.read_past(row, files.cold(row))
    if odd := address % info.dtype.size:
        ctypes.memmove(address - odd, address, nbytes)
    return address - odd


def _compare(pair: tuple[TensorInfo, TensorInfo], addresses: Sequence[int], count: int) -> Apart:
    x, y = pair
    same = False
    if x.dtype is y.dtype:
        views = [np.frombuffer(system.view(address, x.dtype.nbytes(count)), np.uint8) for address in addresses]
        same = bool(np.array_equal(views[0], views[1]))
    if x.dtype.mergeable and y.dtype.mergeable:
        return Apart(count, same, *_native.apart(addresses[0], x.dtype.code, addresses[1], y.dtype.code, count))
    if same:
        return Apart(count)
    if x.dtype is not y.dtype or x.dtype.bits:
        return Apart(count, same=False, differ=count)
    differ = np.any(views[0].reshape(count, -1) != views[1].reshape(count, -1), axis=1)
    return Apart(count, same=False, differ=int(differ.sum()))
