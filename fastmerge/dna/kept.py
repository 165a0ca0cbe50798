"""What a smaller model keeps of each axis of a larger one: how many, and which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.dna.anatomy import Anatomy, Axis
from fastmerge.dna.importance import Inner, Scores, mlps
from fastmerge.dna.layers import LayerSelection, choose_layers
from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import numpy.typing as npt

Index: TypeAlias = "npt.NDArray[np.int64]"


@dataclass(frozen=True)
class Sizes:
    """How many there are of each axis after slicing.

    Attributes:
        layers: of the model.
        hidden: size of the residual stream.
        heads: query heads.
        kv_heads: key and value heads, or groups of query heads.
        experts: of each sparse layer; 0 for a dense model.
        inner: neurons of MLPs, by axis.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    experts: int
    inner: Mapping[str, int]

    @classmethod
    def of(cls, anatomy: Anatomy) -> Sizes:
        """Those of a model as it is."""
        s = anatomy.sizes
        inner = {axis: s[axis] for axis in dict.fromkeys(mlp.key[0] for mlp in mlps(anatomy))}
        return cls(anatomy.layers, s["hidden"], s["heads"], s["kv_heads"], s.get("experts", 0), inner)

    def changed(self, before: Sizes) -> frozenset[str]:
        """Which of ``layers``, ``hidden``, ``heads``, ``kv_heads``, ``experts`` and the inner axes are others."""
        outer = ("layers", "hidden", "heads", "kv_heads", "experts")
        found = {name for name in outer if getattr(self, name) != getattr(before, name)}
        return frozenset(found | {axis for axis, n in self.inner.items() if n != before.inner[axis]})


def proportional(size: int, part: int, whole: int) -> int:
    """``size * part / whole``, rounded to the largest power of two, at most 128, that the size is a multiple of."""
    step = min(128, size & -size)
    return max(step, int(size * part / whole / step + 0.5) * step)


def sizes(
    anatomy: Anatomy,
    *,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    experts: int | None = None,
    inner: Mapping[str, int | None] = {},
) -> Sizes:
    """The sizes that are asked for; what is not given follows.

    The inner size of MLPs follows the hidden size; key and value heads follow the query heads, and these them, so
    that groups stay whole; where both are given, every group keeps equally many query heads.

    Args:
        anatomy: of the model.
        layers: ``target_layers`` and so on.
        hidden: likewise.
        heads: likewise.
        kv_heads: likewise.
        experts: likewise.
        inner: by axis; those of this architecture alone.

    Raises:
        RecipeError: with everything that is wrong.
    """
    before = Sizes.of(anatomy)
    problems: list[str] = []

    def within(key: str, given: int | None, most: int, what: str) -> int:
        if given is None:
            return most
        if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= most:
            problems.append(f"{key}: expected 1 to {most}, the model's {what}, got {given!r:.80}")
            return most
        return given

    found_layers = within("target_layers", layers, before.layers, "number of layers")
    found_hidden = within("target_hidden_size", hidden, before.hidden, "hidden size")
    found_heads = within("target_num_heads", heads, before.heads, "number of heads")
    found_kv = within("target_kv_heads", kv_heads, before.kv_heads, "number of key and value heads")
    share = before.heads // before.kv_heads
    if heads is None:
        found_heads = found_kv * share
    elif kv_heads is None:
        found_kv = found_heads // share
    if kv_heads is None and found_heads % share:
        problems.append(
            f"target_num_heads: expected a multiple of {share}, the query heads of a group, got {heads} (with "
            "target_kv_heads groups may become smaller)"
        )
    elif found_heads % found_kv or found_heads // found_kv > share:
        problems.append(
            f"target_num_heads: expected a multiple of the key and value heads, at most {share} for each, got "
            f"{found_heads} for {found_kv}"
        )
    problems += _fitting(anatomy, found_hidden, found_heads)
    found_experts = _experts(anatomy, experts, problems)
    found_inner = {}
    for axis, most in before.inner.items():
        follows = proportional(most, found_hidden, before.hidden) if found_hidden < before.hidden else None
        given = inner.get(axis)
        found_inner[axis] = within(_KEYS[axis], follows if given is None else given, most, "inner size of MLPs")
    problems += [
        f"{_KEYS[axis]}: no layer of {anatomy.arch.model_type} has such an MLP"
        for axis, given in inner.items()
        if given is not None and axis not in before.inner
    ]
    if anatomy.arch.sizes.get("shared_ffn") == "n_shared_experts" and "shared_ffn" in found_inner:
        found_inner["shared_ffn"] = anatomy.config["n_shared_experts"] * found_inner["expert_ffn"]
        if inner.get("shared_ffn") not in (None, found_inner["shared_ffn"]):
            problems.append(
                f"{_KEYS['shared_ffn']}: expected {found_inner['shared_ffn']}, n_shared_experts times the inner size "
                f"of experts, got {inner['shared_ffn']}"
            )
    if problems:
        raise RecipeError(problems)
    return Sizes(found_layers, found_hidden, found_heads, found_kv, found_experts, found_inner)


