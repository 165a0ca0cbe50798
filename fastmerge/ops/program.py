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

    def take(self, other: Bound) -> bool:
        """Turns to the numbers of an equal program with the same tensors; False where its launches are others."""

    def found(self) -> Sequence[Any]:
        """What :meth:`Program.found` has, once all of it has run; waits. For programs that ask."""

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
        """All passes over tensors in device memory at once, but for those whose results were given.

        None where the backend, or the method, works pass by pass.

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
        self,
        sequence: Steps,
        ops: Sequence[Op] = (),
        check: Callable[[Any, int, Sequence[Op]], None] | None = None,
        found: Callable[[Any], Sequence[Any]] | None = None,
    ) -> None:
        """Takes the sequence, its ops, and what is asked of it afterwards.

        Args:
            sequence: of launches.
            ops: of its tensors.
            check: raises the error of the vector whose sums are not finite.
            found: reads what was found.
        """
        self.sequence = sequence
        self.ops = ops
        self.refuse = check
        self.read = found

    def run(self) -> None:
        """Launches everything."""
        self.sequence.run()

    def move(self, segments: Segments, ops: Sequence[Op]) -> bool:
        """Other addresses and keys in the tables."""
        self.sequence.move(segments)
        self.ops = ops
        return True

    def take(self, other: Bound) -> bool:
        """The tables of the other, which need not run any more."""
        if not isinstance(other, Launches) or not self.sequence.call.take(other.sequence.call):
            return False
        self.ops, self.refuse, self.read = other.ops, other.refuse, other.read
        return True

    def found(self) -> Sequence[Any]:
        """Reads it."""
        assert self.read is not None
        return self.read(self.sequence)

    def release(self) -> None:
        """The scratch."""
        self.sequence.call.release()

    def check(self) -> None:
        """Waits and raises where a sum was not finite."""
        wrong = self.sequence.wrong()
        if wrong is not None and self.refuse is not None:
            self.refuse(self.sequence, wrong, self.ops)


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
