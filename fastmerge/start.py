"""What a process of our own does first, so that it starts soon."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from types import ModuleType
from typing import Any

_TYPES = "pydantic_core.core_schema"


class _Types(ModuleType):
    """Stands in for the types of pydantic's schemas, and becomes them where more than names for annotations is wanted.

    They are some hundred typed dictionaries, which take 150 of the 800 million instructions of a ``plan``; the
    package that validates asks for these four names of them and does nothing with them.
    """

    CoreConfig = CoreSchema = CoreSchemaType = ErrorType = dict

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(_TYPES) is self:
            del sys.modules[_TYPES]
        real = importlib.import_module(_TYPES)
        vars(self).update(vars(real))
        return getattr(real, name)


def quickly() -> None:
    """Leaves out what other programs may want and a merge does not."""
    sys.modules.setdefault(_TYPES, _Types(_TYPES))
    # Nothing here calls BLAS, whose threads numpy would start at import and let spin, one per core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Modules and plans are no garbage: looking for some every 700 objects takes 35 million instructions of a plan.
    gc.set_threshold(50_000)
