"""The passes that compute a set of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastmerge.ops.segments import I64, Segments


class Program(Protocol):
    """The passes that compute a set of groups: any statistics first, then apply.

    The stream reads data and calls these; it does not know what they compute. ``statistics`` and ``apply``
    run on any worker thread, on any pieces that together cover the groups; ``advance`` runs once per pass,
    on the host, after every piece of the pass has been seen.
    """

    @property
    def on_host(self) -> bool:
        """Whether it works on host memory, whatever the device is; so do definitions in plain torch."""
        return False

    @property
    def ready(self) -> bool:
        """True once :meth:`apply` may be called; False while a statistics pass is due."""

    def settle(self, segments: Segments, native: Any) -> None:
        """Takes whole tensors in host memory, before the first pass, to spare passes; does nothing by default.

        ``native`` are kernels for host memory, whatever those of the program are.
        """
        return

    def pieces(self) -> I64 | None:
        """Plans the due statistics pass; asked once before it.

        Returns:
            What it reads: None for everything, or ``[K, 3]`` (group, e0, length). A piece longer than a tile starts
            at a tile and may be cut further at tiles; shorter ones (samples) start anywhere and stay whole.
        """

    def statistics(self, segments: Segments) -> Any:
        """One piece of the due pass. Pure: returns its partial result."""

    def advance(self, partials: Sequence[Any]) -> None:
        """Ends the pass: combines the partials (in any order of pieces) and decides what comes next."""

    def apply(self, segments: Segments) -> None:
        """Computes the output of the pieces into their output addresses."""
