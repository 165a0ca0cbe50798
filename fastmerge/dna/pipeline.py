"""One call for every kind of transfer: what to do as a mapping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fastmerge.choices import chosen
from fastmerge.errors import RecipeError, hint

TYPES = ("upcycle", "depth_upscale", "grow", "slice", "family", "merge")


def create_dna_transfer_pipeline(
    source_model: Any, target_config: Mapping[str, Any], *, out: Any = None, **options: Any
) -> Any:
    """Makes the model that a mapping asks for.

    Args:
        source_model: a transformers module, a state dictionary (with ``model_config=`` among the options), or a path.
        target_config: ``type`` (``upcycle`` where absent), and the fields of that type's configuration:

            - ``upcycle``: :class:`~fastmerge.dna.UpcyclingConfig`.
            - ``depth_upscale``: :class:`~fastmerge.dna.DepthUpscaleConfig`.
            - ``grow``: :class:`~fastmerge.dna.ModelGrowthConfig`; ``method`` says whether width or depth.
            - ``slice``: :class:`~fastmerge.dna.ModelSlicingConfig`.
            - ``family``: ``sizes``, and the fields of :class:`~fastmerge.dna.ModelSlicingConfig`.
            - ``merge``: ``models`` (further modules), ``method`` (a merge method, ``linear`` where absent) and
              ``parameters``; of a method with a base that is the source.
        out: directory to write, for a model on disk.
        options: as of the function of that type.

    Returns:
        As that function does.

    Raises:
        RecipeError: an unknown type or field, with the nearest known one.
    """
    from fastmerge import dna

    if not isinstance(target_config, Mapping):
        raise RecipeError(f"target_config: expected a mapping, got {target_config!r:.80}")
    settings = {str(key): value for key, value in target_config.items()}
    kind = settings.pop("type", "upcycle")
    if kind not in TYPES:
        raise RecipeError(
            f"type: expected one of {', '.join(TYPES)}, got {kind!r:.80}{hint(str(kind), TYPES) if kind else ''}"
        )
    if kind == "merge":
        return _merged(source_model, settings, **options)
    if out is not None:
        options["out"] = out
    if kind == "family":
        sizes = settings.pop("sizes", None)
        if not sizes:
            raise RecipeError("sizes: expected pairs (layers, hidden size), got none")
        config = _config(dna.ModelSlicingConfig, settings)
        return dna.create_model_family(source_model, sizes, config=config, **options)
    if kind == "grow":
        config = _config(dna.ModelGrowthConfig, settings)
        if chosen("method", dna.GrowthMethod, config.method) is dna.GrowthMethod.NET2DEEPER:
            return dna.grow_model_depth(source_model, config, **options)
        return dna.grow_model_width(source_model, config, **options)
    kinds: dict[str, tuple[Any, Callable[..., Any]]] = {
        "upcycle": (dna.UpcyclingConfig, dna.upcycle_dense_to_moe),
        "depth_upscale": (dna.DepthUpscaleConfig, dna.depth_upscale),
        "slice": (dna.ModelSlicingConfig, dna.slice_model),
    }
    configuration, run = kinds[kind]
    return run(source_model, _config(configuration, settings), **options)


def _config(kind: Any, settings: Mapping[str, Any]) -> Any:
    """The configuration with these fields."""
    known = [field.name for field in dataclasses.fields(kind)]
    problems = [f"{n}: {kind.__name__} has no such field{hint(n, known)}" for n in settings if n not in known]
    if problems:
        raise RecipeError(problems)
    return kind(**settings)


def _merged(source: Any, settings: dict[str, Any], **options: Any) -> Any:
    """Modules of one architecture merged in memory, as a module."""
    from fastmerge.api.tensors import merge_state_dicts
    from fastmerge.dna.modules import build
    from fastmerge.dna.parent import Parent, config_of
    from fastmerge.methods import get

    models, method = settings.pop("models", None), settings.pop("method", "linear")
    parameters = settings.pop("parameters", None)
    if settings:
        raise RecipeError([f"{name}: a merge has no such field (models, method, parameters)" for name in settings])
    modules = isinstance(models, list | tuple) and all(hasattr(m, "state_dict") for m in (source, *models))
    if not modules or not models:
        raise RecipeError("models: expected one or more further modules, to merge with the source")
    base = 0 if get(method).contract.base == "required" else None
    states = [Parent.open(m).kept for m in (source, *models)]
    merged = merge_state_dicts(dict(enumerate(states)), method, parameters=parameters, base=base, **options)
    return build(config_of(source), merged)
