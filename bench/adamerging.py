"""The fused pair of AdaMerging beside eager autograd, in turn and in one run: time, and memory beside the inputs.

    python bench/adamerging.py                                    # 100 M parameters, N = 4, fp32; 5 GB of memory
    python bench/adamerging.py --parameters 4e6 --rounds 1 --no-save   # does it work?

A step makes merged weights of a base and N experts, and of their gradient the gradient of N coefficients per tensor.
``eager`` writes the definition down for autograd. ``usual`` is what FusionBench does: task vectors are made once, and
each task's backward goes through the merge. ``fused`` is the kernel pair: forward ``combine``, backward ``dot``, once a
step however many tasks there are; ``summed`` adds the gradients of the tasks up first, as autograd does where tasks are
not in one batch. Gradients of the weights are there before, the same for all. Every contender is a process of its own,
which makes its inputs, takes one step untimed, and then those that are timed; memory is the peak of its resident pages
in all these, less those before. Targets: fused 2.5 times faster than eager in a third of its memory, and 8 times faster
than the usual scheme with four tasks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import Row, provenance, save, table, unfit

WIDTH = 2048
"""Of the matrices that the parameters are divided into, at most."""

FASTER, FASTER_THAN_USUAL, MEMORY = 2.5, 8.0, 1 / 3
DTYPES = ("float32", "bfloat16", "float16")


def resident(what: str) -> int:
    """Resident bytes of this process: ``VmRSS`` now, ``VmHWM`` the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {what}")


def inputs(parameters: float, models: int, dtype: str) -> tuple[list[list[Any]], list[Any]]:
    """Base and experts of each matrix, and its gradient."""
    import torch

    g = torch.Generator().manual_seed(0)
    width = min(WIDTH, math.isqrt(int(parameters)))
    kind = getattr(torch, dtype)

    def one(spread: float) -> Any:
        return torch.randn(width, width, generator=g).mul_(spread).to(kind)

    groups = []
    for _ in range(max(1, round(parameters / width**2))):
        base = one(0.02)
        groups.append([base, *[base + one(1e-3) for _ in range(models)]])
    return groups, [one(1e-2) for _ in groups]


def fused(groups: list[list[Any]], gradients: list[Any], tasks: int, *, summed: bool) -> Callable[[], Any]:
    """Merged weights in memory of their own; a gradient is turned into products as soon as it is whole."""
    import numpy as np

    from fastmerge.adamerging.streams import Streams

    streams = Streams(groups)
    outputs, models = streams.outputs(), streams.models
    lam = np.full((len(groups), models), 0.3)

    def step() -> Any:
        streams.render(lam, outputs)
        slopes = np.zeros(lam.shape)
        for p, g in enumerate(gradients):
            whole = g
            for task in range(1, tasks if summed else 1):
                whole = g + g if task == 1 else whole.add_(g)
            slopes[p] = streams.slopes({p: whole})[0]
        return slopes

    return step


def eager(groups: list[list[Any]], gradients: list[Any], tasks: int) -> Callable[[], Any]:
    """The definition, for autograd."""
    import torch

    lam = torch.full((len(groups), len(groups[0]) - 1), 0.3, requires_grad=True)

    def step() -> Any:
        lam.grad = None
        thetas = []
        for row, (base, *experts) in zip(lam.unbind(), groups, strict=True):
            theta = base
            for weight, expert in zip(row.unbind(), experts, strict=True):
                theta = theta + weight.to(base.dtype) * (expert - base)
            thetas.append(theta)
        for task in range(tasks):
            torch.autograd.backward(thetas, gradients, retain_graph=task + 1 < tasks)
        return lam.grad

    return step


def usual(groups: list[list[Any]], gradients: list[Any], tasks: int) -> Callable[[], Any]:
    """Task vectors in place of experts, and a backward through the merge per task."""
    import torch

    for base, *experts in groups:
        for expert in experts:
            expert.sub_(base)
    lam = torch.full((len(groups), len(groups[0]) - 1), 0.3, requires_grad=True)

    def step() -> Any:
        lam.grad = None
        thetas = []
        for row, (base, *vectors) in zip(lam.unbind(), groups, strict=True):
            theta = base
            for weight, vector in zip(row.unbind(), vectors, strict=True):
                theta = theta + vector * weight.to(base.dtype)
            thetas.append(theta)
        for task in range(tasks):
            torch.autograd.backward(thetas, gradients, retain_graph=task + 1 < tasks)
        return lam.grad

    return step


