"""A tensor of one model, as it is or scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from fastmerge.methods.base import Contract, Method, per_input
from fastmerge.ops.combine import CombineProgram, weights_in_range

if TYPE_CHECKING:
    import torch

    from fastmerge.ops.kernels import Kernels
    from fastmerge.ops.program import Program
    from fastmerge.ops.spec import Grain, Op, Spec


def _tables(spec: Spec) -> tuple[tuple[float, ...], float]:
    """Coefficient and divisor."""
    return weights_in_range((cast("Passthrough", spec.method).factor,), 1.0, double=spec.double)


@dataclass(frozen=True, kw_only=True)
class Passthrough(Method):
    r"""One model's tensor, times ``scale`` where it is given.

    .. math:: s\,x

    Shapes: ``x: [*S]`` -> ``[*S]``.
    Numerics: fp32 (fp64 for fp64 and for fp32 results), one rounding; without a scale, and where the type stays, plans
    copy the bytes and compute nothing.
    Paper: none; the building block of frankenmerges such as SOLAR, arXiv 2312.15166.
    """

    name = "passthrough"
    summary = "One model's tensor, unchanged or scaled: layer stacking and repetition."
    formula = "out = s x"
    paper = "https://arxiv.org/abs/2312.15166"
    contract = Contract("ignored", least=1, most=1)
    coded = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mergekit": {}}
    wide = True
    cases = ({}, {"scale": 0.5}, {"scale": -1.7}, {"scale": 0.0})

    scale: tuple[float | None, ...] = per_input("factor; null copies the bytes", None)

    @property
    def factor(self) -> float:
        """The scale, 1 where there is none."""
        return 1.0 if self.scale[0] is None else self.scale[0]

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """``s x``."""
        from fastmerge.ops import blocks

        return blocks.combined(inputs, op.spec, *_tables(op.spec))

    @classmethod
    def program(cls, ops: Sequence[Op], kernels: Kernels) -> Program:
        """One pass of the combine kernel."""
        from fastmerge.ops.per_spec import PerSpec

        tables = PerSpec(_tables, ops)
        coef, scale = tables.rows(lambda t: t[0]), tables.rows(lambda t: (1.0, t[1]))
        return CombineProgram(kernels, coef, scale, delta=False, wide=ops[0].spec.double)


@dataclass(frozen=True, kw_only=True)
class Copy(Method):
    """The bytes of one source, whatever their type; further sources must hold the same ones.

    Plans use it where nothing is computed; the operating system copies, and no kernel runs. It is no method of
    recipes, so it has no name there.
    """

    summary = "The bytes as they are."
    formula = "out = x"
    paper = ""
    contract = Contract("ignored")

    def reference(self, inputs: Sequence[torch.Tensor], op: Op) -> torch.Tensor:
        """``x``."""
        return inputs[0].detach().clone().reshape(op.spec.shape)

    def grain(self, spec: Spec) -> Grain:
        """Bytes."""
        return "copy"


COPY = Copy()
"""The one instance there need be."""
