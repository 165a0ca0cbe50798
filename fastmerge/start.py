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

_STAND_INS: dict[str, dict[str, Any]] = {
    # Some hundred typed dictionaries, 150 of the 800 million instructions of a ``plan``; the package that validates
    # asks for these names of them, for annotations.
    "pydantic_core.core_schema": dict.fromkeys(("CoreConfig", "CoreSchema", "CoreSchemaType", "ErrorType"), dict),
    # Docstrings of numpy's functions and scalars, and its types of arrays: 12 of the 45 ms that numpy takes.
    "numpy._core._add_newdocs": {},
    "numpy._core._add_newdocs_scalars": {},
    "numpy._typing": {"NDArray": list},
}
"""Modules that our process can do without, and what others ask of them at their import."""


class _StandIn(ModuleType):
    """Stands in for a module, and becomes it where more is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        real = importlib.import_module(self.__name__)
        vars(self).update(vars(real))
        return getattr(real, name)


def quickly() -> None:
    """Leaves out what other programs may want and a merge does not."""
    for name, asked in _STAND_INS.items():
        stand_in = _StandIn(name)
        vars(stand_in).update(asked)
        sys.modules.setdefault(name, stand_in)
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
