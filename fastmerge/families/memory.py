"""Runs a program over tensors that the caller owns, in this thread: small merges, and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.dtypes import DType
from fastmerge.errors import ShapeError
from fastmerge.methods.base import HEADER, I64, Group, Program, Segments
from fastmerge.methods.reference import torch_dtype

if TYPE_CHECKING:
    import torch


def whole(groups: Sequence[Group]) -> I64:
    """One piece ``(group, e0, length)`` per tensor."""
    return np.array([(g, 0, group.numel) for g, group in enumerate(groups)], np.int64).reshape(-1, 3)


def segments(
    groups: Sequence[Group],
    inputs: Sequence[Sequence[torch.Tensor]],
    outputs: Sequence[torch.Tensor] | None,
    pieces: I64,
) -> list[Segments]:
    """Segment tables over tensors in host memory, one per combination of types.

    Args:
        groups: the tensors' descriptions.
        inputs: per group, contiguous CPU tensors of its types and shape.
        outputs: per group, a contiguous CPU tensor; None where nothing is written.
        pieces: ``[K, 3]`` (group, e0, length).

    Raises:
        ShapeError: for a tensor that does not match its description.
    """
    for group, tensors in zip(groups, inputs, strict=True):
        for t, d in zip(tensors, group.dtypes, strict=True):
            if tuple(t.shape) != group.shape or t.dtype != torch_dtype(d) or not t.is_contiguous() or t.is_cuda:
                raise ShapeError(
                    f"{group.name}: expected a contiguous CPU tensor {group.shape} of {d.name}, "
                    f"got {tuple(t.shape)} of {t.dtype}"
                )
    rows: dict[tuple[tuple[DType, ...], DType], list[list[int]]] = {}
    for g, e0, length in pieces.tolist():
        group = groups[g]
        key = group.key - (1 << 64) if group.key >= 1 << 63 else group.key
        out = outputs[g].data_ptr() + e0 * group.out_dtype.size if outputs is not None else 0
        places = [t.data_ptr() + e0 * d.size for t, d in zip(inputs[g], group.dtypes, strict=True)]
        kind = (group.dtypes, group.out_dtype)
        rows.setdefault(kind, []).append([out, length, e0, group.row, key, g, 0, *places])
    out_segments = []
    for (dtypes, out_dtype), table in rows.items():
        data = np.array(table, np.int64).reshape(len(table), HEADER + len(dtypes))
        out_segments.append(Segments(data, dtypes, out_dtype, np.zeros(len(table), np.int64)))
    return out_segments


def run(
    program: Program,
    groups: Sequence[Group],
    inputs: Sequence[Sequence[torch.Tensor]],
) -> list[torch.Tensor]:
    """Runs all passes of a program, single-threaded, and returns new tensors.

    Args:
        program: of exactly these groups.
        groups: the tensors' descriptions.
        inputs: per group, contiguous CPU tensors.
    """
    import torch

    outputs = [torch.empty(g.shape, dtype=torch_dtype(g.out_dtype)) for g in groups]
    every = whole(groups)
    if not program.ready:
        for s in segments(groups, inputs, None, every):
            program.settle(s)
    while not program.ready:
        due = program.pieces()
        some = every if due is None else due
        program.advance([program.statistics(s) for s in segments(groups, inputs, None, some)])
    for s in segments(groups, inputs, outputs, every):
        program.apply(s)
    return outputs
