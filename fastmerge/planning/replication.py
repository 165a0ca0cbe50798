"""A model whose layers are repeated, as adapters with ``layer_replication`` have it (SOLAR, arXiv:2312.15166)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

from fastmerge.checkpoint import Checkpoint
from fastmerge.errors import CheckpointError
from fastmerge.planning.restack import SourceLayer, count_keys, restack
from fastmerge.planning.structure import structure


def replicated(model: Checkpoint, runs: Sequence[tuple[int, int]]) -> Checkpoint:
    """The model that has runs ``[first, end)`` of the layers of another one, one after the other.

    Every layer of it is a tensor of its own name in the bytes of the original: nothing is copied.

    Args:
        model: with one main stack of layers.
        runs: of its layers.

    Raises:
        CheckpointError: the model has no such layers.
        RecipeError: its configuration gives layers a meaning that the new order does not keep.
    """
    if model.alike is not None:
        raise CheckpointError(f"layer_replication {_shown(runs)} of what another document makes: write that to disk")
    found = structure(model.tensors, model.config)
    stack = found.main
    if stack is None:
        raise CheckpointError(f"layer_replication {_shown(runs)} needs one stack of layers")
    if max(end for _, end in runs) > stack.count:
        raise CheckpointError(f"layer_replication {_shown(runs)}; the model has {stack.count} layers")
    layers = list(itertools.chain.from_iterable(range(first, end) for first, end in runs))
    inside: dict[int, list[str]] = {}
    tensors = {}
    for name, info in model.tensors.items():
        place = stack.split(name)
        if place is None or place[0] >= stack.count:
            tensors[name] = info
        else:
            inside.setdefault(place[0], []).append(name)
    for i, layer in enumerate(layers):
        for name in inside.get(layer, ()):
            new = f"{stack.prefix}.{i}{name[len(stack.prefix) + 1 + len(str(layer)) :]}"
            tensors[new] = model.tensors[name]._replace(name=new)
    config = copy.deepcopy(dict(model.config))
    keys = found.keys or tuple(count_keys(config, stack.count))
    warnings = restack(config, keys, stack.count, [SourceLayer(model.ref, model.config, layer) for layer in layers])
    return replace(model, tensors=tensors, config=config, warnings=(*model.warnings, *warnings))


def _shown(runs: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"[{first}, {end})" for first, end in runs)
