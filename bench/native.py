"""combine, gram and replicate of the extension on one core, beside memcpy in the same run; nothing is written.

    python bench/native.py

Cold: buffers of 256 MiB, memcpy and kernel alternated, GB/s of bytes moved (memcpy of n bytes moves 2n, combine
(M + 1) n, gram M n, replicate to E experts (E + 1) n). Hot: 256 KiB per buffer, as in the stream, GB/s of inputs.
Medians of the thread's CPU time, so that other work on the machine counts less.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from report import Row, provenance, table

from fastmerge import _native
from fastmerge.families.replicate import rows as replicate_rows
from fastmerge.philox import normal_lines

COLD, HOT = 128 << 20, 128 << 10  # elements
RUNS = {COLD: 9, HOT: 400}
TYPES = {3: ("bf16", np.uint16), 2: ("fp16", np.uint16), 1: ("fp32", np.uint32)}
memcpy = ctypes.CDLL(None).memcpy
memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def buffers(count: int, n: int, kind: Any) -> list[npt.NDArray[Any]]:
    """Values around 0.01 in either 16-bit type, and in the high half of fp32."""
    rng = np.random.default_rng(0)
    some = rng.integers(0x2400, 0x2600, 1 << 16).astype(kind) + kind(0x1800)
    return [np.resize(np.roll(some << (16 if kind == np.uint32 else 0), 77 * i), n) for i in range(count)]


def measure(kernel: str, code: int, inputs: int, *, delta: bool, diff: bool = False, n: int) -> Row:
    """One row: median GB/s of a kernel, beside memcpy where n is out of cache."""
    name, kind = TYPES[code]
    *x, out = buffers(inputs + 1, n, kind)
    rows = np.array([[out.ctypes.data, n, 0, n, 0, 0, 0, *[b.ctypes.data for b in x]]], np.int64)
    ins, bad = np.full(inputs, code, np.int32), np.zeros(1, np.int64)
    coef, scale = np.full((1, inputs), 1 / inputs), np.ones((1, 2))
    vectors = inputs - delta
    partials = np.zeros((-(-n // 65536), vectors * (vectors + 1) // 2 + diff))

    def work() -> None:
        if kernel == "combine":
            _native.combine(rows, ins, code, coef, scale, delta, False, bad)
        else:
            _native.gram(rows, ins, partials, delta, diff, False)

    pairs = [
        (seconds(work), seconds(lambda: memcpy(out.ctypes.data, x[0].ctypes.data, out.nbytes)) if n == COLD else 0)
        for _ in range(RUNS[n])
    ]
    took, copy = (statistics.median(column) for column in zip(*pairs, strict=True))
    read = inputs * out.nbytes / took / 1e9
    moved = read * (inputs + 1) / inputs if kernel == "combine" else read
    floor = 2 * out.nbytes / copy / 1e9 if copy else None
    return {
        "kernel": kernel + (" delta" if delta else "") + (" diff" if diff else ""),
        "type": name,
        "inputs": inputs,
        "where": "cold" if n == COLD else "hot",
        "GB/s in": round(read, 1),
        "GB/s moved": round(moved, 1),
        "memcpy": round(floor, 1) if floor else None,
        "share": round(moved / floor, 2) if floor else None,
    }


def replicate(code: int, experts: int, *, noise: bool, n: int) -> Row:
    """One row of expert replication: all experts clean, or all but the first one noisy."""
    name, kind = TYPES[code]
    x, *outs = buffers(experts + 1, n, kind)
    sigma = np.where(np.arange(experts) > 0, 1e-3 * noise, 0.0)
    places = np.array([[t.ctypes.data for t in outs]], np.int64)
    rows = replicate_rows(np.array([[x.ctypes.data, n, 0, 1]], np.int64), places, sigma, np.arange(experts))
    lines = normal_lines()
    pairs = [
        (
            seconds(lambda: _native.replicate(rows, code, code, lines)),
            seconds(lambda: memcpy(outs[0].ctypes.data, x.ctypes.data, x.nbytes)) if n == COLD else 0,
        )
        for _ in range(RUNS[n])
    ]
    took, copy = (statistics.median(column) for column in zip(*pairs, strict=True))
    moved = (experts + 1) * x.nbytes / took / 1e9
    floor = 2 * x.nbytes / copy / 1e9 if copy else None
    return {
        "kernel": "replicate" + (" noise" if noise else ""),
        "type": name,
        "inputs": 1,
        "experts": experts,
        "where": "cold" if n == COLD else "hot",
        "GB/s moved": round(moved, 1),
        "GB/s written": round(moved * experts / (experts + 1), 1),
        "G noisy/s": round((experts - 1) * n / took / 1e9, 2) if noise else None,
        "memcpy": round(floor, 1) if floor else None,
        "share": round(moved / floor, 2) if floor else None,
    }


if __name__ == "__main__":
    print({k: v for k, v in provenance().items() if k in {"command", "commit", "cpu", "isa", "load_1min"}})
    found = [measure("combine", 3, 3, delta=d, n=COLD) for d in (False, True)]
    found.append(measure("gram", 3, 2, delta=False, diff=True, n=COLD))
    found += [
        measure("combine", code, m, delta=d, n=HOT)
        for code in TYPES
        for m in (1, 2, 3, 4, 8)
        for d in ([False, True] if m > 1 else [False])
    ]
    found += [
        measure("gram", code, m, delta=d, diff=f, n=HOT)
        for code in TYPES
        for m, d, f in [(2, False, True), (3, True, False), (4, False, False), (8, False, False)]
    ]
    print(table(found))
    found = [replicate(3, 4, noise=noise, n=COLD) for noise in (False, True)]
    found += [replicate(code, 8, noise=noise, n=HOT) for code in TYPES for noise in (False, True)]
    print(table(found))
