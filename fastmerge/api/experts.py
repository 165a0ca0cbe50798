"""Expert replication of a tensor in memory, on CPU cores or a CUDA device."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fastmerge.api.tensors import run
from fastmerge.backends.choose import cpu_backend, say, wanted
from fastmerge.backends.probe import cuda_reason, gpu_reason, native_reason
from fastmerge.dtypes import BY_NAME, FLOATS, DType
from fastmerge.errors import BackendUnavailable, RecipeError, ShapeError
from fastmerge.keys import tensor_key
from fastmerge.methods.replicate import Replicate
from fastmerge.ops.blocks import gram, torch_dtype
from fastmerge.ops.replicate import MOST_SIGMA, launch
from fastmerge.ops.segments import TILE, Segments, segment_row
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.runtime.devices import cores
from fastmerge.tensors import check, extent, python_values

if TYPE_CHECKING:
    import torch

MOST_EXPERTS = 1 << 20
"""Copies of one call."""

PIECE = 1 << 20
"""Elements written per piece at least, where the CPU's cores share the work: about a millisecond."""


def replicate_experts(
    tensor: torch.Tensor,
    experts: int | Sequence[int],
    *,
    noise: float = 0.0,
    mode: str = "relative",
    name: str = "",
    seed: int = 0,
    out_dtype: torch.dtype | None = None,
    first_clean: bool = True,
    out: Sequence[torch.Tensor] | torch.Tensor | None = None,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """Copies of a tensor for the experts of a mixture, with noise that tells them apart.

    ``out_e = round(x + sigma n_e)`` with standard normal numbers that depend on (seed, name, number of the expert,
    element) alone: the same on every device, for any subset of the experts.

    Args:
        tensor: ``[*S]``, fp64, fp32, fp16 or bf16, on the CPU or a CUDA device; it is not changed.
        experts: how many, or the numbers of those wanted (0 .. 2**32 - 1), as a sequence, an array or a tensor.
        noise: the noise's standard deviation, 0 or more.
        mode: ``relative``: in units of the root mean square of ``tensor``, whose sum has one written order, so that it
            is the same everywhere; ``absolute``: as it is.
        name: of the tensor; with the seed it keys the random numbers.
        seed: -2**63 .. 2**63 - 1.
        out_dtype: of the results; that of ``tensor`` where absent.
        first_clean: whether expert 0 gets no noise.
        out: one contiguous tensor ``[*S]`` per expert (a tensor ``[E, *S]`` will do), on the device of ``tensor``,
            that overlap neither it nor each other.
        backend: ``native`` (C++ on all cores, and CUDA for tensors there), ``reference``, or None for the best one: on
            CUDA whatever ``FASTMERGE_BACKEND`` says, except ``reference``.

    Returns:
        A tensor ``[*S]`` per expert: those of ``out`` where that was given. Without noise and in one type they are the
        bytes of ``tensor``; every other NaN is canonical. On CUDA the work is queued on the current stream; relative
        noise waits once for the sum.

    Raises:
        RecipeError: for a parameter out of range, or relative noise for a tensor that is not finite.
        ShapeError: for what is no dense tensor or one of another type, or an ``out`` that does not fit or overlaps.
        BackendUnavailable: where the backend that was named cannot run.
    """
    import torch

    which = _numbers(experts)
    check("tensor", tensor)
    stored = _type("tensor", tensor.dtype)
    target = stored if out_dtype is None else _type("out_dtype", out_dtype)
    if mode not in ("relative", "absolute"):
        raise RecipeError(f"mode: expected relative or absolute, got {mode!r}")
    noise = _noise(noise)
    if not isinstance(name, str):
        raise RecipeError(f"name: expected a string, got {name!r}")
    try:
        key = tensor_key(operator.index(seed), name)
    except TypeError:
        raise RecipeError(f"seed: expected a 64-bit signed integer, got {seed!r}") from None
    x = tensor.detach().contiguous()
    if out is None:
        outputs = [torch.empty(x.shape, dtype=torch_dtype(target), device=x.device) for _ in which]
    else:
        outputs = _outputs(out, tensor, len(which), torch_dtype(target))
    sigma = noise * _rms(x, stored, name) if noise and mode == "relative" else noise
    if not sigma <= MOST_SIGMA:
        raise RecipeError(f"{name or 'tensor'}: noise of standard deviation {sigma}, expected at most 2**100")
    scales = [0.0 if first_clean and e == 0 else sigma for e in which]
    method = Replicate(experts=tuple(which), sigma=tuple(scales))
    spec = Spec(method, tuple(x.shape), (stored,), target)
    targets = tuple([Memory(t.data_ptr(), target, spec.shape) for t in outputs])
    op = Op(name, spec, key, (Memory(x.data_ptr(), stored, spec.shape),), targets)
    if x.is_cuda:
        _on_cuda(op, x, outputs, backend)
    elif wanted(backend) == "triton":
        raise BackendUnavailable(f"backend triton: has no expert replication on {x.device}")
    else:
        # One long run for each core: writing E tensors in turns of 2 MB takes 1.7 times as long.
        run([op], x.device, backend, elements=max(TILE, PIECE // len(which), -(-x.numel() // (cores() * TILE)) * TILE))
    return outputs


def _numbers(experts: int | Sequence[int]) -> list[int]:
    given = python_values(experts)
    try:
        if isinstance(given, Sequence):
            found = [operator.index(e) for e in given]
        else:
            found = list(range(min(operator.index(given), MOST_EXPERTS + 1)))
    except TypeError:
        raise RecipeError(f"experts: expected how many, or their numbers, got {given!r:.80}") from None
    if not 0 < len(found) <= MOST_EXPERTS or min(found) < 0 or max(found) >= 1 << 32:
        raise RecipeError(
            f"experts: expected 1 to {MOST_EXPERTS} of them, numbered from 0 to 2**32 - 1, got {given!r:.80}"
        )
    return found


def _noise(given: Any) -> float:
    value = python_values(given)
    if not isinstance(value, int | float) or not 0.0 <= value <= MOST_SIGMA:
        raise RecipeError(f"noise: expected a number from 0 to 2**100, got {value!r:.80}")
    return float(value)


def _type(what: str, dtype: torch.dtype) -> DType:
    found = BY_NAME.get(str(dtype).removeprefix("torch."))
    if found not in FLOATS:
        raise ShapeError(f"{what}: expected one of {', '.join(d.name for d in FLOATS)}, got {dtype}")
    return found


def _outputs(out: Any, tensor: torch.Tensor, count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The caller's outputs, checked."""
    try:
        outputs = list(out)
    except TypeError:
        raise ShapeError(f"out: expected {count} tensors, got {type(out).__name__}") from None
    if len(outputs) != count:
        raise ShapeError(f"out: expected {count} tensors, got {len(outputs)}")
    for i, t in enumerate(outputs):
        check(f"out[{i}]", t)
        if t.shape != tensor.shape or t.dtype != dtype or t.device != tensor.device or not t.is_contiguous():
            raise ShapeError(
                f"out[{i}]: expected a contiguous tensor {tuple(tensor.shape)} of {dtype} on {tensor.device}, "
                f"got {tuple(t.shape)} of {t.dtype} on {t.device}{'' if t.is_contiguous() else ', not contiguous'}"
            )
    spans = sorted(extent(t) for t in (tensor, *outputs) if t.numel())
    if any(before[1] > after[0] for before, after in itertools.pairwise(spans)):
        raise ShapeError("out: expected tensors that overlap neither each other nor the input")
    return outputs


def _has_kernel(device: torch.device, backend: str | None) -> bool:
    """Whether the CUDA kernel runs, or the reference; what is named for the CPU's sake does not count."""
    if wanted(backend) == "reference":
        return False
    if backend == "triton":
        raise BackendUnavailable("backend triton: has no expert replication")
    reason = native_reason() or _built_without()
    if reason is None:
        return True
    if backend == "native":
        raise BackendUnavailable(f"backend native: {reason}")
    say(f"replicate_experts on {device}: {reason}; falling back to the reference, which is much slower")
    return False


def _on_cuda(op: Op, x: torch.Tensor, outputs: Sequence[torch.Tensor], backend: str | None) -> None:
    """One launch on the caller's stream."""
    if not _has_kernel(x.device, backend):
        for there, copy in zip(outputs, op.spec.method.references([x], op), strict=True):
            there.copy_(copy)
        return
    row = segment_row(op, 0, 0, x.numel(), outputs[0].data_ptr(), [x.data_ptr()])
    table = np.array([[*row, *(t.data_ptr() for t in outputs[1:])]], np.int64)
    segments = Segments(table, op.spec.dtypes, op.spec.out_dtype)
    method = cast("Replicate", op.spec.method)
    launch(segments, np.array([method.sigma]), np.array(method.experts, np.int64), x.device)


def _built_without() -> str | None:
    from fastmerge import _native

    return None if _native.has_cuda() else "the extension was built without nvcc (see FASTMERGE_CUDA)"


def _rms(x: torch.Tensor, dtype: DType, name: str) -> float:
    """``sqrt(sum x^2 / n)``, the sum in the written order of design law L2, so that every backend has its bits."""
    if not x.numel():
        return 0.0
    kernels = _sums(x)
    if kernels is None:
        wide = x.reshape(1, -1).cpu().double() if dtype.size == 8 else x.reshape(1, -1).cpu().float()
        total = float(gram([wide])[0, 0])
    else:
        table = np.array([[0, x.numel(), 0, x.numel(), 0, 0, 0, x.data_ptr()]], np.int64)
        partials = np.empty((-(-x.numel() // TILE), 1))
        kernels.gram(Segments(table, (dtype,), dtype), partials, delta=False, diff=False, per_row=False)
        total = float(kernels.fold(partials, np.array([0, len(partials)], np.int64))[0, 0])
    if not math.isfinite(total):
        raise RecipeError(f"{name or 'tensor'}: relative noise needs a finite root mean square, got {total} / n")
    return math.sqrt(total / x.numel())


def _sums(x: torch.Tensor) -> Any:
    """The kernels that sum ``x`` where it is, if there are any."""
    if not x.is_cuda:
        return cpu_backend("auto").kernels
    if cuda_reason() or gpu_reason(x.device.index):
        return None
    from fastmerge.kernels import TritonKernels

    return TritonKernels(x.device)
