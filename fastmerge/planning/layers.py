"""Layers of several models in one stack: whether each has all tensors, and all have one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.planning.names import kind, shown
from fastmerge.planning.structure import Stack

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo


class Layers:
    """The layers of one model's stack: suffixes, with their shapes."""

    def __init__(self, stack: Stack, tensors: Mapping[str, TensorInfo]) -> None:
        self.prefix = stack.prefix
        self.layers: list[set[str]] = [set() for _ in range(stack.count)]
        self.shapes: dict[str, set[tuple[int, ...]]] = {}
        for name, info in tensors.items():
            split = stack.split(name)
            if split is not None and split[0] < stack.count:
                self.layers[split[0]].add(split[1])
                self.shapes.setdefault(split[1], set()).add(info.shape)
        self.common = set.intersection(*self.layers) if self.layers else set()


def incomplete(models: Mapping[str, Layers], made: Sequence[tuple[str, int, set[str]]]) -> list[str]:
    """Layers of the output that lack what every layer of one of the models has.

    Args:
        models: by reference.
        made: for each layer of the output the model and layer that it comes from, and the suffixes of its tensors.
    """
    out = []
    for ref, model in models.items():
        lacking: dict[str, list[str]] = {}
        for other, layer, suffixes in made:
            if not model.common <= suffixes:
                names = [f"{model.prefix}.{layer}.{s}" for s in sorted(model.common - suffixes)]
                lacking.setdefault(other, []).extend(names)
        for other, names in lacking.items():
            unique = list(dict.fromkeys(names))
            out.append(f"{other!r} lacks {shown(unique)}, which every layer of {ref!r} has: no layer may be without")
    return out


def sizes(models: Mapping[str, Layers], configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Models whose layers have another size than those of the first.

    Sizes that a configuration gives layer by layer may differ; norms, which tell the hidden size, may not.
    """
    out = []
    (first, whole), *others = models.items()
    for ref, model in others:
        free = any(_by_layer(configs[r], len(models[r].layers)) for r in (first, ref))
        bad: dict[str, str] = {}
        for suffix, shapes in model.shapes.items():
            own = whole.shapes.get(suffix)
            if own is None or not own.isdisjoint(shapes) or (free and "norm" not in suffix):
                continue
            bad.setdefault(kind(suffix), f"{suffix} {list(min(shapes))} and {list(min(own))}")
        if bad:
            more = ", ..." if len(bad) > 2 else ""
            listed = ", ".join(list(bad.values())[:2])
            out.append(f"layers of {ref!r} and of {first!r} have different sizes: {listed}{more}: no model has both")
    return out


def _by_layer(config: Mapping[str, Any], count: int) -> bool:
    """Whether a configuration gives sizes layer by layer."""
    blocks = [config, *(b for b in config.values() if isinstance(b, Mapping))]
    return any(
        isinstance(v, list) and len(v) == count and all(isinstance(i, (int, float)) for i in v) and "layer" not in key
        for block in blocks
        for key, v in block.items()
    )
