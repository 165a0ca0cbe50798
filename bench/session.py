"""Renders of a session beside the floor of their bytes and beside mergekit's merge in memory.

    python bench/session.py                      # 1.4 GB of disk, 5 GB of memory, five minutes on two cores
    python bench/session.py --size tiny --runs 1 --no-save

Three fine-tunes are merged again and again into the same tensors, each time with other weights, so that everything is
written. *floor*: memcpy by all cores that moves as many bytes as the render reads and writes, measured in turn with
it. *mergekit*: its ``merge_state_dicts`` of the same state dictionaries, which makes new tensors. *batch*: eight
candidates at once beside the same eight one by one, with thresholds and inner products known to both.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import generate
import numpy as np
import recipes
from process import Spread
from report import Row, provenance, save, table, unfit

import fastmerge as fm

HERE = Path(__file__).resolve().parents[1]
FLOOR, LINEAR, TIES, BATCH = 1.3, 3.0, 30.0, 0.5
CANDIDATES = 8


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memcpy(nbytes: int) -> Callable[[], None]:
    """Moves so many bytes, half of them read and half written, by all cores."""
    half, cores = nbytes // 2, len(os.sched_getaffinity(0))
    source, target = np.ones(half, np.uint8), np.ones(half, np.uint8)
    part = -(-half // cores)

    def copy(core: int) -> None:
        at = core * part
        ctypes.memmove(target.ctypes.data + at, source.ctypes.data + at, max(0, min(part, half - at)))

    def work() -> None:
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(copy, range(cores)))

    return work


def candidate(family: Sequence[Path], method: str, number: int) -> dict[str, Any]:
    """A recipe whose numbers are like no other's."""
    body = recipes.recipe("ties" if method == "task_arithmetic" else method, family)
    if method == "task_arithmetic":
        body["merge_method"] = method
    for i, row in enumerate(body["models"]):
        if method == "slerp":
            body["parameters"]["t"] = 0.2 + number / 1000
        else:
            weight = {"weight": 0.2 + 0.1 * i + number / 1000}
            row["parameters"] = weight if method == "task_arithmetic" else row["parameters"] | weight
    return body


def peer(family: Sequence[Path], method: str, runs: int) -> Spread | None:
    """The merge of the same state dictionaries by mergekit; None without it."""
    try:
        from mergekit import merge_methods
    except ImportError:
        return None
    from safetensors.torch import load_file

    body = candidate(family, method, 0)
    given = {str(path): load_file(path / "model.safetensors") for path in recipes.inputs(body)}
    own = {row["model"]: row.get("parameters", {}) for row in body["models"]}
    names = {name for values in own.values() for name in values}
    parameters = {name: {model: values[name] for model, values in own.items()} for name in names}
    parameters |= body.get("parameters", {})
    base = body.get("base_model")
    call = {"parameters": parameters, **({"base": base} if base else {})}
    return Spread.of([seconds(lambda: merge_methods.merge_state_dicts(given, method, **call)) for _ in range(runs)])


def renders(
    session: fm.Session, family: Sequence[Path], methods: Sequence[str], runs: int, peer_runs: int
) -> list[Row]:
    """Each method beside its floor and beside mergekit."""
    rows: list[Row] = []
    for method in methods:
        target = session.render(candidate(family, method, 500))
        size = sum(t.nbytes for t in target.values())
        floor = memcpy(size * (1 + len(recipes.inputs(candidate(family, method, 0)))))
        ours, floors = [], []
        for run in range(runs + 1):
            body = candidate(family, method, run)
            took = seconds(lambda body=body, target=target: session.render(body, target)), seconds(floor)
            if run:
                ours.append(took[0])
                floors.append(took[1])
        mine, least, theirs = Spread.of(ours), Spread.of(floors), peer(family, method, peer_runs)
        over = mine.median / least.median
        times = theirs.median / mine.median if theirs else None
        wanted = {"linear": LINEAR, "ties": TIES}.get(method)
        met = None if wanted is None or times is None else times >= wanted
        if method == "linear":
            met = met is not False and over <= FLOOR
        rows.append(
            {
                "what": f"render, {method}",
                "ms": f"{mine.median * 1e3:.1f} ({mine.least * 1e3:.1f}..{mine.most * 1e3:.1f})",
                "floor ms": f"{least.median * 1e3:.1f}",
                "of the floor": round(over, 2),
                "mergekit s": str(theirs) if theirs else None,
                "times faster": round(times, 1) if times else None,
                "met": None if met is None else "yes" if met else "NO",
            }
        )
        print(table(rows[-1:]), flush=True)
    return rows


def batches(session: fm.Session, family: Sequence[Path], methods: Sequence[str], runs: int) -> list[Row]:
    """Eight candidates at once, and one by one."""
    rows: list[Row] = []
    for method in methods:
        targets = [session.render(candidate(family, method, 900 + i)) for i in range(CANDIDATES)]
        together, apart = [], []
        for run in range(runs + 1):
            first, second = (
                [candidate(family, method, 100 + 2 * CANDIDATES * run + 2 * i + n) for i in range(CANDIDATES)]
                for n in range(2)
            )
            pairs = list(zip(second, targets, strict=True))
            eight = seconds(lambda some=first, into=targets: session.render_batch(some, into))
            one = seconds(lambda pairs=pairs: [session.render(body, into) for body, into in pairs])
            if run:
                together.append(eight)
                apart.append(one)
        singly, at_once = Spread.of(apart), Spread.of(together)
        share = at_once.median / singly.median
        rows.append(
            {
                "what": f"{CANDIDATES} candidates, {method}",
                "one by one s": str(singly),
                "at once s": str(at_once),
                "share": round(share, 2),
                "met": ("yes" if share <= BATCH else "NO") if method == "linear" else None,
            }
        )
        print(table(rows[-1:]), flush=True)
    return rows


def main() -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FASTMERGE_BENCH_DATA", HERE / ".cache/bench"))
    parser.add_argument("--data", type=Path, default=default)
    parser.add_argument("--size", default="768x12")
    parser.add_argument("--methods", nargs="+", default=["linear", "ties", "slerp", "dare_ties", "task_arithmetic"])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--peer-runs", type=int, default=3, help="of mergekit")
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    about = provenance(args.data if args.data.exists() else None)
    if not args.no_save and (reason := unfit(about)):
        raise SystemExit(reason)
    args.data.mkdir(parents=True, exist_ok=True)
    family = generate.generate(args.data, args.size, 3)
    found: dict[str, list[Row]] = {}
    with fm.Session(family) as session:
        found["render"] = renders(session, family, args.methods, args.runs, args.peer_runs)
        found["batch"] = batches(session, family, [m for m in args.methods if m != "dare_ties"], min(args.runs, 5))
    print(f"\n{about['cpu']}, {about['cores']} cores, load {about['load_1min']}, {about['commit']}\n")
    for section, rows in found.items():
        print(f"{section}\n{table(rows)}\n")
    if not args.no_save:
        print(save("session", found, about))
    return int(any(row["met"] == "NO" for rows in found.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
