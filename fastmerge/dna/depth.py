"""Deeper models: depth up-scaling (layers twice), and layers that change nothing at first (Net2Deeper)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from fastmerge.choices import chosen
from fastmerge.dna.anatomy import Anatomy, anatomy
from fastmerge.dna.architectures import ARCHITECTURES
from fastmerge.dna.draft import MOST_COPIES, Draft, Request
from fastmerge.dna.growth import FIELDS, GrowthMethod, ModelGrowthConfig
from fastmerge.dna.layers import Layer, Noise, checked, relayered
from fastmerge.dna.parent import Parent
from fastmerge.dna.results import deliver
from fastmerge.errors import RecipeError
from fastmerge.ops.replicate import MOST_SIGMA


class IDUSType(Enum):
    """Arrangements of the first ``n - m`` and the last ``n - m`` of ``n`` layers."""

    ORIGINAL = "original"
    """One behind the other: SOLAR's depth up-scaling."""
    INTERLOCKED_1 = "interlocked_1"
    """Layer by layer in turns."""
    INTERLOCKED_8 = "interlocked_8"
    """In groups of ``m`` layers: the first once, those in the middle twice each, the last once."""


class InsertionMethod(Enum):
    """Where depth up-scaling puts the layers that it repeats."""

    INTERLEAVE = "interleave"
    """Behind the layer that they repeat."""
    STACK = "stack"
    """Behind the whole model."""
    IDUS_ORIGINAL = "idus_original"
    """:attr:`IDUSType.ORIGINAL`."""
    IDUS_INTERLOCKED_1 = "idus_interlocked_1"
    """:attr:`IDUSType.INTERLOCKED_1`."""
    IDUS_INTERLOCKED_8 = "idus_interlocked_8"
    """:attr:`IDUSType.INTERLOCKED_8`."""


class NoiseMode(Enum):
    """Units of noise."""

    RELATIVE = "relative"
    """The root mean square of each tensor."""
    ABSOLUTE = "absolute"
    """As it is."""


@dataclass(frozen=True)
class DepthUpscaleConfig:
    """How to repeat layers.

    Attributes:
        scale_factor: layers of the result per layer, for ``interleave`` and ``stack``; a fraction repeats evenly
            spread layers (``interleave``) or the last ones (``stack``).
        insertion_method: an :class:`InsertionMethod`, or its value.
        init_noise: standard deviation of noise on repeated layers, as ``noise_mode`` says. Relative noise of 0.001
            changes 22 % of normally distributed weights in bfloat16, and of 0.01 83 %; the others round back.
        skip_embed_and_head: True: a model has one embedding and one head, which are never repeated.
        idus_overlap_start: layers that SOLAR drops from the end of the first copy and the start of the second.
        target_layers: layers of the result, in place of ``scale_factor`` or ``idus_overlap_start``.
        arrangement: the layers of the result by their numbers in the model, in place of all the above.
        preserve_output: repeated layers add nothing at first (see :func:`grow_model_depth`), so the result computes
            what the model computes. Without it, it does not, and has to be trained on.
        noise_mode: ``relative``, in units of each tensor's root mean square, or ``absolute``.
        seed: of the noise.
    """

    scale_factor: float = 2
    insertion_method: InsertionMethod | str = "interleave"
    init_noise: float = 0.001
    skip_embed_and_head: bool = True
    idus_overlap_start: int = 8
    target_layers: int | None = None
    arrangement: Sequence[int] | None = None
    preserve_output: bool = False
    noise_mode: NoiseMode | str = "relative"
    seed: int = 0


