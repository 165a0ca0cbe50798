"""Which mixture of experts computes what a dense model does, and what its config.json says."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastmerge.dna.anatomy import Anatomy, Architecture
from fastmerge.dna.architectures import ARCHITECTURES
from fastmerge.errors import RecipeError, hint


@dataclass(frozen=True)
class Twin:
    """A type of mixture that dense models become.

    Whatever an expert weighs, copies of one MLP give that MLP's output where the weights of a token sum to one. They
    do by themselves in Mixtral and GraniteMoe, and with ``norm_topk_prob`` elsewhere.

    Attributes:
        target: its ``model_type``.
        sources: types of dense models that it can stand for.
        counts: keys that say how many experts there are; readers differ in which they ask for.
        width: key of the experts' inner size.
        settings: what is the same for all.
        router: ``softmax``, or ``sigmoid`` with a bias that only selects, computed in fp32.
        shared: the expert that every token passes: none, one behind a switch (``sigmoid(w x)``), or one without.
        biases: of attention, all or none: ``""``, ``qkv`` or ``qkvo``.
        bias_key: key that says whether they are there.
        window: which layers can have sliding windows: none, all alike (``model``), each (``layer``).
        layers: which layers may stay dense: none, any (``list``), the first ones (``first``).
        balance: whether config.json has a coefficient for the auxiliary loss.
    """

    target: str
    sources: tuple[str, ...]
    counts: tuple[str, ...]
    width: str = "moe_intermediate_size"
    settings: Mapping[str, Any] = field(default_factory=dict)
    router: Literal["softmax", "sigmoid"] = "softmax"
    shared: Literal["none", "switched", "plain"] = "none"
    biases: Literal["", "qkv", "qkvo"] = "qkvo"
    bias_key: str = "attention_bias"
    window: Literal["none", "model", "layer"] = "none"
    layers: Literal["none", "list", "first"] = "none"
    balance: bool = True

    @property
    def arch(self) -> Architecture:
        """Its tensors."""
        return ARCHITECTURES[self.target]


_SIGMOID: Mapping[str, Any] = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 0}
_LISTED: Mapping[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1}

TWINS = (
    Twin(
        "mixtral",
        ("llama", "mistral", "phi3"),
        ("num_local_experts",),
        "intermediate_size",
        biases="",
        bias_key="",
        window="model",
    ),
    Twin(
        "qwen2_moe",
        ("qwen2", "llama"),
        ("num_experts", "num_local_experts"),
        settings=_LISTED,
        shared="switched",
        biases="qkv",
        bias_key="qkv_bias",
        window="layer",
        layers="list",
    ),
    Twin("qwen3_moe", ("qwen3",), ("num_experts", "num_local_experts"), settings=_LISTED, layers="list"),
    Twin(
        "flex_olmo",
        ("olmo2",),
        ("num_experts", "num_local_experts"),
        "intermediate_size",
        settings={"norm_topk_prob": True},
    ),
    Twin("granitemoe", ("granite",), ("num_local_experts",), "intermediate_size"),
    Twin(
        "glm4_moe",
        ("llama", "qwen3"),
        ("n_routed_experts",),
        settings=_SIGMOID,
        router="sigmoid",
        shared="plain",
        biases="qkv",
        layers="first",
        balance=False,
    ),
    Twin(
        "dots1",
        ("qwen3",),
        ("n_routed_experts",),
        settings=_SIGMOID,
        router="sigmoid",
        shared="plain",
        window="layer",
        layers="first",
        balance=False,
    ),
    Twin(
        "solar_open",
        ("llama",),
        ("n_routed_experts",),
        settings=_SIGMOID,
        router="sigmoid",
        shared="plain",
        biases="qkv",
        balance=False,
    ),
)
"""Of a dense model's twins the first is what ``auto`` means."""


def _said(eps: float, pad: int | None, bos: int | None, eos: int | None, **more: Any) -> dict[str, Any]:
    ids = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
    return {"rms_norm_eps": eps, "hidden_act": "silu", "initializer_range": 0.02, **ids, **more}


_ONE = dict.fromkeys(
    ["embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"],
    1.0,
)

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": _said(1e-6, None, 1, 2),
    "mistral": _said(1e-6, None, 1, 2, sliding_window=4096),
    "phi3": _said(1e-5, 32000, 1, 32000),
    "qwen2": _said(1e-6, None, None, None),
    "qwen3": _said(1e-6, None, None, None),
    "olmo2": _said(1e-5, 1, None, 50279),
    "granite": _said(1e-6, None, 1, 2, **_ONE),
}
"""What a config.json means that does not say so: the twin's type may have other defaults (transformers 5.23)."""

