"""What becomes of a tensor that some models lack: mergekit's rules, said aloud."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastmerge.methods.base import Method

Fate = Literal["merge", "single", "drop", "error"]

_BASE_ALONE = frozenset({"nearswap"})
"""Methods of two inputs that pass a lone survivor through only where it is the base."""


def fate(method: type[Method], present: Sequence[bool], base: int | None) -> Fate:
    """What to do with a tensor.

    ==============================  =========================================================
    methods without a base          merge those present
    methods of exactly two inputs   a single survivor passes through (``nearswap``: the base)
    ``model_stock``                 base alone passes through; fewer than needed: dropped
    other methods with a base       the base must be there; merge those present; base alone
                                    passes through
    ==============================  =========================================================

    Args:
        method: whose contract decides.
        present: for each source of the part, whether it has the tensor (or a tied one).
        base: which of them is the base; None without one.

    Returns:
        ``merge`` those present, pass the ``single`` one through, ``drop`` the tensor, or ``error``.
    """
    if all(present):
        return "merge"
    contract = method.contract
    count = sum(present)
    has_base = base is not None and present[base]
    others = count - has_base
    pair = contract.most is not None and contract.most == contract.least
    if base is not None and not has_base:
        if pair and count == 1 and method.name not in _BASE_ALONE:
            return "single"
        return "drop" if contract.least > 1 and not pair and count <= contract.least else "error"
    if has_base and others == 0:
        return "single"
    if others >= contract.least:
        return "merge"
    if pair and count == 1:
        return "single"
    return "drop" if base is not None and not pair else "error"
