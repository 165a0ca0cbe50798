"""The passes that compute a set of tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastmerge.ops.segments import I64, Segments

if TYPE_CHECKING:
    from fastmerge.ops.kernels import Sequence as Steps
    from fastmerge.ops.spec import Op


class Bound(Protocol):
    """A program with its tensors: run as often as wanted."""

    def run(self) -> None:
        """Starts all of its work, and waits for none."""

    def check(self) -> None:
        """Waits where the method can fail on its data, and then raises its error.

        Raises:
            OutputError: with the tensor.
        """

    def move(self, segments: Segments, ops: Sequence[Op]) -> bool:
        """Turns to other tensors of the same specs, aligned alike; False where that cannot be done."""

    def release(self) -> None:
        """Keeps no memory of the device until the next run."""


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

    def bind(self, segments: Segments) -> Bound | None:
        """All passes over tensors in device memory at once; None where the backend, or the method, works pass by pass.

        Args:
            segments: every group once, whole, in order.
        """
        return None

    def asks(self) -> Sequence[Hashable] | None:
        """What the due statistics of each op depend on, beside its inputs.

        Returns:
            Equal values mean equal statistics of equal inputs; None where they are nothing to keep: where none are
            due, or where they depend on weights or other tensors.
        """
        return None

    def found(self) -> Sequence[Any]:
        """What the statistics of :meth:`asks` were, for each op, once they are there."""
        raise AssertionError("a program that asks for nothing finds nothing")

    def give(self, found: Sequence[Any]) -> None:
        """Takes what an equal program found, in place of its passes."""
        raise AssertionError("a program that asks for nothing takes nothing")

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


class Launches:
    """A sequence of launches as a :class:`Bound`."""

    def __init__(
        self, sequence: Steps, ops: Sequence[Op] = (), check: Callable[[int, Sequence[Op]], None] | None = None
    ) -> None:
        """Takes the sequence, its ops, and what raises the error of the vector whose sums are not finite."""
        self._sequence = sequence
        self._ops = ops
        self._check = check

    def run(self) -> None:
        """Launches everything."""
        self._sequence.run()

    def move(self, segments: Segments, ops: Sequence[Op]) -> bool:
        """Other addresses and keys in the tables."""
        self._sequence.move(segments)
        self._ops = ops
        return True

    def release(self) -> None:
        """The scratch."""
        self._sequence.call.release()

    def check(self) -> None:
        """Waits and raises where a sum was not finite."""
        wrong = self._sequence.wrong()
        if wrong is not None and self._check is not None:
            self._check(wrong, self._ops)


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
