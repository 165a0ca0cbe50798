"""Where the layers are, from tensor names and config.json alone.

A *stack* is ``<prefix>.<index>.<suffix>`` with indices 0 .. count - 1. In each name the first integer
component counts whose indices fit a layer count of the configuration; where nothing fits (or there is no
configuration), the first integer component with contiguous indices. Experts inside layers are therefore
never layers. A model has one stack (most), two (encoder and decoder), or more (vision towers).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers")
"""Keys that count the layers of a language model, the usual one first."""

OTHER_COUNT_KEYS = ("encoder_layers", "decoder_layers", "num_encoder_layers", "depth", "vision_layers")
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
EXTRA_LAYERS = 4
"""At most so many layers beyond the configured count (multi-token prediction) are not part of the stack."""

_OTHER_TOWER = r"(^|\.)mtp\.|feature_extractor|vision|visual|image|video|audio|speech|vit\b|whisper|siglip|clip"
_EXPERTS = r"(^|[._])experts?$"
_INDEX = re.compile(r"\.(0|[1-9][0-9]{0,5})(?=\.)")
_HEAD = r"(^|\.)(lm_head|embed_out|mtp)(\.|$)"
_NORM = r"(^|\.)embed\w*_?norm(\.|$)"
_PRE = r"embed|wte|wpe|word_emb|tok_emb|position|pos_emb"
_POST = r"(^|\.)(output|output_layer|head|score|classifier|pooler|cls|norm|norm_f|ln_f|ln_out)(\.|$)|final|logit"


@dataclass(frozen=True, slots=True)
class Stack:
    """Repeated layers: ``prefix.0.`` to ``prefix.{count - 1}.``, with so many tensors."""

    prefix: str
    count: int
    tensors: int

    def split(self, name: str) -> tuple[int, str] | None:
        """Index and suffix of a name below the prefix; None for other names. The index may be >= count."""
        start = len(self.prefix) + 1
        if not name.startswith(self.prefix + "."):
            return None
        index, dot, suffix = name[start:].partition(".")
        return (int(index), suffix) if dot and _is_index(index) else None


class Structure(NamedTuple):
    """The stacks of one model.

    Attributes:
        stacks: all, the largest first.
        main: the one that ``slices`` cut; None where there is none, or several would do.
        keys: where the configuration counts the main stack: paths of keys.
    """

    stacks: tuple[Stack, ...]
    main: Stack | None
    keys: tuple[tuple[str, ...], ...]

    def place(self, name: str) -> tuple[Stack, int] | None:
        """Stack and layer of a tensor; None outside all layers."""
        for stack in self.stacks:
            found = stack.split(name)
            if found is not None and found[0] < stack.count:
                return stack, found[0]
        return None

    def gradient(self, name: str) -> float:
        """Where in 0 .. 1 a tensor stands in its stack (1 in a stack of one layer); 0 outside all layers."""
        found = self.place(name)
        if found is None:
            return 0.0
        return found[1] / (found[0].count - 1) if found[0].count > 1 else 1.0


def structure(names: Iterable[str], config: Mapping[str, Any]) -> Structure:
    """Finds the stacks.

    Args:
        names: all tensor names of a model.
        config: its config.json; empty where it has none.
    """
    indices: dict[str, set[int]] = {}
    tensors: dict[str, int] = {}
    for name in names:
        for found in _INDEX.finditer(name):
            prefix = name[: found.start()]
            indices.setdefault(prefix, set()).add(int(found[1]))
            tensors[prefix] = tensors.get(prefix, 0) + 1
    main_counts = list(_counts(config, COUNT_KEYS, TEXT_CONFIGS))
    counts = {n for _, n in main_counts} | {n for _, n in _counts(config, COUNT_KEYS + OTHER_COUNT_KEYS, None)}
    primary = main_counts[0][1] if main_counts else None

    by_depth = sorted(indices, key=lambda p: p.count("."))
    chosen: dict[str, int] = {}

    def free(prefix: str) -> bool:
        return not any(prefix == p or prefix.startswith(p + ".") or p.startswith(prefix + ".") for p in chosen)

    by_depth = [p for p in by_depth if not re.search(_EXPERTS, p)]
    for prefix in by_depth:
        if max(indices[prefix]) + 1 in counts and free(prefix):
            chosen[prefix] = max(indices[prefix]) + 1
    if primary is not None and primary not in chosen.values():
        for prefix in by_depth:
            extra = max(indices[prefix]) + 1 - primary
            if 0 < extra <= EXTRA_LAYERS and indices[prefix] >= set(range(primary)) and free(prefix):
                chosen[prefix] = primary
    for prefix in by_depth:
        count = max(indices[prefix]) + 1
        nested = any(_is_index(part) for part in prefix.split("."))
        if len(indices[prefix]) == count > 1 and not nested and free(prefix):
            chosen[prefix] = count
    stacks = tuple(sorted((Stack(p, n, tensors[p]) for p, n in chosen.items()), key=lambda s: -s.tensors))
    fitting = stacks[:1] if primary is None else tuple(s for s in stacks if s.count == primary)
    if len(fitting) > 1:  # a vision tower, or layers that predict further tokens, of the same number
        fitting = tuple(s for s in fitting if not re.search(_OTHER_TOWER, s.prefix.lower()))
    if config.get("is_encoder_decoder"):
        fitting = ()
    main = fitting[0] if len(fitting) == 1 else None
    keys = tuple(path for path, n in main_counts if main is not None and n == main.count)
    return Structure(stacks, main, keys)


def is_pre(name: str, *, before_layers: bool, other_tower: bool, last_norm: bool = False) -> bool:
    """Whether a tensor outside the main stack belongs before the layers (first slice) or after (last slice).

    A head (``lm_head``, ``embed_out``) and what predicts further tokens come after; other towers (vision) before,
    whole; names with ``embed``, ``wte``, ``wpe``, ``position`` before; norms, heads, ``final...``, classifiers after;
    anything else as it lies in the file, before or after the first layer.

    Args:
        name: of the tensor.
        before_layers: whether it lies before the first layer in the file.
        other_tower: whether it is no part of the tower that holds the main stack.
        last_norm: whether a norm that is named after embeddings is the last one, for want of another.
    """
    lower = name.lower()
    if is_head(name):
        return False
    if other_tower:
        return True
    if last_norm and re.search(_NORM, lower):
        return False
    if re.search(_PRE, lower):
        return True
    return not is_post(name) and before_layers


def is_head(name: str) -> bool:
    """Whether a name is one of a head of a language model, or of what predicts further tokens."""
    return bool(re.search(_HEAD, name.lower()))


def is_post(name: str) -> bool:
    """Whether a name is one of a norm, a head or a classifier."""
    return bool(re.search(_POST, name.lower()))


def counting(config: Mapping[str, Any], stack: Stack) -> list[tuple[str, ...]]:
    """Where a configuration counts a stack that is not the main one: paths of keys.

    The stack of an encoder or a decoder is counted by keys of that name; any other one in the block of its module.
    """
    path = stack.prefix.lower().split(".")
    side = next((p for p in path[:2] if p in ("encoder", "decoder")), None)
    if side is not None and config.get("is_encoder_decoder"):
        plain = ("num_hidden_layers", "num_layers") if side == "encoder" else ()
        keys = (f"{side}_layers", f"num_{side}_layers", *plain)
        return [(key,) for key in keys if config.get(key) == stack.count]
    tower = "audio" if re.search(r"audio|speech|sound", stack.prefix.lower()) else "vision"
    found = _counts(config, COUNT_KEYS + OTHER_COUNT_KEYS, [name for name in config if tower in name.lower()])
    return [at for at, n in found if n == stack.count and len(at) > 1]


def is_last_norm(name: str) -> bool | None:
    """Whether a tensor outside the layers is surely the last norm; None for a norm that is named after embeddings."""
    lower = name.lower()
    if re.search(_NORM, lower):
        return None
    return bool(re.search(r"(^|\.)(\w*norm\w*|ln_f|ln_out)(\.|$)", lower)) and not re.search(_PRE, lower)


def roots(structure: Structure) -> dict[str, str]:
    """For each stack the outermost module that holds it and no other stack; empty for a single stack."""
    prefixes = [s.prefix.split(".") for s in structure.stacks]
    out: dict[str, str] = {}
    for parts in prefixes if len(prefixes) > 1 else ():
        others = [p for p in prefixes if p is not parts]
        n = next((n for n in range(1, len(parts)) if all(p[:n] != parts[:n] for p in others)), len(parts))
        out[".".join(parts)] = ".".join(parts[:n])
    return out


def _counts(
    config: Mapping[str, Any], keys: Iterable[str], nested: Iterable[str] | None
) -> Iterator[tuple[tuple[str, ...], int]]:
    """(path, count) in the configuration; ``nested`` None looks into every block that is a mapping."""
    blocks: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), config)]
    for name in config if nested is None else nested:
        block = config.get(name)
        if isinstance(block, Mapping):
            blocks.append(((name,), block))
    for path, block in blocks:
        for key in keys:
            value = block.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                yield (*path, key), value


def _is_index(part: str) -> bool:
    return part.isdecimal() and part.isascii() and len(part) < 7 and (part == "0" or part[0] != "0")
