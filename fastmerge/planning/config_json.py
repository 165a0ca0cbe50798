"""The output's config.json: the donor's, with the layers and the type that the output has."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.dtypes import DType
from fastmerge.planning import tied
from fastmerge.planning.structure import TEXT_CONFIGS, Stack, Structure, counting
from fastmerge.planning.traits import number

if TYPE_CHECKING:
    from fastmerge.planning.restack import SourceLayer

_TYPE_KEYS = ("torch_dtype", "dtype")
_QUANTISED = ("quantization_config", "compression_config", "quantization")
_TIE = "tie_word_embeddings"
PREDICTED = "num_nextn_predict_layers"
"""Counts layers beyond the others that predict further tokens."""

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Tokens that a model begins, stops and pads with."""


def rewrite(
    config: Mapping[str, Any],
    *,
    dtype: DType | None,
    untied: bool,
    stacks: Sequence[tuple[Stack, Sequence[SourceLayer]]],
    structure: Structure | None,
    names: Collection[str] = (),
    quantised: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the output.

    Args:
        config: the donor's.
        dtype: type of most bytes of the output; None leaves the type alone.
        untied: whether the output has a head of its own that some model tied to its embedding.
        stacks: stacks of layers that slices made, with the origin of each layer of the output.
        structure: of the donor; used with ``stacks`` only.
        names: of the tensors of the output.
        quantised: whether the output's weights are quantised as the donor's are.

    Returns:
        The configuration and warnings.

    Raises:
        RecipeError: with every key that gives layers a meaning which the slices do not keep.
    """
    out = copy.deepcopy(dict(config))
    warnings: list[str] = []
    if dtype is not None:
        _set_type(out, dtype)
    if untied:
        # In a model with several parts the key at the top decides; programs that read the text part alone see its own.
        out[_TIE] = False
        for block in text_blocks(out):
            if _TIE in block:
                block[_TIE] = False
    elif _TIE not in out:
        ties = _ties(out, names)
        out |= {} if ties is None else {_TIE: ties}
    for block in (out, *(b for b in out.values() if isinstance(b, dict))):
        # Weights of the output are not quantised, whatever those of the donor are, but where that is asked for.
        for key in _QUANTISED if not quantised else ():
            block.pop(key, None)
    for stack, layers in stacks:
        from fastmerge.planning.restack import count_keys, restack

        found = structure.stacks if structure is not None else ()
        main = structure.main if structure is not None else None
        own = next((s for s in found if s.prefix == stack.prefix), main)
        keys: Sequence[tuple[str, ...]] = ()
        if own is not None and own == main and structure is not None:
            keys = structure.keys or tuple(count_keys(config, own.count))
        elif own is not None:
            keys = counting(config, own)
        if own is not None:
            warnings += restack(out, keys, own.count, layers)
        if not keys:
            of = "" if own is None or own == main else f" of {own.prefix!r}"
            warnings.append(f"config.json has no layer count{of} to rewrite; the output has {len(layers)} layers")
    warnings += _predicted(out, names)
    return out, warnings


def _ties(config: Mapping[str, Any], names: Collection[str]) -> bool | None:
    """What to say of ties where the donor says nothing at the top, so that no model type's default decides.

    A head in the files is used as it is. None for a model without a head of words.
    """
    classes = config.get("architectures")
    if not isinstance(classes, list) or not any(isinstance(c, str) and c.endswith(tied.HEADED) for c in classes):
        return None
    ends = tied.candidates(names)
    if any(name in family.heads for family in tied.families(ends) for name in family.names):
        return False
    return True if ends else None


def _predicted(out: dict[str, Any], names: Collection[str]) -> list[str]:
    """Sets the number of prediction layers to none where the output has no tensor of one."""
    warnings = []
    for block in (out, *text_blocks(out)):
        extra, count = (number(block, key) or 0 for key in (PREDICTED, "num_hidden_layers"))
        if not extra or not names:
            continue
        beyond = "|".join(map(str, range(count, count + extra)))
        if not any(re.search(rf"(^|\.)(mtp\.|layers\.({beyond})\.)", n) for n in names):
            block[PREDICTED] = 0
            warnings.append(f"config.json: {PREDICTED} is 0: the output has no layers that predict further tokens")
    return warnings


def text_blocks(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a configuration that describe its language model, if it has such parts."""
    for name in TEXT_CONFIGS:
        block = config.get(name)
        if isinstance(block, dict):
            yield block


def special_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of :data:`IDS` that a configuration names: numbers or lists of them."""
    found: dict[str, Any] = {}
    for block in (*text_blocks(config), config):
        found |= {key: block[key] for key in IDS if block.get(key) is not None}
    return found


def set_ids(config: dict[str, Any], ids: Mapping[str, Any]) -> list[str]:
    """Writes the tokens that a model begins, stops and pads with, wherever the configuration names them.

    Returns:
        What was changed, each as ``key old -> new``.
    """
    changed: dict[str, None] = {}
    for key, value in ids.items():
        blocks = [b for b in (config, *text_blocks(config)) if key in b] or [config]
        for block in blocks:
            if block.get(key) != value:
                changed[f"{key} {block.get(key)} -> {value}"] = None
                block[key] = value
    return list(changed)


def _set_type(out: dict[str, Any], dtype: DType) -> None:
    for key in [key for key in _TYPE_KEYS if key in out] or ["torch_dtype"]:
        out[key] = dtype.name
    for block in out.values():
        for key in _TYPE_KEYS if isinstance(block, dict) else ():
            if key in block:
                block[key] = dtype.name


def canonical(config: Mapping[str, Any] | None) -> str:
    """One line of JSON, for fingerprints."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"))
