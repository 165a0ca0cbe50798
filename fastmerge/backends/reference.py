"""The reference backend: every method's definition in plain torch, as a program over whole tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmerge.dtypes import DType
from fastmerge.methods.base import HEADER, I64, Group, Method, Program, Segments

if TYPE_CHECKING:
    import torch

Whole = list[tuple[int, "list[torch.Tensor]"]]


def borrow(address: int, count: int, dtype: DType) -> torch.Tensor:
    """A flat tensor over memory that somebody else owns."""
    import torch

    kind = getattr(torch, dtype.name)
    if count == 0:
        return torch.empty(0, dtype=kind)
    raw = (ctypes.c_uint8 * (count * dtype.size)).from_address(address)
    return torch.frombuffer(raw, dtype=kind)


class ReferenceProgram(Program):
    """Runs :meth:`Method.reference`; a method of scope ``model`` copies all inputs first, so it is for tests."""

    def __init__(self, method: type[Method], groups: Sequence[Group]) -> None:
        """Takes the method and its tensors; pieces must be whole tensors."""
        self._method = method
        self._groups = groups
        self._together = bool(groups) and method.scope(groups[0]) == "model"
        self._outputs: dict[int, torch.Tensor] | None = None

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
            group = self._groups[row[5]]
            if row[2] != 0 or row[1] != group.numel:
                raise ValueError(f"{group.name}: the reference needs whole tensors, got {row[1]} of {group.numel}")
            pairs = zip(row[HEADER:], segments.dtypes, strict=True)
            out.append((row[5], [borrow(a, row[1], d).reshape(group.shape) for a, d in pairs]))
        return out

    def statistics(self, segments: Segments) -> Whole:
        """Copies of the inputs."""
        return [(g, [t.clone() for t in tensors]) for g, tensors in self._inputs(segments)]

    def advance(self, partials: Sequence[Any]) -> None:
        """Computes every output."""
        inputs = dict(pair for call in partials for pair in call)
        numbers = sorted(inputs)
        results = self._method.reference_all([inputs[g] for g in numbers], [self._groups[g] for g in numbers])
        self._outputs = dict(zip(numbers, results, strict=True))

    def apply(self, segments: Segments) -> None:
        """Computes, or looks up, each output and copies it to its address."""
        import torch

        bad = np.zeros(len(segments), np.int64)
        for n, (g, tensors) in enumerate(self._inputs(segments)):
            group = self._groups[g]
            known = self._outputs[g] if self._outputs is not None else None
            out = self._method.reference(tensors, group) if known is None else known
            if out.numel():
                borrow(int(segments.table[n, 0]), out.numel(), segments.out_dtype).copy_(out.reshape(-1))
            bad[n] = out.numel() - int(torch.isfinite(out).sum())
        if len(segments.nonfinite):
            segments.nonfinite += bad