def get_idus_layer_arrangement(
    n_layers: int, idus_type: IDUSType | str = IDUSType.ORIGINAL, overlap_start: int = 8
) -> list[int]:
    """The layers of an interlocked depth up-scaling, by their numbers.

    With n layers of which m are dropped: ``original`` is ``[0, n - m) + [m, n)``; ``interlocked_1`` takes one of each
    in turns; ``interlocked_8`` repeats each group of m layers but the first and the last.

    Args:
        n_layers: n.
        idus_type: an :class:`IDUSType`, or its value.
        overlap_start: m.

    Returns:
        ``2 (n - m)`` numbers.

    Raises:
        RecipeError: m is not in 0 .. n / 2 (more would leave out layers), or not one of three or more equal groups of
            layers for ``interlocked_8``.
    """
    kind = chosen("idus_type", IDUSType, idus_type)
    n, m = n_layers, overlap_start
    if not _whole(n) or n < 1:
        raise RecipeError(f"n_layers: expected a whole number above 0, got {n!r:.80}")
    if not _whole(m) or not 0 <= 2 * m <= n:
        raise RecipeError(
            f"idus_overlap_start: expected 0 to {n // 2}, half of {n} layers, got {m!r:.80}; SOLAR drops a quarter, "
            f"here {n // 4}"
        )
    if kind is IDUSType.INTERLOCKED_8:
        if m == 0 or n % m or n // m < 3:
            raise RecipeError(
                f"idus_overlap_start: expected three or more groups of equal size for interlocked_8, got {m} of {n} "
                "layers"
            )
        groups = [list(range(i, i + m)) for i in range(0, n, m)]
        return [i for g, group in enumerate(groups) for i in group * (1 if g in (0, len(groups) - 1) else 2)]
    first, second = list(range(n - m)), list(range(m, n))
    if kind is IDUSType.ORIGINAL:
        return first + second
    return [i for pair in zip(first, second, strict=True) for i in pair]


def plan_depth_upscale(parent: Parent, config: DepthUpscaleConfig) -> Draft:
    """The model that :func:`depth_upscale` makes. Reads headers only.

    Raises:
        RecipeError: with every option that does not fit the model; a configuration that cannot say what kinds the
            layers are of.
        CheckpointError: as of :func:`~fastmerge.dna.anatomy.anatomy`.
    """
    model = anatomy(parent)
    noise, problems = _noise("init_noise", config.init_noise, config.noise_mode)
    if config.skip_embed_and_head is not True:
        problems.append("skip_embed_and_head: expected True: a model has one embedding and one head")
    try:
        sources = _arrangement(config, model.layers)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from None
    if sources == list(range(model.layers)):
        problems.append(f"the result would be the model: {model.layers} layers in their order")
    originals = _originals(sources, model.layers, in_order=config.preserve_output)
    if originals is None:
        problems.append(
            f"preserve_output: expected an arrangement that has layers 0 to {model.layers - 1} in this order, with "
            f"further ones between them, got {_short(sources)}"
        )
    if problems or originals is None:
        raise RecipeError(problems)
    copies = [i not in originals for i in range(len(sources))]
    layers = [Layer(s, noisy=c, silent=c and config.preserve_output) for s, c in zip(sources, copies, strict=True)]
    return relayered(model, layers, _request("depth-upscale", parent, config), noise=noise, seed=config.seed)


