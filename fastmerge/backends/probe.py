"""Why something cannot compute here: one reason each, None where it can."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import itertools
import os
import re
from pathlib import Path

PROC = Path("/proc/driver/nvidia/gpus")
"""Where the driver has one directory per GPU; some containers hide it."""

NO_DEVICE = 100
"""What the driver's cuInit answers on a machine without a GPU."""

OLDEST = (8, 0)
"""Compute capability from which on GPUs are supported."""


def native_reason() -> str | None:
    """Why the native backend cannot be used; None if it can."""
    try:
        importlib.import_module("fastmerge._native")
    except ImportError as error:
        return f"the C++ extension is not there ({error}); install a wheel or build from source"
    return None


def torch_reason() -> str | None:
    """Why torch cannot be used; None if it is installed. Does not import it."""
    found = importlib.util.find_spec("torch") is not None
    return None if found else "torch is not installed; install it (the extra 'torch')"


def absent_reason() -> str | None:
    """Why there is no GPU to speak of: no driver, none that it finds, or all hidden; None where one may be there."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libcuda.so.1 was not found)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 keeps the kernels in Triton's interpreter, on the CPU"
    if visible() == []:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} hides every GPU"
    start = getattr(driver, "cuInit", None)
    return "the NVIDIA driver finds no GPU" if start is not None and start(0) == NO_DEVICE else None


def driver_reason() -> str | None:
    """Why GPUs are out of the question; None where torch has to be asked. Imports nothing heavy."""
    reason = absent_reason()
    missing = [n for n in ("torch", "triton") if importlib.util.find_spec(n) is None]
    if reason is None and missing:
        reason = f"{' and '.join(missing)} not installed; install torch and triton (the extra 'gpu')"
    return reason


def visible() -> list[str] | None:
    """What ``CUDA_VISIBLE_DEVICES`` names, up to the first word that is no GPU, as CUDA reads it; None if not set."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return None
    words = (w.strip() for w in told.split(","))
    named = list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, words))
    return named if len(set(named)) == len(named) else []  # one that is named twice hides all


def cuda_reason() -> str | None:
    """Why no GPU can be used; None if torch sees one. Imports torch where there is a driver."""
    reason = driver_reason()
    if reason:
        return reason
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no device, a driver that is too old, a forked process
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}): {_line(error)}"
    return None


_WORKING: set[int] = set()
"""GPUs on which a first kernel has run. What failed is tried again: memory may have been short for a moment."""


def gpu_reason(index: int) -> str | None:
    """Why GPU ``index`` cannot be used where others can; None if it can: one small kernel has run there."""
    reason = None if index in _WORKING else _examine(index)
    if reason is None:
        _WORKING.add(index)
    return reason


def _examine(index: int) -> str | None:
    """What :func:`gpu_reason` says the first time."""
    import torch

    count = torch.cuda.device_count()
    if index >= count:
        return f"there is no GPU {index}; torch sees {count}"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        have, need = (".".join(map(str, c)) for c in (capability, OLDEST))
        return f"{torch.cuda.get_device_name(index)} has compute capability {have}; expected {need} or newer"
    try:
        return _trial(f"cuda:{index}")
    except Exception as error:  # noqa: BLE001  compilers, headers, drivers: whatever it is, it is the reason
        return f"a first kernel failed: {type(error).__name__}: {_line(error)}"


def _trial(device: str) -> str | None:
    """Doubles three numbers on a device."""
    import numpy as np
    import torch

    from fastmerge.dtypes import F32
    from fastmerge.ops.segments import Segments

    x = torch.tensor([1.0, 2.0, 3.0], device=device)
    out = torch.zeros_like(x)
    table = np.array([[out.data_ptr(), 3, 0, 3, 0, 0, 0, x.data_ptr()]], np.int64)
    segments = Segments(table, (F32,), F32)
    kernels = importlib.import_module("fastmerge.kernels").TritonKernels(device)
    kernels.combine(segments, np.full((1, 1), 2.0), np.ones((1, 2)), delta=False, per_row=False)
    return None if out.tolist() == [2.0, 4.0, 6.0] else f"a first kernel gave {out.tolist()}, expected [2.0, 4.0, 6.0]"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def usable() -> tuple[str | None, tuple[int, ...]]:
    """Every GPU that can be used, or why there is none."""
    reason = cuda_reason()
    if reason:
        return reason, ()
    import torch

    reasons = {i: gpu_reason(i) for i in range(torch.cuda.device_count())}
    bad = "; ".join(r for r in reasons.values() if r)
    return bad or "torch sees none", tuple(i for i, r in reasons.items() if r is None)
