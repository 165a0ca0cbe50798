"""Every kernel of the extension on one core beside memcpy, then every method by itself.

    python bench/kernels.py [--sections cold types] [--kernels gram count] [--quick] [--no-save]

Sections: hot and cold (every kernel in bf16, on a base and fine-tunes: cases.py), types (combine and gram by type and
number of models, replicate by type), methods (statistics, solve and apply with default parameters).
*Cold*: 256 MiB per tensor, far beyond the caches. *Hot*: half a million elements per tensor, half a unit of the stream.
The share is of the bandwidth that memcpy reached in the same run, alternated with the kernel. Bytes moved are every
input once, and every output; memcpy of n bytes moves 2 n. Times are the thread's CPU time, medians.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cases
from report import Row, provenance, save, table, unfit

QUICK_RUNS = 3

SECTIONS: dict[str, Callable[[Any], Iterable[cases.Case]]] = {
    "hot": lambda native: cases.every(native, cases.HOT),
    "cold": lambda native: cases.every(native, cases.COLD),
    "types": lambda native: cases.by_type(native, cases.HOT),
}
"""Section to its cases, given the extension; ``methods`` is made of no cases."""


def measure(case: cases.Case, runs: int) -> Row:
    """One row: a kernel, memcpy alternated with it."""
    case.work()
    ours, copies = [], []
    for _ in range(runs):
        ours.append(_seconds(case.work))
        copies.append(_seconds(lambda: ctypes.memmove(case.out.ctypes.data, case.source.ctypes.data, case.out.nbytes)))
    took, copied = statistics.median(ours), statistics.median(copies)
    moved, copy = case.nbytes / took / 1e9, 2 * case.out.nbytes / copied / 1e9
    return {
        "kernel": case.kernel,
        "type": case.type,
        "models": case.models,
        "where": "hot" if len(case.out) == cases.HOT else "cold",
        "G elements/s": round(case.elements / took / 1e9, 3),
        "GB/s moved": round(moved, 2),
        "memcpy GB/s": round(copy, 2),
        "share of memcpy": round(moved / copy, 2),
    }


def _seconds(work: cases.Work) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def main() -> None:
    """Prints and saves the tables."""
    kernels = [*dict.fromkeys(name.split()[0] for name in cases.ALL), "replicate"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SECTIONS, "methods"]
    parser.add_argument("--sections", nargs="+", choices=names, metavar="SECTION", help=", ".join(names))
    parser.add_argument(
        "--kernels", nargs="+", choices=kernels, default=kernels, metavar="KERNEL", help=", ".join(kernels)
    )
    parser.add_argument("--quick", action="store_true", help="nothing cold, a few runs each; no file in results/")
    parser.add_argument("--no-save", action="store_true", help="print only; no file in results/")
    args = parser.parse_args()
    wanted = args.sections or [name for name in names if not (args.quick and name == "cold")]
    try:
        from fastmerge import _native
    except ImportError as error:
        parser.exit(1, f"the native extension cannot be imported: {error}\n")
    about = provenance()
    kept = not (args.no_save or args.quick)
    if kept and (reason := unfit(about)):
        parser.error(reason)
    sections: dict[str, Sequence[Row]] = {}
    for name in wanted:
        if name == "methods":
            from fastmerge.commands.bench import bench_kernels

            rows = bench_kernels(runs=1) if args.quick else bench_kernels()
        else:
            some = (c for c in SECTIONS[name](_native) if c.kernel.split()[0] in args.kernels)
            rows = [measure(c, QUICK_RUNS if args.quick else c.runs) for c in some]
        sections[name] = rows
        print(f"== {name}\n{table(rows)}\n", flush=True)
    if kept:
        print(f"saved {save('kernels', sections, about)}")


if __name__ == "__main__":
    main()
