"""An index beside the shards that it speaks of: where they disagree, and whether that does harm."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint.header import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fastmerge.checkpoint.header import TensorInfo
    from fastmerge.checkpoint.model import ShardFile

_NUMBER = r"\d+"
_LAYER = r"\.(\d+)\."
_DRAFT = r"(?:^|[._])(?:mtp|nextn|eagle|medusa|draft)"
"""Heads that guess further tokens: checkpoints keep them or lose them, and every loader does without."""

_BUFFER = r"(?:\.rotary_emb\.inv_freq|\.attn\.(?:masked_)?bias|\.attention\.(?:masked_)?bias|position_ids)$"
_NEEDED = r"(?:^|[._])(?:norm|layer_?norm|ln_f|embed\w*|word_embeddings|wte|wpe|shared)(?:\.|$)"
"""What a model has once and cannot do without."""

_HEADS = frozenset({"lm_head.weight", "embed_out.weight", "output.weight", "proj_out.weight"})


def compare(
    directory: Path,
    weight_map: Mapping[str, str],
    files: Sequence[ShardFile],
    tensors: Mapping[str, TensorInfo],
    *,
    config: Mapping[str, Any],
) -> tuple[list[str], list[str]]:
    """Compares what an index promises with what the shards hold.

    Shards count: what they hold is read, wherever and whether or not the index names it, as transformers 5 does. A
    tensor that no shard holds is a problem where the model is less without it.

    Args:
        directory: of the model.
        weight_map: tensor to file name.
        files: whose headers were read; of others, which are reported elsewhere, nothing is known.
        tensors: of these files.
        config: of the model.

    Returns:
        Problems and warnings.
    """
    names = [f.path.name for f in files]
    extra = tensors.keys() - weight_map.keys()
    absent = {n for n in weight_map.keys() - tensors.keys() if weight_map[n] in names}
    moved = [n for n, i in tensors.items() if names[i.file] != weight_map.get(n, names[i.file])]
    problems, warnings = [], []
    if extra:
        shown = listing([n for n in tensors if n in extra])
        warnings.append(f"{directory}: tensors that the index does not name are read as well: {shown}")
    if moved:
        warnings.append(f"{directory}: tensors are in other shards than the index says: {listing(moved)}")
    if absent:
        harmless = _harmless(tensors, config)
        lost = [n for n in weight_map if n in absent and not harmless(n)]
        if lost:
            where = ", ".join(sorted({weight_map[n] for n in lost})[:3])
            problems.append(f"{directory}: tensors that the index places in {where} are in no shard: {listing(lost)}")
        if len(lost) < len(absent):
            shown = listing([n for n in weight_map if n in absent and n not in set(lost)])
            warnings.append(f"{directory}: the index names tensors that are in no shard: {shown}")
    return problems, warnings


def _harmless(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a model is whole without a tensor that its index names."""
    kinds = {re.sub(_NUMBER, "#", name) for name in tensors}
    tops = {name.partition(".")[0] for name in tensors}
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    depth = config.get("num_hidden_layers", text.get("num_hidden_layers"))
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))

    def harmless(name: str) -> bool:
        if re.search(_DRAFT, name) or re.search(_BUFFER, name):
            return True
        layer = re.search(_LAYER, name)
        if layer and isinstance(depth, int) and int(layer[1]) >= depth:
            return True
        if re.sub(_NUMBER, "#", name) in kinds:
            return False  # other layers have it
        if name in _HEADS:
            return tied is not False
        top, _, rest = name.partition(".")
        # A part of which nothing is there was left out on purpose, or is missed by the other models.
        return not re.search(_NEEDED, name) or (top not in tops and "." in rest)

    return harmless
