"""Every kernel of the extension on one core beside memcpy, then every method by itself.

    python bench/kernels.py [--kernels gram count] [--hot] [--no-save]

A base and three fine-tunes in bf16 with realistic deltas (see generate.py). *Cold*: 128 MiB per tensor, far beyond
the caches; the share is of the bandwidth that memcpy reached in the same run, alternated. *Hot*: 1 MiB per tensor, a
unit of the stream. Bytes moved are every input once, and the output where there is one; memcpy of n bytes moves 2 n.
Times are the thread's CPU time, medians.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from generate import pools
from report import Row, provenance, save, table

MODELS = 3
BF16 = 3
KEEP_ALL = -1
HOT, COLD = 1 << 19, 1 << 26
RUNS = {HOT: 60, COLD: 7}
TILE = 1 << 16
DENSITY = 0.2

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Data:
    """What kernels are called with.

    Attributes:
        table: one segment: base and fine-tunes; ``plain`` the same without the base.
        types, plain_types: their type codes.
        threshold: key of the last kept delta of each fine-tune at a density of 0.2.
        n: elements.
        buffers: owns the memory: output, base, fine-tunes.
    """

    table: npt.NDArray[np.int64]
    plain: npt.NDArray[np.int64]
    types: npt.NDArray[np.int32]
    plain_types: npt.NDArray[np.int32]
    threshold: npt.NDArray[np.uint64]
    n: int
    buffers: Sequence[npt.NDArray[np.uint16]]

    @property
    def tiles(self) -> int:
        """Tiles of the segment."""
        return -(-self.n // TILE)


def data(n: int) -> Data:
    """The inputs at a size: a pool of a million weights per model, repeated."""
    count = 1 << 20
    models = [pools(0, model, count)[2][:count] for model in range(MODELS + 1)]
    base, *tuned = ((bits.astype(np.uint32) << 16).view(np.float32) for bits in models)
    keys = [np.abs(t - base).view(np.uint32) for t in tuned]
    at = int((1 - DENSITY) * count)
    buffers = [np.zeros(n, np.uint16), *(np.resize(bits, n) for bits in models)]
    out, *addresses = (b.ctypes.data for b in buffers)
    head = [out, n, 0, n, 12_345, 0, 0]
    return Data(
        np.array([[*head, *addresses]], np.int64),
        np.array([[*head, *addresses[1:]]], np.int64),
        np.full(MODELS + 1, BF16, np.int32),
        np.full(MODELS, BF16, np.int32),
        np.array([[np.partition(k, at)[at] for k in keys]], np.uint64),
        n,
        buffers,
    )


def keep(d: Data, *, drop: bool, trim: bool) -> tuple[Any, ...]:
    """The keep arguments: Bernoulli with probability one half, and the threshold with every tie kept."""
    cut = np.full((1, MODELS, 3), KEEP_ALL, np.int64)
    cut[:, :, 0] = 1 << 62
    half = np.full((1, MODELS), 1 << 15, np.int32)
    return KEEP_ALL, drop, trim, np.arange(MODELS, dtype=np.int32), half, d.threshold, cut


def combine(native: Any, d: Data, *, delta: bool) -> Work:
    rows, types = (d.table, d.types) if delta else (d.plain, d.plain_types)
    coef, scale, bad = np.full((1, len(types)), 1 / MODELS), np.ones((1, 2)), np.zeros(1, np.int64)
    return lambda: native.combine(rows, types, BF16, coef, scale, delta, False, bad)


def gram(native: Any, d: Data, *, delta: bool) -> Work:
    rows, types = (d.table, d.types) if delta else (d.plain, d.plain_types)
    partials = np.zeros((d.tiles, MODELS * (MODELS + 1) // 2))
    return lambda: native.gram(rows, types, partials, delta, False, False)


def delta_keys(native: Any, d: Data) -> Work:
    """Keys of a sample only: every key of a large tensor is never written out."""
    n = min(d.n, HOT)
    rows = d.table.copy()
    rows[:, 1] = n
    out = np.zeros((n, MODELS), np.uint32)
    args = keep(d, drop=False, trim=False)
    return lambda: native.delta_keys(rows, d.types, KEEP_ALL, False, args[3], args[4], out)


def count(native: Any, d: Data, *, drop: bool) -> Work:
    """A bracket around the threshold, as the sample of a selection leaves it."""
    args = keep(d, drop=drop, trim=False)
    low = (d.threshold * np.uint64(999) // np.uint64(1000)).astype(np.uint64)
    high = d.threshold + (d.threshold - low)
    counts, used = np.zeros((d.tiles, MODELS, 4), np.int64), np.zeros(MODELS, np.int64)
    capacity = d.n // 8
    keys, where = np.zeros((MODELS, capacity), np.uint32), np.zeros((MODELS, capacity, 2), np.int64)

    def work() -> None:
        used[:] = 0
        native.count(d.table, d.types, KEEP_ALL, drop, args[3], args[4], low, high, counts, keys, where, used)

    return work


def l1(native: Any, d: Data, *, drop: bool, trim: bool) -> Work:
    sums = np.zeros((d.tiles, MODELS, 2))
    return lambda: native.l1(d.table, d.types, *keep(d, drop=drop, trim=trim), sums)


def votes(native: Any, d: Data) -> Work:
    tally = np.zeros((d.tiles, 2), np.int64)
    factors = np.ones((1, MODELS, 3))
    return lambda: native.votes(d.table, d.types, *keep(d, drop=False, trim=True), 1, False, factors, tally)


def consensus(native: Any, d: Data, *, drop: bool, trim: bool, elect: int) -> Work:
    factors, scale, bad = np.ones((1, MODELS, 3)), np.ones((1, 3)), np.zeros(1, np.int64)
    rules = (elect, False, 0, 0, factors, scale, bad)
    return lambda: native.consensus(d.table, d.types, BF16, *keep(d, drop=drop, trim=trim), *rules)


WITHOUT_BASE, WITH_BASE = MODELS, MODELS + 1
CASES: dict[str, tuple[int, Callable[[Any, Data], Work]]] = {
    "combine": (WITHOUT_BASE + 1, lambda k, d: combine(k, d, delta=False)),
    "combine delta": (WITH_BASE + 1, lambda k, d: combine(k, d, delta=True)),
    "gram": (WITHOUT_BASE, lambda k, d: gram(k, d, delta=False)),
    "gram delta": (WITH_BASE, lambda k, d: gram(k, d, delta=True)),
    "delta_keys": (WITH_BASE, delta_keys),
    "count": (WITH_BASE, lambda k, d: count(k, d, drop=False)),
    "count dropped": (WITH_BASE, lambda k, d: count(k, d, drop=True)),
    "l1 dropped": (WITH_BASE, lambda k, d: l1(k, d, drop=True, trim=False)),
    "l1 trimmed": (WITH_BASE, lambda k, d: l1(k, d, drop=False, trim=True)),
    "votes": (WITH_BASE, votes),
    "consensus ties": (WITH_BASE + 1, lambda k, d: consensus(k, d, drop=False, trim=True, elect=1)),
    "consensus dare": (WITH_BASE + 1, lambda k, d: consensus(k, d, drop=True, trim=False, elect=0)),
    "consensus dare_ties": (WITH_BASE + 1, lambda k, d: consensus(k, d, drop=True, trim=False, elect=1)),
}
"""Case to the tensors that it moves (inputs, and the output where there is one) and how it is called."""


def measure(native: Any, name: str, d: Data) -> Row:
    """One row: a kernel at one size, memcpy alternated with it."""
    tensors, make = CASES[name]
    work = make(native, d)
    out, source = d.buffers[0], d.buffers[1]
    work()
    ours, copies = [], []
    for _ in range(RUNS[d.n]):
        ours.append(_seconds(work))
        copies.append(_seconds(lambda: ctypes.memmove(out.ctypes.data, source.ctypes.data, out.nbytes)))
    took, copied = statistics.median(ours), statistics.median(copies)
    elements = min(d.n, HOT) if name == "delta_keys" else d.n
    moved, copy = tensors * 2 * elements / took / 1e9, 2 * out.nbytes / copied / 1e9
    return {
        "kernel": name,
        "where": "hot" if d.n == HOT else "cold",
        "G elements/s": round(elements / took / 1e9, 3),
        "GB/s moved": round(moved, 2),
        "memcpy GB/s": round(copy, 2),
        "share of memcpy": round(moved / copy, 2),
    }


def _seconds(work: Work) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def main() -> None:
    """Prints and saves the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=CASES, default=list(CASES), metavar="KERNEL")
    parser.add_argument("--hot", action="store_true", help="only tensors of 1 MiB")
    parser.add_argument("--no-methods", action="store_true", help="kernels only")
    parser.add_argument("--no-save", action="store_true", help="print only; no file in results/")
    args = parser.parse_args()
    try:
        from fastmerge import _native
    except ImportError as error:
        parser.exit(1, f"the native extension cannot be imported: {error}\n")
    about = provenance()
    sections: dict[str, Sequence[Row]] = {}
    for n in (HOT,) if args.hot else (HOT, COLD):
        inputs = data(n)
        rows = [measure(_native, name, inputs) for name in args.kernels]
        sections["hot" if n == HOT else "cold"] = rows
        print(table(rows), end="\n\n", flush=True)
    if not args.no_methods:
        from fastmerge.benchmark import bench_kernels

        sections["methods"] = bench_kernels()
        print(table(sections["methods"]))
    if not args.no_save:
        print(f"\nsaved {save('kernels', sections, about)}")


if __name__ == "__main__":
    main()
