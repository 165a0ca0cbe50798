"""What a call on tensors in a GPU's memory costs the host, and what it asks of the device; no GPU is needed.

    python bench/host.py                     # every method; two minutes
    python bench/host.py --methods ties      # some
    python bench/host.py ../before           # beside commit 1d9f8df: a work tree with its extension, as for beside.py

Rows ``render ...`` are of a session on a GPU: *host ms* a render with other numbers than before, *again ms* one with
the same numbers that writes everything.

Everything runs as on a GPU but for the device itself: its memory is host memory that nobody touches, a copy copies
nothing, and a compiled kernel that is launched does nothing. So what is left is the host's own time, and launches,
uploads, allocations and waits can be counted. (A real launch adds what the driver takes, some 3 microseconds by
estimate.) Results and inputs are not counted: they are the caller's. See the README beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    import torch

GIVEN: dict[str, dict[str, Any]] = {
    "passthrough": {"scale": 0.5},
    "linear": {"weight": 0.4},
    "checkpoint_average": {"schedule": "cosine"},
    "task_arithmetic": {"weight": 0.7},
    "slerp": {"t": 0.3},
    "model_stock": {},
    "ties": {"weight": 0.5, "density": 0.3},
    "dare_linear": {"weight": 0.5, "density": 0.4},
    "dare_ties": {"weight": 0.5, "density": 0.4},
}
"""Parameters of each method."""

INPUTS = {"passthrough": 1, "slerp": 2}
"""Models of a call, where it is not three."""

BASELESS = ("passthrough", "linear", "checkpoint_average")
"""Methods whose first input is not the base."""

PLAIN = ("linear", "task_arithmetic")
"""Methods without statistics: an earlier tree's decide nothing by what kernels have found, and there are none here."""

Shapes = dict[str, tuple[int, ...]]

LAYER: Shapes = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14_336, 4096),
    "up": (14_336, 4096),
    "down": (4096, 14_336),
    "n1": (4096,),
    "n2": (4096,),
}
EXPERT: Shapes = {"w1": (96, 256), "w2": (256, 96), "w3": (96, 256)}

SIZES = ("64 elements", "one", "147", "18867")
"""One tensor of 64 elements; one of 268 million; models of 147 tensors (4.5 billion parameters) and of 18,867."""

BARS = {"64 elements": 0.3, "one": 0.3, "147": 6.0, "18867": 400.0}
"""Milliseconds that a call may take of the host."""

AGAIN = 0.15
"""Milliseconds of the same launches again."""


@dataclass
class Counts:
    """What a device was asked for.

    Attributes:
        launches: kernels.
        uploads: copies to it.
        allocations: of its memory.
        waits: times that the host waited for it.
        between: those of the waits that a launch or an upload followed.
        scratch: bytes allocated.
    """

    launches: int = 0
    uploads: int = 0
    allocations: int = 0
    waits: int = 0
    between: int = 0
    scratch: int = 0

    def reset(self) -> None:
        """To zero."""
        vars(self).update(asdict(Counts()))


