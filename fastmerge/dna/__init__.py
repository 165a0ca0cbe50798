"""DNA transfer: a model of another shape out of the weights of one that is there."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.dna.growth import GrowthMethod, Initialization, ModelGrowthConfig, NewUnits, WidthMode
    from fastmerge.dna.parent import Parent
    from fastmerge.dna.width import fresh_rms, grow_model_width, plan_width

_LAZY = {
    "GrowthMethod": "growth",
    "Initialization": "growth",
    "ModelGrowthConfig": "growth",
    "NewUnits": "growth",
    "Parent": "parent",
    "WidthMode": "growth",
    "fresh_rms": "width",
    "grow_model_width": "width",
    "plan_width": "width",
}

__all__ = [
    "GrowthMethod",
    "Initialization",
    "ModelGrowthConfig",
    "NewUnits",
    "Parent",
    "WidthMode",
    "fresh_rms",
    "grow_model_width",
    "plan_width",
]


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
