"""The engine inside mergekit 0.1.5: its merges from disk to disk, and its methods on tensors.

::

    from fastmerge.adapters import mergekit

    mergekit.install()

or, for its commands, ``python -m fastmerge.adapters.mergekit mergekit-yaml CONFIG OUT [mergekit's flags]``.
What the engine does not take, mergekit's own code merges as before, and a line of the log says why.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable

from fastmerge.errors import BackendUnavailable

KNOWN = ("0.1.5",)
"""Versions of mergekit whose insides are known."""

_LOCK = threading.Lock()
_UNDO: dict[str, Callable[[], None]] = {}
"""What takes back each level that is installed."""


def install(*, methods: bool = True, merges: bool = True) -> None:
    """Lets mergekit work through this engine, until :func:`uninstall`; what is installed already stays as it is.

    Args:
        methods: the methods of its registry: ``merge_tensors``, ``merge_state_dicts``, ``mergekit-pytorch`` and every
            graph. mergekit's own code still runs where gradients are recorded, for types other than fp64, fp32, fp16
            and bf16, for values that the engine refuses or has no kernels for, and for a method that something else
            replaced.
        merges: ``run_merge``, under every name that it was imported as: ``mergekit-yaml``, ``mergekit-multi``, evolve.

    Raises:
        BackendUnavailable: mergekit is not installed, or of a version that is not known.
    """
    check_version()
    with _LOCK:
        for level, wanted in (("merges", merges), ("methods", methods)):
            if wanted and level not in _UNDO:
                _UNDO[level] = importlib.import_module(f"{__name__}.{level}").install()


def uninstall() -> None:
    """Gives mergekit everything back that :func:`install` replaced."""
    with _LOCK:
        while _UNDO:
            _UNDO.popitem()[1]()


def check_version() -> None:
    """Whether there is a mergekit that is known.

    Raises:
        BackendUnavailable: there is none, or another one.
    """
    from importlib.metadata import PackageNotFoundError, version

    known = " or ".join(KNOWN)
    try:
        found = version("mergekit")
    except PackageNotFoundError:
        raise BackendUnavailable(f"mergekit is not installed: expected {known}") from None
    if found not in KNOWN:
        raise BackendUnavailable(f"mergekit {found}: expected {known}, whose insides the adapter knows")