_KEYS = {
    "ffn": "target_intermediate_size",
    "expert_ffn": "target_moe_intermediate_size",
    "shared_ffn": "target_shared_intermediate_size",
}


def _fitting(anatomy: Anatomy, hidden: int, heads: int) -> list[str]:
    """What transformers refuses of a hidden size and a number of heads."""
    if (hidden, heads) == (anatomy.sizes["hidden"], anatomy.sizes["heads"]):
        return []
    kind, head = anatomy.arch.model_type, anatomy.sizes["head_dim"]
    if kind in _MULTIPLE and hidden % heads:
        what = f"a multiple of the {heads} heads, which {kind} of transformers asks for"
        return [f"target_hidden_size: expected {what}, got {hidden} (target_num_heads sets the heads)"]
    if kind in _SQUARE and hidden != heads * head:
        what = f"{heads * head}, the length of the norms of queries and keys of {heads} heads, which {kind} has so long"
        return [f"target_hidden_size: expected {what}, got {hidden} (target_num_heads sets the heads)"]
    return []


_MULTIPLE = frozenset({"llama", "gemma2", "gemma3_text"})
"""Types whose configurations transformers 5 refuses where the hidden size is no multiple of the heads."""

_SQUARE = frozenset({"olmoe"})
"""Types whose norms over all heads transformers makes as long as the hidden size."""


def _experts(anatomy: Anatomy, given: int | None, problems: list[str]) -> int:
    """How many experts stay, at least as many as a token goes to."""
    most = anatomy.sizes.get("experts", 0)
    if given is None:
        return most
    if not most:
        problems.append(f"target_experts: {anatomy.arch.model_type} has no experts, got {given!r:.80}")
        return 0
    least = anatomy.config.get("num_experts_per_tok") or 1
    if not isinstance(given, int) or isinstance(given, bool) or not least <= given <= most:
        problems.append(
            f"target_experts: expected {least} (num_experts_per_tok) to {most}, the model's number of experts, got "
            f"{given!r:.80}"
        )
        return most
    if given != most and (anatomy.config.get("n_group") or 1) > 1:
        problems.append(
            f"target_experts: experts are routed in {anatomy.config['n_group']} groups (n_group): expected 1"
        )
    return given


@dataclass(frozen=True)
class Kept:
    """Which of each axis stay, in the order that they get; what is not there stays as it is.

    Attributes:
        sizes: how many.
        layers: of the model, in ascending order.
        hidden: channels of the residual stream, the same ones everywhere.
        inner: neurons of each MLP.
        heads: query heads by layer.
        groups: key and value heads by layer.
        experts: by layer.
    """

    sizes: Sizes
    layers: tuple[int, ...]
    hidden: Index | None = None
    inner: Mapping[Inner, Index] = field(default_factory=dict)
    heads: Mapping[int, Index] = field(default_factory=dict)
    groups: Mapping[int, Index] = field(default_factory=dict)
    experts: Mapping[int, Index] = field(default_factory=dict)

    def index(self, anatomy: Anatomy, axis: Axis, layer: int | None, expert: int | None) -> Index | None:
        """What stays of a dimension of a tensor; None for all of it."""
        if isinstance(axis, tuple):
            return self._joined(anatomy, axis, layer, expert)
        if axis == "hidden":
            return self.hidden
        if layer is None:
            return None
        if axis == "experts":
            return self.experts.get(layer)
        if axis in ("q", "kv", "heads"):
            found = (self.groups if axis == "kv" else self.heads).get(layer)
            if found is None or axis == "heads":
                return found
            head = anatomy.sizes["head_dim"]
            return (found[:, None] * head + np.arange(head)).reshape(-1)
        return self.inner.get((axis, layer, expert))

    def _joined(self, anatomy: Anatomy, axis: tuple[str, ...], layer: int | None, expert: int | None) -> Index | None:
        """Of a dimension that is several behind each other, or two that alternate."""
        parts = [self.index(anatomy, a, layer, expert) for a in axis]
        if all(p is None for p in parts):
            return None
        whole = [np.arange(anatomy.sizes[a]) if p is None else p for a, p in zip(axis, parts, strict=True)]
        if anatomy.arch.interleaved:
            return (whole[0][:, None] * 2 + np.arange(2)).reshape(-1)
        starts = np.cumsum([0, *[anatomy.sizes[a] for a in axis[:-1]]])
        return np.concatenate([w + s for w, s in zip(whole, starts, strict=True)])

    def facts(self) -> dict[str, Any]:
        """For the report: indices as runs."""
        found: dict[str, Any] = {"layers": list(self.layers)}
        if self.hidden is not None:
            found["hidden"] = runs(self.hidden)
        for name, by in (("heads", self.heads), ("kv_heads", self.groups), ("experts", self.experts)):
            if by:
                found[name] = {str(layer): runs(by[layer]) for layer in self.layers if layer in by}
        for (axis, layer, expert), index in self.inner.items():
            if layer in self.layers:
                place = str(layer) if expert is None else f"{layer}.{expert}"
                found.setdefault(axis, {})[place] = runs(index)
        return found


