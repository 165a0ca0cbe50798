"""What a call on tensors in a GPU's memory costs the host, and what it asks of the device; no GPU is needed.

    python bench/host.py                    # every method; a minute
    python bench/host.py ../before          # beside another work tree, where that can be done without data

Everything runs as on a GPU but for the device itself: memory is host memory that nobody touches, a copy copies nothing,
and a compiled kernel that is launched does nothing. So what is left is the host's own time, and launches, uploads,
allocations and waits can be counted. (A real launch adds what the driver takes, some 3 microseconds.) Another tree is
measured for methods without statistics only: before, the host decided by what kernels had found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    import torch

GIVEN: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4},
    "task_arithmetic": {"weight": 0.7},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "ties": {"weight": 0.5, "density": 0.3},
    "dare_linear": {"weight": 0.5, "density": 0.4},
    "dare_ties": {"weight": 0.5, "density": 0.4},
}
"""Parameters of each method; slerp takes two models, the others three, the first of which is the base but of linear."""

PLAIN = ("linear", "task_arithmetic")
"""Methods without statistics."""

BARS = {"one": 0.3, "147": 6.0, "18867": 400.0, "again": 0.15}
"""Milliseconds."""


class Counts:
    """Stands for a device, and counts."""

    def __init__(self) -> None:
        self.launches = self.uploads = self.allocations = self.waits = self.scratch = 0

    def reset(self) -> None:
        """To zero."""
        self.__init__()  # type: ignore[misc]


def counted(counts: Counts) -> Any:
    """Kernels whose device is ``counts``."""
    import torch

    from fastmerge.kernels._call import Gpu
    from fastmerge.kernels.backend import TritonKernels

    class Stub(Gpu):
        """Does everything but the device's part."""

        def allocate(self, nbytes: int) -> torch.Tensor:
            counts.allocations += 1
            counts.scratch += nbytes
            return torch.empty(nbytes, dtype=torch.uint8)

        def send(self, there: torch.Tensor, here: torch.Tensor) -> None:
            counts.uploads += 1

        def bring(self, there: torch.Tensor) -> torch.Tensor:
            counts.waits += 1
            return torch.full_like(there, 0x7F)  # what no solve has found wrong is a large number

        def compiled(self, launch: Any) -> Any:
            found = super().compiled(launch)

            class Runner:
                def __getitem__(self, grid: Any) -> Any:
                    def run(*args: Any) -> None:
                        counts.launches += 1

                    return run

            return found and Runner()

    kernels = object.__new__(TritonKernels)  # the constructor rightly refuses a CPU
    kernels.device = torch.device("cpu")
    kernels.gpu = Stub(kernels.device)
    return kernels


def stub() -> Callable[[Counts], Any]:
    """Makes the calls of this process believe in a GPU; gives what makes the kernels of one."""
    from fastmerge.api import tensors
    from fastmerge.backends.choose import Backend
    from triton.runtime.jit import JITFunction

    class Kernel:
        """Runs nothing."""

    JITFunction.warmup = lambda self, *args, **named: Kernel()

    def start(counts: Counts) -> Any:
        kernels = counted(counts)
        tensors.choose = lambda *args, **named: Backend("triton", kernels, (0,))  # type: ignore[assignment]
        return kernels

    return start


def shapes(count: int) -> dict[str, tuple[int, ...]]:
    """Of a model of 4.5 billion parameters in 147 tensors, or of one with experts in 18,867."""
    if count == 1:
        return {"w": (16_384, 16_384)}
    if count == 147:
        layer = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14_336, 4096),
                 "up": (14_336, 4096), "down": (4096, 14_336), "n1": (4096,), "n2": (4096,)}  # fmt: skip
        out = {f"model.layers.{i}.{n}.weight": s for i in range(16) for n, s in layer.items()}
        return {**out, "model.embed.weight": (128_256, 4096), "head.weight": (128_256, 4096), "norm.weight": (4096,)}
    expert = {"w1": (96, 256), "w2": (256, 96), "w3": (96, 256)}
    names = ((f"model.layers.{i}.experts.{e}.{n}.weight", s)
             for i in range(48) for e in range(128) for n, s in expert.items())  # fmt: skip
    more = {f"model.layers.{i}.n{j}.weight": (2048,) for i in range(48) for j in range(9)}
    return dict([*names, *more.items()][: count - 3]) | {f"extra{i}": (2048,) for i in range(3)}


def model(count: int) -> dict[str, torch.Tensor]:
    """Tensors of those shapes that own no memory: each is a view of one that nobody touches."""
    import torch

    found = shapes(count)
    total = sum(a * b for a, b in ((s[0], s[1] if len(s) > 1 else 1) for s in found.values()))
    room = torch.empty(total, dtype=torch.bfloat16)
    out, at = {}, 0
    for name, shape in found.items():
        n = shape[0] * (shape[1] if len(shape) > 1 else 1)
        out[name] = room[at : at + n].view(shape)
        at += n
    return out


