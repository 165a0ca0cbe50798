"""The tensors of an 8B Llama in one call, beside the same bytes as one tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench import calls
from bench.calls import Family
from bench.gpu.data import family, ties
from bench.gpu.plan import Row
from bench.gpu.timing import Bench, Probes, ratio

if TYPE_CHECKING:
    import torch

POOL = 1 << 26
"""Elements that are drawn; the rest of an arena repeats them."""


def lengths(*, small: bool) -> list[int]:
    """Elements of the 291 tensors of Llama 3 8B, in the order of the modules; or of the first of a tiny one."""
    from bench.generate import SIZES, shapes

    sizes = [math.prod(s) for s in shapes(SIZES["tiny" if small else "8b"]).values()]
    return sizes[:6] if small else sizes


def arenas(bench: Bench, cuts: Sequence[int], kind: str = "lattice") -> Family:
    """A base and two fine-tunes, each one allocation that holds all tensors."""
    import torch

    pool = family(bench.device, min(POOL, sum(cuts)), 2, kind)

    def fill(some: torch.Tensor) -> torch.Tensor:
        whole = torch.empty(sum(cuts), dtype=torch.bfloat16, device=bench.device)
        for at in range(0, len(whole), len(some)):
            part = whole[at : at + len(some)]
            part.copy_(some[: len(part)])
        return whole

    return Family(fill(pool.base), [fill(x) for x in pool.tuned], fill(pool.out))


def batch(bench: Bench, what: str) -> Row:
    """Device time of one call over all tensors, and of one over a single tensor of as many bytes."""
    from fastmerge.kernels import TritonKernels

    cuts = lengths(small=bench.device == "cpu")
    f = arenas(bench, cuts)
    kernels: Any = TritonKernels(bench.device)

    def call(pieces: Sequence[int] | None) -> Any:
        if what == "combine":
            return calls.combine(kernels, f, delta=False, cuts=pieces)
        return ties(kernels, f, pieces)

    probes = Probes(bench)
    works = {"one": call(None), "many": call(cuts), "copy": probes.copy}
    found = bench.alternate(works, runs=min(bench.runs, 7))
    arrays = 3 if what == "combine" else 4
    return {
        "times": ratio(found["many"].median, found["one"].median),
        "tensors": len(cuts),
        "GB": round(2e-9 * arrays * f.n, 3),
        "many ms": str(found["many"]),
        "one ms": str(found["one"]),
        "share": round(2.0 * arrays * f.n / found["many"].median / (2 * probes.nbytes / found["copy"].median), 4),
    }
