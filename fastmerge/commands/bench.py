"""``fastmerge bench``: this machine's throughput, beside the best that the bytes allow in the same run."""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmerge.api import merge as engine
from fastmerge.backends.choose import Backend, cpu_backend
from fastmerge.commands.doctor import memcpy_rate
from fastmerge.dtypes import BF16
from fastmerge.methods import METHODS
from fastmerge.methods.base import REQUIRED, Method
from fastmerge.methods.called import called
from fastmerge.ops.segments import Segments, segment_row
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime.stream import compute

ELEMENTS = 1 << 20
"""Elements of the tensors of the kernel benchmarks: one unit of the stream, in the cache."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A whole method on one unit of work that lies in the cache.

    Attributes:
        method: its name.
        statistics: whether it needs a pass before it applies.
        nbytes: of every input once, and of the output.
        work: statistics, solve and apply.
        memory: owner of the tensors.
    """

    method: str
    statistics: bool
    nbytes: int
    work: Callable[[], None]
    memory: Sequence[Any]


def method_calls() -> Iterator[MethodCall]:
    """Every method that has kernels on the CPU, with its default parameters: three bf16 models, and a base."""
    backend = cpu_backend("native")
    for name, method in METHODS.items():
        op = _op(method)
        if backend.whole(op.spec):
            continue
        segments, memory = _segments(op)
        nbytes = ELEMENTS * 2 * (len(op.spec.dtypes) + 1)
        work = functools.partial(_merge, backend, op, segments)
        yield MethodCall(name, not backend.program([op]).ready, nbytes, work, memory)


def bench_kernels(*, runs: int = 5) -> list[Row]:
    """Every method on one core.

    Args:
        runs: counted runs, at least one; the median is shown.

    Returns:
        One row per method: G elements/s, GB/s of inputs and outputs once, and share of memcpy's bandwidth.
    """
    floor = memcpy_rate()
    rows: list[Row] = []
    for call in method_calls():
        seconds = _median(call.work, runs)
        rows.append(
            {
                "method": call.method,
                "statistics": "yes" if call.statistics else "no",
                "G elements/s": float(f"{ELEMENTS / seconds / 1e9:.3g}"),
                "GB/s": round(call.nbytes / seconds / 1e9, 2),
                "share of memcpy": round(call.nbytes / seconds / floor, 2),
            }
        )
    return rows


def _merge(backend: Backend, op: Op, segments: Segments) -> None:
    compute(backend.program([op]), segments)


def _median(work: Callable[[], None], runs: int) -> float:
    work()
    times = []
    for _ in range(max(1, runs)):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _op(method: type[Method]) -> Op:
    """Three models, or as many as the method takes, with its default parameters."""
    n = min(3, method.contract.most or 3) - method.contract.pairs
    based = method.contract.base == "required"
    given = {p.name: {"weight": 1.0 / n}.get(p.name, 0.5) for p in method.params if p.default is REQUIRED}
    if "density" in {p.name for p in method.params}:
        given["density"] = 0.2
    resolved = called(method, given, range(n)).method("bench", [(i, "bench") for i in range(n)])
    return Op("bench", Spec(resolved, (1024, ELEMENTS // 1024), (BF16,) * (n + based), BF16, has_base=based))


def _segments(op: Op) -> tuple[Segments, Sequence[Any]]:
    """bf16 weights of sd 0.02 and task vectors of sd 2e-4, so that ties and zeros are as common as in fine-tunes."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(ELEMENTS, np.float32) * np.float32(0.02)
    arrays = []
    for i in range(len(op.spec.dtypes)):
        delta = rng.standard_normal(ELEMENTS, np.float32) * np.float32(2e-4 if i else 0)
        made = base + delta
        bits = (np.abs(made) if i % 2 and op.spec.method.contract.pairs else made).view(np.uint32)
        arrays.append(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))
    out = np.zeros(ELEMENTS, np.uint16)
    row = segment_row(op, 0, 0, ELEMENTS, out.ctypes.data, [a.ctypes.data for a in arrays])
    segments = Segments(np.array([row], np.int64), op.spec.dtypes, op.spec.out_dtype, np.zeros(1, np.int64))
    return segments, [*arrays, out]


def bench_recipe(recipe: str, *, memory: str | None = None, runs: int = 5) -> list[Row]:
    """Merging a recipe beside its floor: ``cat`` of the inputs and ``dd`` of the output's bytes, alternated.

    Args:
        recipe: a recipe file; its models are read from disk, and the output goes to a temporary directory
            beside the recipe, which is removed.
        memory: the merge's budget.
        runs: counted runs of each, at least one; the median is shown.
    """
    planned = engine.plan(recipe)
    files = sorted({str(f.path) for c in planned.checkpoints for f in c.files})
    merges, floors = [], []
    with tempfile.TemporaryDirectory(dir=Path(recipe).resolve().parent, prefix=".fastmerge-bench-") as directory:
        out = Path(directory) / "out"
        for run in range(max(1, runs) + 1):
            start = time.perf_counter()
            engine.merge(planned, out, memory=memory)
            merged = time.perf_counter() - start
            shutil.rmtree(out)
            floor = _floor(files, planned.layout.total, Path(directory) / "zeros")
            if run:
                merges.append(merged)
                floors.append(floor)
    total = sum(os.path.getsize(f) for f in files) + planned.layout.total  # noqa: PTH202
    rows = []
    for name, times in (("merge", merges), ("floor", floors)):
        median = statistics.median(times)
        rows.append(
            {
                "what": name,
                "median s": round(median, 3),
                "min s": round(min(times), 3),
                "max s": round(max(times), 3),
                "GB/s": round(total / median / 1e9, 2),
                "times floor": round(median / statistics.median(floors), 2),
            }
        )
    return rows


def _floor(files: Sequence[str], nbytes: int, zeros: Path) -> float:
    """Seconds of reading every input once and writing the output's bytes durably."""
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    blocks = max(1, nbytes >> 22)
    subprocess.run(
        ["dd", "if=/dev/zero", f"of={zeros}", "bs=4M", f"count={blocks}", "conv=fdatasync"],
        stderr=subprocess.DEVNULL,
        check=True,
    )
    seconds = time.perf_counter() - start
    zeros.unlink()
    return seconds


def table(rows: Sequence[Row]) -> str:
    """Rows as aligned columns."""
    if not rows:
        return "nothing to show"
    names = list(rows[0])
    cells = [names, *[[str(r[n]) for n in names] for r in rows]]
    widths = [max(len(c[i]) for c in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
