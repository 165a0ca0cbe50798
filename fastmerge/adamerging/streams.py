"""The tensors of a base and experts, bound once: weighted sums of task vectors, and the gradients of their weights.

The fused pair of AdaMerging. Forward, the family ``combine``: ``theta = x_0 + sum_i c_i (x_i - x_0)``, which reads the
base and N experts and writes theta. Backward, the family ``dot``: ``dc_i = <g, x_i - x_0>``, which reads the same and
the gradient. Task vectors exist in registers only, so experts are kept as they are and nothing is saved for a backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch

from fastmerge.backends.choose import choose
from fastmerge.dtypes import BY_NAME, DType
from fastmerge.ops import blocks
from fastmerge.ops.combine import USUAL, deltas_in_range
from fastmerge.ops.segments import E0, F64, GROUP, HEADER, I64, LENGTH, OUT, ROW, TILE, Segments
from fastmerge.ops.tiles import number
from fastmerge.runtime.devices import cores
from fastmerge.runtime.workers import each

WRITTEN, READ = 64 * TILE, 8 * TILE
"""Elements of a piece at most: enough for the caches to be bypassed by what is written; and where nothing is, few
enough for all cores to share a tensor."""

FEW = 1 << 20
"""Elements below which a call is made by the calling thread alone."""


def dtype_of(tensor: torch.Tensor) -> DType:
    """The type of a tensor's elements, as the kernels call it."""
    return BY_NAME[str(tensor.dtype).removeprefix("torch.")]


@dataclass
class _Kind:
    """Tensors of the same types: their pieces.

    Attributes:
        dtypes: of the base and experts; results and gradients are of the base's.
        written: ``[S, 7 + N + 1]`` pieces of all tensors, whose results are still to come.
        read: ``[S, 7 + N + 2]`` pieces of each tensor, by its number, whose gradients are still to come.
    """

    dtypes: tuple[DType, ...]
    written: I64
    read: dict[int, I64]


