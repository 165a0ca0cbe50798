"""What a merge will cost, from the plan alone: bytes, memory, bottleneck, time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastmerge.backends.choose import cpu_backend, device_for, expected_gpus
from fastmerge.ops.sources import all_spared
from fastmerge.planning import Plan
from fastmerge.runtime import budget as budgets
from fastmerge.runtime.devices import cuda
from fastmerge.runtime.kept import room, twice
from fastmerge.runtime.making import making, uncut
from fastmerge.runtime.placement import Budget, VramLimit, beside, cpu_slots, gpu_slots, workers
from fastmerge.runtime.schedule import schedule
from fastmerge.sizes import default_memory, parse_bytes, show_bytes

READ_RATE = 10e9
"""Bytes per second and worker of warm files into a hot slot: an estimate; ``doctor`` probes the machine's own."""

WRITE_RATE = 1.5e9
"""Bytes per second of a new file including fdatasync, all workers together: an estimate; ``doctor`` probes it."""

ELEMENT_RATE = {"element": 1.0e9, "tensor": 0.35e9, "row": 0.5e9, "model": 0.3e9, "matrix": 0.02e9}
"""Output elements per second and worker by the grain of the method, three bf16 models: estimates."""


GPU_READ_RATE = 6e9
"""Bytes per second and worker of warm files into a pinned slot of many MiB: an estimate, not measured beside a GPU."""

GPU_ELEMENT_RATE = 5e9
"""Output elements per second and GPU: what PCIe 5 x16 could bring of three bf16 models: an estimate."""


def estimate(
    planned: Plan, *, memory: str | None, device: str, backend: str | None, max_vram: str | None = None
) -> dict[str, Any]:
    """Facts for ``fastmerge plan``. GPUs are not asked (that would take torch seconds), only counted.

    Args:
        planned: the plan.
        memory: the budget, as the user wrote it; None for the default.
        device: as the user wrote it.
        backend: as the user wrote it.
        max_vram: as the user wrote it.

    Returns:
        Passes over the input, memory in bytes, the bottleneck and an estimate of the seconds for warm files.
        There are fewer workers and slots for those (``cached``) than for files that are on the disk only.
    """
    ops = planned.ops
    gpus = expected_gpus(device_for(device, ops, backend), backend)
    budget = parse_bytes(memory) if memory is not None else default_memory()
    if gpus:
        name, read_rate = "triton", GPU_READ_RATE
        vram = None if max_vram is None else VramLimit(parse_bytes(max_vram), max(map(gpus.count, gpus)))
        wants = budgets.need(ops, elements=cuda.UNIT_ELEMENTS)
        slots = gpu_slots(wants, len(gpus), Budget(budget), vram)
        jobs = schedule(ops, slot=slots.nbytes, elements=cuda.UNIT_ELEMENTS)
        keeps, warm = 0, slots
    else:
        chosen = cpu_backend(backend)
        name, read_rate = chosen.name, READ_RATE
        whole = uncut(ops, chosen)
        wants = budgets.need(ops, whole=whole, defined=chosen.defined, made=making(chosen))
        slots, warm = (cpu_slots(wants, budget, workers(chosen), warm=warm) for warm in (False, True))
        jobs = schedule(ops, slot=slots.nbytes, elements=budgets.UNIT_ELEMENTS, whole=whole)
        keeps = math.prod(room(ops, jobs, beside(wants, slots, budget)))
    units = sum(len(j.units) for j in jobs)
    n, cached = (max(1, min(s.number, units) if gpus else s.number) for s in (slots, warm))
    reads = elements_time = 0.0
    again = writes = 0
    spares = all_spared(ops)
    for job in jobs:
        kept = 0
        for o in job.ops:
            spec = ops[o].spec
            nbytes = spec.numel * sum([d.size for d in spec.dtypes])
            writes += spec.stored * len(ops[o].targets)
            if job.copy:
                reads += nbytes
                continue
            passes = 2 if twice(ops, job) else 1
            reads += passes * (nbytes - spares.get(o, (0, 0))[0])
            if passes > 1:
                again, kept = again + nbytes - min(nbytes, keeps - kept), min(keeps, kept + nbytes)
            elements_time += spec.numel / (GPU_ELEMENT_RATE / passes if gpus else ELEMENT_RATE[spec.grain])
    stages = {"read": reads / read_rate / cached, "compute": elements_time / (len(gpus) or cached)}
    stages["write"] = writes / WRITE_RATE
    seconds = 0.25 + stages["write"] + max(stages["read"], stages["compute"])
    return {
        "backend": name,
        "workers": n,
        "workers_cached": cached,
        "units": units,
        "bytes_read": int(reads),
        "bytes_read_twice": again,
        "memory_budget": budget,
        "memory_slots": n * slots.nbytes,
        "memory_cached": cached * warm.nbytes,
        "bottleneck": max(stages, key=lambda s: stages[s]),
        "seconds_estimated": round(seconds, 2),
    }


def table(facts: Mapping[str, Any]) -> str:
    """The facts of a plan for people, one a line; its warnings are not among them."""
    return "\n".join(
        f"{name.replace('_', ' '):<18} {text}"
        for name, value in facts.items()
        if name != "warnings"
        for name, text in _lines(name, value)
    )


def _lines(name: str, value: Any) -> list[tuple[str, str]]:
    """The lines of one fact; those of a list after the first have no name."""
    if isinstance(value, list):
        return [("" if i else name, str(item)) for i, item in enumerate(value)]
    if name == "tensors":
        return [(name, _counts(value))]
    if name == "account":
        return [("" if i else name, f"{model}: {_counts(counts)}") for i, (model, counts) in enumerate(value.items())]
    if name == "dtypes":
        return [(name, ", ".join(f"{dtype} ({show_bytes(nbytes)})" for dtype, nbytes in value.items()))]
    if name.startswith(("bytes", "memory")):
        return [(name, show_bytes(value))]
    if name == "seconds_estimated":
        return [("time", f"about {value:.3g} s with files in the page cache")]
    return [(name, f"{value:,}" if isinstance(value, int) and name != "seed" else str(value))]


def _counts(value: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in value.items() if count)
