"""``fastmerge doctor``: what is used on this machine, why, and what it can reach."""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
import time
from typing import Any

import numpy as np

from fastmerge.backends import probe
from fastmerge.checkpoint.io import native
from fastmerge.checkpoint.past import open_past
from fastmerge.runtime.devices import Buffer, cores
from fastmerge.sizes import default_memory
from fastmerge.version import __version__

PROBE = 256 << 20
"""Bytes of the disk and memory probes."""


def examine(directory: str = ".") -> dict[str, Any]:
    """Devices, backends and the reason for each, memory, and probes of memory and disk.

    Args:
        directory: where the disk is probed, with a temporary file of 256 MiB.
    """
    native = probe.native_reason()
    facts: dict[str, Any] = {
        "fastmerge": f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "cpu": f"{cores()} cores",
        "backend native": f"not used: {native}" if native else f"used for CPU devices, instruction set {_isa()}",
        "backend triton": _triton(),
        "backend reference": _reference(native),
        **_gpus(),
        "cuda extension": "not built" if native else ("built" if _has_cuda() else "not built: nvcc was not found"),
        "memory budget": f"{default_memory() / 1e9:.1f} GB unless --memory says otherwise",
        "memcpy, one core": f"{memcpy_rate() / 1e9:.1f} GB/s moved",
    }
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        facts["platform"] = "best effort: fastmerge is made for Linux on x86-64 and arm64"
    try:
        write, read, past = _disk(directory)
        place = os.path.abspath(directory)  # noqa: PTH100
    except OSError as error:
        facts["disk"] = f"cannot be probed in {directory}: {error.strerror or error}"
    else:
        facts["disk write"] = f"{write / 1e9:.2f} GB/s with fdatasync, in {place}"
        facts["disk read, cached"] = f"{read / 1e9:.2f} GB/s, one core"
        facts["disk read, not cached"] = past
    return facts


def _isa() -> str:
    from fastmerge import _native

    return str(_native.isa())


def _has_cuda() -> bool:
    from fastmerge import _native

    return bool(_native.has_cuda())


def _triton() -> str:
    reason = probe.cuda_reason()
    return f"not used: {reason}" if reason else "used for the GPUs below, which --device auto takes"


def _gpus() -> dict[str, str]:
    """Every GPU: name, memory, capability, and why it is not used where it is not."""
    if probe.cuda_reason():
        return {}
    import torch

    facts = {}
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        reason = probe.gpu_reason(i)
        facts[f"cuda:{i}"] = (
            f"{about.name}, {about.total_memory / 1e9:.0f} GB, compute capability {about.major}.{about.minor}"
            + (f", not used: {reason}" if reason else "")
        )
    return facts


def _reference(native: str | None) -> str:
    reason = probe.torch_reason()
    if reason:
        return f"not used: {reason}"
    return "used: native is not there" if native else "available by name (--backend reference); native is faster"


def memcpy_rate() -> float:
    """Bytes moved per second (read plus written) by libc's memcpy on one core, median of five."""
    source, target = np.ones(PROBE, np.uint8), np.ones(PROBE, np.uint8)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        ctypes.memmove(target.ctypes.data, source.ctypes.data, PROBE)
        times.append(time.perf_counter() - start)
    return 2 * PROBE / sorted(times)[2]


def _disk(directory: str) -> tuple[float, float, str]:
    """Bytes per second written and read through the page cache, and how files there are read that it does not hold."""
    block = np.ones(4 << 20, np.uint8)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".fastmerge-probe-") as f:
        start = time.perf_counter()
        for _ in range(PROBE // block.nbytes):
            f.write(block.data)
        f.flush()
        os.fdatasync(f.fileno())
        write = PROBE / (time.perf_counter() - start)
        f.seek(0)
        start = time.perf_counter()
        with open(f.name, "rb", buffering=0) as again:  # noqa: PTH123  unbuffered reads into one block
            while again.readinto(block.data):
                pass
        read = PROBE / (time.perf_counter() - start)
        try:
            past = f"{_past(f.fileno()) / 1e9:.2f} GB/s past the page cache"
        except OSError as error:
            past = f"through the page cache: {error.strerror or error}"
    return write, read, past


def _past(fd: int) -> float:
    """Bytes per second of reading the probe past the page cache.

    Raises:
        OSError: whose text says why merges do not read so in this directory.
    """
    if probe.native_reason():
        raise OSError("backend native is not there")
    direct = open_past(fd)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        memory = Buffer.allocate(PROBE)
        if native().resident(np.array([[fd, 0, 0, PROBE]], np.int64))[0]:
            raise OSError("the kernel does not say what its page cache holds")
        start = time.perf_counter()
        code = native().read_past(np.array([[fd, 0, direct, memory.address, PROBE]], np.int64), 0, 0)[2]
        if code:
            raise OSError(code, os.strerror(code))
        return PROBE / (time.perf_counter() - start)
    finally:
        os.close(direct)
