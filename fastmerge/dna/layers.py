"""Models out of the layers of one model: fewer, more, in another order, some with noise, some of no effect."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from fastmerge.choices import chosen
from fastmerge.dna.anatomy import Anatomy, Located, anatomy
from fastmerge.dna.draft import Draft, Request
from fastmerge.dna.parent import Parent
from fastmerge.dtypes import FLOATS
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.methods.replicate import Replicate
from fastmerge.ops.made import Constant
from fastmerge.planning.restack import SourceLayer, restack

_OUTPUTS = frozenset({"o", "down", "shared_down"})
"""Weights that write the residual stream; their biases do too."""

_OUTPUT_NORMS = frozenset({"attention_norm", "output_norm"})
"""Norms behind them, in the architectures that have such."""


class Layer(NamedTuple):
    """A layer of the result.

    Attributes:
        source: the layer of the parent that it is a copy of.
        noisy: whether it gets noise.
        silent: whether it adds nothing to the residual stream.
    """

    source: int
    noisy: bool = False
    silent: bool = False


class Noise(NamedTuple):
    """Normal random numbers that are added to weights.

    Attributes:
        std: their standard deviation, 0 for none.
        relative: whether that is in units of the root mean square of each tensor.
    """

    std: float = 0.0
    relative: bool = True


class LayerSelection(Enum):
    """Ways to choose the layers that a smaller model keeps."""

    IMPORTANCE = "importance"
    """The highest scores."""
    UNIFORM = "uniform"
    """Evenly spread, the first and the last among them."""
    FIRST = "first"
    """The lowest ones."""
    LAST = "last"
    """The highest ones."""


def choose_layers(
    layers: int,
    keep: int,
    selection: LayerSelection | str = LayerSelection.IMPORTANCE,
    *,
    scores: Sequence[float] | None = None,
    preserve_first_last: bool = True,
) -> list[int]:
    """The layers to keep, in ascending order.

    ``uniform`` keeps ``round(i (layers - 1) / (keep - 1))``, halves rounded up, and the first of all where one is kept.
    Layers that are preserved are in before the others are ranked, so they cost the lowest ranks.

    Args:
        layers: how many there are.
        keep: how many to keep, 1 .. ``layers``.
        selection: how.
        scores: of each layer, for ``importance``; of equal ones the earlier layer counts more.
        preserve_first_last: whether layers 0 and ``layers - 1`` stay in any case.

    Raises:
        RecipeError: numbers out of range, no scores where they are wanted, or others than one finite per layer.
    """
    how = chosen("layer_selection", LayerSelection, selection)
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep <= layers:
        raise RecipeError(f"target_layers: expected 1 to {layers}, as many as there are layers, got {keep!r:.80}")
    if preserve_first_last and keep == 1 < layers:
        raise RecipeError("target_layers: expected 2 or more with preserve_first_last, got 1")
    if how is LayerSelection.UNIFORM:
        step = max(keep - 1, 1)
        return [(2 * i * (layers - 1) + step) // (2 * step) for i in range(keep)]
    if how is LayerSelection.IMPORTANCE:
        if scores is None or len(scores) != layers:
            got = "none" if scores is None else str(len(scores))
            raise RecipeError(f"layer_selection importance: expected {layers} scores, one per layer, got {got}")
        if any(not abs(s) < float("inf") for s in scores):
            raise RecipeError(f"layer_selection importance: expected finite scores, got {list(scores)!r:.200}")
        ranked = sorted(range(layers), key=lambda i: (-scores[i], i))
    else:
        ranked = list(range(layers)) if how is LayerSelection.FIRST else list(range(layers))[::-1]
    forced = {0, layers - 1} if preserve_first_last else set()
    ranked = [*sorted(forced), *(i for i in ranked if i not in forced)]
    return sorted(ranked[:keep])


def plan_layers(parent: Parent, kept: Sequence[int]) -> Draft:
    """A model of some layers of another one, with the configuration that fits.

    Args:
        parent: a model of a known architecture.
        kept: layers, in ascending order, each once.

    Raises:
        RecipeError: layers that there are not, or that are not in order; a configuration that cannot say what kinds
            the layers are of.
        CheckpointError: as of :func:`~fastmerge.dna.anatomy.anatomy`.
    """
    model = anatomy(parent)
    sources = checked("layers", kept, model.layers)
    if sources != sorted(set(sources)):
        raise RecipeError(f"layers: expected each once, in ascending order, got {sources!r:.200}")
    request = Request("slice", (parent.ref,), {"layers": sources})
    return relayered(model, [Layer(i) for i in sources], request)


def checked(key: str, given: Iterable[Any], layers: int) -> list[int]:
    """Numbers of layers.

    Raises:
        RecipeError: what is no number of a layer; or nothing is there.
    """
    try:
        found = [i.__index__() for i in given]
    except (AttributeError, TypeError):
        raise RecipeError(f"{key}: expected numbers of layers, got {given!r:.80}") from None
    wrong = [i for i in found if not 0 <= i < layers]
    if wrong or not found:
        what = f"{wrong[0]}" if wrong else "none"
        raise RecipeError(f"{key}: expected layers from 0 to {layers - 1}, got {what}")
    return found


def restacked(model: Anatomy, sources: Sequence[int]) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a model whose layers are these layers of another one, and warnings.

    Raises:
        RecipeError: with every key whose meaning the new order of layers cannot keep.
    """
    config = copy.deepcopy(dict(model.config))
    origins = [SourceLayer(model.parent.ref, model.config, i) for i in sources]
    warnings = restack(config, [("num_hidden_layers",)], model.layers, origins)
    return config, warnings


