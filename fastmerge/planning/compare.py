"""Whether the configurations of models mean the same: what a merged model runs with is one of them.

Keys are compared by meaning, not as text: rotary positions in the dialects of transformers 4 (``rope_theta``,
``rope_scaling``) and 5 (``rope_parameters``), names of one value that model families spell differently, defaults that
one configuration writes and another leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastmerge.planning.config_json import text_blocks
from fastmerge.planning.structure import COUNT_KEYS
from fastmerge.planning.traits import TRAITS, number

Meaning = dict[str, Any]

_SAME_KEYS = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "norm epsilon": (
        "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon",
    ),
    "activation": ("hidden_activation", "hidden_act", "activation_function"),
}  # fmt: skip
_SCALARS = (
    "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "attention_chunk_size",
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling", "logit_scale",
    "scale_emb", "scale_depth", "dim_model_base", "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor",
    "scoring_func", "topk_method", "n_group", "topk_group", "position_embedding_type", "clip_qkv", "qk_norm",
    "use_qk_norm", "alibi", "rope_interleave", "rope_local_base_freq", "parallel_attn", "use_parallel_residual",
    "attention_types", "state_size", "mamba_d_state", "mamba_expand", "conv_L_cache", "model_type",
)  # fmt: skip
"""Keys that are compared as they are, where both models write them."""

_KINDS_OF_LAYERS = "attention of the layers"

MILD = frozenset({"model_type", _KINDS_OF_LAYERS})
"""Differences that are no fault where layers are stacked: models of several types share their arithmetic, and each
layer keeps its own kind of attention."""

_SAME_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh"}
_THETA_10000 = frozenset({"llama", "mistral", "qwen2", "gemma", "gemma2", "phi", "phi3", "cohere", "stablelm", "olmo"})
_LONG = {"su": "longrope"}
_KINDS = ("full_attention", "sliding_attention")


def meaning(config: Mapping[str, Any]) -> Meaning:
    """What a configuration says of the arithmetic of its language model: values by name; unknown ones are left out."""
    block = _block(config)
    out: Meaning = {}
    for name, keys in _SAME_KEYS.items():
        found = next((block[k] for k in keys if block.get(k) is not None), None)
        if found is not None and not isinstance(found, list):  # sizes by layer follow the layers
            out[name] = found
    if isinstance(out.get("activation"), str):
        gemma = str(block.get("model_type")).startswith("gemma") and out["activation"] == "gelu"
        out["activation"] = _SAME_ACTIVATIONS.get("gelu_new" if gemma else out["activation"], out["activation"])
    layers = next((n for key in COUNT_KEYS if (n := number(block, key))), 0)
    kinds = TRAITS[0].read(block, layers) if layers else None
    if kinds is not None:
        out[_KINDS_OF_LAYERS] = kinds
    heads, hidden = out.get("num_attention_heads"), out.get("hidden_size")
    if isinstance(heads, int) and heads > 0:
        out.setdefault("num_key_value_heads", heads)
        if isinstance(hidden, int):
            out.setdefault("head_dim", hidden // heads)
    out |= {key: block[key] for key in _SCALARS if block.get(key) is not None}
    if "sliding_window" in block:
        out["sliding_window"] = block["sliding_window"] if block.get("use_sliding_window", True) else None
    return out | _rope(block)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value of a, value of b) of whatever two configurations say differently.

    What only one of them says is not compared, but a sliding window: none is what the other has.
    """
    a, b = _part(a, b), _part(b, a)
    x, y = meaning(a), meaning(b)
    window = "sliding_window"
    if x.get("model_type") == y.get("model_type") and (window in x) != (window in y):
        x.setdefault(window, None)
        y.setdefault(window, None)
    for name in x:
        if a and b and name in y and not _same(x[name], y[name]):
            yield name, x[name], y[name]


_LITTLE = frozenset({"transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype", "use_cache"})
"""Keys that say nothing of what a model computes, or what its tensors say themselves."""

_READ = frozenset(key for keys in _SAME_KEYS.values() for key in keys) | frozenset(_SCALARS)


