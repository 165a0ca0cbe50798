"""Calls of the Triton kernels on tensors that lie on the device: everything large is there, so nothing waits.

Only the segment table and the parameters of a tensor (some bytes to some KB) travel with the call, as in the stream.
Results that a caller might want back (counts, sums, lists) are tensors of the device. What is imported in functions
may be missing until the part ``build`` has installed it, and items are listed before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.gpu.data import Family, keys, quantile
from bench.gpu.timing import Work

if TYPE_CHECKING:
    import torch

    from fastmerge.methods.base import I64, Segments

DENSITY = 0.2

BRACKET = 0.00235
"""Half the width of a bracket of the selection: six standard deviations of a sample of a million at density 0.2."""

KEEP_ALL = 1 << 62


def segments(inputs: Sequence[torch.Tensor], out: torch.Tensor | None, cuts: Sequence[int] | None = None) -> Segments:
    """The table of one tensor, or of the many that an arena is cut into.

    Args:
        inputs: bf16 of one length, in the order of the kernel.
        out: where results go.
        cuts: lengths of the tensors that follow each other in each input; one tensor where absent.
    """
    import numpy as np
    import torch

    from fastmerge.dtypes import BF16
    from fastmerge.methods.base import TILE, Segments

    n = inputs[0].numel()
    lengths = np.array(cuts if cuts is not None else [n], np.int64)
    starts = np.cumsum(lengths) - lengths
    count = len(lengths)
    tiles = -(-lengths // TILE)
    head = np.zeros((count, 7), np.int64)
    head[:, 0] = 0 if out is None else out.data_ptr() + 2 * starts
    head[:, 1] = head[:, 3] = lengths
    head[:, 4] = np.arange(count) + 12_345
    head[:, 5] = np.arange(count)
    head[:, 6] = np.cumsum(tiles) - tiles
    addresses = np.stack([x.data_ptr() + 2 * starts for x in inputs], axis=1).astype(np.int64)
    table: I64 = np.ascontiguousarray(np.concatenate([head, addresses], axis=1))
    bad: Any = torch.zeros(count, dtype=torch.int64, device=inputs[0].device)
    return Segments(table, (BF16,) * len(inputs), BF16, bad)


def combine(kernels: Any, f: Family, *, delta: bool, cuts: Sequence[int] | None = None) -> Work:
    """``sum c_i x_i``, or ``b + sum c_i (x_i - b)``: ``(N + 1) b`` or ``(N + 2) b`` bytes per element."""
    import numpy as np

    inputs = [f.base, *f.tuned] if delta else list(f.tuned)
    s = segments(inputs, f.out, cuts)
    coef, scale = np.full((len(s), len(inputs)), 1 / len(f.tuned)), np.ones((len(s), 2))
    return lambda: kernels.combine(s, coef, scale, delta=delta, per_row=False)


def gram(kernels: Any, f: Family) -> Work:
    """The statistics of slerp: xx, xy, yy and the squared difference; ``2 b`` bytes per element."""
    import torch

    from fastmerge.methods.base import TILE

    s = segments(f.tuned[:2], None)
    partials = torch.zeros((-(-f.n // TILE), 4), dtype=torch.float64, device=f.base.device)
    return lambda: kernels.gram(s, partials, delta=False, diff=True, per_row=False)


def keep(f: Family, groups: int, *, drop: bool, trim: bool) -> tuple[Any, ...]:
    """The keep arguments: Bernoulli one half, and the threshold of density 0.2 with the tie cut in the middle."""
    import numpy as np

    from fastmerge.methods.base import TILE

    models = len(f.tuned)
    thr = np.zeros((groups, models), np.uint64)
    cut = np.full((groups, models, 3), -1, np.int64)
    cut[:, :, 0] = KEEP_ALL
    if trim:
        for i in range(models):
            thr[:, i] = quantile(keys(f, i), 1 - DENSITY)
        cut[:, :, :2] = (-(-f.n // TILE) // groups // 2, 1000)
    half = np.full((groups, models), 1 << 15, np.int32)
    return -1, drop, trim, np.arange(models, dtype=np.int32), half, thr, cut


def consensus(kernels: Any, f: Family, *, drop: bool, elect: bool, cuts: Sequence[int] | None = None) -> Work:
    """TIES' merge pass (``elect``, trimmed) or DARE (``drop``): ``(N + 2) b`` bytes per element."""
    import numpy as np

    s = segments([f.base, *f.tuned], f.out, cuts)
    args = keep(f, len(s), drop=drop, trim=elect and not drop)
    rules = np.ones((len(s), len(f.tuned), 3))
    rules[:, :, 0] = 1 / len(f.tuned)
    scale = np.ones((len(s), 3))
    return lambda: kernels.consensus(s, *args, int(elect), False, 0, 0, rules, scale)


def count(kernels: Any, f: Family) -> Work:
    """The selection's one counting read, listing included: ``(N + 1) b`` bytes per element."""
    import numpy as np
    import torch

    from fastmerge.methods.base import TILE

    s = segments([f.base, *f.tuned], None)
    models, device = len(f.tuned), f.base.device
    lo, hi = np.zeros((1, models), np.uint64), np.zeros((1, models), np.uint64)
    for i in range(models):
        ordered = keys(f, i)
        lo[:, i] = quantile(ordered, 1 - DENSITY - BRACKET)
        hi[:, i] = quantile(ordered, 1 - DENSITY + BRACKET)
    cap = max(1024, f.n // 16)
    counts = torch.zeros((-(-f.n // TILE), models, 4), dtype=torch.int64, device=device)
    listed = torch.zeros((models, cap), dtype=torch.int32, device=device)
    where = torch.zeros((models, cap, 2), dtype=torch.int64, device=device)
    used = torch.zeros(models, dtype=torch.int64, device=device)
    round_code, drop, _, index, bern, _, _ = keep(f, 1, drop=False, trim=False)

    def work() -> None:
        used.zero_()
        kernels.count(s, round_code, drop, index, bern, lo, hi, counts, listed, where, used)

    return work
