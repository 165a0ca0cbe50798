"""Consensus of task vectors that a method thins by a rule of its own, a whole tensor at a time.

The rule is numpy on the keys of one model; what stays goes to the kernels as one bit per element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fastmerge.dtypes import F64
from fastmerge.ops.blocks import Keys, Mask
from fastmerge.ops.consensus.program import ConsensusProgram
from fastmerge.ops.consensus.rules import Consensus
from fastmerge.ops.kernels import BLOCK, U32, Deltas, Kernels
from fastmerge.ops.per_spec import PerSpec
from fastmerge.ops.program import OnePass
from fastmerge.ops.segments import E0, GROUP, HEADER, LENGTH, Segments
from fastmerge.ops.spec import Op
from fastmerge.philox import u16

if TYPE_CHECKING:
    import numpy.typing as npt

Draw: TypeAlias = "Callable[[int, int, int, int, int], npt.NDArray[np.uint16]]"
"""16-bit random numbers, with the arguments of :func:`fastmerge.philox.u16`."""

Rule = Callable[[Op, int, Keys, Draw], Mask]
"""From an op, a model and the keys of its task vector to which elements stay."""


def workspace(numel: int, models: int, *, double: bool) -> int:
    """Bytes beside the slot: bits of every model, and of one the keys, a copy in another order, and masks of a byte."""
    return numel * models // 8 + numel * (2 * (8 if double else 4) + 4)


class MaskedProgram(OnePass):
    """One tensor after the other: keys and mask of each model, sums of magnitudes where asked for, the merge."""

    def __init__(self, ops: Sequence[Op], rules: PerSpec[Consensus], kernels: Kernels, rule: Rule) -> None:
        """Takes the ops, their rules (of which density says who is thinned), a backend on host memory, and the rule."""
        self._ops = ops
        self._rules = rules
        self._kernels = kernels
        self._rule = rule
        self._draw: Draw = getattr(kernels, "lanes", u16)

    def apply(self, segments: Segments) -> None:
        """Every tensor."""
        for i, row in enumerate(segments.table):
            group = int(row[GROUP])
            op, rules = self._ops[group], self._rules[group]
            if row[E0] or row[LENGTH] != op.spec.numel:
                raise ValueError(f"{op.name}: expected a whole tensor, got {row[LENGTH]} of {op.spec.numel}")
            table = row[None].copy()
            table[:, GROUP] = 0
            one = segments.pieces(table, segments.nonfinite[i : i + 1])
            thinned = [m for m, d in enumerate(rules.density) if d < 1]
            bits = self._bits(op, rules, one, thinned)
            plain = rules._replace(density=(1.0,) * len(rules.density))
            ConsensusProgram([op], PerSpec.of_each([op], [plain]), self._kernels).masked(one, bits, thinned)

    def _bits(self, op: Op, rules: Consensus, one: Segments, thinned: Sequence[int]) -> U32:
        """What stays of every model."""
        numel = op.spec.numel
        bits = np.full((-(-numel // BLOCK), len(rules.density), BLOCK // 32), 0xFFFFFFFF, np.uint32)
        key = np.uint64 if op.spec.double else np.uint32
        code = one.dtypes[0].code if rules.round_base else -1
        for m in thinned:
            inputs = [0, 1 + m]
            if op.spec.double and F64 not in (one.dtypes[0], one.dtypes[1 + m]):
                inputs.append(one.dtypes.index(F64))  # whose presence makes the work fp64
            table = one.table[:, [*range(HEADER), *(HEADER + i for i in inputs)]].copy()
            coded = tuple(one.coded[i] for i in inputs) if one.coded else ()
            some = Segments(table, tuple(one.dtypes[i] for i in inputs), one.out_dtype, coded=coded)
            models = len(inputs) - 1
            keys: Keys = np.empty((numel, models), key)
            deltas = Deltas(code, False, np.zeros(models, np.int32), np.full((1, models), 65536, np.int32))
            self._kernels.delta_keys(some, deltas, keys)
            stays = self._rule(op, m, np.ascontiguousarray(keys[:, 0]), self._draw)
            packed = np.zeros(len(bits) * BLOCK // 8, np.uint8)
            packed[: -(-numel // 8)] = np.packbits(stays, bitorder="little")
            bits[:, m] = packed.view("<u4").reshape(-1, BLOCK // 32)
        return bits
