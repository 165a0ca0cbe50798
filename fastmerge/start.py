"""What a process of our own does first, so that it starts soon."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from types import ModuleType
from typing import Any

_LOADER = "pydantic.plugin._loader"


class _NoPlugins(ModuleType):
    """Stands in for pydantic's search for plugins, and becomes it where more of it is asked for.

    The search is off, and importing it alone brings ``importlib.metadata`` and ``email``: 60 of the 975 million
    instructions of a ``plan``.
    """

    def get_plugins(self) -> tuple[()]:
        """None."""
        return ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(_LOADER, None)
        return getattr(importlib.import_module(_LOADER), name)


def quickly() -> None:
    """Leaves out what other programs may want and a merge does not."""
    # There are no plugins of pydantic that a recipe wants.
    if os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__") == "__all__":
        sys.modules.setdefault(_LOADER, _NoPlugins(_LOADER))
    # Nothing here calls BLAS, whose threads numpy would start at import and let spin, one per core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Modules and plans are no garbage: looking for some every 700 objects takes 35 million instructions of a plan.
    gc.set_threshold(50_000)
