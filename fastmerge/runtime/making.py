"""What it takes to make inputs that are results of other ops: who makes them, and in how much memory. No data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fastmerge.backends.choose import Backend, cpu_backend
from fastmerge.ops.sources import FileRange, panel_bytes, results_of, workspace
from fastmerge.ops.spec import Op, Spec

KEPT = 8
"""Solutions that are kept for each result of the op that takes most: workers are at units of a few ops at a time."""


def host(chosen: Backend) -> Backend:
    """The backend that makes results: in host memory, whatever takes them."""
    return cpu_backend("auto") if chosen.gpus else chosen


def uncut(ops: Iterable[Op], chosen: Backend) -> Callable[[Spec], bool]:
    """Says whether tensors of a spec are never cut: a definition works on whole ones, or makes an input of them."""
    makes, found = host(chosen), set()
    for spec, op in {op.spec: op for op in ops if op.spec.grain not in ("copy", "model")}.items():
        if any(makes.whole(r.op.spec) for s in op.inputs if type(s) is not FileRange for r in results_of(s)):
            found.add(spec)
    return lambda spec: spec in found or chosen.whole(spec)


def making(chosen: Backend) -> Callable[[Op], tuple[int, int]]:
    """Says what an op takes for inputs that are made: most bytes beside its slot, and bytes that stay between passes.

    What stays are solutions: tables of rows, and bits that are drawn once.
    """
    makes = host(chosen)

    def taken(op: Op) -> tuple[int, int]:
        most = stays = 0
        for source in op.inputs:
            specs = [r.op.spec for r in results_of(source)] if type(source) is not FileRange else []
            most = max(most, workspace(source) + sum([panel_bytes(s, s.numel) for s in specs if makes.whole(s)]))
            stays += KEPT * sum(map(_solution, specs))
        return most, stays

    return taken


def _solution(spec: Spec) -> int:
    from fastmerge.ops.consensus.program import MOST_DRAWN

    drawn = spec.numel * len(spec.models) // 8 if spec.method.random else 0
    return spec.workspace + (drawn if drawn <= MOST_DRAWN else 0)
