"""Family replicate: one read, one write per expert, with optional noise and the conversion of types fused in.

For expert ``e`` (a number), element ``i`` (logical index in the whole tensor) and the work type W, fp64 where the input
is fp64 and else fp32::

    out_e[i] = round(x[i] + W(sigma_e) * n)      n = normal(key, e, NOISE, i)

rounded once to the output's type, every NaN canonical. An expert whose sigma is 0 (after rounding to W) has no noise:
its elements are converted by the same rounding, or, where the types agree, copied byte for byte, NaNs included.
An expert's bytes depend on nothing but its number, so any subset of experts, in any pieces, gives the same ones.
Where the noise is relative, sigma_e is times the root mean square of x, whose sum has the order of design law L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastmerge.dtypes import DType
from fastmerge.errors import BackendUnavailable
from fastmerge.ops.blocks import number, round_to, torch_dtype
from fastmerge.ops.gram import GramProgram, check_sums
from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import OnePass
from fastmerge.ops.segments import E0, F64, GROUP, HEADER, I64, LENGTH, Segments
from fastmerge.ops.spec import Op
from fastmerge.ops.tiles import Partial
from fastmerge.philox import NOISE, normal, normal_lines

if TYPE_CHECKING:
    import torch

MOST_SIGMA = 2.0**100
"""Largest sigma: noise is finite, so only a NaN makes a NaN."""

TILE_BYTES = 16384
"""Bytes of an output that the CUDA kernel writes at a time, ``kTileBytes`` of ``csrc/replicate.h``."""


class Replicates(Protocol):
    """Kernels that replicate: those of the extension."""

    def replicate(self, segments: Segments, sigma: F64, numbers: I64) -> None:
        """One input to E outputs; ``sigma [P, E]`` and ``numbers [E]`` as in :class:`ReplicateProgram`."""


class ReplicateProgram(OnePass):
    """One input to E outputs, each with its noise."""

    def __init__(self, kernels: Replicates, sigma: F64, numbers: I64) -> None:
        """Takes the tables.

        Args:
            kernels: the backend.
            sigma: ``[P, E]``, one row per tensor: standard deviation of the noise of each output, 0 .. 2**100.
            numbers: ``[E]`` the experts' numbers, 0 .. 2**32 - 1.
        """
        self._kernels = kernels
        self._sigma = np.ascontiguousarray(sigma, np.float64)
        self._numbers = np.ascontiguousarray(numbers, np.int64)

    def apply(self, segments: Segments) -> None:
        """One kernel call."""
        self._kernels.replicate(segments, self._sigma, self._numbers)


class RelativeProgram(GramProgram):
    """The same where ``sigma`` is in units of each tensor's root mean square: one pass to sum the squares, and then."""

    def __init__(self, kernels: Kernels, ops: Sequence[Op], sigma: F64, numbers: I64) -> None:
        """Takes the backend, the ops, and the tables of :class:`ReplicateProgram`."""
        numbers = np.ascontiguousarray(numbers, np.int64)

        def solve(some: Sequence[Op], stats: F64, _: Sequence[int]) -> tuple[F64, F64]:
            return sigma * roots(some, stats)[:, None], np.ones((len(stats), 2))

        super().__init__(kernels, ops, solve, per_row=False, delta=False)
        self._numbers = numbers

    def statistics(self, segments: Segments) -> Partial:
        """Sums of squares of every tile of the pieces."""
        return super().statistics(alone(segments))

    def apply(self, segments: Segments) -> None:
        """One kernel call."""
        if self._tables is None:
            raise AssertionError("apply before the statistics are complete")
        self._kernels.replicate(segments, self._tables[0], self._numbers)


def alone(segments: Segments) -> Segments:
    """Pieces without the results after the first, as kernels of one result take them."""
    table = np.ascontiguousarray(segments.table[:, : HEADER + len(segments.dtypes)])
    return Segments(table, segments.dtypes, segments.out_dtype)


def roots(ops: Sequence[Op], squares: F64) -> F64:
    """Root mean squares ``[P]`` of tensors from their sums ``[P, 1]`` of squares.

    Raises:
        OutputError: a sum is not finite.
    """
    check_sums(ops, squares, [1] * len(ops), "relative noise needs its root mean square")
    found: F64 = np.sqrt(squares[:, 0] / np.array([max(1, op.spec.numel) for op in ops], np.float64))
    return found


def first_tiles(table: I64, blocks: int) -> I64:
    """Where each segment's tiles of ``blocks`` Philox blocks start, and then their number: int64 ``[S + 1]``."""
    length, e0 = table[:, LENGTH], table[:, E0]
    touched = np.where(length > 0, ((e0 + length - 1) >> 3) - (e0 >> 3) + 1, 0)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-touched // blocks))])


def launch(segments: Segments, sigma: F64, numbers: I64, device: torch.device) -> None:
    """Runs the CUDA kernel on the current stream of a device, and does not wait for it.

    Everything but the data goes to the device in one copy, made and freed by torch in the order of that stream.
    Addresses need only the alignment of their elements; where that of logical element 0 is 16 bytes, the kernel moves
    128 bits at a time.

    Args:
        segments: of one input and E outputs, with addresses of the device's memory, which must stay valid until the
            stream has come by; so must ``nonfinite``, a tensor there, or empty.
        sigma: ``[P, E]``, see :class:`ReplicateProgram`.
        numbers: ``[E]``.
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
    first = first_tiles(segments.table, TILE_BYTES // (8 * segments.out_dtype.size))
    if first[-1] == 0:
        return
    used, rows = np.unique(segments.table[:, GROUP], return_inverse=True)  # a plan has more groups than a call
    table, sigma = segments.table.copy(), sigma[used]
    table[:, GROUP] = rows
    ins = np.array([d.code for d in segments.dtypes], np.int32)
    args = table, ins, segments.out_dtype.code, sigma, numbers, first
    packed = [table, first, sigma.view(np.int64), numbers, normal_lines().view(np.int64), np.zeros(1, np.int64)]
    bad: Any = segments.nonfinite
    with torch.cuda.device(device):
        there = torch.from_numpy(np.concatenate([a.reshape(-1) for a in packed])).pin_memory()
        there = there.to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device).cuda_stream
        counters = bad.data_ptr() if len(bad) else 0
        status = native.cuda_replicate(device.index, stream, *args, there.data_ptr(), counters)
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

    torch_type = torch_dtype(out_dtype)
    x = tensor.detach().reshape(-1).to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    out = []
    for expert, scale in zip(numbers, sigma, strict=True):
        s = number(scale, x.new_zeros(()))
        if s == 0:
            copy = tensor.detach().clone() if tensor.dtype == torch_type else round_to(x, torch_type)
        else:
            n = torch.from_numpy(normal(key, expert, NOISE, e0, x.numel())).to(x)
            copy = round_to(x + s * n, torch_type)
        out.append(copy.reshape(tensor.shape))
    return out
