"""What becomes of a tensor that some models lack.

It is an error, unless the tensor is known to be optional, or the model that lacks it is a *part* of the reference:
all of one tower of it, or the few tensors that were trained. ``missing: merge`` in a recipe asks for mergekit's
rules instead (:func:`decide`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Literal

from fastmerge.methods.base import Method
from fastmerge.planning.names import kind
from fastmerge.planning.structure import Structure, roots

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo

Decision = Literal["merge", "single", "drop", "error"]

_BASE_ALONE = frozenset({"nearswap"})
"""Methods of two inputs that pass a lone survivor through only where it is the base."""


def decide(method: type[Method], present: Sequence[bool], base: int | None) -> Decision:
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


_BUFFER = (
    r"(^|\.)(inv_freq|position_ids|(cos|sin)_cached|num_batches_tracked|final_logits_bias)$"
    r"|(attn|attention)\.masked_bias$"
)
_MASK = r"(attn|attention)\.bias$"
_VALUE_HEAD = r"(^|\.)(v_head|value_head)\."
_PREDICTION = r"(^|\.)mtp\."


def buffer(name: str, info: TensorInfo) -> bool:
    """Whether a tensor is one that models make for themselves: rotary tables, masks, position numbers, counters."""
    return bool(re.search(_BUFFER, name) or (len(info.shape) == 4 and re.search(_MASK, name)))


def value_head(name: str) -> bool:
    """Whether a tensor belongs to the value head that trainers put beside a model (TRL's ``v_head``)."""
    return bool(re.search(_VALUE_HEAD, name))


def optional(name: str, info: TensorInfo, structure: Structure) -> str | None:
    """Why a model may do without a tensor; None where it may not.

    Args:
        name: of the tensor.
        info: the tensor in one of the models that have it.
        structure: of that model.
    """
    if buffer(name, info):
        return "a buffer that models make for themselves"
    if value_head(name):
        return "a value head, which is no part of the model"
    main = structure.main
    split = main.split(name) if main is not None else None
    if re.search(_PREDICTION, name) or (main is not None and split is not None and split[0] >= main.count):
        return "a layer beyond the configured ones (multi-token prediction)"
    return None


def lost(whole: Iterable[str], structure: Structure, part: AbstractSet[str], *, like: bool) -> set[str]:
    """Tensors that a model should have besides those that it has; without them it is a part of the whole.

    Where the part lacks a tower (all that lies under the same module as a stack of layers and no other stack), it
    has all or nothing of every other tower and module. Otherwise, and instead, it may hold the smaller share that
    was trained: at most half of the kinds of tensors, whole modules, and those of every layer.

    Args:
        whole: names of the reference's tensors.
        structure: of the reference.
        part: names of the model's tensors, as the reference writes them.
        like: whether the model may be a fine-tune of the reference that holds only what was trained.

    Returns:
        Names of the reference that the model lost; empty for a part.
    """
    towers = list(roots(structure).values())
    groups: dict[str, list[str]] = {}
    for name in whole:
        groups.setdefault(_group(name, towers), []).append(name)
    if not any(part.isdisjoint(groups.get(tower, ())) for tower in towers):
        groups = {"": [n for names in groups.values() for n in names]}
    out: set[str] = set()
    for names in groups.values():
        absent = [n for n in names if n not in part]
        if len(absent) in (0, len(names)):
            continue
        kinds, present = {kind(n) for n in names}, {kind(n) for n in names if n in part}
        gone = {kind(n) for n in absent}
        modules = {k.rpartition(".")[0] for k in present}
        partly = any(k.rpartition(".")[0] in modules for k in gone if "." in k)
        if not like or partly or gone & present or 2 * len(present) > len(kinds):
            out.update(absent)
    return out


def _group(name: str, towers: Sequence[str]) -> str:
    """The tower that a tensor belongs to, or else the module that no tower shares with it."""
    if not towers:
        return ""
    found = next((r for r in towers if name.startswith(r + ".")), None)
    if found is not None:
        return found
    parts = name.split(".")
    for n in range(1, len(parts)):
        prefix = ".".join(parts[:n])
        if not any(r == prefix or r.startswith(prefix + ".") for r in towers):
            return prefix
    return name
