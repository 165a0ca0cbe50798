"""What the device does during one call, as torch's profiler sees it: kernels, copies and fills with their times."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.gpu.plan import Row
from bench.gpu.timing import Bench, Times, ratio

KERNEL = "kernel"

KINDS = (KERNEL, "gpu_memcpy", "gpu_memset")
"""Categories of a trace that are the device's work."""


def row(bench: Bench, work: Callable[[], Any], wall: Times) -> Row:
    """The second of two profiled calls; the first starts the profiler's own machinery.

    Args:
        bench: the device.
        work: the call, warmed up.
        wall: of the same call without a profiler.
    """
    trace, _ = traced(bench, work)
    trace, watched = traced(bench, work)
    found = device_times(trace)
    kernels = sum(entry["ms"] for entry in found if entry["what"] == KERNEL)
    return {
        "share": ratio(kernels, 1e3 * wall.median),
        "kernels ms": round(kernels, 4),
        "wall ms": str(wall),
        "watched wall ms": round(1e3 * watched, 3),
        "launches": sum(entry["times"] for entry in found if entry["what"] == KERNEL),
        "copies and fills": sum(entry["times"] for entry in found if entry["what"] != KERNEL),
        "device": found,
    }


def traced(bench: Bench, work: Callable[[], Any]) -> tuple[dict[str, Any], float]:
    """The trace of one call, and its wall time."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if bench.device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as seen:
        took = bench.once(work)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        seen.export_chrome_trace(str(path))
        found: dict[str, Any] = json.loads(path.read_text())
    return found, took


def device_times(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Milliseconds and number of everything that the device did, by name, what took longest first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for event in trace.get("traceEvents", []):
        what = event.get("cat")
        if what in KINDS and event.get("ph") == "X":
            name = str(event["name"])[:100]
            entry = found.setdefault((what, name), {"name": name, "what": what, "times": 0, "ms": 0.0})
            entry["times"] += 1
            entry["ms"] += float(event["dur"]) / 1e3
    rows = sorted(found.values(), key=lambda entry: -entry["ms"])
    return [{**entry, "ms": round(entry["ms"], 5)} for entry in rows]
