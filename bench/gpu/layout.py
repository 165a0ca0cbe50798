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


def arenas(bench: Bench, cuts: Sequence[int]) -> Family:
    """A base and two fine-tunes, each one allocation that holds all tensors."""
    import torch

    pool = family(bench.device, min(POOL, sum(cuts)), 2)

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


def public(bench: Bench, what: str) -> Row:
    """The same through the public calls, wall time: ``merge_state_dicts`` of all over ``merge_tensors`` of the one."""
    import fastmerge

    cuts = lengths(small=bench.device == "cpu")
    f = arenas(bench, cuts)
    method, base = ("linear", None) if what == "combine" else ("ties", 0)
    parameters = {"weight": 0.5} if base is None else {"weight": 0.5, "density": calls.DENSITY}
    inputs = list(f.tuned) if base is None else [f.base, *f.tuned]
    states = [{f"t{i}": t for i, t in enumerate(x.split(list(cuts)))} for x in inputs]
    works = {
        "many": lambda: fastmerge.merge_state_dicts(states, method, base=base, parameters=parameters),
        "one": lambda: fastmerge.merge_tensors(inputs, method, base_index=base, parameters=parameters),
    }
    wall = bench.wall(works, runs=min(bench.runs, 3))
    return {
        "times": ratio(wall["many"].median, wall["one"].median),
        "tensors": len(cuts),
        "GB": round(2e-9 * (len(inputs) + 1) * f.n, 3),
        "many wall ms": str(wall["many"]),
        "one wall ms": str(wall["one"]),
    }
