"""Which backend computes, and why: argument, then ``FASTMERGE_BACKEND``, then the best that is there.

``auto`` may fall back and warns once, unless there is no GPU to speak of; a backend or device that was named works
or raises :class:`~fastmerge.errors.BackendUnavailable` with the reason.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastmerge.backends.probe import (
    PROC,
    absent_reason,
    cuda_reason,
    driver_reason,
    gpu_reason,
    native_reason,
    torch_reason,
    usable,
    visible,
)
from fastmerge.errors import BackendUnavailable
from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import Program
from fastmerge.ops.spec import Op, Spec

log = logging.getLogger("fastmerge")

BACKENDS = ("native", "triton", "reference")


@dataclass(frozen=True)
class Backend:
    """A way to compute.

    Attributes:
        name: ``native`` (C++ on CPU cores), ``triton`` (GPU) or ``reference`` (plain torch).
        kernels: the object with the kernel functions; None for the reference.
        gpus: the GPUs that it runs on, one number per logical device; empty for CPU cores.
        otherwise: name of the backend that was asked for where the GPUs were not named: those without room for a
            slot may be left out then. None where they were named.
        home: where the tensors are that a definition works on, as torch names it.
    """

    name: str
    kernels: Kernels | None
    gpus: tuple[int, ...] = ()
    otherwise: str | None = None
    home: str = "cpu"

    def reason(self, spec: Spec) -> str | None:
        """Why there is no kernel for a spec, so that the method's definition runs in its place; None where there is."""
        if self.kernels is None:
            return "the reference backend was chosen"
        return spec.method.gap() or self.kernels.supports(spec)

    def defined(self, spec: Spec) -> bool:
        """Whether the definition makes tensors of a spec."""
        return spec.grain != "copy" and self.reason(spec) is not None

    def whole(self, spec: Spec) -> bool:
        """Whether tensors of a spec are never cut: definitions work on whole ones, and some programs do."""
        return spec.grain == "matrix" or self.defined(spec)

    def coded(self, spec: Spec) -> bool:
        """Whether its kernels take the quantised inputs of a spec as codes and scales, not as fp32."""
        return self.name == "native" and spec.method.coded and not self.defined(spec)

    def program(self, ops: Sequence[Op]) -> Program:
        """The program of the ops of one job: of kernels where there are some, else of the definition."""
        first = ops[0].spec
        if not self.defined(first):
            assert self.kernels is not None
            made = type(first.method).program(ops, self.kernels)
            if made is not None:
                return made
        from fastmerge.backends.reference import ReferenceProgram

        return ReferenceProgram(ops, self.home)

    def check(self, ops: Iterable[Op]) -> None:
        """Says once per method what runs as its definition.

        Raises:
            BackendUnavailable: where that needs torch, and torch is not installed.
        """
        for spec in dict.fromkeys([op.spec for op in ops]):
            if not self.defined(spec):
                continue
            if reason := torch_reason():
                raise BackendUnavailable(f"{self.reason(spec)}, and its definition needs torch: {reason}")
            if self.kernels is not None:
                say(f"{self.reason(spec)} ({self.name}): its definition in plain torch merges whole tensors, slowly")


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
        return Backend("native", _native_kernels())
    if torch_reason():
        raise BackendUnavailable(f"backend reference: {torch_reason()}")
    if reason and name == "auto":
        say(f"native backend not used: {reason}; falling back to the reference")
    return Backend("reference", None)


@functools.cache
def _native_kernels() -> Kernels:
    from fastmerge.backends.native import NativeKernels

    return NativeKernels()


def _triton_interpreter() -> Any:
    """The Triton kernels on host memory: only the interpreter can, and only tests want it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendUnavailable("backend triton: needs a CUDA device (or TRITON_INTERPRET=1, which is very slow)")
    try:
        kernels = importlib.import_module("fastmerge.kernels")
    except ImportError as error:
        raise BackendUnavailable(f"backend triton: {error}; install torch and triton (the extra 'gpu')") from error
    return kernels.TritonKernels("cpu")


def device_for(spec: str, ops: Iterable[Op], name: str | None) -> str:
    """``--device``, but ``cpu`` for ``auto`` where all ops are copies: CUDA would be started for nothing."""
    copies = spec == "auto" and wanted(name) != "triton" and all(op.spec.grain == "copy" for op in ops)
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
        reason, gpus = usable()
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
        there, named = len(list(PROC.glob("*"))), visible()
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