class Streams:
    """Contiguous tensors on one device, of which none may be moved or freed while this lives."""

    def __init__(self, inputs: Sequence[Sequence[torch.Tensor]], backend: str | None = None) -> None:
        """Binds the tensors.

        Args:
            inputs: base and experts of each tensor, ``[*S]`` each, contiguous, floating-point; all on one device.
            backend: ``native``, ``reference``, ``triton`` or None for the best one on their device.

        Raises:
            BackendUnavailable: if the backend cannot work on that device.
        """
        self.inputs = [[x.detach() for x in group] for group in inputs]
        self._home = home = inputs[0][0].device
        self._kernels: Any = choose(str(home), backend, said=f"tensors on {home}").kernels
        self._launched = self._kernels is not None and self._kernels.launcher is not None
        self._kinds = self._bound()
        self._kind_of = {p: k for k, kind in enumerate(self._kinds) for p in kind.read}

    def __reduce__(self) -> NoReturn:
        """A copy would keep the addresses of tensors that are not its own."""
        raise TypeError("bound tensors cannot be copied or pickled: save coefficients, and bind anew")

    @property
    def models(self) -> int:
        """N, the experts."""
        return len(self.inputs[0]) - 1

    def _bound(self) -> list[_Kind]:
        alike: dict[tuple[DType, ...], list[int]] = {}
        for p, group in enumerate(self.inputs):
            alike.setdefault(tuple(map(dtype_of, group)), []).append(p)
        return [
            _Kind(
                dtypes,
                np.concatenate([self._pieces(p, WRITTEN) for p in members]),
                {p: np.pad(self._pieces(p, READ), ((0, 0), (0, 1))) for p in members},
            )
            for dtypes, members in alike.items()
        ]

    def _pieces(self, p: int, most: int) -> I64:
        """Rows of tensor ``p``, of so many elements at most."""
        group = self.inputs[p]
        n = group[0].numel()
        e0 = np.arange(0, n, most)
        table = np.zeros((len(e0), HEADER + len(group)), np.int64)
        table[:, E0], table[:, LENGTH], table[:, ROW], table[:, GROUP] = e0, np.minimum(most, n - e0), n, p
        for i, x in enumerate(group):
            table[:, HEADER + i] = x.data_ptr() + e0 * x.element_size()
        return table

    def outputs(self) -> list[torch.Tensor]:
        """New tensors for results: of the base's types and shapes."""
        return [torch.empty_like(group[0]) for group in self.inputs]

    # ---- forward ------------------------------------------------------------------------------------------

    def render(self, coefficients: F64, outputs: Sequence[torch.Tensor]) -> None:
        """``theta = x_0 + sum_i c_i (x_i - x_0)`` into every output.

        Args:
            coefficients: ``[P, N]``, one row per tensor.
            outputs: contiguous, of the base's types and shapes; they may overlap no input.
        """
        if self._kernels is None:
            for group, row, out in zip(self.inputs, coefficients.tolist(), outputs, strict=True):
                _combined(group, row, out)
            return
        coef, scale = self._tables(coefficients)
        starts = np.array([x.data_ptr() for x in outputs], np.int64)
        work = []
        for kind in self._kinds:
            table = kind.written.copy()
            table[:, OUT] = starts[table[:, GROUP]] + table[:, E0] * kind.dtypes[0].size
            work += self._shared(Segments(table, kind.dtypes, kind.dtypes[0]), WRITTEN)

        def one(segments: Segments) -> None:
            self._kernels.combine(segments, coef, scale, delta=True, per_row=False)

        self._run(one, work)

    def _tables(self, coefficients: F64) -> tuple[F64, F64]:
        """The parameters of combine: what task arithmetic makes of the same weights, for the same bytes."""
        coef = np.concatenate([np.zeros((len(coefficients), 1)), coefficients], axis=1)
        scale = np.ones((len(coef), 2))
        most = np.frexp(np.abs(coefficients).max(axis=1, initial=0.0))[1] - 1
        for p in np.flatnonzero((np.abs(most) > USUAL[False]) & (coefficients != 0).any(axis=1)).tolist():
            double = any(d.code == 0 for d in self._kinds[self._kind_of[p]].dtypes)
            coef[p, 1:], *scale[p] = deltas_in_range(coefficients[p].tolist(), 1.0, 1.0, double=double)
        return coef, scale

    # ---- backward -----------------------------------------------------------------------------------------

    def slopes(self, gradients: Mapping[int, torch.Tensor]) -> F64:
        """``dc_i = <g, x_i - x_0>`` of some tensors.

        Differences, products and the sums within a tile of 65,536 elements are fp32 (fp64 where an input is), in the
        written order; tiles add in fp64.

        Args:
            gradients: g by the number of the tensor, of its shape.

        Returns:
            ``[len(gradients), N]``, in their order.
        """
        found = np.zeros((len(gradients), self.models))
        if self._kernels is None:
            for i, (p, g) in enumerate(gradients.items()):
                base, *others = self.inputs[p]
                found[i] = _dotted(base, others, g)
            return found
        work, folds = [], []
        mine: dict[int, list[int]] = {}
        for i, p in enumerate(gradients):
            mine.setdefault(self._kind_of[p], []).append(i)
        keys = list(gradients)
        for k, which in mine.items():
            kind, of = self._kinds[k], [keys[i] for i in which]
            dense = [_plain(gradients[p], self.inputs[p][0]) for p in of]
            rows = [kind.read[p] for p in of]
            table = np.concatenate(rows)
            if not len(table):
                continue
            starts = np.repeat([g.data_ptr() for g in dense], [len(r) for r in rows])
            table[:, -1] = starts + table[:, E0] * kind.dtypes[0].size
            segments, _, tiles = number(Segments(table, (*kind.dtypes, kind.dtypes[0]), kind.dtypes[0]))
            partials = np.zeros((tiles, self.models))
            ends = np.cumsum([0, *(-(-self.inputs[p][0].numel() // TILE) for p in of)])
            work += [(s, partials) for s in self._shared(segments, READ)]
            folds.append((which, partials, ends, dense))

        def one(call: tuple[Segments, F64]) -> None:
            self._kernels.dot(*call)

        self._run(one, work)
        for which, partials, first, _ in folds:
            found[which] = self._kernels.fold(partials, first)
        return found

    # ---- who does it ----------------------------------------------------------------------------------------

    def _shared(self, segments: Segments, least: int) -> list[Segments]:
        """A table in parts of about equal size, one per kernel call; in one where a call is a launch."""
        table = segments.table
        total = int(table[:, LENGTH].sum())
        if self._launched or total < FEW:
            return [segments] if len(table) else []
        share = max(least, -(-total // (4 * cores())))
        part = (np.cumsum(table[:, LENGTH]) - 1) // share
        cuts = np.flatnonzero(np.diff(part)) + 1
        return [replace(segments, table=np.ascontiguousarray(rows)) for rows in np.split(table, cuts)]

    def _run(self, work: Any, items: Sequence[Any]) -> None:
        """Kernel calls: in turn where they are launched or few elements, else on all cores."""
        elements = sum(int((i if isinstance(i, Segments) else i[0]).table[:, LENGTH].sum()) for i in items)
        if self._launched or elements < FEW:
            with torch.cuda.device(self._home) if self._home.type == "cuda" else contextlib.nullcontext():
                for item in items:
                    work(item)
        else:
            each(work, items, threads=min(cores(), len(items)), name="adamerging")


def _plain(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A gradient as the kernels read it: dense, of the result's type, elements in the order of the tensor's."""
    dense = gradient.detach().to_dense() if gradient.layout is not torch.strided else gradient.detach()
    return dense.to(like.dtype).contiguous()


def _wide(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Flat, in the work type."""
    work = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return [x.detach().reshape(-1).to(work) for x in tensors]


def _combined(group: Sequence[torch.Tensor], weights: Sequence[float], out: torch.Tensor) -> None:
    """The definition of the forward."""
    base, *others = _wide(group)
    mix = blocks.weighted_sum([x - base for x in others], weights)
    with torch.no_grad():
        out.copy_(blocks.round_to(base + mix, out.dtype).view_as(out))


def _dotted(base: torch.Tensor, others: Sequence[torch.Tensor], gradient: torch.Tensor) -> F64:
    """The definition of the backward."""
    *values, g = _wide([base, *others, _plain(gradient, base)])
    return blocks.dot(values, g)
