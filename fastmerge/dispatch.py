"""Which backend computes, and why: argument, then ``FASTMERGE_BACKEND``, then the best that is there.

``auto`` may fall back and says so once, at INFO; a backend or device that was named works or raises
:class:`~fastmerge.errors.BackendUnavailable` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmerge.devices import CpuDevice, Device, cores
from fastmerge.errors import BackendUnavailable
from fastmerge.methods.base import Program
from fastmerge.planning import Output

log = logging.getLogger("fastmerge")

WAITING = 2
"""Workers beyond the cores: while some wait for the disk, others compute."""

BACKENDS = ("native", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """A way to compute.

    Attributes:
        name: ``native`` (C++ on CPU cores), ``triton`` (GPU) or ``reference`` (plain torch).
        kernels: the object with the kernel functions; None for the reference.
    """

    name: str
    kernels: Any

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


def torch_reason() -> str | None:
    """Why torch cannot be used; None if it is installed. Does not import it."""
    found = importlib.util.find_spec("torch") is not None
    return None if found else "torch is not installed; pip install 'fastmerge[torch]'"


def cuda_reason() -> str | None:
    """Why no CUDA device can be used; None if one can."""
    reason = torch_reason()
    if reason:
        return reason
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable device or driver"
    return "streaming through GPUs is not part of this release; merges run on the CPU"


@functools.cache
def _fallback(reason: str) -> None:
    log.info("native backend not used: %s; falling back to the reference", reason)


def backend(name: str | None = None) -> Backend:
    """Chooses the backend for CPU devices.

    Args:
        name: ``native``, ``reference``, ``triton`` or ``auto``; None reads ``FASTMERGE_BACKEND``.

    Raises:
        BackendUnavailable: if a named backend cannot run here.
    """
    name = name or os.environ.get("FASTMERGE_BACKEND") or "auto"
    if name not in (*BACKENDS, "auto"):
        raise BackendUnavailable(f"unknown backend {name!r}; expected one of auto, {', '.join(BACKENDS)}")
    if name == "triton":
        return Backend(name, _triton_interpreter())
    reason = native_reason()
    if name == "native" or (name == "auto" and reason is None):
        if reason:
            raise BackendUnavailable(f"backend native: {reason}")
        from fastmerge.families.native import NativeKernels

        return Backend("native", NativeKernels())
    if torch_reason():
        raise BackendUnavailable(f"backend reference: {torch_reason()}")
    if reason and name == "auto":
        _fallback(reason)
    return Backend("reference", None)


def _triton_interpreter() -> Any:
    """The Triton kernels on host memory: only the interpreter can, and only tests want it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailable("backend triton: needs a CUDA device (or TRITON_INTERPRET=1, which is very slow)")
    try:
        kernels = importlib.import_module("fastmerge.kernels")
    except ImportError as error:
        raise BackendUnavailable(f"backend triton: {error}; pip install 'fastmerge[gpu]'") from error
    return kernels.TritonKernels("cpu")


def devices(spec: str, chosen: Backend) -> list[Device]:
    """The devices that ``--device`` names, one entry per worker.

    Args:
        spec: ``auto``, ``cpu``, ``cuda`` or a list such as ``cuda:0,cuda:1``.
        chosen: the backend for CPU cores.

    Raises:
        BackendUnavailable: for a device that cannot be used here.
    """
    names = [s.strip() for s in spec.split(",")]
    for name in names:
        if name.split(":")[0] == "cuda":
            raise BackendUnavailable(f"--device {spec}: {cuda_reason()}")
        if name not in ("cpu", "auto"):
            raise BackendUnavailable(f"--device {spec}: unknown device {name!r}; expected auto, cpu, cuda or cuda:N")
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
            from fastmerge.families.reference import ReferenceProgram

            return ReferenceProgram(method, groups)
        return method.program(groups, device.kernels)

    return make
