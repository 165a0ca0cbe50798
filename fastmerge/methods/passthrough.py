"""A tensor of one model, as it is or scaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastmerge.methods.base import Contract, Group, Method, Param, Program, once_per_kind
from fastmerge.ops import blocks as reference
from fastmerge.ops.combine import CombineProgram

if TYPE_CHECKING:
    import torch


class Passthrough(Method):
    r"""One model's tensor, times ``scale`` where it is given.

    .. math:: s\,x

    Shapes: ``x: [*S]`` -> ``[*S]``.
    Numerics: fp32 (fp64 for fp64), one rounding; without a scale, and where the type stays, plans copy the
    bytes and compute nothing.
    Paper: none; the building block of frankenmerges such as SOLAR, arXiv 2312.15166.
    """

    name = "passthrough"
    summary = "One model's tensor, unchanged or scaled: layer stacking and repetition."
    formula = "out = s x"
    paper = "https://arxiv.org/abs/2312.15166"
    contract = Contract("ignored", least=1, most=1)
    params = (Param("scale", "input", float, None, "factor; null copies the bytes"),)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mergekit": {}}
    cases = ({}, {"scale": 0.5}, {"scale": -1.7}, {"scale": 0.0})

    @classmethod
    def factor(cls, group: Group) -> float:
        """The scale, 1 where there is none."""
        scale = group.models[0]["scale"]
        return 1.0 if scale is None else float(scale)

    @classmethod
    def reference(cls, inputs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
        """``s x``."""
        return reference.plain(inputs, group, [cls.factor(group)], 1.0)

    @classmethod
    def program(cls, groups: Sequence[Group], kernels: Any) -> Program:
        """One pass of the combine kernel."""
        coef = np.array([[factor] for factor in once_per_kind(cls.factor, groups)])
        return CombineProgram(kernels, coef, np.ones((len(groups), 2)), delta=False)
