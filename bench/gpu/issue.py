"""How many instructions per second the device issues, and how many a kernel needs: its other bound.

The rate is that of a kernel that does nothing but integer multiplications and exclusive ors on registers, half of
each, which is the mix of Philox; its instructions are counted in its machine code, and so are those of what is bounded.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.calls import Work
from bench.gpu.plan import Absent, Row
from bench.gpu.timing import Bench

TRIPS = 256
WARPS = 4
BLOCK = 1024

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(0x[0-9a-f]+)")
"""Of a listing: the address and text of an instruction, and where a branch goes."""


def machine_code(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of every instruction.

    Raises:
        Absent: triton has no disassembler here.
    """
    from tests.kernels.aot import tool

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        try:
            lines = LINE.findall(tool("cuobjdump", "-sass", str(path)))
        except OSError as error:
            raise Absent(f"cuobjdump of triton cannot run: {error}") from error
    found = [(int(at, 16), text.strip()) for at, text in lines if not text.startswith("NOP")]
    while found and target(found[-1][1]) == found[-1][0]:  # the padding jumps to itself
        found.pop()
    return found


def target(text: str) -> int | None:
    """Where a branch jumps to."""
    found = BRANCH.search(text)
    return int(found.group(1), 16) if found else None


def executed(code: list[tuple[int, str]], trips: int) -> float:
    """Instructions that a thread of the rate's kernel executes: what its one loop holds, ``trips`` times, and the rest.

    Raises:
        RuntimeError: there is no loop.
    """
    loops = [(t, a) for a, text in code if (t := target(text)) is not None and t < a]
    if not loops:
        raise RuntimeError("the kernel that measures the rate of instructions has no loop")
    low, high = max(loops, key=lambda span: span[1] - span[0])
    inside = sum(low <= a <= high for a, _ in code)
    return float(inside * trips + len(code) - inside)


@contextmanager
def compiled(family: str) -> Iterator[list[tuple[Any, int, int]]]:
    """Collects the kernels of a family that calls bind meanwhile: each with its elements per step and its warps."""
    from fastmerge.kernels._call import Gpu

    inner = Gpu.compiled
    seen: list[tuple[Any, int, int]] = []

    def compiled(gpu: Gpu, launch: Any) -> Any:
        made = inner(gpu, launch)
        if launch.kernel.fn.__name__ == f"{family}_kernel":
            words = dict(zip(launch.kernel.arg_names, (*launch.args, *launch.constants), strict=True))
            seen.append((made, words["BLOCK"], launch.options["num_warps"]))
        return made

    Gpu.compiled = compiled
    try:
        yield seen
    finally:
        Gpu.compiled = inner


def per_element(work: Work, family: str) -> float:
    """Instructions per element of the leanest kernel that a call launches: the one for full, aligned blocks.

    Of elementwise kernels, which do everything once per block: their one loop looks for the segment of the block, and
    ends at once where there is one.
    """
    with compiled(family) as seen:
        work()
    if not seen:
        raise RuntimeError(f"no {family} kernel was launched")
    return min(len(machine_code(made.asm["cubin"])) / (block / (32 * warps)) for made, block, warps in seen)


def measure(bench: Bench) -> dict[str, float]:
    """Instructions of threads per second."""
    import torch

    from bench.gpu.spin import spin_kernel

    programs = 2048 if bench.device != "cpu" else 1
    trips = TRIPS if bench.device != "cpu" else 2
    out = torch.zeros(programs * BLOCK, dtype=torch.int32, device=bench.device)
    launched: list[Any] = []

    def work() -> None:
        launched.append(spin_kernel[(programs,)](out, trips, BLOCK=BLOCK, num_warps=WARPS))

    took = bench.alternate({"spin": work}, runs=min(bench.runs, 7))["spin"].median
    if bench.device == "cpu":
        return {"instructions/s": 1.0 / took, "per thread": 1.0}
    each = executed(machine_code(launched[-1].asm["cubin"]), trips)
    return {"instructions/s": each * programs * WARPS * 32 / took, "per thread": each}


def rates(bench: Bench) -> Row:
    """The rate of instructions, beside the bandwidths that it is to be compared with."""
    from bench.gpu.timing import Probes

    probes = Probes(bench)
    found = bench.alternate({"copy": probes.copy, "write": probes.fill})
    copy, write = 2 * probes.nbytes / found["copy"].median, probes.nbytes / found["write"].median
    row: Row = {"copy GB/s": round(copy / 1e9, 1), "copy ms": str(found["copy"])}
    row |= {"write GB/s": round(write / 1e9, 1), "write ms": str(found["write"])}
    rate = measure(bench)
    return {**row, "T instructions/s": round(rate["instructions/s"] / 1e12, 2),
            "per byte of copy": round(rate["instructions/s"] / copy, 2),
            "instructions per thread": rate["per thread"]}  # fmt: skip
