"""The output's config.json: the donor's, with the layers and the type that the output has."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.dtypes import DType
from fastmerge.planning.structure import TEXT_CONFIGS, Structure

_TYPE_KEYS = ("torch_dtype", "dtype")


def rewrite(
    config: Mapping[str, Any],
    *,
    dtype: DType | None,
    untied: bool,
    layers: Sequence[tuple[Mapping[str, Any], int]] | None,
    structure: Structure | None,
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the output.

    Args:
        config: the donor's.
        dtype: type of most bytes of the output; None leaves the type alone.
        untied: whether the output has a head of its own that some model tied to its embedding.
        layers: for each output layer, the configuration and the layer that it comes from; None without slices.
        structure: of the donor; used with ``layers`` only.

    Returns:
        The configuration and warnings.
    """
    out = copy.deepcopy(dict(config))
    warnings: list[str] = []
    if dtype is not None:
        _set_type(out, dtype)
    if untied and out.get("tie_word_embeddings") is not False:
        out["tie_word_embeddings"] = False
    if layers is not None:
        main, keys = (structure.main, structure.keys) if structure is not None else (None, ())
        if not keys:
            warnings.append(f"config.json has no layer count to rewrite; the output has {len(layers)} layers")
        for path in keys:
            block = _block(out, path[:-1])
            block[path[-1]] = len(layers)
            if main is not None:
                _restack(block, main.count, layers, path[:-1], warnings)
    if "auto_map" in out:
        warnings.append("config.json refers to custom code (auto_map); *.py files are not copied")
    return out, warnings


def _set_type(out: dict[str, Any], dtype: DType) -> None:
    keys = [key for key in _TYPE_KEYS if key in out] or ["torch_dtype"]
    for key in keys:
        out[key] = dtype.name
    for name in TEXT_CONFIGS:
        block = out.get(name)
        if isinstance(block, dict):
            for key in _TYPE_KEYS:
                if key in block:
                    block[key] = dtype.name


def _block(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = config[key]
    return config


def _restack(
    block: dict[str, Any],
    count: int,
    layers: Sequence[tuple[Mapping[str, Any], int]],
    path: Sequence[str],
    warnings: list[str],
) -> None:
    """Lists with one entry per layer follow the layers; lists of layer numbers are renumbered."""
    identity = [layer for _, layer in layers] == list(range(count))
    for key, value in list(block.items()):
        if not isinstance(value, list) or not ("layer" in key or "block" in key):
            continue
        if len(value) == count:
            picked = []
            for source, layer in layers:
                own = _own_list(source, path, key)
                picked.append(own[layer] if layer < len(own) else value[min(layer, count - 1)])
            block[key] = picked
        elif not identity and _layer_numbers(value, count):
            block[key] = [i for i, (source, layer) in enumerate(layers) if layer in _own_list(source, path, key)]
            warnings.append(f"config.json: {key} was read as a list of layer numbers and renumbered")


def _layer_numbers(value: list[Any], count: int) -> bool:
    whole = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < count for v in value)
    return bool(value) and whole and len(set(value)) == len(value)


def _own_list(config: Mapping[str, Any], path: Sequence[str], key: str) -> list[Any]:
    try:
        found = _block(config, path).get(key)
    except (KeyError, AttributeError, TypeError):
        return []
    return found if isinstance(found, list) else []


def canonical(config: Mapping[str, Any] | None) -> str:
    """One line of JSON, for fingerprints."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"))
