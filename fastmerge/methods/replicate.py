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
        relative: it is in units of the tensor's root mean square.
    """

    summary = "Copies of a tensor for the experts of a mixture, with optional noise."
    formula = "out_e = x + sigma_e n_e"
    paper = "https://arxiv.org/abs/2212.05055"
    contract = Contract("ignored", least=1, most=1)
    needs: ClassVar[tuple[str, ...]] = ("replicate",)

    experts: tuple[int, ...]
    sigma: tuple[float, ...]
    relative: bool = False

    @property
    def words(self) -> tuple[object, ...]:
        """The experts, so that all tensors of a call have the same ones."""
        return (self.experts, self.relative)

    @property
    def random(self) -> bool:
        """Noise is drawn."""
        return True

    def grain(self, spec: Spec) -> Grain:
        """An element, but for relative noise."""
        return "tensor" if self.relative else "element"

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """The first expert."""
        return self.references(inputs, op)[0]

    def references(self, inputs: Sequence[torch.Tensor], op: Op) -> list[torch.Tensor]:
        """Every expert."""
        return family.reference(inputs[0], self.experts, self.deviations(inputs[0], op), op.key, op.spec.out_dtype)

    def deviations(self, tensor: torch.Tensor, op: Op) -> Sequence[float]:
        """Standard deviations of the noise of a tensor, as they are."""
        from fastmerge.ops import blocks

        if not self.relative:
            return self.sigma
        x = blocks.work([tensor], op.spec)[0]
        found: list[float] = (np.array(self.sigma) * family.roots([op], blocks.gram([x.reshape(1, -1)]))).tolist()
        return found

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """One pass of the replicate kernel, behind one of sums where the noise is relative."""
        methods = [cast("Replicate", op.spec.method) for op in ops]
        sigma, numbers = np.array([m.sigma for m in methods]), np.array(methods[0].experts, np.int64)
        if methods[0].relative:
            return family.RelativeProgram(kernels, ops, sigma, numbers)
        return family.ReplicateProgram(kernels, sigma, numbers)
