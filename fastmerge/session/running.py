"""Runs ops whose inputs and results are in memory, on the cores of the CPU."""

from __future__ import annotations

from collections.abc import Sequence

from fastmerge.backends.choose import Backend
from fastmerge.ops.spec import Op
from fastmerge.runtime.budget import UNIT_ELEMENTS, need
from fastmerge.runtime.devices import CpuDevice, cores
from fastmerge.runtime.results import Results
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.workers import Runner


def run(ops: Sequence[Op], backend: Backend) -> None:
    """All passes of all ops, as a merge on disk has them."""
    slot = need(ops, whole=backend.whole).best
    jobs = schedule(ops, slot=slot, elements=UNIT_ELEMENTS, whole=backend.whole)
    store = OpStore(ops, results=Results(backend, ops, "warn"))
    Runner(ops, jobs, store, [CpuDevice() for _ in range(cores())], backend.program, slot=slot).run()
