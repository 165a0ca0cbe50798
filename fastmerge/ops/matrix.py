"""Methods that need a matrix as a whole: its polar factor, its largest singular directions; in numpy, in fp64.

What LAPACK and BLAS compute depends on the machine in the last places of fp64, so these results are the same everywhere
only to the rounding of their type, unlike everything else here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastmerge.dtypes import F32, F64
from fastmerge.ops.elementwise import Array, convert
from fastmerge.ops.kernels import Kernels
from fastmerge.ops.program import OnePass
from fastmerge.ops.segments import E0, GROUP, HEADER, LENGTH, OUT, Segments
from fastmerge.ops.spec import Op

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Matrix: TypeAlias = "npt.NDArray[np.float64]"

Read = Callable[[int], Array]
"""An input as a flat array of the work type, by its number; a new one each time."""

Merge = Callable[[Op, Read], Array]
"""From an op and its inputs to the flat result, not yet rounded."""

SMALLEST = 1e-6
"""Singular values below this share of the largest are rounding of fp32 inputs; their directions are left out."""


def directions(w: Matrix) -> tuple[Matrix, Matrix]:
    """Squared singular values of ``[m, n]``, m >= n, from the smallest, and right singular vectors as columns."""
    values, vectors = np.linalg.eigh(w.T @ w)
    return values, vectors


def polar(w: Matrix) -> Matrix:
    """The polar factor ``U V^T`` of ``U S V^T``: what is nearest among matrices of orthonormal columns (or rows).

    By the eigenvectors of the Gram matrix of the shorter side, and two steps of Newton and Schulz, after which products
    of columns are within 1e-12 of 0 and 1. Directions whose singular value is below :data:`SMALLEST` of the largest are
    left out: there the factor is 0.
    """
    if w.shape[0] < w.shape[1]:
        return polar(w.T).T
    values, vectors = directions(w)
    kept = values > SMALLEST * SMALLEST * values[-1:]
    p = w @ ((vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T)
    for _ in range(2):
        gram = p.T @ p
        gram *= -0.5
        gram[np.diag_indices(len(gram))] += 1.5
        p = p @ gram
    return p


def largest(w: Matrix, k: int) -> tuple[Matrix, Matrix, Matrix]:
    """The k largest singular triples: left vectors ``[m, k]``, values ``[k]``, right vectors ``[n, k]``.

    A direction whose singular value is below :data:`SMALLEST` of the largest is a column of zeros, on both sides.
    """
    if w.shape[0] < w.shape[1]:
        right, values, left = largest(w.T, k)
        return left, values, right
    squares, vectors = directions(w)
    s = np.sqrt(np.maximum(squares[: -k - 1 : -1], 0.0))
    s[s <= SMALLEST * s[:1]] = 0.0
    v = vectors[:, : -k - 1 : -1] * (s > 0)
    return w @ v / np.where(s > 0, s, 1.0), s, v


def workspace(m: int, n: int) -> int:
    """Bytes that :func:`polar` takes beside its argument: two more of it, and what LAPACK needs for eigenvectors."""
    r = min(m, n)
    return 16 * m * n + 56 * r * r


class MatrixProgram(OnePass):
    """Whole tensors, one after the other."""

    def __init__(self, ops: Sequence[Op], kernels: Kernels, merge: Merge) -> None:
        """Takes the ops, a backend on host memory, and the method's mathematics."""
        self._ops = ops
        self._kernels = kernels
        self._merge = merge

    def apply(self, segments: Segments) -> None:
        """Every tensor."""
        for i, row in enumerate(segments.table):
            op = self._ops[row[GROUP]]
            if row[E0] or row[LENGTH] != op.spec.numel:
                raise ValueError(f"{op.name}: expected a whole tensor, got {row[LENGTH]} of {op.spec.numel}")
            numel, addresses = op.spec.numel, row[HEADER : HEADER + len(segments.dtypes)].tolist()
            wide, number = (F64, np.float64) if op.spec.double else (F32, np.float32)

            def read(j: int, numel: int = numel, addresses: list[int] = addresses) -> Array:
                out: Array = np.empty(numel, number)  # noqa: B023  called within this iteration
                convert(self._kernels, segments.dtypes[j], wide, [addresses[j]], [out.ctypes.data], numel)  # noqa: B023
                return out

            made = np.ascontiguousarray(self._merge(op, read))
            source = F64 if made.dtype == np.float64 else F32
            bad = convert(self._kernels, source, segments.out_dtype, [made.ctypes.data], [int(row[OUT])], numel)
            if len(segments.nonfinite):
                segments.nonfinite[i] += bad


def reference(op: Op, inputs: Sequence[torch.Tensor], merge: Merge) -> torch.Tensor:
    """The same of a tensor in torch."""
    import torch

    from fastmerge.ops import blocks

    made = merge(op, lambda i: blocks.work([inputs[i]], op.spec)[0].numpy().copy())
    return blocks.finish(torch.from_numpy(np.ascontiguousarray(made)), op.spec)