def timed(call: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of a call, repeated for a while; the first two do not count."""
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < 7 or (time.perf_counter() < until and len(took) < 500):
        start = time.perf_counter()
        call()
        took.append((time.perf_counter() - start) * 1e3)
    return statistics.median(took[2:])


def calls(method: str, count: int, small: bool) -> Callable[[], Any]:
    """A whole call: of one tensor, or of state dicts."""
    import torch

    import fastmerge as fm

    inputs = 2 if method == "slerp" else 3
    base = None if method == "linear" else 0
    given = {"parameters": GIVEN[method]}
    if count == 1:
        tensors = [torch.randn(64).bfloat16() if small else model(1)["w"] for _ in range(inputs)]
        out = torch.empty_like(tensors[0])
        return lambda: fm.merge_tensors(tensors, method, base_index=base, out=out, **given)
    models = [model(count) for _ in range(inputs)]
    return lambda: fm.merge_state_dicts(models, method, base=base, **given)


def rows(methods: list[str], *, seconds: float) -> Iterator[dict[str, Any]]:
    """Every method: whole calls and bound ones."""
    start = stub()
    from fastmerge.api import tensors
    from fastmerge.runtime import resident

    for method in methods:
        for what, count, small in (
            ("64 elements", 1, True),
            ("one", 1, False),
            ("147", 147, False),
            ("18867", 18_867, False),
        ):
            counts = Counts()
            kernels = start(counts)
            call = calls(method, count, small)
            call()
            counts.reset()
            call()
            row = {"method": method, "tensors": what, **vars(counts)}
            row["host ms"] = round(timed(call, seconds), 3)
            seen: list[Any] = []
            whole, tensors.resident = tensors.resident, lambda ops, program: seen.append((ops, program))  # type: ignore[assignment]
            call()
            tensors.resident = whole
            bound = resident.bind(*seen[0])
            again = lambda bound=bound: [b.run() for b in bound]  # noqa: E731
            again()
            row["again ms"] = round(timed(again, seconds), 3)
            row["met"] = (
                row["host ms"] <= BARS["one" if count == 1 else str(count)] and row["again ms"] <= BARS["again"]
            )
            del kernels
            yield row


def before(methods: list[str], seconds: float) -> None:
    """The same calls in a tree whose kernels are launched through Triton's own way; prints JSON."""
    import torch
    from fastmerge.api import tensors
    from fastmerge.backends.choose import Backend
    from fastmerge.kernels.backend import TritonKernels
    from fastmerge.runtime.devices import CpuDevice
    from triton.runtime.jit import JITFunction

    JITFunction.run = lambda self, *args, **named: None
    kernels = object.__new__(TritonKernels)
    kernels.device = torch.device("cpu")
    backend = Backend("triton", kernels, (0,))
    tensors.choose = lambda *args, **named: backend  # type: ignore[assignment]
    tensors.Resident = lambda home: CpuDevice()  # type: ignore[attr-defined]
    for method in methods:
        for what, count, small in (
            ("64 elements", 1, True),
            ("one", 1, False),
            ("147", 147, False),
            ("18867", 18_867, False),
        ):
            call = calls(method, count, small)
            call()
            print(
                json.dumps({"method": method, "tensors": what, "before ms": round(timed(call, seconds), 3)}), flush=True
            )


def main() -> int:
    """Prints the table, and JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", help="another work tree, with its extension")
    parser.add_argument("--methods", nargs="*", default=list(GIVEN))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--json", help="file to write")
    parser.add_argument("--before", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.before:
        before(options.methods, options.seconds)
        return 0
    old: dict[tuple[str, str], float] = {}
    if options.tree:
        plain = [m for m in options.methods if m in PLAIN]
        command = [sys.executable, __file__, "--before", "--seconds", str(options.seconds), "--methods", *plain]
        done = subprocess.run(
            command, env={**os.environ, "FASTMERGE_TREE": options.tree}, capture_output=True, text=True, check=True
        )
        for line in done.stdout.splitlines():
            found = json.loads(line)
            old[found["method"], found["tensors"]] = found["before ms"]
    out = []
    print(f"{'method':16} {'tensors':>12} {'launches':>8} {'uploads':>7} {'allocs':>6} {'waits':>5} {'before ms':>9} "
          f"{'host ms':>8} {'again ms':>8} {'scratch MB':>10}")  # fmt: skip
    for row in rows(options.methods, seconds=options.seconds):
        row["before ms"] = old.get((row["method"], row["tensors"]))
        out.append(row)
        shown = "" if row["before ms"] is None else row["before ms"]
        print(f"{row['method']:16} {row['tensors']:>12} {row['launches']:8} {row['uploads']:7} {row['allocations']:6} "
              f"{row['waits']:5} {shown:>9} {row['host ms']:8} {row['again ms']:8} {row['scratch'] / 1e6:10.2f}"
              f"{'' if row['met'] else '  above the bar'}", flush=True)  # fmt: skip
    if options.json:
        about = {"python": platform.python_version(), "cores": os.cpu_count(), "bars": BARS, "rows": out}
        Path(options.json).write_text(json.dumps(about, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    tree = os.environ.get("FASTMERGE_TREE")
    sys.path.insert(0, str(tree or ROOT))
    sys.exit(main())
