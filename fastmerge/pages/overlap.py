"""How the models of a merge changed their base, and what of it the merge has: one read of every tensor.

With task vectors ``d_i = x_i - base`` and that of the result ``m``:

- length of a change: ``|d_i| / |base|``;
- cosine of two changes: ``<d_i, d_j> / (|d_i| |d_j|)``; near 0 where models learned different things;
- sign conflict: share of the elements that one model raises and another lowers;
- kept: share of the elements in which the result is not the base.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fastmerge.checkpoint import Checkpoint, Files, TensorInfo, system
from fastmerge.commands.pairs import PAGE, read
from fastmerge.runtime.devices import Buffer, cores
from fastmerge.runtime.workers import each

if TYPE_CHECKING:
    import numpy.typing as npt

    from fastmerge.dtypes import DType

ELEMENTS = 1 << 18
"""Of each model at a time: a core's cache holds the fp32 values of a few."""

F64: TypeAlias = "npt.NDArray[np.float64]"


class Overlap(NamedTuple):
    """Of one tensor, or of several together: sums over elements that are finite in every model.

    Attributes:
        numel: elements.
        base: ``|base|^2``.
        gram: ``<d_i, d_j>`` of the models and, last, of the result, ``[N + 1, N + 1]``.
        conflict: elements that one model raises and another lowers.
        kept: elements in which the result is not the base.
    """

    numel: int
    base: float
    gram: F64
    conflict: int
    kept: int

    def __add__(self, other: object) -> Overlap:
        """Of both together."""
        if not isinstance(other, Overlap):
            return NotImplemented
        a, b = self, other
        return Overlap(a.numel + b.numel, a.base + b.base, a.gram + b.gram, a.conflict + b.conflict, a.kept + b.kept)

    def length(self, i: int) -> float:
        """``|d_i| / |base|``; 0 where the base is 0."""
        return math.sqrt(max(self.gram[i, i], 0.0) / self.base) if self.base else 0.0

    def cosine(self, i: int, j: int) -> float:
        """Of two changes; NaN where one is none."""
        lengths = float(self.gram[i, i] * self.gram[j, j])
        return max(-1.0, min(1.0, float(self.gram[i, j]) / math.sqrt(lengths))) if lengths > 0 else math.nan


def measure(base: Checkpoint, models: Sequence[Checkpoint], result: Checkpoint) -> dict[str, Overlap]:
    """Measures every tensor that all have, in one shape, and on which something is computed.

    Args:
        base: what the models were before they were trained.
        models: at least one.
        result: made of them.

    Raises:
        CheckpointError: a file cannot be read, shrank or was replaced.
    """
    every = [base, *models, result]
    names = [n for n, info in base.tensors.items() if info.dtype.mergeable and _alike(n, info, every)]
    pieces = [
        (name, start, min(ELEMENTS, math.prod(base.tensors[name].shape) - start))
        for name in names
        for start in range(0, math.prod(base.tensors[name].shape), ELEMENTS)
    ]
    found: list[Overlap | None] = [None] * len(pieces)
    left = deque(range(len(pieces)))
    with Files(every) as files:

        def work(_: int) -> None:
            most = ELEMENTS * max(c.tensors[n].dtype.size for n in names for c in every)
            buffers = [Buffer.allocate(most + 2 * PAGE) for _ in every]
            while True:
                try:
                    k = left.popleft()
                except IndexError:
                    return
                name, start, count = pieces[k]
                infos = [c.tensors[name] for c in every]
                at = [read(files, i, info, start, count, buffers[i].address) for i, info in enumerate(infos)]
                found[k] = _overlap([_values(a, info.dtype, count) for a, info in zip(at, infos, strict=True)])

        threads = max(1, min(cores(), len(pieces)))
        each(work, range(threads), threads=threads, name="page")
    out: dict[str, Overlap] = {}
    for (name, _, _), piece in zip(pieces, found, strict=True):
        if piece is not None:
            out[name] = out[name] + piece if name in out else piece
    return out


def together(parts: Sequence[Overlap]) -> Overlap:
    """Of several tensors."""
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _alike(name: str, info: TensorInfo, every: Sequence[Checkpoint]) -> bool:
    there = [c.tensors.get(name) for c in every]
    return all(t is not None and t.shape == info.shape and t.dtype.mergeable for t in there)


def _values(address: int, dtype: DType, count: int) -> npt.NDArray[Any]:
    """Elements in fp32, or as fp64 ones are."""
    raw = np.frombuffer(system.view(address, dtype.nbytes(count)), np.uint8)
    if dtype.name == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"float16": np.float16, "float32": np.float32, "float64": np.float64}[dtype.name])


def _overlap(values: Sequence[npt.NDArray[Any]]) -> Overlap:
    base, *others = values
    finite = np.isfinite(base)
    for x in others:
        finite &= np.isfinite(x)
    kept = int(np.count_nonzero(others[-1] != base))
    wide = [np.where(finite, x, 0) for x in values] if not finite.all() else list(values)
    deltas = np.stack([np.subtract(x, wide[0], dtype=np.float64) for x in wide[1:]])
    up = (deltas[:-1] > 0).any(axis=0)
    down = (deltas[:-1] < 0).any(axis=0)
    wide_base = wide[0].astype(np.float64)
    return Overlap(len(base), float(wide_base @ wide_base), deltas @ deltas.T, int(np.count_nonzero(up & down)), kept)
