"""What a backend offers: the kernels, their arguments as records, and what it has no kernel for.

``P`` tensors, ``N`` models beside the base, ``M`` inputs, ``S`` segments, ``R`` rows of partial results, one per tile.
Tables are numpy arrays; outputs may be tensors of the device where a backend has one, and then nothing waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from fastmerge.ops.segments import F64, I64, Segments

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastmerge.ops.spec import Spec

I32: TypeAlias = "npt.NDArray[np.int32]"
U32: TypeAlias = "npt.NDArray[np.uint32]"
U64: TypeAlias = "npt.NDArray[np.uint64]"

BLOCK = 1024
"""Elements of a block of :class:`Keep`'s bits."""

ELECT = {"none": 0, "mass": 1, "count": 2}
ZERO = {"plus": 0, "majority": 1, "base": 2}
MERGE = {"mean": 0, "sum": 1, "max": 2}


class Deltas(NamedTuple):
    """How task vectors are formed: ``x_i - b``, rounded, then dropped at random.

    Attributes:
        round_code: type that they are rounded to; -1 for none.
        drop: whether any are dropped.
        models: ``[N]`` numbers of the models for the random numbers.
        bernoulli: ``[P, N]`` an element stays where its 16-bit random number is below this.
        variance: elements are ranked by how much the models vary there (the sum of the squared differences of all
            pairs), not each model's by its magnitude; keys, ranks and thresholds then have one column for all models.
            Only with neither rounding nor drop, and with ties by index.
    """

    round_code: int
    drop: bool
    models: I32
    bernoulli: I32
    variance: bool = False


class Keep(NamedTuple):
    """Task vectors and what the trim leaves of them.

    Attributes:
        deltas: before the trim.
        trim: whether there is one.
        thr: ``[P, N]`` key of the smallest magnitude that stays.
        cut: ``[P, N, 3]`` which elements at the threshold stay: before element ``rank`` of those in tile ``tile``,
            or, where the third number is not negative, those whose random number is below it.
        bits: ``[blocks, N, 32]`` room for what the drop keeps, one bit per element of a table's blocks of 1024; ``l1``
            may leave it there for ``consensus`` of the same table. None: each draws.
        given: the bits are there before ``l1``, from a rule that is not the drop's.
        wide_sums: from what is kept on everything is fp64, whatever the task vectors are.
    """

    deltas: Deltas
    trim: bool
    thr: U64
    cut: I64
    bits: U32 | None = None
    given: bool = False
    wide_sums: bool = False


class Votes(NamedTuple):
    """How a sign is elected.

    Attributes:
        elect: a value of :data:`ELECT`.
        split: the vote sums task vectors without their weights.
        factors: ``[P, N, 3]`` coefficient, what a model adds to the divisor, factor of the vote.
    """

    elect: int
    split: bool
    factors: F64


class Rules(NamedTuple):
    """How kept task vectors become the result.

    Attributes:
        votes: the election.
        zero: a value of :data:`ZERO`: what a tied vote elects.
        merge: a value of :data:`MERGE`.
        scale: ``[P, 3]`` lambda, divisor, sign of the majority.
    """

    votes: Votes
    zero: int
    merge: int
    scale: F64


class Brackets(NamedTuple):
    """Ranges of keys, ``[P, N]`` each: those strictly between are listed."""

    low: U64
    high: U64


class Found(NamedTuple):
    """Where the counts and lists of keys go.

    Attributes:
        counts: ``[R, N, 4]`` keys above, at the upper end, at the lower end, strictly inside.
        keys: ``[N, capacity]`` those inside.
        where: ``[N, capacity, 2]`` group and element of each.
        used: ``[N]`` how many there were; starts at 0, may exceed the capacity.
    """

    counts: I64
    keys: npt.NDArray[Any]
    where: I64
    used: I64


class Sequence(Protocol):
    """A batch of whole tensors in device memory, as one fixed sequence of launches; see ``kernels/sequence.py``.

    Programs add its steps; what a step finds stays on the device for the next.
    """

    def run(self) -> None:
        """Launches everything, and waits for nothing; may be called again."""

    @property
    def call(self) -> Any:
        """The tables and launches."""

    def move(self, segments: Segments) -> None:
        """Turns to other tensors of the same kinds."""

    def wrong(self) -> int | None:
        """The first vector whose sums are not finite; waits for the launches where the method has such sums."""


