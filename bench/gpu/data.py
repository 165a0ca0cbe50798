"""Tensors to measure on, drawn on the device: a base and its fine-tunes in bf16.

How many deltas are equal decides how hard a selection is, and how often counters and ties meet: so five kinds.

- ``random``: heavy-tailed deltas as large as the weights; hardly any two are equal;
- ``lattice``: what bf16 makes of a fine-tune: updates of sd 2e-4 on weights of sd 0.02, half of the deltas zero, the
  others a few hundred values (as ``bench/generate.py`` writes them);
- ``equal``: every delta has the same magnitude;
- ``zeros``: 88 % of the deltas are zero, the others random;
- ``rows``: random deltas, each row of 4096 scaled by e^N(0, 1): neighbours are alike, so a sample says less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench import calls
from bench.calls import Family, Work

if TYPE_CHECKING:
    import torch

KINDS = ("random", "lattice", "equal", "zeros", "rows")

CHUNK = 1 << 24
"""Elements drawn at once, whole rows: fp32 temporaries stay small."""

ROW = 4096

SAMPLE = 1 << 22
"""Deltas that stand for all in :func:`keys`."""


def family(device: str, n: int, models: int, kind: str = "lattice") -> Family:
    """Draws a family.

    Args:
        device: where.
        n: elements of each tensor.
        models: fine-tunes.
        kind: one of :data:`KINDS`; each always has the same bits on one kind of device.
    """
    import torch

    generator = torch.Generator(device=device).manual_seed(0)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(count, generator=generator, device=device)

    base, out, *tuned = (torch.empty(n, dtype=torch.bfloat16, device=device) for _ in range(models + 2))
    for at in range(0, n, CHUNK):
        count = min(CHUNK, n - at)
        some = base[at : at + count]
        some.copy_(torch.ones(count, device=device) if kind == "equal" else 0.02 * normal(count))
        for x in tuned:
            if kind == "equal":
                delta = 2.0**-6 * torch.sign(normal(count))
            else:
                delta = normal(count) * normal(count) * (2e-4 if kind == "lattice" else 0.02)
            if kind == "zeros":
                delta *= torch.rand(count, generator=generator, device=device) >= 0.88
            if kind == "rows":
                delta *= torch.exp(normal(-(-count // ROW))).repeat_interleave(ROW)[:count]
            x[at : at + count].copy_(some.float() + delta)
    return Family(base, tuned, out)


def keys(f: Family, model: int) -> torch.Tensor:
    """Magnitude keys of the first deltas of one fine-tune, ascending, int32."""
    import torch

    delta = f.tuned[model][:SAMPLE].float() - f.base[:SAMPLE].float()
    return delta.abs().view(torch.int32).sort().values


def quantile(ordered: torch.Tensor, share: float) -> int:
    """The key below which that share of the sample lies."""
    return int(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def thresholds(f: Family, share: float = 1 - calls.DENSITY) -> Any:
    """Per fine-tune, the key below which that share of its deltas lies, ``uint64 [1, N]``."""
    import numpy as np

    return np.array([[quantile(keys(f, i), share) for i in range(len(f.tuned))]], np.uint64)


def ties(kernels: Any, f: Family, cuts: Sequence[int] | None = None) -> Work:
    """TIES' merge pass, with thresholds and a tie cut in the middle of every tensor."""
    middle = f.tiles // (1 if cuts is None else len(cuts)) // 2
    return calls.consensus(kernels, f, thresholds(f), elect=True, tie=(middle, 1000), cuts=cuts)


def count(kernels: Any, f: Family) -> Work:
    """The selection's counting read, with a bracket around the threshold."""
    low, high = (thresholds(f, 1 - calls.DENSITY + side * calls.BRACKET) for side in (-1, 1))
    return calls.count(kernels, f, low, high, listed=16)
