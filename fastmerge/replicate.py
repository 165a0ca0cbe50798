"""Expert replication of a tensor in memory, on CPU cores or a CUDA device."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.dispatch import backend as choose
from fastmerge.dispatch import cuda_reason, gpu_reason
from fastmerge.dtypes import BY_NAME, FLOATS, DType
from fastmerge.errors import BackendUnavailable, RecipeError, ShapeError
from fastmerge.families.replicate import MOST_SIGMA, Copies, launch, reference, rows
from fastmerge.methods.base import TILE, Segments
from fastmerge.methods.reference import gram, torch_dtype
from fastmerge.philox import tensor_key

if TYPE_CHECKING:
    import torch

MOST_EXPERTS = 1 << 20
"""Copies of one call."""


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
        experts: how many, or the numbers of those wanted (0 .. 2**32 - 1).
        noise: the noise's standard deviation, 0 or more.
        mode: ``relative``: in units of the root mean square of ``tensor``, whose sum has one written order, so that it
            is the same everywhere; ``absolute``: as it is.
        name: of the tensor; with the seed it keys the random numbers.
        seed: -2**63 .. 2**63 - 1.
        out_dtype: of the results; that of ``tensor`` where absent.
        first_clean: whether expert 0 gets no noise.
        out: one contiguous tensor ``[*S]`` per expert (a tensor ``[E, *S]`` will do), on the device of ``tensor``,
            that overlap neither it nor each other.
        backend: ``native`` (C++, and CUDA for tensors there), ``reference``, or None for the best one.

    Returns:
        A tensor ``[*S]`` per expert: those of ``out`` where that was given. Without noise and in one type they are the
        bytes of ``tensor``; every other NaN is canonical. On CUDA the work is queued on the current stream; relative
        noise waits once for the sum.

    Raises:
        RecipeError: for a parameter out of range, or relative noise for a tensor that is not finite.
        ShapeError: for a tensor of another type, or an ``out`` that does not fit or overlaps.
        BackendUnavailable: where the backend that was named cannot run.
    """
    import torch

    numbers = _numbers(experts)
    kind = _type("tensor", tensor.dtype)
    target = kind if out_dtype is None else _type("out_dtype", out_dtype)
    if mode not in ("relative", "absolute"):
        raise RecipeError(f"mode: expected relative or absolute, got {mode!r}")
    if not 0.0 <= noise <= MOST_SIGMA:
        raise RecipeError(f"noise: expected a number from 0 to 2**100, got {noise}")
    key = tensor_key(seed, name)
    x = tensor.detach().contiguous()
    if out is None:
        outputs = [torch.empty(x.shape, dtype=torch_dtype(target), device=x.device) for _ in numbers]
    else:
        outputs = list(out)
        _check_outputs(outputs, tensor, len(numbers), torch_dtype(target))
    sigma = noise * _rms(x, kind, name) if noise and mode == "relative" else noise
    if not sigma <= MOST_SIGMA:
        raise RecipeError(f"{name or 'tensor'}: noise of standard deviation {sigma}, expected at most 2**100")
    scales = [0.0 if first_clean and e == 0 else sigma for e in numbers]
    kernels = _kernels(x, backend)
    if kernels is None:
        copies = reference(x, numbers, scales, key, target)
        for there, copy in zip(outputs, copies, strict=True):
            there.copy_(copy)
        return outputs
    source = np.array([[x.data_ptr(), x.numel(), 0, key - (1 << 64) if key >> 63 else key]], np.int64)
    places = np.array([[t.data_ptr() for t in outputs]], np.int64)
    kernels(Copies(rows(source, places, np.array(scales), np.array(numbers, np.int64)), kind, target))
    return outputs


def _numbers(experts: int | Sequence[int]) -> list[int]:
    try:
        if isinstance(experts, Sequence):
            numbers = [operator.index(e) for e in experts]
        else:
            numbers = list(range(min(operator.index(experts), MOST_EXPERTS + 1)))
    except TypeError:
        raise RecipeError(f"experts: expected how many, or their numbers, got {experts!r}") from None
    if not 0 < len(numbers) <= MOST_EXPERTS or min(numbers) < 0 or max(numbers) >= 1 << 32:
        raise RecipeError(
            f"experts: expected 1 to {MOST_EXPERTS} of them, numbered from 0 to 2**32 - 1, got {experts!r:.80}"
        )
    return numbers


def _type(what: str, dtype: torch.dtype) -> DType:
    found = BY_NAME.get(str(dtype).removeprefix("torch."))
    if found not in FLOATS:
        raise ShapeError(f"{what}: expected one of {', '.join(d.name for d in FLOATS)}, got {dtype}")
    return found


def _check_outputs(outputs: Sequence[torch.Tensor], tensor: torch.Tensor, count: int, dtype: torch.dtype) -> None:
    if len(outputs) != count:
        raise ShapeError(f"out: expected {count} tensors, got {len(outputs)}")
    for i, t in enumerate(outputs):
        if t.shape != tensor.shape or t.dtype != dtype or t.device != tensor.device or not t.is_contiguous():
            raise ShapeError(
                f"out[{i}]: expected a contiguous tensor {tuple(tensor.shape)} of {dtype} on {tensor.device}, "
                f"got {tuple(t.shape)} of {t.dtype} on {t.device}{'' if t.is_contiguous() else ', not contiguous'}"
            )
    spans = sorted(_extent(t) for t in (tensor, *outputs) if t.numel())
    if any(before[1] > after[0] for before, after in itertools.pairwise(spans)):
        raise ShapeError("out: expected tensors that overlap neither each other nor the input")


def _extent(t: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one behind its last."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _kernels(x: torch.Tensor, backend: str | None) -> Any:
    """What runs a table of copies on the device of ``x``; None for the reference."""
    chosen = choose(backend)
    if chosen.kernels is None:
        return None
    if chosen.name != "native" or x.device.type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"backend {chosen.name}: has no expert replication on {x.device}")
    if not x.is_cuda:
        return chosen.kernels.replicate
    from fastmerge import _native

    if backend is None and not _native.has_cuda():
        return None
    return lambda copies: launch(copies, x.device)


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
        return choose("auto").kernels
    if cuda_reason() or gpu_reason(x.device.index):
        return None
    from fastmerge.kernels import TritonKernels

    return TritonKernels(x.device)