_OF_DENSE = (
    *("attention_bias", "mlp_bias", "qkv_bias", "pretraining_tp", "resid_pdrop", "embd_pdrop", "auto_map"),
    *("original_max_position_embeddings", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
)
"""Keys that a twin does not take over as they are."""


def twin_of(model_type: str, target: str = "auto") -> Twin:
    """The twin of a type of dense models.

    Raises:
        RecipeError: there is no such type of mixtures, or it does not stand for such models.
    """
    mine = [twin for twin in TWINS if model_type in twin.sources]
    names = [twin.target for twin in mine]
    if not mine:
        known = sorted({s for twin in TWINS for s in twin.sources})
        raise RecipeError(
            f"model_type {model_type!r} has no twin among mixtures of experts: expected one of {', '.join(known)}"
        )
    if target == "auto":
        return mine[0]
    if target not in names:
        near = hint(target, names) if isinstance(target, str) else ""
        raise RecipeError(f"target_arch: {model_type} becomes auto or {', '.join(names)}, got {target!r:.80}{near}")
    return mine[names.index(target)]


def problems_of(twin: Twin, dense: Anatomy) -> list[str]:
    """What a dense model has that its twin cannot have."""
    config, found = dense.config, []
    roles = {place.part.role for place in dense.places.values()}
    biases = "".join(r for r in "qkvo" if f"{r}_bias" in roles)
    if biases not in ("", twin.biases):
        takes = f"of {twin.biases} together" if twin.biases else "none"
        found.append(f"attention has biases of {biases}; {twin.target} takes {takes}")
    if roles & {"gate_bias", "up_bias", "down_bias"}:
        found.append(f"the MLP has biases (mlp_bias); experts of {twin.target} have none")
    windows = _windows(dense)
    if any(windows) and (twin.window == "none" or (twin.window == "model" and not all(windows))):
        found.append(f"sliding_window: {twin.target} has no windows in {'these' if all(windows) else 'some'} layers")
    factor = rope_of(config).get("partial_rotary_factor", 1.0)
    if factor != 1:
        found.append(f"partial_rotary_factor: expected 1, which {twin.target} has, got {factor}")
    kind = rope_of(config).get("rope_type", "default")
    if config.get("model_type") == "phi3" and kind != "default":
        found.append(f"rope_type: expected default, as {twin.target} cannot scale as phi3 does, got {kind!r}")
    return [f"{dense.parent.ref}: {text}" for text in found]


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions in the words of transformers 5, whichever of the two dialects says them."""
    old = config.get("rope_scaling") or {}
    found = {**old, **(config.get("rope_parameters") or {})}
    if "type" in found:
        found.setdefault("rope_type", found["type"])
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in config:
            found.setdefault(key, config[key])
    return found


def _windows(dense: Anatomy) -> list[bool]:
    """Whether each layer of a dense model has a sliding window."""
    config, kind = dense.config, dense.config["model_type"]
    window = config.get("sliding_window", DEFAULTS[kind].get("sliding_window"))
    if kind in ("mistral", "phi3"):
        return [window is not None] * dense.layers
    if kind not in ("qwen2", "qwen3"):
        return [False] * dense.layers
    listed = config.get("layer_types")
    if listed is not None:
        return [entry == "sliding_attention" for entry in listed]
    first = config.get("max_window_layers", 28)
    return [bool(config.get("use_sliding_window")) and window is not None and i >= first for i in range(dense.layers)]


def config_of(
    twin: Twin,
    dense: Anatomy,
    *,
    experts: int,
    active: int,
    width: int,
    shared_width: int = 0,
    dense_layers: Sequence[int] = (),
    scaling: float = 1.0,
    balance: float = 0.0,
    jitter: float = 0.0,
) -> dict[str, Any]:
    """The config.json of a twin.

    Args:
        twin: the type of mixture.
        dense: the model that it stands for, without :func:`problems_of`; its configuration is not changed.
        experts: how many there are.
        active: how many of them a token passes.
        width: inner size of each.
        shared_width: inner size of the shared one, a multiple of ``width`` where there is no switch.
        dense_layers: layers that stay dense.
        scaling: of the sum of experts, where the router is a sigmoid.
        balance: coefficient of the auxiliary loss.
        jitter: multiplicative noise of the router's input in training (Mixtral).
    """
    roles = {place.part.role for place in dense.places.values()}
    kind = str(dense.config["model_type"])
    made = {**DEFAULTS[kind], **copy.deepcopy(dict(dense.config))}
    window = made.get("sliding_window")
    for key in _OF_DENSE:
        made.pop(key, None)
    made |= {
        "model_type": twin.target,
        "architectures": [twin.arch.head],
        "head_dim": dense.sizes["head_dim"],
        "num_key_value_heads": dense.sizes["kv_heads"],
        "tie_word_embeddings": dense.tied,
        "intermediate_size": dense.sizes["ffn"],
        twin.width: width,
        **dict.fromkeys(twin.counts, experts),
        "num_experts_per_tok": active,
        "output_router_logits": False,
        "router_aux_loss_coef": balance,
        **twin.settings,
    }
    if twin.bias_key:
        made[twin.bias_key] = "q_bias" in roles
    _positions(twin, made, dense.config)
    windows = _windows(dense)
    if twin.window != "none":
        made["sliding_window"] = window if any(windows) else None
    if twin.window == "layer":
        made["use_sliding_window"] = any(windows)
        made["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    elif twin.target == "qwen3_moe":
        made |= {"use_sliding_window": False, "sliding_window": None}
    if twin.layers == "list":
        made["mlp_only_layers"] = list(dense_layers)
    elif twin.layers == "first":
        made["first_k_dense_replace"] = len(dense_layers)
    if twin.shared == "switched":
        made["shared_expert_intermediate_size"] = shared_width
    elif twin.shared == "plain":
        made |= {"n_shared_experts": shared_width // width, "routed_scaling_factor": scaling}
    if twin.target == "mixtral":
        made["router_jitter_noise"] = jitter
    if twin.target == "glm4_moe":
        made["use_qk_norm"] = "q_norm" in roles
    return made


def _positions(twin: Twin, made: dict[str, Any], config: Mapping[str, Any]) -> None:
    """Rotary positions, in the dialects of transformers 4 (for readers of that time) and 5."""
    rope = {"rope_theta": 10000.0, "rope_type": "default", **rope_of(config)}
    rope.pop("type", None)
    if twin.target == "glm4_moe":
        rope["partial_rotary_factor"] = made["partial_rotary_factor"] = 1.0
    made["rope_theta"] = rope["rope_theta"]
    made["rope_parameters"] = rope
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    made["rope_scaling"] = scaling if scaling["rope_type"] != "default" else None
