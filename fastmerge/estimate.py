"""What a merge will cost, from the plan alone: bytes, memory, bottleneck, time."""

from __future__ import annotations

from typing import Any

from fastmerge.dispatch import backend as choose
from fastmerge.dispatch import devices
from fastmerge.planning import Plan
from fastmerge.schedule import kinds, schedule
from fastmerge.sizes import default_memory, parse_bytes

READ_RATE = 10e9
"""Bytes per second and worker of warm files into a hot slot; 14.9e9 measured on one Zen 3 core, alone."""

WRITE_RATE = 1.5e9
"""Bytes per second of a new file including fdatasync, all workers together; 1.0 to 1.8e9 measured there."""

ELEMENT_RATE = {"element": 1.0e9, "tensor": 0.35e9, "row": 0.5e9, "model": 0.3e9}
"""Output elements per second and worker by the scope of the method, three bf16 models."""


def estimate(planned: Plan, *, memory: str | None, device: str, backend: str | None) -> dict[str, Any]:
    """Facts for ``fastmerge plan``.

    Args:
        planned: the plan.
        memory: the budget, as the user wrote it; None for the default.
        device: as the user wrote it.
        backend: as the user wrote it.

    Returns:
        Passes over the input, memory in bytes, the bottleneck and an estimate of the seconds for warm files.
    """
    chosen = choose(backend)
    workers = devices(device, chosen)
    budget = parse_bytes(memory) if memory is not None else default_memory()
    work = schedule(planned.outputs, workers=len(workers), memory=budget, whole=chosen.whole)
    reads = elements_time = 0.0
    writes = 0
    reach = kinds(planned.outputs)
    for job in work.jobs:
        for o in job.outputs:
            out = planned.outputs[o]
            nbytes = sum(s.info.nbytes for s in out.sources)
            writes += planned.layout.places[out.name].nbytes
            if job.kind == "copy" or out.method is None or out.group is None:
                reads += out.sources[0].info.nbytes if out.sources else 0
                continue
            scope = reach[o].scope
            passes = 1 if job.resident or scope == "element" else 2
            reads += passes * nbytes
            elements_time += out.group.numel / ELEMENT_RATE[scope]
    n = max(1, min(len(workers), work.slots))
    stages = {"read": reads / READ_RATE / n, "compute": elements_time / n, "write": writes / WRITE_RATE}
    seconds = 0.25 + stages["write"] + max(stages["read"], stages["compute"])
    return {
        "backend": chosen.name,
        "workers": n,
        "units": sum(len(j.units) for j in work.jobs),
        "bytes_read": int(reads),
        "memory_budget": budget,
        "memory_slots": n * work.slot_bytes,
        "bottleneck": max(stages, key=lambda s: stages[s]),
        "seconds_estimated": round(seconds, 2),
    }
