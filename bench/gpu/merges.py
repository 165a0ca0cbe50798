"""Whole merges from disk to disk, beside the disk and the bus of the same run.

A merge cannot be faster than its slowest stage: reading the inputs, bringing them to the device, bringing the result
back, writing it durably. Each is probed alternately with the merge, in the same state of the page cache, and writing
both through that cache and past it (where the filesystem can), of which the faster counts; ``share`` is
the slowest of them over the merge. Merges run in one process that has its context and its kernels, as in a farm;
``process s`` is a whole command from start to exit besides. ``cold`` drops the inputs from the page cache first
(posix_fadvise, no privileges), ``warm`` reads them first.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.gpu.plan import ROOT, Context, Item, Row
from bench.gpu.timing import Times, ratio
from bench.process import weights
from bench.recipes import METHODS, inputs, recipe

DEVICES = ("cuda:0", "cuda:0,cuda:0", "cpu")
SPEED_METHODS = ("linear", "slerp", "ties")
STATES = ("cold", "warm")
BLOCK = 16 << 20
THREADS = 8
PAGE = 4096

WRITES = {"write": False, "write past cache": True}
"""Probes of writing, and whether they go past the page cache."""

JUDGED = "cuda:0"
"""Where whole merges have a bar."""

RUNS, FEWER = 5, 2
"""Counted rounds of what is judged, and of the rest; a round is a merge of 9 to 12 GB and the probes of its stages."""

SIZE, SMALL = "1.5b", "768x12"
"""Models of 3 GB for speed, and of 0.27 GB for the bytes of every method."""


def items(context: Context) -> Sequence[Item]:
    """The models, the bytes of every method on every device, then speed."""
    methods = ("linear", "ties") if context.dry else METHODS
    fast = ("ties",) if context.dry else SPEED_METHODS
    found = [Item("models", lambda: models(context), needs=60, limit=400)]
    found += [Item(f"same bytes {m}", functools.partial(same_bytes, context, m), needs=25, limit=150) for m in methods]
    for d in DEVICES:
        runs, needs, limit = (RUNS, 100, 480) if d == JUDGED else (FEWER, 50, 240)
        found += [
            Item(f"{m} {d} {s}", functools.partial(speed, context, m, d, s, runs), needs=needs, limit=limit)
            for m in fast
            for s in STATES
            if d == JUDGED or (m == "ties" and not (context.dry and s == "cold"))
        ]
    return found


def size(context: Context, name: str) -> str:
    """The size of that name, or a toy."""
    return "tiny" if context.dry else name


def device(context: Context, name: str) -> str:
    """The device of that name; a dry run has none but the CPU."""
    return "cpu" if context.dry else name


def family(context: Context, name: str) -> list[Path]:
    """A base and two fine-tunes, generated where they are missing."""
    from bench.generate import generate  # numpy may be missing until the part build has installed it

    return generate(context.data, size(context, name), 2)


def models(context: Context) -> Row:
    """Writes the models."""
    start = time.perf_counter()
    made = [path for name in (SIZE, SMALL) for path in family(context, name)]
    nbytes = sum(f.stat().st_size for path in made for f in weights(path))
    return {"GB": round(nbytes / 1e9, 2), "seconds": round(time.perf_counter() - start, 1), "models": len(made)}


def same_bytes(context: Context, method: str) -> Row:
    """One merge per device, and the hash of what it wrote.

    Raises:
        AssertionError: the hashes differ.
    """
    body = recipe(method, family(context, SMALL))
    found: dict[str, str] = {}
    for name in DEVICES:
        _, _, found[name] = merge(context, body, device(context, name), look=digest)
    if len(set(found.values())) != 1:
        raise AssertionError("different bytes: " + ", ".join(f"{k} {v[:12]}" for k, v in found.items()))
    return {"sha256": next(iter(found.values()))[:16], "devices": " = ".join(found)}


def merge(
    context: Context, body: Any, where: str, *, look: Callable[[Path], str] | None = None
) -> tuple[float, Any, str]:
    """Merges into a fresh directory, looks at it, removes it: seconds and report of the merge, and what was seen."""
    import fastmerge

    out = context.data / "out"
    shutil.rmtree(out, ignore_errors=True)
    try:
        start = time.perf_counter()
        report = fastmerge.merge(body, out, device=where)
        took = time.perf_counter() - start
        seen = look(out) if look is not None else ""
    finally:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()  # removed pages are not to be written meanwhile
    return took, report, seen


def digest(directory: Path) -> str:
    """Hash of the weight files, in order."""
    found = hashlib.sha256()
    for path in weights(directory):
        with path.open("rb") as file:
            while some := file.read(BLOCK):
                found.update(some)
    return found.hexdigest()


def speed(context: Context, method: str, where: str, state: str, runs: int) -> Row:
    """Merges alternated with the probes of their stages: medians of so many rounds, with the fastest and slowest."""
    body = recipe(method, family(context, SIZE))
    files = [f for model in inputs(body) for f in weights(model)]
    read = sum(f.stat().st_size for f in files)
    written = weights(inputs(body)[0])
    out_bytes = sum(f.stat().st_size for f in written)
    gpu = where.startswith("cuda") and not context.dry
    seconds: dict[str, list[float]] = {}
    report: Any = None
    for count in range(0 if context.dry else -1, 1 if context.dry else runs):
        prepare(files, state)
        took, report, _ = merge(context, body, device(context, where))
        if state == "cold":
            prepare(files, state)
        probes: dict[str, float | None] = {"read": read_files(files)}
        probes |= {n: write_file(context.data / "zeros", out_bytes, direct=d) for n, d in WRITES.items()}
        probes |= bus(read, out_bytes) if gpu else {"to device": 0.0, "from device": 0.0}
        if count >= 0:  # the first one compiles and allocates
            for name, value in {"merge": took, **probes}.items():
                if value is not None:
                    seconds.setdefault(name, []).append(value)
    found = {name: Times.of(some) for name, some in seconds.items()}
    write = min((n for n in WRITES if n in found), key=lambda n: found[n].median)
    slowest = max((write, *(n for n in found if n not in {"merge", *WRITES})), key=lambda n: found[n].median)
    row = {"share": ratio(found[slowest].median, found["merge"].median), "slowest": slowest}
    row |= {f"{n} s": f"{t.median:.3f} ({t.least:.3f}..{t.most:.3f})" for n, t in found.items()}
    row |= {"runs": len(seconds["merge"]), "GB": round((read + out_bytes) / 1e9, 2)}
    row |= {"GB/s": round((read + out_bytes) / found["merge"].median / 1e9, 2), "bottleneck": report.bottleneck}
    if state == "warm" and where == JUDGED:
        row["process s"] = process(context, body, device(context, where))
    return row


def process(context: Context, body: Any, where: str) -> float:
    """Seconds of the command line, from start to exit."""
    from bench.recipes import write

    out, path = context.data / "out", write(body, context.data / "recipe.yml")
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "fastmerge", "merge", str(path), str(out), "--device", where, "--quiet"]
    start = time.perf_counter()
    try:
        subprocess.run(words, check=True, cwd=ROOT, env=context.environment())
    finally:
        took = time.perf_counter() - start
        shutil.rmtree(out, ignore_errors=True)
    return round(took, 2)


def prepare(files: Sequence[Path], state: str) -> None:
    """Brings files into the page cache, or drops them from it."""
    if state == "warm":
        read_files(files)
        return
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)  # only clean pages can be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def read_files(files: Sequence[Path]) -> float:
    """Seconds of reading all files once, into buffers that are used again, with as many threads as a merge has."""
    pieces = [(path, at) for path in files for at in range(0, path.stat().st_size, BLOCK)]
    buffers = [bytearray(BLOCK) for _ in range(THREADS)]

    def some(thread: int) -> None:
        for path, at in pieces[thread::THREADS]:
            fd = os.open(path, os.O_RDONLY)
            os.preadv(fd, [buffers[thread]], at)
            os.close(fd)

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(some, range(THREADS)))
    return time.perf_counter() - start


def write_file(path: Path, nbytes: int, *, direct: bool) -> float | None:
    """Seconds of writing so many bytes durably into a new file, from as many threads.

    Args:
        path: of the file, which is removed again.
        nbytes: how many, rounded up to whole pages.
        direct: past the page cache, as a merge writes where that is fast; None is returned where it cannot be done.
    """
    path.unlink(missing_ok=True)
    data = mmap.mmap(-1, BLOCK)  # starts at a page, as direct writes want it
    data.write(os.urandom(BLOCK))
    size = max(1, -(-nbytes // PAGE)) * PAGE
    fd = -1
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if direct else 0), 0o600)
        os.posix_fallocate(fd, 0, size)
        start = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool, memoryview(data) as block:
            done = sum(pool.map(lambda at: os.pwrite(fd, block[: size - at], at), range(0, size, BLOCK)))
        os.fdatasync(fd)
        took = time.perf_counter() - start
    except OSError as error:
        if direct and error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    finally:
        if fd >= 0:
            os.close(fd)
        path.unlink(missing_ok=True)
    if done != size:
        raise AssertionError(f"{path}: {done} of {size} bytes were written")
    os.sync()
    return took


def bus(read: int, out_bytes: int) -> dict[str, float]:
    """Seconds of the inputs' bytes to the device and the output's back, pinned, in pieces of 64 MiB."""
    import torch

    piece = 64 << 20
    host = torch.empty(piece, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(piece, dtype=torch.uint8, device="cuda")
    found = {}
    for name, nbytes, to, source in (("to device", read, there, host), ("from device", out_bytes, host, there)):
        times = max(1, nbytes // piece)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - start) * nbytes / (times * piece)
    return found
