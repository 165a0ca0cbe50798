"""The public call on tensors that lie on the GPU, beside what else would merge them there.

One tensor of bf16 per model, wall time of whole calls with an idle device before and after: statistics, host work and
launches included. The peers are torch eager and torch.compile on the same formulas, and mergekit's own functions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.gpu.data import family
from bench.gpu.eager import DENSITY, MERGES, T
from bench.gpu.plan import Absent, Context, Item, Row
from bench.gpu.timing import Bench, Probes, ratio

if TYPE_CHECKING:
    import torch

METHODS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"weight": 1.0},
    "slerp": {"t": T},
    "ties": {"weight": 1.0, "density": DENSITY},
    "dare_linear": {"weight": 0.5, "density": 0.5},
}
"""Parameters as fastmerge and mergekit take them."""

BASES: Mapping[str, int | None] = {"linear": None, "slerp": 0, "ties": 0, "dare_linear": 0}
"""Which input is the base; that of slerp is the first of its two."""

SIDE = 16_384
"""Rows and columns of the tensors: 0.5 GB each."""


def items(context: Context) -> Sequence[Item]:
    """Per method: the call itself, then each peer beside it."""
    bench = Bench.of(dry=context.dry)
    found = []
    for method in METHODS:
        for peer, run in {"eager": eager, "compile": compiled, "mergekit": mergekit}.items():
            work = functools.partial(compare, bench, method, run)
            limit = {"compile": 150.0}.get(peer, 90.0)
            found.append(Item(f"{method} {peer}", work, needs=limit / 4, limit=limit))
    return found


def tensors(bench: Bench, method: str) -> list[torch.Tensor]:
    """The inputs, base first where there is one."""
    side = 128 if bench.device == "cpu" else SIDE
    f = family(bench.device, side * side, 2)
    inputs = list(f.tuned) if method in ("linear", "slerp") else [f.base, *f.tuned]
    return [x.view(side, side) for x in inputs]


def ours(method: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The call of a user."""
    import fastmerge

    return fastmerge.merge_tensors(inputs, method, parameters=METHODS[method], base_index=BASES[method])


def compare(bench: Bench, method: str, peer: Callable[[Bench, str], Callable[..., Any]]) -> Row:
    """Wall times, how many times faster, and the largest difference of the results."""
    theirs = peer(bench, method)
    inputs = tensors(bench, method)
    mine = functools.partial(ours, method, inputs)
    other = functools.partial(theirs, inputs)
    probes = Probes(bench)
    copy = 2 * probes.nbytes / bench.alternate({"copy": probes.copy}, runs=min(bench.runs, 5))["copy"].median
    found = bench.wall({"fastmerge": mine, "peer": other}, runs=min(bench.runs, 5))
    apart = float((mine().float() - other().to(bench.device).float()).abs().max())  # mergekit may answer on the CPU
    moved = 2.0 * inputs[0].numel() * (len(inputs) + 1)
    return {
        "times faster": ratio(found["peer"].median, found["fastmerge"].median),
        "fastmerge wall ms": str(found["fastmerge"]),
        "peer wall ms": str(found["peer"]),
        "share of one read and write": ratio(moved / found["fastmerge"].median, copy),
        "largest difference": None if method.startswith("dare") else apart,
    }


def eager(_: Bench, method: str) -> Callable[..., Any]:
    """Torch as it is."""
    return MERGES[method]


def compiled(bench: Bench, method: str) -> Callable[..., Any]:
    """torch.compile of the same function, compiled before it is timed by the round that is not counted."""
    import torch

    if bench.device == "cpu":
        raise Absent("torch.compile is not tried in a dry run")
    made: Callable[..., Any] = torch.compile(MERGES[method], dynamic=False)
    return made


def mergekit(_: Bench, method: str) -> Callable[..., Any]:
    """Mergekit's own functions on the same tensors.

    Raises:
        Absent: it cannot be imported.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module("mergekit.merge_methods")
            version = importlib.metadata.version("mergekit")
    except Exception as error:
        raise Absent(f"mergekit cannot be imported: {type(error).__name__}: {error}") from error
    call = getattr(module, "merge_tensors", None)
    if call is None:
        raise Absent(f"mergekit {version} has no merge_tensors; 0.1.5 has")

    def run(inputs: Sequence[Any]) -> Any:
        return call(list(inputs), method, parameters=dict(METHODS[method]), base_index=BASES[method], dtype=None)

    return run
