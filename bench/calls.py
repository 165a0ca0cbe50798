"""Calls of kernels on tensors that are where the kernels run: numpy arrays in host memory, torch tensors on a GPU.

Only the segment table and the parameters of a tensor (some bytes to some KB) travel with the call, as in the stream.
Results that a caller might want back (counts, sums, lists) stay on the device, so nothing waits. What is imported in
functions may be missing until ``bench.gpu`` has installed it, and its items are listed before that.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.dtypes import DType
    from fastmerge.ops.kernels import Keep
    from fastmerge.ops.segments import Segments

Work = Callable[[], object]

DENSITY = 0.2

BRACKET = 0.00235
"""Half the width of a bracket of the selection: six standard deviations of a sample of a million at density 0.2."""

BF16 = 3
KEEP_ALL = 1 << 62


@dataclass(frozen=True, slots=True)
class Family:
    """A base, its fine-tunes, and room for a result, all of one type and length.

    Attributes:
        base, tuned, out: arrays of one dimension.
        code: type code of all.
    """

    base: Any
    tuned: Sequence[Any]
    out: Any
    code: int = BF16

    @property
    def n(self) -> int:
        """Elements of each."""
        return len(self.base)

    @property
    def tiles(self) -> int:
        """Tiles of each."""
        from fastmerge.ops.segments import TILE

        return -(-self.n // TILE)

    @property
    def dtype(self) -> DType:
        """The type of all."""
        from fastmerge.dtypes import FLOATS

        return next(d for d in FLOATS if d.code == self.code)

    def zeros(self, *shape: int, dtype: str) -> Any:
        """Room for results of another type where the tensors are; torch lacks most unsigned integers."""
        if hasattr(self.base, "data_ptr"):
            import torch

            return torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("u")), device=self.base.device)
        import numpy as np

        return np.zeros(shape, dtype)


def address(x: Any) -> int:
    """Where an array or a tensor begins."""
    return int(x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data)


def copy(out: Any, source: Any) -> Work:
    """The best that memory can do: memcpy, or the device's copy."""
    if hasattr(out, "data_ptr"):
        return lambda: out.copy_(source)
    return lambda: ctypes.memmove(out.ctypes.data, source.ctypes.data, out.nbytes)


