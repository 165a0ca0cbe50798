"""DNA transfer: a model of another shape out of the weights of one that is there."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.dna.upcycling import UpcyclingConfig, plan_upcycle, upcycle_dense_to_moe
    from fastmerge.dna.upcycling.balance import attach_moe_aux_loss

_LAZY = {
    "UpcyclingConfig": "upcycling",
    "attach_moe_aux_loss": "upcycling.balance",
    "plan_upcycle": "upcycling",
    "upcycle_dense_to_moe": "upcycling",
}

__all__ = ["UpcyclingConfig", "attach_moe_aux_loss", "plan_upcycle", "upcycle_dense_to_moe"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
