"""What a process of our own does first, so that it starts soon, and last, so that it is gone soon."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

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


def program(commands: Callable[[], Any]) -> None:
    """Runs a command line; where it says how it ended, the process ends without taking apart what it made.

    The interpreter would free modules and objects one by one, 13 of the 140 ms of a ``plan``. Before that it joins
    threads and calls what is registered with :mod:`atexit`, the last first: all of that has happened when it comes to
    :func:`leave`. Where others registered before us (coverage does), or a stream cannot be flushed, it goes on as ever.

    Args:
        commands: raises SystemExit with its exit code.
    """
    code: Any = None

    def leave() -> None:
        if not isinstance(code, int):
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (AttributeError, OSError, ValueError):  # no stream, a full disk, closed
            return
        os._exit(code)

    if atexit._ncallbacks() == 0:  # noqa: SLF001 (nothing public tells)
        atexit.register(leave)
    try:
        commands()
    except SystemExit as end:
        code = end.code
        raise