def runs(index: Iterable[int]) -> str:
    """Numbers as text in which a run is ``first-last``."""
    found: list[list[int]] = []
    for i in map(int, index):
        if found and found[-1][1] == i - 1:
            found[-1][1] = i
        else:
            found.append([i, i])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def choose(
    anatomy: Anatomy,
    wanted: Sizes,
    scores: Scores,
    *,
    selection: LayerSelection | str,
    preserve_first_last: bool = True,
    ranked: frozenset[str] | None = None,
) -> Kept:
    """The layers, channels, neurons, heads and experts with the highest scores; of equal ones the first.

    Args:
        anatomy: of the model.
        wanted: how many.
        scores: of everything that is chosen.
        selection: of layers.
        preserve_first_last: whether the first and the last layer stay.
        ranked: axes (as of :meth:`Sizes.changed`) whose indices come in the order of their ranks, the best first, so
            that what a smaller model keeps is the beginning of what a larger one does; None for ascending indices.
    """
    before = Sizes.of(anatomy)
    changed = wanted.changed(before) if ranked is None else ranked

    def top(of: npt.NDArray[np.float64], keep: int) -> Index:
        order = np.lexsort((np.arange(len(of)), -of))[:keep].astype(np.int64)
        return np.sort(order) if ranked is None else order

    how = None if scores.layers is None else scores.layers.tolist()
    every = wanted.layers == before.layers
    layers = range(before.layers)
    kept = (
        layers
        if every
        else choose_layers(before.layers, wanted.layers, selection, scores=how, preserve_first_last=preserve_first_last)
    )
    hidden = None
    if "hidden" in changed and scores.hidden is not None:
        hidden = top(scores.hidden, wanted.hidden)
    inner = {key: top(of, wanted.inner[key[0]]) for key, of in scores.inner.items() if key[0] in changed}
    groups: dict[int, Index] = {}
    heads: dict[int, Index] = {}
    if changed & {"heads", "kv_heads"}:
        share, each = before.heads // before.kv_heads, wanted.heads // wanted.kv_heads
        for layer in layers:
            groups[layer] = top(scores.groups[layer], wanted.kv_heads)
            within = scores.heads[layer].reshape(-1, share)
            heads[layer] = np.concatenate([g * share + top(within[g], each) for g in groups[layer]])
    experts = {i: top(of, wanted.experts) for i, of in scores.experts.items() if "experts" in changed}
    return Kept(wanted, tuple(kept), hidden, inner, heads, groups, experts)


def given_experts(anatomy: Anatomy, given: Mapping[int, Sequence[float]]) -> dict[int, npt.NDArray[np.float64]]:
    """Scores of experts that somebody else has found.

    Raises:
        RecipeError: they are not one finite number for each expert of each sparse layer.
    """
    found, problems = {}, []
    for layer in range(anatomy.layers):
        if not anatomy.is_sparse(layer):
            continue
        values = np.asarray(given.get(layer, ()), np.float64)
        if values.shape != (anatomy.sizes["experts"],) or not np.isfinite(values).all():
            problems.append(
                f"expert_scores: layer {layer}: expected {anatomy.sizes['experts']} finite numbers, got "
                f"{list(values.shape)}"
            )
        found[layer] = values
    if problems or not found:
        raise RecipeError(problems or f"expert_scores: {anatomy.arch.model_type} has no experts")
    return found