def depth_upscale(
    model: Any,
    config: DepthUpscaleConfig,
    layer_container_name: str = "layers",
    *,
    out: str | os.PathLike[str] | None = None,
    model_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Repeats layers of a model.

    Args:
        model: a transformers module, a state dictionary, or where a model is on disk; it is not changed.
        config: what to repeat, and where.
        layer_container_name: what the model calls its list of layers; nothing else is accepted.
        out: directory to write, for a model on disk.
        model_config: of a state dictionary: its ``config.json``.
        options: of :func:`~fastmerge.dna.results.deliver`.

    Returns:
        What :func:`~fastmerge.dna.results.deliver` gives for such a model.

    Raises:
        RecipeError: as of :func:`plan_depth_upscale`.
        CheckpointError: as of :func:`plan_depth_upscale`, or what ``out`` says does not fit the model.
    """
    parent = Parent.open(model, config=model_config)
    _check_container(parent, layer_container_name)
    return deliver(plan_depth_upscale(parent, config), model, out, **options)


def plan_depth_growth(parent: Parent, config: ModelGrowthConfig) -> Draft:
    """The model that :func:`grow_model_depth` makes. Reads headers only.

    Raises:
        RecipeError: with every option that does not fit the model; a configuration that cannot say what kinds the
            layers are of.
        CheckpointError: as of :func:`~fastmerge.dna.anatomy.anatomy`.
    """
    model = anatomy(parent)
    noise, problems = _noise("noise_std", config.noise_std, config.noise_mode)
    problems += [f"{key}: new layers are as wide as the others" for key in FIELDS if getattr(config, key) is not None]
    try:
        chosen("method", GrowthMethod, config.method)
        after = _positions(config, model)
    except RecipeError as error:
        raise RecipeError([*problems, *error.problems]) from None
    if problems:
        raise RecipeError(problems)
    layers = []
    for i in range(model.layers):
        layers += [Layer(i), *[Layer(i, noisy=True, silent=config.preserve_output)] * after.count(i)]
    draft = relayered(model, layers, _request("grow-depth", parent, config), noise=noise, seed=config.seed)
    draft.facts["insertion_positions"] = after
    return draft


def grow_model_depth(
    model: Any,
    config: ModelGrowthConfig,
    layer_container_name: str = "layers",
    *,
    out: str | os.PathLike[str] | None = None,
    model_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Puts layers into a model that change nothing at first.

    A new layer is a copy of the one that it follows, with noise, whose outputs are 0: ``x + 0 = x``, so the result
    computes bit for bit what the model computes, in any type. Only those zeros have a gradient at the first step; the
    rest of the layer learns from the second on. Where norms follow attention and MLP (Gemma 2 and 3, OLMo 2 and 3)
    their gain is 0, and else the weights and biases of the outputs are. Without ``preserve_output`` new layers are
    copies with noise.

    Args:
        model: a transformers module, a state dictionary, or where a model is on disk; it is not changed.
        config: how many layers, and where. Where no positions are given, k new ones are evenly spread over the L layers
            and the last is at the end: new layer i = 0 .. k - 1 is behind ``round((i + 1) L / k)`` of them (halves are
            rounded up, and none is in front), as in LLaMA Pro (arXiv 2401.02415). Given positions decide how many
            there are.
        layer_container_name: what the model calls its list of layers; nothing else is accepted.
        out: directory to write, for a model on disk.
        model_config: of a state dictionary: its ``config.json``.
        options: of :func:`~fastmerge.dna.results.deliver`.

    Returns:
        What :func:`~fastmerge.dna.results.deliver` gives for such a model.

    Raises:
        RecipeError: as of :func:`plan_depth_growth`.
        CheckpointError: as of :func:`plan_depth_growth`, or what ``out`` says does not fit the model.
    """
    parent = Parent.open(model, config=model_config)
    _check_container(parent, layer_container_name)
    return deliver(plan_depth_growth(parent, config), model, out, **options)


def _arrangement(config: DepthUpscaleConfig, n: int) -> list[int]:
    """The layers of the result, by their numbers."""
    how = chosen("insertion_method", InsertionMethod, config.insertion_method)
    target = config.target_layers
    if target is not None and (not _whole(target) or target < 1):
        raise RecipeError(f"target_layers: expected a whole number above 0, got {target!r:.80}")
    idus = how.value.startswith("idus_")
    if (idus or config.arrangement is not None or target is not None) and config.scale_factor != 2:
        decides = "target_layers" if target is not None else how.value if idus else "arrangement"
        raise RecipeError(f"scale_factor: {decides} decides how many layers there are: leave it out")
    if config.arrangement is not None:
        sources = checked("arrangement", config.arrangement, n)
        if target not in (None, len(sources)):
            raise RecipeError(f"target_layers: expected {len(sources)}, as many as arrangement has, got {target}")
        return sources
    if idus:
        return _interlocked(IDUSType(how.value.removeprefix("idus_")), n, config.idus_overlap_start, target)
    factor = config.scale_factor
    if target is None:
        if not isinstance(factor, int | float) or not 0 < factor < 1e6:
            raise RecipeError(f"scale_factor: expected a number above 1, got {factor!r:.80}")
        target = int(factor * n + 0.5)
    if target > MOST_COPIES:
        raise RecipeError(f"expected at most {MOST_COPIES} layers, got {target}")
    if target <= n:
        raise RecipeError(f"expected more than {n} layers, as many as the model has, got {target}")
    if how is InsertionMethod.INTERLEAVE:
        return [i for i in range(n) for _ in range((i + 1) * target // n - i * target // n)]
    return [*range(n)] * (target // n) + [*range(n - target % n, n)]


def _interlocked(kind: IDUSType, n: int, m: int, target: int | None) -> list[int]:
    """The layers of an interlocked up-scaling to a number of layers, or without so many."""
    if target is None:
        return get_idus_layer_arrangement(n, kind, m)
    if not n <= target <= 2 * n:
        raise RecipeError(f"target_layers: expected {n} to {2 * n} for {kind.value}, got {target}")
    if kind is IDUSType.ORIGINAL:
        return [*range(-(-target // 2)), *range(n - target // 2, n)]
    if target % 2:
        raise RecipeError(f"target_layers: expected an even number for {kind.value}, got {target}")
    return get_idus_layer_arrangement(n, kind, n - target // 2)


def _originals(sources: Sequence[int], n: int, *, in_order: bool) -> set[int] | None:
    """Which layers of the result are the model's, others being copies: those in the model's order, or the first ones.

    None where an order is wanted and there is none.
    """
    if in_order:
        found: list[int] = []
        for i, source in enumerate(sources):
            if source == len(found):
                found.append(i)
        return set(found) if len(found) == n else None
    return {sources.index(source) for source in set(sources)}


def _positions(config: ModelGrowthConfig, model: Anatomy) -> list[int]:
    """The layers that new ones follow."""
    given = config.insertion_positions
    if not hasattr(given, "__len__") or len(given):
        return sorted(checked("insertion_positions", config.insertion_positions, model.layers))
    k, n = config.num_new_layers, model.layers
    if not _whole(k) or not 1 <= k <= MOST_COPIES:
        raise RecipeError(f"num_new_layers: expected a whole number from 1 to {MOST_COPIES}, got {k!r:.80}")
    return [max((2 * (i + 1) * n + k) // (2 * k), 1) - 1 for i in range(k)]


def _noise(key: str, std: Any, mode: Any) -> tuple[Noise, list[str]]:
    """The noise that two options ask for, and what is wrong with them."""
    problems, relative = [], True
    if not isinstance(std, int | float) or not 0 <= std <= MOST_SIGMA:
        problems.append(f"{key}: expected a number from 0 to 2**100, got {std!r:.80}")
    try:
        relative = chosen("noise_mode", NoiseMode, mode) is NoiseMode.RELATIVE
    except RecipeError as error:
        problems += error.problems
    return Noise(std, relative), problems


def _request(operation: str, parent: Parent, config: DepthUpscaleConfig | ModelGrowthConfig) -> Request:
    options = {}
    for key, value in asdict(config).items():
        plain = value.value if isinstance(value, Enum) else value
        options[key] = plain if plain is None or isinstance(plain, bool | int | float | str) else list(map(int, plain))
    return Request(operation, (parent.ref,), options)


def _check_container(parent: Parent, name: str) -> None:
    arch = ARCHITECTURES.get(str(parent.config.get("model_type")))
    if arch is not None and name not in (arch.layers, arch.layers.rpartition(".")[2]):
        raise RecipeError(f"layer_container_name: {parent.ref} has its layers in {arch.layers}, got {name!r:.80}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(sources: Sequence[int]) -> str:
    text = str(list(sources))
    return text if len(text) <= 120 else f"{text[:120]}..."