def contender(name: str, parameters: float, models: int, tasks: int, dtype: str, runs: int) -> None:
    """What a measured process does; prints seconds of each step, memory, and the gradient's sum."""
    groups, gradients = inputs(parameters, models, dtype)
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "fused": lambda: fused(groups, gradients, tasks, summed=False),
        "summed": lambda: fused(groups, gradients, tasks, summed=True),
        "eager": lambda: eager(groups, gradients, tasks),
        "usual": lambda: usual(groups, gradients, tasks),
    }
    step = makers[name]()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    found = step()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        found = step()
        seconds.append(time.perf_counter() - start)
    most = resident("VmHWM") - before
    print(json.dumps({"seconds": seconds, "memory": most, "sum": float(found.sum())}))


def child(name: str, tasks: int, args: argparse.Namespace) -> dict[str, Any]:
    """One contender's process."""
    what = ["--contender", name, "--tasks", str(tasks), "--dtype", args.dtype, "--runs", str(args.runs)]
    sizes = ["--parameters", str(args.parameters), "--models", str(args.models)]
    done = subprocess.run([sys.executable, __file__, *what, *sizes], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit status {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(args: argparse.Namespace) -> list[Row]:
    """All contenders in turn, round by round."""
    every = [("fused", 1), ("eager", 1), ("fused", args.tasks), ("summed", args.tasks), ("usual", args.tasks)]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for name, tasks in every:
            runs.setdefault((name, tasks), []).append(child(name, tasks, args))
    middle = {key: statistics.median(s for r in some for s in r["seconds"]) for key, some in runs.items()}
    memory = {key: statistics.median(r["memory"] for r in some) for key, some in runs.items()}
    size = 4 if args.dtype == "float32" else 2
    moved = args.parameters * size * ((args.models + 2) + (args.models + 2))
    beside = {("eager", 1): ("fused", 1), ("usual", args.tasks): ("fused", args.tasks)}
    rows: list[Row] = []
    for key in every:
        seconds = [s for r in runs[key] for s in r["seconds"]]
        ours = beside.get(key)
        times = middle[key] / middle[ours] if ours else None
        share = memory[ours] / memory[key] if ours else None
        target = {"eager": FASTER, "usual": FASTER_THAN_USUAL}.get(key[0])
        met = None if times is None or target is None else times >= target
        if key[0] == "eager" and share is not None:
            met = met and share <= MEMORY
        rows.append(
            {
                "scheme": key[0],
                "tasks": key[1],
                "ms": f"{middle[key] * 1e3:.1f} ({min(seconds) * 1e3:.1f}..{max(seconds) * 1e3:.1f})",
                "GB/s of the pair's bytes": round(moved / middle[key] / 1e9, 1) if key == ("fused", 1) else None,
                "MB beside the inputs": round(memory[key] / 1e6),
                "fused is faster by": None if times is None else round(times, 1),
                "fused's share of the memory": None if share is None else round(share, 2),
                "met": None if met is None else "yes" if met else "NO",
            }
        )
    sums = {key: some[0]["sum"] / (1 if key[0] == "fused" else key[1]) for key, some in runs.items()}
    near = max(abs(s - sums["fused", 1]) for s in sums.values()) / abs(sums["fused", 1])
    if near > (1e-3 if args.dtype == "float32" else 0.2):
        raise SystemExit(f"the schemes disagree: {sums}")
    return rows


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--runs", type=int, default=5, help="steps of each process, after the first")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each contender")
    parser.add_argument("--no-save", action="store_true")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contender(args.contender, args.parameters, args.models, args.tasks, args.dtype, args.runs)
        return 0
    about = provenance()
    if not args.no_save and (reason := unfit(about)):
        raise SystemExit(reason)
    rows = compare(args)
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load_1min']}, {about['commit']}")
    print(f"{args.parameters:.3g} parameters in {args.dtype}, {args.models} experts\n\n{table(rows)}")
    if not args.no_save:
        print(save("adamerging", {"pair": rows}, about))
    return int(any(row["met"] == "NO" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
