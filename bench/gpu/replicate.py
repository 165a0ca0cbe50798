"""Expert replication beside the write bandwidth of the same run: one read, E writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.gpu.plan import Absent, Row
from bench.gpu.timing import Bench, Probes


def entry() -> Callable[..., Any]:
    """``fastmerge.replicate_experts`` where the extension has its CUDA part.

    Raises:
        Absent: it does not.
    """
    import fastmerge

    call = getattr(fastmerge, "replicate_experts", None)
    if call is None:
        raise Absent("this version has no fastmerge.replicate_experts")
    from fastmerge import _native

    if not getattr(_native, "has_cuda", bool)():
        raise Absent("the extension was built without CUDA (no nvcc)")
    found: Callable[..., Any] = call
    return found


def rate(bench: Bench, experts: int, what: str) -> Row:
    """Copies of one tensor, clean or with noise on all of them.

    Returns:
        ``written share``: bytes written per second, of the write bandwidth, which is what is required; ``read and
        written share``: with the one read, which takes its part of the memory's time.
    """
    import torch

    call = entry()
    n = bench.elements(experts + 1)
    x = torch.randn(n, device=bench.device, dtype=torch.float32).to(torch.bfloat16)
    room = torch.empty((experts, n), dtype=torch.bfloat16, device=bench.device)
    noise = 0.0 if what == "clean" else 1e-4

    def work() -> object:
        return call(x, experts, noise=noise, mode="absolute", name="w", first_clean=False, out=room)

    probes = Probes(bench)
    found = bench.alternate({"fill": probes.fill, "replicate": work})
    write = probes.nbytes / found["fill"].median
    took = found["replicate"].median
    moved = 2.0 * n * (experts + 1)
    return {
        "written share": round(2.0 * n * experts / took / write, 4),
        "read and written share": round(moved / took / write, 4),
        "GB": round(moved / 1e9, 3),
        "replicate ms": str(found["replicate"]),
        "replicate GB/s": round(moved / took / 1e9, 1),
        "write GB/s": round(write / 1e9, 1),
    }
