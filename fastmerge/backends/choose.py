"""Which backend computes, and why: argument, then ``FASTMERGE_BACKEND``, then the best that is there.

``auto`` may fall back and warns once, unless there is no GPU to speak of; a backend or device that was named works
or raises :class:`~fastmerge.errors.BackendUnavailable` with the reason.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastmerge.errors import BackendUnavailable
from fastmerge.methods.base import Program
from fastmerge.planning import Output
from fastmerge.runtime.devices import CpuDevice, Device, cores

log = logging.getLogger("fastmerge")

WAITING = 2
"""Workers beyond the cores: while some wait for the disk, others compute."""

BACKENDS = ("native", "triton", "reference")

PROC = Path("/proc/driver/nvidia/gpus")
"""Where the driver has one directory per GPU; some containers hide it."""

NO_DEVICE = 100
"""What the driver's cuInit answers on a machine without a GPU."""

OLDEST = (8, 0)
"""Compute capability from which on GPUs are supported."""


@dataclass(frozen=True)
class Backend:
    """A way to compute.

    Attributes:
        name: ``native`` (C++ on CPU cores), ``triton`` (GPU) or ``reference`` (plain torch).
        kernels: the object with the kernel functions; None for the reference.
        gpus: the GPUs that it runs on, one number per logical device; empty for CPU cores.
        otherwise: name of the backend that was asked for where the GPUs were not named: those without room for a
            slot may be left out then. None where they were named.
    """

    name: str
    kernels: Any
    gpus: tuple[int, ...] = ()
    otherwise: str | None = None

    @property
    def whole(self) -> bool:
        """The reference works on whole tensors only."""
        return self.kernels is None


def native_reason() -> str | None:
    """Why the native backend cannot be used; None if it can."""
    try:
        importlib.import_module("fastmerge._native")
    except ImportError as error:
        return f"the C++ extension is not there ({error}); install a wheel or build from source"
    return None


def host_kernels() -> Any:
    """The native backend's kernels; None where it cannot be used."""
    if native_reason():
        return None
    from fastmerge.backends.native import NativeKernels

    return NativeKernels()


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
    if _visible() == []:
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


def _visible() -> list[str] | None:
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
    from fastmerge.methods.base import Segments

    x = torch.tensor([1.0, 2.0, 3.0], device=device)
    out = torch.zeros_like(x)
    table = np.array([[out.data_ptr(), 3, 0, 3, 0, 0, 0, x.data_ptr()]], np.int64)
    segments = Segments(table, (F32,), F32)
    kernels = importlib.import_module("fastmerge.kernels").TritonKernels(device)
    kernels.combine(segments, np.full((1, 1), 2.0), np.ones((1, 2)), delta=False, per_row=False)
    return None if out.tolist() == [2.0, 4.0, 6.0] else f"a first kernel gave {out.tolist()}, expected [2.0, 4.0, 6.0]"


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@functools.cache
def say(text: str) -> None:
    """Warns, once per reason."""
    log.warning("%s", text)


def wanted(name: str | None) -> str:
    """The backend that was named, by argument or environment, else ``auto``.

    Raises:
        BackendUnavailable: for a name that is none.
    """
    name = name or os.environ.get("FASTMERGE_BACKEND") or "auto"
    if name not in (*BACKENDS, "auto"):
        raise BackendUnavailable(f"unknown backend {name!r}; expected one of auto, {', '.join(BACKENDS)}")
    return name


def cpu_backend(name: str | None = None) -> Backend:
    """Chooses the backend for CPU devices.

    Args:
        name: ``native``, ``reference``, ``triton`` or ``auto``; None reads ``FASTMERGE_BACKEND``.

    Raises:
        BackendUnavailable: if a named backend cannot run here.
    """
    name = wanted(name)
    if name == "triton":
        return Backend(name, _triton_interpreter())
    reason = native_reason()
    if name == "native" or (name == "auto" and reason is None):
        if reason:
            raise BackendUnavailable(f"backend native: {reason}")
        return Backend("native", host_kernels())
    if torch_reason():
        raise BackendUnavailable(f"backend reference: {torch_reason()}")
    if reason and name == "auto":
        say(f"native backend not used: {reason}; falling back to the reference")
    return Backend("reference", None)