def device(counts: Counts) -> Any:
    """What calls take for a GPU, and what counts in its place."""
    import torch

    from fastmerge.kernels._call import Gpu
    from fastmerge.kernels.sequence import NOBODY

    gpu = Gpu(torch.device("cpu"))
    compiled = gpu.compiled

    def allocate(nbytes: int) -> torch.Tensor:
        counts.allocations += 1
        counts.scratch += nbytes
        return torch.empty(nbytes, dtype=torch.uint8)

    def send(there: torch.Tensor, here: torch.Tensor) -> None:  # noqa: ARG001
        counts.uploads += 1
        counts.between = counts.waits

    def bring(there: torch.Tensor) -> torch.Tensor:
        counts.waits += 1
        return torch.full((-(-len(there) // 8),), NOBODY).view(torch.uint8)[: len(there)]  # no sum was wrong

    def launch(*args: Any) -> None:  # noqa: ARG001
        counts.launches += 1
        counts.between = counts.waits

    class Runs:
        """A compiled kernel: asked for with a grid, it can be launched."""

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return launch

    def ready(wanted: Any) -> Runs:
        compiled(wanted)
        return Runs()

    gpu.allocate, gpu.send, gpu.bring, gpu.compiled = allocate, send, bring, ready
    return gpu


@contextmanager
def stubbed(counts: Counts) -> Iterator[None]:
    """Calls of this process believe in a GPU meanwhile."""
    import torch
    from triton.runtime.jit import JITFunction

    from fastmerge.api import tensors
    from fastmerge.backends.choose import Backend
    from fastmerge.kernels.backend import TritonKernels
    from fastmerge.runtime import resident
    from fastmerge.session import session
    from fastmerge.session.homes import Home, Homes

    class There(Home):
        """A GPU that has every tensor."""

        def has(self, tensor: torch.Tensor) -> bool:
            return True

    kernels: Any = object.__new__(TritonKernels)  # the constructor rightly refuses a CPU
    kernels.device, kernels.gpu = torch.device("cpu"), device(counts)
    chosen = Backend("triton", kernels, (0,))

    def warmup(*_: object, **__: object) -> object:
        return object()

    def choose(*_: object, **__: object) -> Backend:
        return chosen

    with (
        mock.patch.object(JITFunction, "warmup", warmup),
        mock.patch.object(tensors, "choose", choose),
        mock.patch.object(session, "choose", choose),
        mock.patch.object(session, "homes_of", lambda backend: Homes([There("cuda:0", backend)])),
        mock.patch.dict(resident._KEPT, clear=True),  # noqa: SLF001  calls of other devices
    ):
        yield


def shapes(size: str) -> Shapes:
    """Of the tensors of a model; ``two`` are a large and a small one of those of ``147``."""
    if size == "147":
        layers = {f"model.layers.{i}.{n}.weight": shape for i in range(16) for n, shape in LAYER.items()}
        ends: Shapes = {"model.embed.weight": (128_256, 4096), "head.weight": (128_256, 4096), "norm.weight": (4096,)}
        return {**layers, **ends}
    if size == "18867":
        each = [(f"model.layers.{i}.experts.{e}", n) for i in range(48) for e in range(128) for n in EXPERT]
        experts = {f"{where}.{n}.weight": EXPERT[n] for where, n in each}
        norms: Shapes = {f"model.layers.{i}.n{j}.weight": (2048,) for i in range(48) for j in range(9)}
        return {**experts, **norms, **dict.fromkeys(("extra0", "extra1", "extra2"), (2048,))}
    few: dict[str, Shapes] = {
        "64 elements": {"w": (64,)},
        "one": {"w": (16_384, 16_384)},
        "two": {"w": (4096, 4096), "n": (4096,)},
    }
    return few[size]


def model(size: str) -> dict[str, torch.Tensor]:
    """Tensors of those shapes that take no memory: all are views of one that nobody touches."""
    import torch

    found = {name: (shape, math.prod(shape)) for name, shape in shapes(size).items()}
    room = torch.empty(sum(n for _, n in found.values()), dtype=torch.bfloat16)
    parts = room.split([n for _, n in found.values()])
    return {name: part.view(shape) for (name, (shape, _)), part in zip(found.items(), parts, strict=True)}


def call(method: str, size: str) -> Callable[[], object]:
    """A whole call: of one tensor, or of state dicts."""
    import torch

    import fastmerge as fm

    models = [model(size) for _ in range(INPUTS.get(method, 3))]
    base = None if method in BASELESS else 0
    if len(models[0]) > 1:
        return lambda: fm.merge_state_dicts(models, method, base=base, parameters=GIVEN[method])
    tensors = [m["w"] for m in models]
    out = torch.empty_like(tensors[0])
    return lambda: fm.merge_tensors(tensors, method, base_index=base, out=out, parameters=GIVEN[method])


def counted(method: str, size: str) -> Counts:
    """What one call asks for, when an equal one went before."""
    counts = Counts()
    with stubbed(counts):
        work = call(method, size)
        work()
        counts.reset()
        work()
    return counts


def timed(work: Callable[[], object], seconds: float) -> float:
    """Median milliseconds of a call, repeated for a while; the first does not count."""
    took: list[float] = []
    until = time.perf_counter() + seconds
    while len(took) < 4 or (time.perf_counter() < until and len(took) < 500):
        start = time.perf_counter()
        work()
        took.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(took[1:]), 3)


def bound(work: Callable[[], object]) -> Callable[[], object]:
    """The launches of a call alone, prepared once."""
    from fastmerge.api import tensors
    from fastmerge.runtime import resident

    seen: list[tuple[Any, ...]] = []
    with mock.patch.object(tensors, "resident", lambda *args: seen.append(args)):
        work()
    found = resident.bind(*seen[0])

    def again() -> None:
        for some in found:
            some.run()

    return again


def rows(methods: Sequence[str], sizes: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Counts and times of every method and size."""
    for method in methods:
        for size in sizes:
            counts = counted(method, size)
            with stubbed(Counts()):
                work = call(method, size)
                whole, again = timed(work, seconds), timed(bound(work), seconds)
            met = whole <= BARS[size] and again <= AGAIN
            yield {"method": method, "tensors": size, **asdict(counts), "host ms": whole, "again ms": again, "met": met}


RENDERED: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("weight", {}),
    "ties": ("weight", {"density": 0.3}),
    "slerp": ("t", {}),
    "dare_ties": ("weight", {"density": 0.4}),
}
"""Methods of renders: the number that changes, and the others."""


def document(method: str, value: float) -> dict[str, Any]:
    """A recipe of the models ``base``, ``a`` and ``b``."""
    changed, given = RENDERED[method]
    names = ["a"] if method == "slerp" else ["a", "b"]
    values = {changed: value, **given}
    out: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method != "linear":
        out["base_model"] = "base"
    if method == "slerp":
        return {**out, "models": [{"model": "a"}], "parameters": values}
    return {**out, "models": [{"model": name, "parameters": values} for name in names]}


def renders(methods: Sequence[str], sizes: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """Counts of a render with other numbers, when what passes find is known; and times."""
    import fastmerge as fm

    for method in methods:
        for size in sizes:
            counts, numbers = Counts(), itertools.count(1)
            with (
                stubbed(counts),
                fm.Session({name: model(size) for name in ("base", "a", "b")}, device="cuda") as session,
            ):
                target = model(size)
                bound = session.bind(document(method, 0.5), target)
                given = [fm.Recipe.load(document(method, value / 1000)) for value in range(400)]

                def other(bound: Any = bound, given: Any = given, numbers: Any = numbers) -> None:
                    bound.render(given[next(numbers) % len(given)])

                other()
                other()
                counts.reset()
                other()
                found = asdict(counts)
                whole = timed(other, seconds)
                again = timed(lambda bound=bound: bound.render(everything=True), seconds)  # type: ignore[misc]
            met = whole <= BARS[size]
            yield {
                "method": f"render {method}",
                "tensors": size,
                **found,
                "host ms": whole,
                "again ms": again,
                "met": met,
            }


def before(tree: str, methods: Sequence[str], sizes: Sequence[str], seconds: float) -> None:
    """Times of the same calls in a work tree of commit 1d9f8df, by JSON; its kernels are launched by Triton itself."""
    # An editable installation in this environment would come first.
    sys.meta_path[:] = [f for f in sys.meta_path if "_editable" not in type(f).__module__]
    sys.path.insert(0, tree)
    import torch
    from triton.runtime.jit import JITFunction

    import fastmerge
    from fastmerge import dispatch, memory
    from fastmerge.kernels.backend import TritonKernels

    assert Path(fastmerge.__file__).is_relative_to(Path(tree).resolve()), fastmerge.__file__
    kernels = object.__new__(TritonKernels)
    kernels.device = torch.device("cpu")
    chosen = dispatch.Backend("triton", kernels, (0,))

    def run(*_: object, **__: object) -> None:
        pass

    def choose(*_: object, **__: object) -> object:
        return chosen

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(memory, "choose", choose):
        for method in methods:
            for size in sizes:
                print(json.dumps([method, size, timed(call(method, size), seconds)]), flush=True)


def earlier(tree: str, methods: Sequence[str], sizes: Sequence[str], seconds: float) -> dict[tuple[str, str], float]:
    """Times of :func:`before`, in a process of its own."""
    plain = [m for m in methods if m in PLAIN]
    if not plain:
        return {}
    words = ["--seconds", str(seconds), "--sizes", *sizes, "--methods", *plain]
    command = [sys.executable, __file__, tree, "--before", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {(method, size): took for method, size, took in map(json.loads, done.stdout.splitlines())}


def main() -> int:
    """Prints the table; writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", nargs="?", help="another work tree, with its extension")
    parser.add_argument("--methods", nargs="*", default=list(GIVEN), choices=list(GIVEN), metavar="METHOD")
    parser.add_argument("--renders", nargs="*", default=list(RENDERED), choices=list(RENDERED), metavar="METHOD")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=SIZES, metavar="SIZE")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--before", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.before:
        before(options.tree, options.methods, options.sizes, options.seconds)
        return 0
    sys.path.insert(0, str(ROOT))
    old = earlier(options.tree, options.methods, options.sizes, options.seconds) if options.tree else {}
    print(f"{'method':16} {'tensors':>12} {'launches':>8} {'uploads':>7} {'allocs':>6} {'waits':>5} {'between':>7} "
          f"{'before ms':>9} {'host ms':>8} {'again ms':>8} {'scratch MB':>10}")  # fmt: skip
    out = []
    rendered = renders(options.renders, [s for s in options.sizes if s != "one"], options.seconds)
    for row in itertools.chain(rows(options.methods, options.sizes, options.seconds), rendered):
        row["before ms"] = old.get((row["method"], row["tensors"]))
        out.append(row)
        print(f"{row['method']:16} {row['tensors']:>12} {row['launches']:8} {row['uploads']:7} {row['allocations']:6} "
              f"{row['waits']:5} {row['between']:7} {row['before ms'] or '':>9} {row['host ms']:8} {row['again ms']:8} "
              f"{row['scratch'] / 1e6:10.2f}{'' if row['met'] else '  above the bar'}", flush=True)  # fmt: skip
    if options.json:
        about = {"python": platform.python_version(), "cores": os.cpu_count(), "bars": {**BARS, "again": AGAIN}}
        options.json.write_text(json.dumps({**about, "rows": out}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # which would run the kernels
    sys.exit(main())