def relayered(
    model: Anatomy,
    layers: Sequence[Layer],
    request: Request,
    *,
    noise: Noise = Noise(),  # noqa: B008  a value that nobody can change
    seed: int = 0,
) -> Draft:
    """A model with these layers; everything outside them is copied.

    A silent layer computes what it is, and adds exactly 0 to the residual stream: its norms behind attention and MLP
    have gain 0 where the architecture has such norms, and else the weights and biases that write the stream are 0.
    (With such norms, zeros in front of them would do too, but the gradient there is 1/sqrt(eps) times as large.)
    All its other weights may have noise.

    Args:
        model: what the layers are of.
        layers: those of the result.
        request: what was asked for.
        noise: of the layers that are noisy.
        seed: of the noise; each tensor's random numbers depend on it and on the tensor's name in the result.

    Raises:
        RecipeError: as of :func:`restacked`.
        CheckpointError: tensors of a layer that is to be changed are no floating-point numbers.
    """
    config, warnings = restacked(model, [layer.source for layer in layers])
    draft = Draft(request, (model.parent,), config, seed=seed, warnings=warnings)
    inside: dict[int | None, list[tuple[str, Located]]] = {}
    for name, place in model.places.items():
        inside.setdefault(place.layer, []).append((name, place))
    outside, filled = inside.get(None, []), dict[str, float]()
    embeddings = [name for name, place in outside if place.part.role == "embed"]
    for name in embeddings:
        draft.copy(name, model.parent.tensors[name])
    for i, layer in enumerate(layers):
        silent = _silent(model, inside[layer.source]) if layer.silent else {}
        filled |= {model.places[name].part.role: value for name, value in silent.items()}
        skip = len(f"{model.arch.layers}.{layer.source}.")
        for name, _ in inside[layer.source]:
            to = f"{model.arch.layers}.{i}.{name[skip:]}"
            _layer_tensor(draft, model, name, to, silent.get(name), noise if layer.noisy else Noise())
    for name, _ in outside:
        if name not in embeddings:
            draft.copy(name, model.parent.tensors[name])
    draft.facts["layers"] = [layer.source for layer in layers]
    for what in ("silent", "noisy"):
        marked = [i for i, layer in enumerate(layers) if getattr(layer, what)]
        if marked and (what == "silent" or noise.std):
            draft.facts[f"{what}_layers"] = marked
    if filled:
        draft.facts["silent_by"] = filled
    return draft


def _silent(model: Anatomy, tensors: Iterable[tuple[str, Located]]) -> Mapping[str, float]:
    """What tensors of a layer are filled with, so that it adds nothing."""
    roles = {name: place.part.role for name, place in tensors}
    norms = [name for name, role in roles.items() if role in _OUTPUT_NORMS]
    if norms:
        return dict.fromkeys(norms, -1.0 if model.arch.plus_one else 0.0)
    return {name: 0.0 for name, role in roles.items() if role.removesuffix("_bias") in _OUTPUTS}


def _layer_tensor(draft: Draft, model: Anatomy, name: str, to: str, value: float | None, noise: Noise) -> None:
    """A tensor of a layer: filled with a value, with noise, or as it is."""
    source = model.parent.tensors[name]
    if (value is not None or noise.std) and source.dtype not in FLOATS:
        raise CheckpointError(f"{name}: expected floating-point numbers, got {source.dtype.name}")
    if value is not None:
        draft.copy(to, Constant(value, source.dtype, source.shape))
    elif noise.std:
        method = Replicate(experts=(0,), sigma=(noise.std,), relative=noise.relative)
        draft.add([to], method, [source], source.dtype, source.shape)
    else:
        draft.copy(to, source)