class Launcher(Protocol):
    """What a backend offers whose kernels are launched, and run while the host goes on."""

    def sequence(
        self,
        segments: Segments,
        order: I64 | None = None,
        *,
        per_row: bool = False,
        wide: bool = False,
        wide_sums: bool = False,
    ) -> Any:
        """An empty :class:`Sequence` of whole tensors.

        Args:
            segments: whole tensors, each of its own group, in order.
            order: in which they are laid out.
            per_row: whether sums and coefficients belong to rows.
            wide: whether the work is fp64, whatever the inputs are.
            wide_sums: as of :class:`Keep`.
        """

    def ways(self, segments: Segments) -> I64:
        """A number for how a sequence selects in each tensor; they are laid out in its order."""


class Kernels(Protocol):
    """The kernels of a backend. Every call is one batch: a table of segments of equal types."""

    @property
    def launcher(self) -> Launcher | None:
        """Of sequences; None where kernels run at once."""

    def supports(self, spec: Spec) -> str | None:
        """Why there is no kernel for a spec, so that its definition runs; None where there is one."""

    def combine(
        self, segments: Segments, coef: F64, scale: F64, *, delta: bool, per_row: bool, wide: bool = False
    ) -> None:
        """``(sum c_i x_i) / div``, or ``b + lambda (sum c_i (x_i - b)) / div``; coef ``[P, M]``, scale ``[P, 2]``.

        With ``wide`` in fp64, whatever the inputs are.
        """

    def gram(self, segments: Segments, partials: F64, *, delta: bool, diff: bool, per_row: bool) -> None:
        """Inner products of every tile into ``partials [R, pairs]``, from row ``stats`` of each segment on."""

    def gram_kept(self, segments: Segments, keep: Keep, partials: F64) -> None:
        """The same of task vectors, as far as their variance keeps them. Not on every backend."""

    def dot(self, segments: Segments, partials: F64) -> None:
        """``sum g (x_i - b)`` of every tile into ``partials [R, N]``; the base is input 0, the gradient the last."""

    def fold(self, partials: F64, first: I64) -> F64:
        """Ordered fp64 sums of the row ranges that start at ``first [G + 1]``: ``[G, C]``."""

    def delta_keys(self, segments: Segments, deltas: Deltas, out: npt.NDArray[Any]) -> None:
        """Magnitude keys ``[elements, N]``: uint32, or uint64 where the work type is fp64."""

    def count(self, segments: Segments, deltas: Deltas, brackets: Brackets, found: Found) -> None:
        """Counts keys against brackets, per tile, and lists those inside up to the capacity."""

    def kth(self, segments: Segments, deltas: Deltas, ranks: I64, thr: U64, found: I64) -> None:
        """Thresholds of whole small tensors; a backend may leave any of them open.

        Args:
            segments: whole tensors.
            deltas: of their groups.
            ranks: ``[P, N]`` how many elements to keep; 0 asks for nothing.
            thr: ``[P, N]`` receives keys.
            found: ``[P, N, 4]`` receives how many at the threshold stay, how many there are (0: left open), and tile
                and rank of the first that goes.
        """

    def l1(self, segments: Segments, keep: Keep, sums: F64) -> None:
        """``sums [R, N, 2]``: magnitudes of every tile before and after ``keep``."""

    def votes(self, segments: Segments, keep: Keep, votes: Votes, counts: I64) -> None:
        """``counts [R, 2]``: positive and negative votes of every tile."""

    def consensus(self, segments: Segments, keep: Keep, rules: Rules) -> None:
        """The merge of task vectors into the output addresses."""

    def importance(self, segments: Segments, divergence: F64, out: npt.NDArray[Any]) -> None:
        """``|x - b| KL(softmax x || softmax b)`` of whole rows of two inputs, ``[elements]`` of the work type.

        The divergence of row r of tensor g, rounded to the work type, goes to row ``g + r``. Not on every backend.
        """

    def fuse(self, segments: Segments, divergence: F64, least: float) -> None:
        """``b``, and ``x`` where that is at least ``least``, into the output addresses. Not on every backend."""

    def replicate(self, segments: Segments, sigma: F64, numbers: I64) -> None:
        """One input to E outputs with noise; sigma ``[P, E]``, numbers ``[E]``. Not on every backend."""
