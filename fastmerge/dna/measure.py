"""What weights say of themselves, read a panel at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fastmerge.dna.parent import Parent
from fastmerge.dna.reading import Reader
from fastmerge.dtypes import FLOATS
from fastmerge.errors import CheckpointError
from fastmerge.ops.row_lengths import squares

PANEL = 1 << 20
"""Elements that are looked at at a time."""


def root_mean_squares(parent: Parent, names: Iterable[str]) -> dict[str, float]:
    """Root mean squares of tensors in fp64, by name: the same on every machine.

    Raises:
        CheckpointError: one holds NaN or Inf.
    """
    found = {}
    with Reader([parent]) as reader:
        for name in names:
            source = parent.tensors[name]
            if source.dtype not in FLOATS:
                raise CheckpointError(f"{name}: expected floating-point numbers, got {source.dtype.name}")
            n = math.prod(source.shape)
            panels = (reader.read(source, e0, min(PANEL, n - e0)) for e0 in range(0, n, PANEL))
            total = math.fsum(float(squares(panel.reshape(1, -1))[0]) for panel in panels)
            if not math.isfinite(total):
                raise CheckpointError(f"{name}: NaN or Inf; expected finite values")
            found[name] = math.sqrt(total / max(n, 1))
    return found
