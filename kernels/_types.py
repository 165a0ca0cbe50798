"""What all kernels of a call are told of its types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ._launch import CONFIGS, I64, Walk, config, pack, walks
from .count import STEP
from .gram import STEPS


class Types:
    """Types of a batch.

    Attributes:
        codes: type code of each input.
        wide: whether the work is fp64.
        wide_sums: whether it is from what is kept of task vectors on.
        about: the arguments that say so to a launcher.
    """

    def __init__(self, dtypes: Any, *, wide: bool = False, wide_sums: bool = False) -> None:
        """Takes the inputs' types, base first; ``wide`` where the work, or a part of it, is fp64 whatever they are."""
        self.codes = [int(d.code) for d in dtypes]
        self.wide = wide or 0 in self.codes
        self.wide_sums = wide_sums or self.wide
        self.about: dict[str, Any] = {"inputs": len(self.codes), "codes": pack(self.codes), "wide": self.wide}

    @property
    def float(self) -> Any:
        """The work type."""
        return np.float64 if self.wide else np.float32

    @property
    def key(self) -> Any:
        """The type of keys."""
        return np.int64 if self.wide else np.int32

    def work(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An fp64 table rounded once to the work type."""
        with np.errstate(all="ignore"):
            return array.astype(self.float)

    def sums(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The same to the type of sums of task vectors."""
        with np.errstate(all="ignore"):
            return array.astype(np.float64 if self.wide_sums else np.float32)

    def tiles(self, table: I64, name: str, *, per_row: bool = False, lanes: bool = False) -> Iterator[Walk]:
        """The launches of a kernel of sums."""
        block = CONFIGS[name]["BLOCK"] * {"count": STEP, "gram": STEPS}.get(name, 1)
        return walks(table, self.codes, unit=65_536, block=block, per_row=per_row, lanes=lanes)

    def blocks(
        self, table: I64, name: str, out: int = -1, *, per_row: bool = False, lanes: bool = False
    ) -> Iterator[Walk]:
        """The launches of an elementwise kernel."""
        block = config(name)["BLOCK"]
        return walks(table, self.codes, out, unit=block, block=block, per_row=per_row, lanes=lanes)
