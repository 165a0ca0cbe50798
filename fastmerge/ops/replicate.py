"""Family replicate: one read, one write per expert, with optional noise and the conversion of types fused in.

For expert ``e`` (a number), element ``i`` (logical index in the whole tensor) and the work type W, fp64 where the input
is fp64 and else fp32::

    out_e[i] = round(x[i] + W(sigma_e) * n)      n = normal(key, e, NOISE, i)

rounded once to the output's type, every NaN canonical. An expert whose sigma is 0 (after rounding to W) has no noise:
its elements are converted by the same rounding, or, where the types agree, copied byte for byte, NaNs included.
An expert's bytes depend on nothing but its number, so any subset of experts, in any pieces, gives the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.dtypes import DType
from fastmerge.errors import BackendUnavailable
from fastmerge.ops.blocks import number, round_to, torch_dtype
from fastmerge.ops.segments import F64, I64
from fastmerge.philox import NOISE, normal, normal_lines

if TYPE_CHECKING:
    import torch

HEADER = 4
"""Columns of a row before its experts: input address, length, e0, Philox key (bits)."""

COLUMNS = 3
"""Columns per expert: output address, sigma (bits of fp64), number."""

MOST_SIGMA = 2.0**100
"""Largest sigma: noise is finite, so only a NaN makes a NaN."""

BLOCKS = 1024
"""Philox blocks (8 elements) of a tile of the CUDA kernel: four per thread, between two looks into the table."""


@dataclass(frozen=True, slots=True)
class Copies:
    """Pieces of tensors and where their experts go, all of one input and one output type.

    ``table`` is int64 ``[S, 4 + 3 E]``, see :func:`rows`. Addresses need only the alignment of their elements; where
    that of logical element 0 is 16 bytes, the CUDA kernel moves 128 bits at a time. No output overlaps an input or
    another output.
    """

    table: I64
    in_dtype: DType
    out_dtype: DType


def rows(sources: I64, outputs: I64, sigma: F64, numbers: I64) -> I64:
    """The table of :class:`Copies`.

    Args:
        sources: int64 ``[S, 4]``: input address, length, e0, Philox key (bits).
        outputs: int64 ``[S, E]``: addresses.
        sigma: fp64 ``[S, E]`` or ``[E]``, 0 .. 2**100; each is rounded once to the work type by the kernel.
        numbers: int64 ``[E]``: the experts' numbers, 0 .. 2**32 - 1.

    Returns:
        int64 ``[S, 4 + 3 E]``.
    """
    table = np.empty((len(sources), HEADER + COLUMNS * outputs.shape[1]), np.int64)
    table[:, :HEADER] = sources
    table[:, HEADER::COLUMNS] = outputs
    table[:, HEADER + 1 :: COLUMNS] = np.ascontiguousarray(sigma, np.float64).view(np.int64)
    table[:, HEADER + 2 :: COLUMNS] = numbers
    return table


def first_tiles(table: I64, blocks: int) -> I64:
    """Where each segment's tiles of ``blocks`` Philox blocks start, and then their number: int64 ``[S + 1]``."""
    length, e0 = table[:, 1], table[:, 2]
    touched = np.where(length > 0, ((e0 + length - 1) >> 3) - (e0 >> 3) + 1, 0)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-touched // blocks))])


def launch(copies: Copies, device: torch.device) -> None:
    """Runs the CUDA kernel on the current stream of a device, and does not wait for it.

    The table goes to the device in one copy, made and freed by torch in the order of that stream.

    Args:
        copies: addresses of the device's memory, which must stay valid until the stream has come by.
        device: a CUDA device with an index.

    Raises:
        BackendUnavailable: where the extension was built without CUDA kernels, or the runtime refuses.
        ValueError: for a malformed table.
    """
    import torch

    from fastmerge import _native

    native: Any = _native
    if not native.has_cuda():
        raise BackendUnavailable("replicate on CUDA: the extension was built without nvcc (see FASTMERGE_CUDA)")
    first = first_tiles(copies.table, BLOCKS)
    if first[-1] == 0:
        return
    packed = np.concatenate([copies.table.reshape(-1), first, normal_lines().view(np.int64).reshape(-1)])
    with torch.cuda.device(device):
        there = torch.from_numpy(packed).pin_memory().to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device).cuda_stream
        codes = copies.in_dtype.code, copies.out_dtype.code
        status = native.cuda_replicate(device.index, stream, copies.table, *codes, first, BLOCKS, there.data_ptr())
    if status:
        raise BackendUnavailable(f"replicate on {device}: {native.cuda_error(status)} (CUDA error {status})")


def reference(
    tensor: torch.Tensor, numbers: Sequence[int], sigma: Sequence[float], key: int, out_dtype: DType, *, e0: int = 0
) -> list[torch.Tensor]:
    """The definition, in plain torch: :mod:`fastmerge.ops.replicate`.

    Args:
        tensor: ``[*S]``, fp64, fp32, fp16 or bf16, on any device.
        numbers: ``[E]`` the experts' numbers.
        sigma: ``[E]`` fp64.
        key: Philox key of the tensor.
        out_dtype: of the results.
        e0: logical index of the first element.

    Returns:
        ``E`` new tensors ``[*S]``.
    """
    import torch

    kind = torch_dtype(out_dtype)
    x = tensor.detach().reshape(-1).to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    out = []
    for expert, scale in zip(numbers, sigma, strict=True):
        s = number(scale, x.new_zeros(()))
        if s == 0:
            copy = tensor.detach().clone() if tensor.dtype == kind else round_to(x, kind)
        else:
            n = torch.from_numpy(normal(key, expert, NOISE, e0, x.numel())).to(x)
            copy = round_to(x + s * n, kind)
        out.append(copy.reshape(tensor.shape))
    return out
