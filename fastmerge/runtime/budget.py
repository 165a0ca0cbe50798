"""From bytes to slots: how large they are and how many, within what the user allows. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from fastmerge.ops.segments import TILE
from fastmerge.ops.sources import workspace
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime.schedule import Cost, cost, least_piece

UNIT_ELEMENTS = 1 << 20
"""Elements per unit on CPU cores, where the budget allows it: 2 MiB per bf16 model. GPUs prefer more."""

PIECES = 64
"""Small tensors of a unit that slots have room for; more of them make more units."""

SPARE = 100 << 20
"""What tables may take beside the budget: the law allows 300 MB, and the interpreter takes 60."""


class Need(NamedTuple):
    """What a plan asks of memory.

    Attributes:
        least: bytes of the smallest slot that every op can pass through.
        best: bytes of a slot that holds a unit of the preferred size.
        tables: bytes that the largest op keeps beside the slots, between its passes.
        statistics: whether any op has statistics of a tensor or of the model.
        beside: bytes that a unit takes beside its slot: while its inputs are made, or for whole tensors.
    """

    least: int
    best: int
    tables: int
    statistics: bool
    beside: int = 0

    @property
    def apart(self) -> int:
        """Tables that count against the budget: all, where they are more than the spare."""
        return self.tables if self.tables > SPARE else 0


class Slots(NamedTuple):
    """Slots, one per unit in flight.

    Attributes:
        nbytes: of each.
        number: how many.
    """

    nbytes: int
    number: int


def need(
    ops: Sequence[Op],
    *,
    elements: int = UNIT_ELEMENTS,
    whole: Callable[[Spec], bool] = lambda _: False,
    defined: Callable[[Spec], bool] = lambda _: False,
    made: Callable[[Op], tuple[int, int]] = lambda op: (max(map(workspace, op.inputs)), 0),
) -> Need:
    """What the ops of a plan ask for; looks once at each spec.

    Args:
        ops: the plan's.
        elements: per unit, where memory allows it.
        whole: whether tensors of a spec are never cut.
        defined: whether the definition makes them.
        made: what an op takes for the inputs that are made: bytes beside its slot, and bytes that stay.
    """
    least = best = tables = beside = 0
    statistics = False
    bundles = Cost(0, 0)
    makes = set()
    for op in {op.spec: op for op in ops if op.spec.grain != "copy"}.values():
        if any(map(workspace, op.inputs)):
            makes.add(op.spec)
        spec, price = op.spec, cost(op)
        n, uncut = spec.numel, spec.grain == "matrix" or whole(spec)
        if uncut:
            piece = keep = n
            beside = max(beside, spec.method.defined(spec) if defined(spec) else spec.workspace)
        elif spec.grain == "row":
            piece, keep = max(spec.row, TILE), max(spec.row, elements)
        else:
            piece, keep = TILE, elements * (2 if spec.grain == "tensor" else 1)
        if spec.packing is not None and not uncut:
            piece = least_piece(spec)
            keep = max(keep, piece)
        least = max(least, price.of(min(n, piece)))
        best = max(best, price.of(min(n, keep)) + price.past)
        bundles = max(bundles, price)
        if not uncut:
            tables = max(tables, spec.workspace)
        statistics |= spec.grain in ("tensor", "model")
    total = sum([op.spec.numel for op in ops])
    for op in ops if makes else ():
        if op.spec in makes:
            more, stays = made(op)
            beside, tables = max(beside, more), max(tables, op.spec.workspace + stays)
    best = max(best, bundles.of(min(total, elements), min(len(ops), PIECES)) + bundles.past)
    return Need(least, best, tables, statistics, beside)


def fit(least: int, best: int, wanted: Iterable[tuple[int, int]], largest: Callable[[int], int]) -> Slots | None:
    """The first wish that can be had.

    Args:
        least: bytes of the smallest slot that will do.
        best: bytes of a slot that is as large as it need be.
        wanted: (slots, least bytes of each that this wish is worth), best first.
        largest: bytes of the largest slots of which so many fit.

    Returns:
        None where not even the last wish can be had.
    """
    for count, worth in wanted:
        nbytes = min(best, largest(count))
        if nbytes >= max(least, min(worth, best)):
            return Slots(nbytes, count)
    return None
