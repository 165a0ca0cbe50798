"""One tensor as experts of which some inner units are drawn anew (Drop-Upcycling). No method of recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from fastmerge.methods.replicate import Replicate
from fastmerge.ops import redraw as family

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec


@dataclass(frozen=True, kw_only=True)
class Redraw(Replicate):
    """Copies with noise, and new units in each; see :mod:`fastmerge.ops.redraw`.

    Attributes:
        units: which ones.
    """

    summary = "Copies of a tensor for the experts of a mixture, with some of their units drawn anew."
    formula = "out_e = mean_e + deviation_e n_e in units U_e, x + sigma_e n_e elsewhere"
    paper = "https://arxiv.org/abs/2502.19261"
    needs = ("elementwise", "replicate")

    units: family.Units

    def grain(self, spec: Spec) -> Grain:
        """Means and deviations are a tensor's."""
        return "tensor"

    def references(self, inputs: Sequence[torch.Tensor], op: Op) -> list[torch.Tensor]:
        """Every expert."""
        return family.reference(op, self.units, self.experts, inputs[0], super().references(inputs, op))

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """Sums, noise, and new units."""
        methods = [cast("Redraw", op.spec.method) for op in ops]
        before = super().program(ops, kernels)
        return family.RedrawProgram(kernels, ops, [m.units for m in methods], methods[0].experts, before)