def _triton_interpreter() -> Any:
    """The Triton kernels on host memory: only the interpreter can, and only tests want it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailable("backend triton: needs a CUDA device (or TRITON_INTERPRET=1, which is very slow)")
    try:
        kernels = importlib.import_module("fastmerge.kernels")
    except ImportError as error:
        raise BackendUnavailable(f"backend triton: {error}; install torch and triton (the extra 'gpu')") from error
    return kernels.TritonKernels("cpu")


def device_for(spec: str, outputs: Iterable[Output], name: str | None) -> str:
    """``--device``, but ``cpu`` for ``auto`` where all outputs are copies: CUDA would be started for nothing."""
    copies = spec == "auto" and wanted(name) != "triton" and all(o.method is None for o in outputs)
    return "cpu" if copies else spec


def choose(spec: str, name: str | None = None, *, said: str | None = None) -> Backend:
    """The backend for ``--device`` and ``--backend``.

    Args:
        spec: ``auto`` (all GPUs that can be used, else the CPU), ``cpu``, ``cuda`` (torch's current GPU) or a list
            such as ``cuda:0,cuda:1``; one that is named twice is two logical devices.
        name: as for :func:`cpu_backend`.
        said: how errors name the device; None for ``--device`` and ``spec``.

    Raises:
        BackendUnavailable: for a device or backend that cannot be used here, with the reason.
    """
    said = said or f"--device {spec}"
    names, name = [s.strip() for s in spec.split(",")], wanted(name)
    if names == ["cpu"] or (names == ["auto"] and name not in ("auto", "triton")):
        return cpu_backend(name)
    if names == ["auto"]:
        reason, gpus = _usable()
        if gpus:
            return replace(gpu_backend(gpus), otherwise=name)
        if absent_reason() is None:
            say(f"GPUs not used: {reason}; merging on the CPU")
        return cpu_backend(name)
    _check(said, names, name)
    reason = cuda_reason()
    if reason:
        raise BackendUnavailable(f"{said}: {reason}")
    import torch

    gpus = tuple(int(n[5:]) if n[5:] else torch.cuda.current_device() for n in names)
    for gpu in gpus:
        reason = gpu_reason(gpu)
        if reason:
            raise BackendUnavailable(f"{said}: {reason}")
    return gpu_backend(gpus)


def expected_gpus(spec: str, name: str | None = None) -> tuple[int, ...]:
    """The logical GPUs that :func:`choose` will probably find, without torch; none for the CPU.

    Raises:
        BackendUnavailable: for a device that certainly cannot be used here.
    """
    names, name = [s.strip() for s in spec.split(",")], wanted(name)
    if names == ["cpu"] or (names == ["auto"] and (name not in ("auto", "triton") or driver_reason())):
        return ()
    if names == ["auto"]:
        there, named = len(list(PROC.glob("*"))), _visible()
        if named is None:
            return tuple(range(there or 1))
        known = itertools.takewhile(lambda w: not (there and w.isdigit()) or int(w) < there, named)
        return tuple(range(len(list(known))))
    _check(f"--device {spec}", names, name)
    return tuple(int(n[5:] or 0) for n in names)


def _check(said: str, names: Sequence[str], backend: str) -> None:
    """What is wrong with a list of GPUs, as far as torch need not be asked."""
    wrong = [n for n in names if not re.fullmatch(r"cuda(:\d+)?", n)]
    if wrong:
        raise BackendUnavailable(
            f"{said}: unknown device {wrong[0]!r}; expected auto or cpu alone, or a list of cuda, cuda:0, ..."
        )
    if backend not in ("auto", "triton"):
        raise BackendUnavailable(f"{said}: backend {backend} runs on CPU cores only; expected triton")
    reason = driver_reason()
    if reason:
        raise BackendUnavailable(f"{said}: {reason}")


def gpu_backend(gpus: tuple[int, ...]) -> Backend:
    """The Triton kernels on these GPUs."""
    return Backend("triton", importlib.import_module("fastmerge.kernels").TritonKernels("cuda"), gpus)


def _usable() -> tuple[str | None, tuple[int, ...]]:
    """Every GPU that can be used, or why there is none."""
    reason = cuda_reason()
    if reason:
        return reason, ()
    import torch

    reasons = {i: gpu_reason(i) for i in range(torch.cuda.device_count())}
    bad = "; ".join(r for r in reasons.values() if r)
    return bad or "torch sees none", tuple(i for i, r in reasons.items() if r is None)


def devices(chosen: Backend) -> list[Device]:
    """The workers of a backend for CPU cores, one device each."""
    workers = cores() + WAITING if chosen.name == "native" else 1
    return [CpuDevice(chosen.kernels) for _ in range(workers)]


def program_factory(chosen: Backend) -> Callable[[Sequence[Output], Device], Program]:
    """How the stream gets the program of a job on a device."""

    def make(outputs: Sequence[Output], device: Device) -> Program:
        method = outputs[0].method
        groups = [o.group for o in outputs if o.group is not None]
        if method is None:
            raise AssertionError("a job without a method has no program")
        if chosen.whole:
            from fastmerge.backends.reference import ReferenceProgram

            return ReferenceProgram(method, groups)
        return method.program(groups, device.kernels)

    return make
