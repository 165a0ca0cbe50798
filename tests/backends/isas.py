"""The instruction sets that the extension has here and that this machine runs."""

import contextlib

import numpy as np

from fastmerge import _native


@contextlib.contextmanager
def using(name):
    """Kernels of one instruction set, odd values without numpy's warnings; afterwards those of before."""
    before = _native.isa()
    _native.set_isa(name)
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        _native.set_isa(before)


def available():
    names = []
    for name in ("baseline", "v3", "v4", "neon"):
        with contextlib.suppress(ValueError), using(name):
            names.append(name)
    return names


ISAS = available()
