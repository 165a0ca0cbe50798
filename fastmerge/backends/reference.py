"""The reference backend: every method's definition in plain torch, as a program over whole tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.dtypes import DType
from fastmerge.ops.program import Program
from fastmerge.ops.segments import E0, GROUP, HEADER, I64, LENGTH, OUT, Segments
from fastmerge.ops.spec import Op

if TYPE_CHECKING:
    import torch

Whole = list[tuple[int, "list[torch.Tensor]"]]


class _OnDevice:
    """Device memory, as CUDA's array interface describes it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


def borrow(address: int, count: int, dtype: DType, home: str = "cpu") -> torch.Tensor:
    """A flat tensor over memory that somebody else owns."""
    import torch

    torch_type = getattr(torch, dtype.name)
    if count == 0:
        return torch.empty(0, dtype=torch_type)
    if home != "cpu":
        return torch.as_tensor(_OnDevice(address, count * dtype.size), device=home).view(torch_type)
    raw = (ctypes.c_uint8 * (count * dtype.size)).from_address(address)
    return torch.frombuffer(raw, dtype=torch_type)


class ReferenceProgram(Program):
    """Runs :meth:`Method.reference`; where tensors depend on each other it keeps all inputs, so that is for tests."""

    on_host = True

    def __init__(self, ops: Sequence[Op], home: str = "cpu") -> None:
        """Takes the ops, all of one method, and where their tensors are; pieces must be whole tensors."""
        self._ops = ops
        self._home = home
        self._together = ops[0].spec.grain == "model"
        self._outputs: dict[int, list[torch.Tensor]] | None = None

    @property
    def ready(self) -> bool:
        """At once, unless the tensors depend on each other."""
        return not self._together or self._outputs is not None

    def pieces(self) -> I64 | None:
        """Everything."""
        return None

    def _inputs(self, segments: Segments) -> Whole:
        out: Whole = []
        for row in segments.table.tolist():
            op = self._ops[row[GROUP]]
            if row[E0] != 0 or row[LENGTH] != op.spec.numel:
                raise ValueError(f"{op.name}: the reference needs whole tensors, got {row[LENGTH]} of {op.spec.numel}")
            pairs = zip(row[HEADER : HEADER + len(segments.dtypes)], segments.dtypes, strict=True)
            tensors = [borrow(a, row[LENGTH], d, self._home).cpu().reshape(op.spec.shape) for a, d in pairs]
            out.append((row[GROUP], tensors))
        return out

    def statistics(self, segments: Segments) -> Whole:
        """Copies of the inputs."""
        return [(g, [t.clone() for t in tensors]) for g, tensors in self._inputs(segments)]

    def advance(self, partials: Sequence[Any]) -> None:
        """Computes every output."""
        inputs = dict(pair for call in partials for pair in call)
        numbers = sorted(inputs)
        ops = [self._ops[g] for g in numbers]
        results = type(ops[0].spec.method).reference_all([inputs[g] for g in numbers], ops)
        self._outputs = {g: [result] for g, result in zip(numbers, results, strict=True)}

    def apply(self, segments: Segments) -> None:
        """Computes, or looks up, each output and copies it to its addresses."""
        import torch

        bad = np.zeros(len(segments), np.int64)
        more = HEADER + len(segments.dtypes)
        for n, (g, tensors) in enumerate(self._inputs(segments)):
            op = self._ops[g]
            outs = op.spec.method.references(tensors, op) if self._outputs is None else self._outputs[g]
            row = segments.table[n].tolist()
            for address, out in zip((row[OUT], *row[more:]), outs, strict=True):
                if out.numel():
                    borrow(address, out.numel(), segments.out_dtype, self._home).copy_(out.reshape(-1))
                bad[n] += out.numel() - int(torch.isfinite(out).sum())
        if len(segments.nonfinite):
            segments.nonfinite += bad
