"""One tensor as the experts of a mixture, with noise that tells them apart. No method of recipes: it has no name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np

from fastmerge.methods.base import Contract, Method
from fastmerge.ops import replicate as family

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec


@dataclass(frozen=True, kw_only=True)
class Replicate(Method):
    """``out_e = round(x + sigma_e n_e)``: one target per expert; see :mod:`fastmerge.ops.replicate`.

    Attributes:
        experts: their numbers, which the noise depends on.
        sigma: standard deviation of each one's noise.
    """

    summary = "Copies of a tensor for the experts of a mixture, with optional noise."
    formula = "out_e = x + sigma_e n_e"
    paper = "https://arxiv.org/abs/2212.05055"
    contract = Contract("ignored", least=1, most=1)
    needs: ClassVar[tuple[str, ...]] = ("replicate",)

    experts: tuple[int, ...]
    sigma: tuple[float, ...]

    @property
    def words(self) -> tuple[object, ...]:
        """The experts, so that all tensors of a call have the same ones."""
        return (self.experts,)

    @property
    def random(self) -> bool:
        """Noise is drawn."""
        return True

    def grain(self, spec: Spec) -> Grain:
        """No statistics."""
        return "element"

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """The first expert."""
        return self.references(inputs, op)[0]

    def references(self, inputs: Sequence[torch.Tensor], op: Op) -> list[torch.Tensor]:
        """Every expert."""
        return family.reference(inputs[0], self.experts, self.sigma, op.key, op.spec.out_dtype)

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """One pass of the replicate kernel."""
        methods = [cast("Replicate", op.spec.method) for op in ops]
        return family.ReplicateProgram(
            kernels, np.array([m.sigma for m in methods]), np.array(methods[0].experts, np.int64)
        )
