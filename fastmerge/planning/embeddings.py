"""Tensors that have a row for every token: embeddings, heads and their biases, found by name and shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastmerge.planning.config_json import special_ids, text_blocks

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo

_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "shared", "embeddings")
_HEADS = ("lm_head", "embed_out", "proj_out", "vocab_projector", "generator_lm_head", "output", "output_layer", "head",
          "decoder", "linear")  # fmt: skip
_EMBEDDING = re.compile(rf"(^|\.)({'|'.join(_EMBEDDINGS)})\.weight$")
_KNOWN = re.compile(rf"(^|\.)({'|'.join((*_EMBEDDINGS, *_HEADS))})\.weight$")
_BIAS = re.compile(rf"(^|\.)({'|'.join((*_HEADS, 'predictions'))})\.bias$")
_INSIDE = re.compile(r"(^|\.)(\d+|mtp)\.")
_POSITIONS = re.compile(r"pos|wpe|token_type|norm", re.IGNORECASE)
_KEYS = ("vocab_size", "padded_vocab_size")


def rows_of(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> int | None:
    """How many tokens a model has a row for: those of its embedding, or of its head where it stores no embedding.

    Where there are several, the one of the configuration's ``vocab_size`` counts, else the first.
    """
    for pattern in (_EMBEDDING, _KNOWN):
        found = [i.shape[0] for n, i in tensors.items() if len(i.shape) == 2 and pattern.search(n)]
        said = [block.get("vocab_size") for block in (*text_blocks(config), config)]
        if found:
            return next((n for n in found if n in said), found[0])
    return None


def by_token(tensors: Mapping[str, TensorInfo], rows: int) -> list[str]:
    """Names of the tensors that have a row for every token, outside all layers.

    Args:
        tensors: of a model.
        rows: :func:`rows_of` it.
    """
    ends = {n: i.shape for n, i in tensors.items() if i.shape[:1] == (rows,) and not _INSIDE.search(n)}
    widths = {shape[1:] for n, shape in ends.items() if _EMBEDDING.search(n)}
    return [
        n
        for n, shape in ends.items()
        if (
            _BIAS.search(n)
            if len(shape) == 1
            else _KNOWN.search(n) or (shape[1:] in widths and not _POSITIONS.search(n))
        )
    ]


def set_size(config: dict[str, Any], size: int) -> list[str]:
    """Writes the number of rows wherever a configuration has it, also in the part of a language model.

    Returns:
        Warnings of tokens that the configuration names and that are no rows.
    """
    blocks = [block for block in (config, *text_blocks(config)) if any(key in block for key in _KEYS)]
    for block in blocks or [config]:
        for key in _KEYS:
            if key in block or (not blocks and key == "vocab_size"):
                block[key] = size
    out = []
    for key, value in special_ids(config).items():
        beyond = [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i >= size]
        if beyond:
            out.append(f"config.json: {key} {value}: the output has {size:,} rows")
    return out