def segments(f: Family, inputs: Sequence[Any], out: Any, cuts: Sequence[int] | None = None) -> Segments:
    """The table of one tensor, or of the many that an arena is cut into.

    Args:
        f: owner of the inputs.
        inputs: in the order of the kernel.
        out: where results go; None where there are none.
        cuts: lengths of the tensors that follow each other in each input; one tensor where absent.
    """
    import numpy as np

    from fastmerge.ops.segments import HEADER, TILE, Segments

    lengths = np.array(cuts if cuts is not None else [len(inputs[0])], np.int64)
    starts = (np.cumsum(lengths) - lengths) * f.dtype.size
    tiles = -(-lengths // TILE)
    head = np.zeros((len(lengths), HEADER), np.int64)
    head[:, 0] = 0 if out is None else address(out) + starts
    head[:, 1] = head[:, 3] = lengths
    head[:, 4] = np.arange(len(lengths)) + 12_345
    head[:, 5] = np.arange(len(lengths))
    head[:, 6] = np.cumsum(tiles) - tiles
    places = np.stack([address(x) + starts for x in inputs], axis=1).astype(np.int64)
    table = np.ascontiguousarray(np.concatenate([head, places], axis=1))
    return Segments(table, (f.dtype,) * len(inputs), f.dtype, f.zeros(len(lengths), dtype="int64"))


def combine(kernels: Any, f: Family, *, delta: bool, cuts: Sequence[int] | None = None) -> Work:
    """``sum c_i x_i``, or ``b + sum c_i (x_i - b)``: ``N + 1`` or ``N + 2`` values moved per element."""
    import numpy as np

    s = segments(f, [f.base, *f.tuned] if delta else f.tuned, f.out, cuts)
    coef, scale = np.full((len(s), len(s.dtypes)), 1 / len(f.tuned)), np.ones((len(s), 2))
    return lambda: kernels.combine(s, coef, scale, delta=delta, per_row=False)


def gram(kernels: Any, f: Family, *, delta: bool = False, diff: bool = False) -> Work:
    """Inner products; ``diff`` adds the squared difference, as slerp needs it: ``N`` values, or ``N + 1``."""
    s = segments(f, [f.base, *f.tuned] if delta else f.tuned, None)
    models = len(f.tuned)
    partials = f.zeros(f.tiles, models * (models + 1) // 2 + diff, dtype="float64")
    return lambda: kernels.gram(s, partials, delta=delta, diff=diff, per_row=False)


def dot(kernels: Any, f: Family) -> Work:
    """Inner products of a gradient, which lies where results would, with task vectors: ``N + 2`` values."""
    s = segments(f, [f.base, *f.tuned, f.out], None)
    partials = f.zeros(f.tiles, len(f.tuned), dtype="float64")
    return lambda: kernels.dot(s, partials)


def draw(f: Family, groups: int) -> tuple[Any, Any]:
    """Numbers of the models, and Bernoulli thresholds of one half."""
    import numpy as np

    models = len(f.tuned)
    return np.arange(models, dtype=np.int32), np.full((groups, models), 1 << 15, np.int32)


def keep(f: Family, groups: int, thr: Any = None, *, drop: bool = False, tie: tuple[int, int] = (KEEP_ALL, -1)) -> Keep:
    """The keep arguments: Bernoulli one half where ``drop``, and thresholds where there are some.

    Args:
        f: the tensors.
        groups: how many there are.
        thr: key of the last kept delta, per model; None keeps all.
        drop: whether half of the deltas are dropped at random.
        tie: tile and count at which ties end; by default all are kept.
    """
    import numpy as np

    from fastmerge.ops.kernels import Deltas, Keep

    models = len(f.tuned)
    bounds = np.zeros((groups, models), np.uint64)
    cut = np.full((groups, models, 3), -1, np.int64)
    cut[:, :, 0] = KEEP_ALL
    if thr is not None:
        bounds[:] = thr
        cut[:, :, :2] = tie
    index, half = draw(f, groups)
    return Keep(Deltas(-1, drop, index, half), thr is not None, bounds, cut)


def delta_keys(kernels: Any, f: Family, most: int) -> Work:
    """Magnitude keys of the first elements: those of a large tensor are never all written out."""
    from fastmerge.ops.kernels import Deltas

    n = min(f.n, most)
    s = segments(f, [x[:n] for x in (f.base, *f.tuned)], None)
    out = f.zeros(n, len(f.tuned), dtype="uint32")
    index, half = draw(f, 1)
    return lambda: kernels.delta_keys(s, Deltas(-1, False, index, half), out)


def count(kernels: Any, f: Family, low: Any, high: Any, *, drop: bool = False, listed: int = 8) -> Work:
    """The selection's one counting read, listing included: ``N + 1`` values per element.

    Args:
        kernels: the backend.
        f: the tensors.
        low: key below the threshold of each model, ``[1, N]``.
        high: key above it.
        drop: whether half of the deltas are dropped at random first.
        listed: room for one key in so many.
    """
    import numpy as np

    from fastmerge.ops.kernels import Brackets, Deltas, Found

    models, capacity = len(f.tuned), max(1024, f.n // listed)
    if kernels.launcher is not None:
        return _launched_count(kernels.gpu, f, np.stack([low, high], axis=2), drop=drop, capacity=capacity)
    s = segments(f, [f.base, *f.tuned], None)
    counts, used = f.zeros(f.tiles, models, 4, dtype="int64"), f.zeros(models, dtype="int64")
    keys, where = f.zeros(models, capacity, dtype="uint32"), f.zeros(models, capacity, 2, dtype="int64")
    index, half = draw(f, 1)

    def work() -> None:
        used[:] = 0
        kernels.count(s, Deltas(-1, drop, index, half), Brackets(low, high), Found(counts, keys, where, used))

    return work


def _launched_count(gpu: Any, f: Family, ends: Any, *, drop: bool, capacity: int) -> Work:
    """The same as a selection on the device does it; that of the backend brings counts and lists to the host."""
    import numpy as np

    from fastmerge.kernels import count as kernel
    from fastmerge.kernels._call import Call
    from fastmerge.kernels._launch import bounds
    from fastmerge.kernels._types import Types

    s = segments(f, [f.base, *f.tuned], None)
    types, call, models = Types(s.dtypes), Call(gpu), len(f.tuned)
    outs = (
        call.room((f.tiles, models, 4), np.int64),
        call.room((models, capacity), types.key),
        call.room((models, capacity), np.int32),
        call.zeros((models,), np.int64),
    )
    index, half = draw(f, 1)
    regions = np.stack([np.arange(models) * capacity, np.full(models, capacity)], axis=1)
    table, owner = call.put(s.table), call.put(np.zeros(1, np.int64))
    queries = owner, owner, call.put(bounds(ends, wide=types.wide)), call.put(regions)
    args = call.put(index), call.put(half), queries
    for walk in types.tiles(s.table, "count", lanes=True):
        kernel.count(call, outs, table, walk, *args, round_code=-1, drop=drop, **types.about)
    run: Work = call.run
    return run


def select(kernels: Any, f: Family, density: float = DENSITY) -> Work:
    """The whole exact selection, from samples to cuts: ``N + 1`` values per element, and what is sampled."""
    import numpy as np

    from fastmerge.ops.kernels import Deltas

    sequence = kernels.sequence(segments(f, [f.base, *f.tuned], None))
    ranks = np.full((1, len(f.tuned)), int(f.n * density), np.int64)
    sequence.select(sequence.deltas(Deltas(-1, False, *draw(f, 1))), ranks, ties="index", together=False)
    run: Work = sequence.run
    return run


def l1(kernels: Any, f: Family, thr: Any = None, *, drop: bool = False) -> Work:
    """Sums of magnitudes before and after the keep pipeline: ``N + 1`` values per element."""
    s, sums = segments(f, [f.base, *f.tuned], None), f.zeros(f.tiles, len(f.tuned), 2, dtype="float64")
    args = keep(f, 1, thr, drop=drop)
    return lambda: kernels.l1(s, args, sums)


def votes(kernels: Any, f: Family, thr: Any) -> Work:
    """Positive and negative votes of the kept deltas: ``N + 1`` values per element."""
    import numpy as np

    from fastmerge.ops.kernels import Votes

    s, tally = segments(f, [f.base, *f.tuned], None), f.zeros(f.tiles, 2, dtype="int64")
    args, factors = keep(f, 1, thr), np.ones((1, len(f.tuned), 3))
    return lambda: kernels.votes(s, args, Votes(1, False, factors), tally)


def consensus(
    kernels: Any,
    f: Family,
    thr: Any = None,
    *,
    drop: bool = False,
    elect: bool = False,
    tie: tuple[int, int] = (KEEP_ALL, -1),
    cuts: Sequence[int] | None = None,
) -> Work:
    """The merge pass of TIES (trimmed, ``elect``) and DARE (``drop``): ``N + 2`` values per element."""
    import numpy as np

    from fastmerge.ops.kernels import Rules, Votes

    s = segments(f, [f.base, *f.tuned], f.out, cuts)
    args = keep(f, len(s), thr, drop=drop, tie=tie)
    factors, scale = np.ones((len(s), len(f.tuned), 3)), np.ones((len(s), 3))
    factors[:, :, 0] = 1 / len(f.tuned)
    return lambda: kernels.consensus(s, args, Rules(Votes(int(elect), False, factors), 0, 0, scale))
