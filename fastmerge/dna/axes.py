"""How each axis of a model grows: which old entry each new one is of."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import numpy.typing as npt

I64: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True, eq=False)
class Growth:
    """An axis that grows.

    Attributes:
        axis: its name.
        old: entries before.
        index: int64 ``[new]``: the old entry that each new one is a replica of; -1 for one that is of none.
        scale: fp64 ``[new]``: what each entry of the residual stream is multiplied by; None for 1 everywhere.
    """

    axis: str
    old: int
    index: I64
    scale: npt.NDArray[np.float64] | None = None

    @property
    def new(self) -> int:
        """Entries after."""
        return len(self.index)

    @functools.cached_property
    def replicas(self) -> I64:
        """How many each old entry has."""
        return np.bincount(self.index[self.index >= 0], minlength=self.old)

    @property
    def uniform(self) -> bool:
        """Whether all have as many, and nothing is new."""
        return bool((self.index >= 0).all()) and self.replicas.min() == self.replicas.max()

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        return self.new == self.old and bool((self.index == np.arange(self.old)).all())

    def facts(self) -> dict[str, Any]:
        """What growth_map.json says of it."""
        found: dict[str, Any] = {"old": self.old, "new": self.new, "index": self.index.tolist()}
        found["replicas"] = self.replicas.tolist()
        return found if self.scale is None else {**found, "scale": self.scale.tolist()}


def channels(old: int, new: int, mode: str) -> Growth:
    """The residual stream: the old channels, and then replicas of them in their order, or new ones (``zero``)."""
    index = np.arange(new) % old
    if mode == "zero":
        return Growth("hidden", old, np.where(np.arange(new) < old, index, -1))
    made = Growth("hidden", old, index)
    if mode == "duplicate" or made.uniform:
        return made
    return Growth("hidden", old, index, np.sqrt((new / old) / made.replicas[index]))


def units(axis: str, old: int, new: int, *, copies: bool) -> Growth:
    """Units of an MLP: the old ones, and then replicas of evenly spread ones, or new ones."""
    more = np.arange(new - old)
    again = np.where(more < len(more) // old * old, more % old, more % old * old // max(1, len(more) % old))
    return Growth(axis, old, np.concatenate([np.arange(old), again if copies else np.full(len(more), -1)]))


def heads(old: tuple[int, int], new: tuple[int, int], *, copies: bool) -> tuple[Growth, Growth]:
    """Heads, and heads of keys and values: replicas stand side by side, so that each head has its keys.

    Head h uses keys ``h // (heads / key-value heads)``. A new head is a replica of one that uses what its own keys are
    a replica of; of each group of heads the replicas are spread evenly.

    Args:
        old: heads, and heads of keys and values.
        new: the same of the result.
        copies: whether new ones are replicas; else they have no source.

    Raises:
        RecipeError: new ones cannot be laid out like that.
    """
    (q, kv), (q_new, kv_new) = old, new
    if q_new % kv_new:
        raise RecipeError(
            f"num_attention_heads: expected a multiple of num_key_value_heads, which is {kv_new}, got {q_new}"
        )
    group, size = q // kv, q_new // kv_new
    source = np.arange(kv_new) * kv // kv_new
    counts = np.bincount(source, minlength=kv)
    if int(counts.min()) * size < group:
        raise RecipeError(
            f"num_attention_heads: {q} heads, {group} for each of {kv} key-value heads, do not fit {kv_new} key-value "
            f"heads of {size}: expected {kv_new * -(-group // int(counts.min()))} heads or more"
        )
    number = np.arange(kv_new) - (np.cumsum(counts) - counts)[source]
    slot = number[:, None] * size + np.arange(size)
    index = (source[:, None] * group + slot % group).reshape(-1)
    if not copies:
        index = np.where(slot.reshape(-1) < group, index, -1)
        used = (index.reshape(kv_new, size) >= 0).any(axis=1)
        source = np.where(used, source, -1)
    return Growth("heads", q, index), Growth("kv_heads", kv, source)
