"""Layers of several models in one stack: whether each has all tensors, and all have one size."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.planning.names import kind, shown
from fastmerge.planning.structure import Stack

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo


class Layers:
    """The layers of one stack of a model.

    Attributes:
        prefix: of the stack.
        places: for each name of the model its layer (negative outside the stack) and its name in that.
        layers: names in each layer.
    """

    def __init__(self, stack: Stack, names: Sequence[str]) -> None:
        self.prefix = stack.prefix
        self.places: list[tuple[str, int, str]] = []
        self.layers: list[set[str]] = [set() for _ in range(stack.count)]
        for name in names:
            layer, suffix = stack.split(name) or (-1, "")
            self.places.append((name, layer, suffix))
            if 0 <= layer < stack.count:
                self.layers[layer].add(suffix)

    @functools.cached_property
    def common(self) -> set[str]:
        """Names that every layer has."""
        return set.intersection(*self.layers)

    def shapes(self, tensors: Mapping[str, TensorInfo]) -> dict[str, set[tuple[int, ...]]]:
        """For each name in a layer the shapes of its tensors, in a model of these names."""
        out: dict[str, set[tuple[int, ...]]] = {}
        for name, layer, suffix in self.places:
            if 0 <= layer < len(self.layers):
                out.setdefault(suffix, set()).add(tensors[name].shape)
        return out


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


def headless(models: Mapping[str, Layers], first: set[str]) -> list[str]:
    """Position biases that the first layer of a model computes for all (T5), where the output's first has none."""
    out = []
    for ref, model in models.items():
        names = [s for s in model.layers[0] - model.common - first if "relative_attention_bias" in s]
        if names and len(model.layers) > 1:
            listed = shown([f"{model.prefix}.0.{s}" for s in sorted(names)])
            out.append(
                f"the first layer of {ref!r} has {listed} for all layers: the slices must begin with such a layer"
            )
    return out


def displaced(models: Mapping[str, Layers], made: Sequence[tuple[str, int, set[str]]]) -> list[str]:
    """First layers that do without what every other layer has (ModernBERT: a norm), away from the first place.

    Programs build the first layer of a model without it, and no other one, whatever a configuration says.

    Args:
        models: by reference.
        made: for each layer of the output the model and layer that it comes from, and the suffixes of its tensors.
    """
    out = []
    for ref, model in models.items():
        first, *rest = model.layers
        bare = set.intersection(*rest) - first if len(rest) > 1 and all(first < own for own in rest) else set()
        wrong = [i for i, (other, layer, _) in enumerate(made) if other == ref and (layer == 0) != (i == 0)]
        if bare and wrong:
            listed = shown([f"{model.prefix}.0.{s}" for s in sorted(bare)])
            out.append(
                f"the first layer of {ref!r} has no {listed.partition('.0.')[2]}, which every other layer has: it, and "
                "no other one, must be the first of the output"
            )
    return out


def sizes(
    models: Mapping[str, Layers],
    tensors: Mapping[str, Mapping[str, TensorInfo]],
    configs: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Models whose layers have another size than those of the first.

    Sizes that a configuration gives layer by layer may differ; norms, which tell the hidden size, may not.
    """
    out = []
    (first, one), *others = models.items()
    whole = one.shapes(tensors[first]) if others else {}
    for ref, model in others:
        free = any(_by_layer(configs[r], len(models[r].layers)) for r in (first, ref))
        bad: dict[str, str] = {}
        for suffix, shapes in model.shapes(tensors[ref]).items():
            own = whole.get(suffix)
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


def gaps(stack: Layers, config: Mapping[str, object]) -> list[str]:
    """Tensors that one layer of a model lost: all other layers are alike and have them, and it has the rest.

    Whole modules that one layer lacks are no loss (models are built so), unless they are norms of an inner layer.
    """
    layers = stack.layers
    alike = Counter(map(frozenset, layers))
    full = max(alike, key=lambda s: (alike[s], len(s)), default=frozenset())
    if len(alike) != 2 or alike[full] != len(layers) - 1 or config.get("num_kv_shared_layers"):
        return []
    i, odd = next((i, s) for i, s in enumerate(layers) if s != full)
    if not odd < full:
        return []
    there = {_container(suffix) for suffix in odd}
    inner = 0 < i < len(layers) - 1  # the first and the last layer may be built without a norm
    return [
        f"{stack.prefix}.{i}.{suffix}"
        for suffix in sorted(full - odd)
        if "relative_attention_bias" not in suffix
        and (_container(suffix) in there if _container(suffix) else inner and "norm" in suffix)
    ]


def _container(suffix: str) -> str:
    """What holds the module of a tensor: ``self_attn`` of ``self_attn.q_proj.weight``; empty for the layer itself."""
    return ".".join(suffix.split(".")[:-2])
