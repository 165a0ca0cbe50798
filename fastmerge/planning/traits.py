"""What scalars of a configuration say about each layer, and which scalars say it about other layers.

Most configurations do not list the kind of every layer. They give a period, a first layer or a count, and the model
library works the kinds out from the position. When layers move, such a scalar means other layers. A trait reads the
kind of every layer of a model (:attr:`Trait.read`) and finds values that give wanted kinds (:attr:`Trait.fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Block = Mapping[str, Any]
"""The part of a configuration that counts the layers."""

Kinds = list[Any]
"""One value per layer."""

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"

_PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern")
_DEFAULT_PERIODS = {
    "gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gemma3n_text": 5, "gpt_oss": 2,
    "cohere2": 4, "cohere2_moe": 4, "olmo3": 4, "exaone4": 4, "afmoe": 4, "modernbert": 3, "modernbert-decoder": 3,
    "qwen3_next": 4, "qwen3_5": 4, "qwen3_5_text": 4, "qwen3_5_moe": 4, "qwen3_5_moe_text": 4, "cwm": 4,
}  # fmt: skip
"""Model types whose attention alternates, with the period where the configuration says nothing."""

_LISTED = frozenset({
    *_DEFAULT_PERIODS, "gemma4_text", "vaultgemma", "qwen2", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl",
    "qwen2_5_vl_text", "qwen3", "dots1", "ministral", "llama4", "llama4_text", "smollm3", "exaone_moe",
})  # fmt: skip
"""Model types that take an explicit ``layer_types``."""

_FIRST_IS_FULL = frozenset({"modernbert", "modernbert-decoder", "cwm"})
"""Model types whose full layers are 0, p, 2 p, ...; in all others they are p - 1, 2 p - 1, ..."""

_NO_ROPE = frozenset({"smollm3", "llama4", "llama4_text"})


class Trait(NamedTuple):
    """One property of layers.

    Attributes:
        keys: what says it, for messages.
        read: the value of each of so many layers; None where the configuration says nothing of it.
        fit: what to write, so that so many layers get these values; None where nothing does.
        default: the value of layers of a model whose configuration says nothing; None where that is unknown.
    """

    keys: tuple[str, ...]
    read: Callable[[Block, int], Kinds | None]
    fit: Callable[[Block, Kinds], dict[str, Any] | None]
    default: Any = None


def number(block: Block, key: str) -> int | None:
    """A whole number; None for anything else."""
    value = block.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def filled(block: Block, key: str) -> list[Any] | None:
    """A list with something in it; None for anything else."""
    value = block.get(key)
    return value if isinstance(value, list) and value else None


def numbers(n: int, chosen: Callable[[int], bool]) -> list[int]:
    """The layers of which something holds."""
    return [i for i in range(n) if chosen(i)]


# Attention: sliding, linear, full.


def _period(block: Block) -> tuple[str | None, int | str | None]:
    """The key that gives the period of full attention, and the period (or a pattern such as ``LLLG``)."""
    for key in (*_PATTERN_KEYS, "full_attention_interval", "global_attn_every_n_layers"):
        value = block.get(key)
        if (isinstance(value, str) and value) or (number(block, key) or 0) > 0:
            return key, value
    return None, _DEFAULT_PERIODS.get(str(block.get("model_type")))


def _alternating(block: Block, period: int | str, n: int) -> Kinds:
    model, key = str(block.get("model_type")), _period(block)[0]
    if isinstance(period, str):
        return [SLIDING if period[i % len(period)] == "L" else FULL for i in range(n)]
    linear = key == "full_attention_interval" or model.startswith(("qwen3_next", "qwen3_5"))
    first = model in _FIRST_IS_FULL or (key == "global_attn_every_n_layers" and model != "afmoe")
    return [(LINEAR if linear else SLIDING) if (i + (not first)) % period else FULL for i in range(n)]


def _read_attention(block: Block, n: int) -> Kinds | None:
    model = str(block.get("model_type"))
    listed = filled(block, "layer_types")
    if listed is not None and len(listed) >= n:
        return listed[:n]
    period = _period(block)[1]
    if period is not None and not ("sliding_window" in block and block["sliding_window"] is None):
        return _alternating(block, period, n)
    first = number(block, "max_window_layers")
    if first is not None and block.get("use_sliding_window") and block.get("sliding_window") is not None:
        if model == "qwen2_moe":
            return [SLIDING if (i + 1) % 2 and i < first else FULL for i in range(n)]
        return [SLIDING if i >= first else FULL for i in range(n)]
    return None


def _fit_attention(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    key = _period(block)[0]
    n = len(wanted)
    scalars: Iterator[dict[str, Any]] = iter(())
    if key is not None:
        scalars = ({key: p} for p in (block[key], *range(1, n + 2)))
    elif number(block, "max_window_layers") is not None:
        scalars = ({"max_window_layers": m} for m in range(n + 1))
    for change in scalars:
        if _read_attention({**block, **change}, n) == wanted:
            return change
    if (_read_attention(block, n) or [FULL] * n) == wanted:
        return {}
    # A window that is not in the configuration is not in the layers either.
    if SLIDING in wanted and "sliding_window" in block and block["sliding_window"] is None:
        return None
    return {"layer_types": list(wanted)} if block.get("model_type") in _LISTED else None


# Rotary positions that some layers go without: 1 where a layer has them.


def _read_rope(block: Block, n: int) -> Kinds | None:
    listed = filled(block, "no_rope_layers")
    if listed is not None and len(listed) >= n:
        return listed[:n]
    period = number(block, "no_rope_layer_interval")
    if period is None and block.get("model_type") in _NO_ROPE:
        period = 4
    return [int((i + 1) % period != 0) for i in range(n)] if period else None


def _fit_rope(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    return {} if _read_rope(block, len(wanted)) == wanted else {"no_rope_layers": list(wanted)}


# Dense and sparse feed-forward layers; True where a layer has experts.


def _read_replace(block: Block, n: int) -> Kinds | None:
    first = number(block, "first_k_dense_replace")
    freq = block.get("moe_layer_freq", 1)
    if isinstance(freq, list):
        return [bool(f) and i >= (first or 0) for i, f in enumerate(freq[:n])] if len(freq) >= n else None
    if first is None or not isinstance(freq, int) or freq < 1:
        return None
    return [i >= first and i % freq == 0 for i in range(n)]


def _fit_replace(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    if isinstance(block.get("moe_layer_freq"), list):
        first = {"first_k_dense_replace": 0} if number(block, "first_k_dense_replace") is not None else {}
        return {"moe_layer_freq": [int(w) for w in wanted], **first}
    return _search(block, wanted, _read_replace, "first_k_dense_replace", range(len(wanted) + 1))


def _leading(key: str) -> Trait:
    """A count of first layers that are unlike the others."""

    def read(block: Block, n: int) -> Kinds | None:
        first = number(block, key)
        return None if first is None else [i >= first for i in range(n)]

    def fit(block: Block, wanted: Kinds) -> dict[str, Any] | None:
        return _search(block, wanted, read, key, range(len(wanted) + 1))

    return Trait((key,), read, fit)


def _read_step(block: Block, n: int) -> Kinds | None:
    step = number(block, "decoder_sparse_step")
    dense = block.get("mlp_only_layers") or []
    if step is None or not isinstance(dense, list):
        return None
    return [step > 0 and (i + 1) % step == 0 and i not in dense for i in range(n)]


def _fit_step(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    n = len(wanted)
    if _read_step(block, n) == wanted:
        return {}
    for step in (block["decoder_sparse_step"], 1) if number(block, "decoder_sparse_step") else ():
        dense = numbers(n, lambda i, s=step: (i + 1) % s == 0 and not wanted[i])  # type: ignore[misc]
        change = {"decoder_sparse_step": step, "mlp_only_layers": dense}
        if _read_step({**block, **change}, n) == wanted:
            return change
    return None


def _read_interleaved(block: Block, n: int) -> Kinds | None:
    step = number(block, "interleave_moe_layer_step")
    listed = block.get("moe_layers")
    if isinstance(listed, list):
        return [i in listed for i in range(n)]
    return None if not step else [(i + 1) % step == 0 for i in range(n)]


def _fit_interleaved(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    if _read_interleaved(block, len(wanted)) == wanted:
        return {}
    return {"moe_layers": numbers(len(wanted), lambda i: bool(wanted[i]))}


def _read_range(block: Block, n: int) -> Kinds | None:
    first, last, step = (number(block, f"moe_layer_{k}") for k in ("start_index", "end_index", "interval"))
    if first is None and last is None:
        return None
    last = n - 1 if last in (None, -1) else last
    return [(i + 1) % (step or 1) == 0 and (first or 0) <= i <= (last or 0) for i in range(n)]


def _fit_range(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    n = len(wanted)
    if _read_range(block, n) == wanted:
        return {}
    sparse = numbers(n, lambda i: bool(wanted[i]))
    if not sparse:
        return None
    at = {"moe_layer_start_index": sparse[0]}
    for end in (-1, sparse[-1]):
        change = {**at, "moe_layer_end_index": end}
        if _read_range({**block, **change}, n) == wanted:
            return change
    return None


def _with_offset(name: str) -> Trait:
    """``<name>_period`` and ``<name>_offset``: the layers offset, offset + period, ..."""
    period, offset = f"{name}_period", f"{name}_offset"

    def read(block: Block, n: int) -> Kinds | None:
        p, o = number(block, period), number(block, offset) or 0
        return [i % p == o for i in range(n)] if p else None

    def fit(block: Block, wanted: Kinds) -> dict[str, Any] | None:
        n = len(wanted)
        at = numbers(n, lambda i: bool(wanted[i]))
        # The layers show it: the distance of two of them; with one or none, more than there are layers.
        found = (at[1] - at[0], at[0]) if len(at) > 1 else (n + 1, at[0] if at else n)
        for p, o in ((number(block, period) or 1, number(block, offset) or 0), found):
            change = {period: p, offset: o}
            if o < p and read({**block, **change}, n) == wanted:
                return change
        return None

    return Trait((period, offset), read, fit)


# Patterns that repeat.


def _read_blocks(block: Block, n: int) -> Kinds | None:
    pattern = filled(block, "block_types") or filled(block, "_block_types")
    return None if pattern is None else [pattern[i % len(pattern)] for i in range(n)]


def _fit_blocks(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    keys = [k for k in ("block_types", "_block_types") if filled(block, k)]
    return {} if _read_blocks(block, len(wanted)) == wanted else {key: list(wanted) for key in keys}


def _read_neo(block: Block, n: int) -> Kinds | None:
    out: Kinds = []
    for item in filled(block, "attention_types") or ():
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], list) and isinstance(item[1], int)):
            return None
        out += item[0] * min(item[1], n)
    return out[:n] if len(out) >= n else None


def _fit_neo(block: Block, wanted: Kinds) -> dict[str, Any] | None:
    return {} if _read_neo(block, len(wanted)) == wanted else {"attention_types": [[list(wanted), 1]]}


def _search(
    block: Block, wanted: Kinds, read: Callable[[Block, int], Kinds | None], key: str, values: Sequence[int]
) -> dict[str, Any] | None:
    """The value of one key that gives the wanted kinds, its own first."""
    for value in (block.get(key), *values):
        if value is not None and read({**block, key: value}, len(wanted)) == wanted:
            return {key: value}
    return None


LEADING_KEYS = ("num_dense_layers", "n_dense_layers", "num_hash_layers", "dense_mlp_idx")

TRAITS = (
    Trait(
        (*_PATTERN_KEYS, "full_attention_interval", "global_attn_every_n_layers", "max_window_layers", "layer_types"),
        _read_attention,
        _fit_attention,
        FULL,
    ),
    Trait(("no_rope_layer_interval", "no_rope_layers"), _read_rope, _fit_rope, 1),
    Trait(("first_k_dense_replace", "moe_layer_freq"), _read_replace, _fit_replace),
    *map(_leading, LEADING_KEYS),
    Trait(("decoder_sparse_step", "mlp_only_layers"), _read_step, _fit_step),
    Trait(("interleave_moe_layer_step", "moe_layers"), _read_interleaved, _fit_interleaved),
    Trait(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), _read_range, _fit_range),
    _with_offset("attn_layer"),
    _with_offset("expert_layer"),
    Trait(("block_types", "_block_types"), _read_blocks, _fit_blocks),
    Trait(("attention_types",), _read_neo, _fit_neo),
)
"""Every trait that is known."""

SPARSE = tuple(trait for trait in TRAITS if trait.read in (_read_replace, _read_step, _read_interleaved, _read_range))
"""Traits that say which layers have experts."""

HANDLED = frozenset(key for trait in TRAITS for key in trait.keys) | {"num_kv_shared_layers"}
"""Keys that a trait looks after."""
