"""The passes that compute a set of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fastmerge.ops.segments import I64, Segments


class Program(Protocol):
    """The passes that compute a set of tensors: any statistics first, then apply.

    The stream reads data and calls these; it does not know what they compute. ``statistics`` and ``apply``
    run on any worker thread, on any pieces that together cover the tensors; ``advance`` runs once per pass,
    on the host, after every piece of the pass has been seen. Programs without statistics are :class:`OnePass`.
    """

    @property
    def on_host(self) -> bool:
        """Whether it works on host memory, whatever the device is; so do definitions in plain torch."""
        return False

    @property
    def ready(self) -> bool:
        """True once :meth:`apply` may be called; False while a statistics pass is due."""

    def resident(self, segments: Segments) -> None:
        """Takes tensors that the segments hold whole, before the first pass, to spare passes; nothing by default."""
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


class OnePass(Program):
    """A program that is ready at once: it has an ``apply`` and nothing else."""

    ready = True

    def pieces(self) -> I64 | None:
        """Nothing: no pass is ever due."""
        return None

    def statistics(self, segments: Segments) -> Any:
        """No pass is ever due."""
        raise AssertionError("a program of one pass has no statistics")

    def advance(self, partials: Sequence[Any]) -> None:
        """No pass is ever due."""
        raise AssertionError("a program of one pass has no statistics")
