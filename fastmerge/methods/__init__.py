"""Merge methods: one small class each; this package is the list of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from fastmerge.errors import RecipeError
from fastmerge.methods.base import Contract, Group, Method, Param, Program, Segments
from fastmerge.methods.dare import DareLinear, DareTies
from fastmerge.methods.linear import Linear
from fastmerge.methods.model_stock import ModelStock
from fastmerge.methods.passthrough import Passthrough
from fastmerge.methods.slerp import Slerp
from fastmerge.methods.task_arithmetic import TaskArithmetic
from fastmerge.methods.ties import Ties

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {m.name: m for m in (DareLinear, DareTies, Linear, ModelStock, Passthrough, Slerp, TaskArithmetic, Ties)}
)
"""Every method by the name that recipes use."""

__all__ = ["METHODS", "Contract", "Group", "Method", "Param", "Program", "Segments", "get"]


def get(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        RecipeError: for an unknown name, with the closest known one.
    """
    found = METHODS.get(name)
    if found is None:
        close = difflib.get_close_matches(str(name), METHODS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RecipeError(f"unknown merge method {name!r}{hint} (known: {', '.join(METHODS)})")
    return found