def others(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys of both configurations with different values that :func:`differences` does not look at."""
    looked_at = _READ | _LITTLE | {key for key in a if key.startswith(("rope", "rotary", "partial_rotary", "sliding"))}
    return sorted(key for key in a if key in b and key not in looked_at and not _same(a[key], b[key]))


def disagreements(donor: str, config: Mapping[str, Any], others: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One line for each value of a configuration that other models have otherwise.

    Args:
        donor: the model whose configuration the output takes.
        config: that configuration.
        others: names and configurations of the other models.
    """
    found: dict[str, tuple[Any, list[str]]] = {}
    for name, other in others:
        for key, mine, theirs in differences(config, other):
            found.setdefault(key, (mine, []))[1].append(f"{_show(theirs)} in {name!r}")
    return [
        f"config.json: {key}: {_show(mine)} in {donor!r}, whose configuration the output takes; {', '.join(there)}"
        for key, (mine, there) in found.items()
    ]


def strangers(donor: str, config: Mapping[str, Any], others: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One line for each value with which layers of other models would run otherwise than in their own models."""
    return [
        f"config.json: {key}: {_show(mine)} in {donor!r}, whose configuration the output takes, but "
        f"{_show(theirs)} in {name!r}: the layers taken from there would compute something else"
        for name, other in others
        for key, mine, theirs in differences(config, other)
        if key not in MILD and not (isinstance(mine, list) and isinstance(theirs, list))  # those follow the layers
    ]


def _part(whole: Mapping[str, Any], other: Mapping[str, Any]) -> Mapping[str, Any]:
    """What of a configuration describes the same as another one, which may be that of a single tower."""
    kind = str(other.get("model_type") or "")
    blocks = {name: b for name, b in whole.items() if name.endswith("_config") and isinstance(b, Mapping)}
    if not blocks or whole.get("model_type") == kind or any(name in other for name in blocks):
        return whole
    named = (b for b in blocks.values() if b.get("model_type") == kind)
    of_the_kind = (b for name, b in blocks.items() if name.removesuffix("_config") in kind)
    return next(named, None) or next(of_the_kind, None) or whole


def _block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model."""
    if any(key in config for key in COUNT_KEYS):
        return config
    return next((b for b in text_blocks(config) if any(key in b for key in COUNT_KEYS)), config)


def _rope(block: Mapping[str, Any]) -> Meaning:
    """Rotary positions: base and scaling, of each kind of layer where there are several."""
    new, old = block.get("rope_parameters"), block.get("rope_scaling")
    if isinstance(new, Mapping) and any(isinstance(new.get(kind), Mapping) for kind in _KINDS):
        full, sliding = (new.get(kind) for kind in _KINDS)
        out = _one_rope(full if isinstance(full, Mapping) else {})
        if isinstance(sliding, Mapping):
            local = _one_rope(sliding).get("rope_theta")
            out |= {} if local is None else {"rope_local_base_freq": local}
        return out
    merged: dict[str, Any] = dict(old) if isinstance(old, Mapping) else {}
    merged |= new if isinstance(new, Mapping) else {}
    for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if block.get(key) is not None:
            merged.setdefault(key, block[key])
    for key, alias in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
        if block.get(alias) is not None:
            merged.setdefault(key, block[alias])
    if block.get("model_type") in _THETA_10000:
        merged.setdefault("rope_theta", 10000.0)
    return _one_rope(merged)


def _one_rope(said: Mapping[str, Any]) -> Meaning:
    kind = said.get("rope_type", said.get("type")) or "default"
    kind = _LONG.get(str(kind), str(kind))
    out: Meaning = {"rope type": "default" if kind == "mrope" else kind}
    for key in ("rope_theta", "partial_rotary_factor"):
        if said.get(key) is not None:
            out[key] = said[key]
    if out["rope type"] != "default":
        skip = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        out |= {f"rope {key}": value for key, value in said.items() if key not in skip and value is not None}
    return out


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, int | float) and isinstance(b, int | float):
        return float(a) == float(b)
    return bool(a == b)


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
