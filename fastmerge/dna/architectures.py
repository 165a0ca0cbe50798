"""The table of architectures: which tensors a type of model has, and what they are.

Names are those that ``save_pretrained`` of transformers 5 writes.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastmerge.dna.anatomy import Architecture, Part

Parts = Mapping[str, Part]

OUTSIDE: Parts = {
    "model.embed_tokens.weight": Part("embed", ("vocab", "hidden")),
    "model.norm.weight": Part("final_norm", ("hidden",)),
    "lm_head.weight": Part("head", ("vocab", "hidden"), 1, optional=True),
}

_ATTENTION: Parts = {
    "self_attn.q_proj.weight": Part("q", ("q", "hidden"), 1),
    "self_attn.k_proj.weight": Part("k", ("kv", "hidden"), 1),
    "self_attn.v_proj.weight": Part("v", ("kv", "hidden"), 1),
    "self_attn.o_proj.weight": Part("o", ("hidden", "q"), 1),
    "self_attn.q_proj.bias": Part("q_bias", ("q",), optional=True),
    "self_attn.k_proj.bias": Part("k_bias", ("kv",), optional=True),
    "self_attn.v_proj.bias": Part("v_bias", ("kv",), optional=True),
    "self_attn.o_proj.bias": Part("o_bias", ("hidden",), optional=True),
}


def _mlp(
    prefix: str, inner: str, what: str = "", names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> Parts:
    """Gate, up and down of an MLP, with biases where there may be some."""
    gate, up, down = names
    return {
        f"{prefix}{gate}.weight": Part(f"{what}gate", (inner, "hidden"), 1),
        f"{prefix}{up}.weight": Part(f"{what}up", (inner, "hidden"), 1),
        f"{prefix}{down}.weight": Part(f"{what}down", ("hidden", inner), 1),
    }


_DENSE: Parts = {
    **_mlp("mlp.", "ffn"),
    "mlp.gate_proj.bias": Part("gate_bias", ("ffn",), optional=True),
    "mlp.up_proj.bias": Part("up_bias", ("ffn",), optional=True),
    "mlp.down_proj.bias": Part("down_bias", ("hidden",), optional=True),
}

_PRE: Parts = {
    "input_layernorm.weight": Part("input_norm", ("hidden",)),
    "post_attention_layernorm.weight": Part("mlp_norm", ("hidden",)),
}

_SANDWICH: Parts = {
    "input_layernorm.weight": Part("input_norm", ("hidden",)),
    "post_attention_layernorm.weight": Part("attention_norm", ("hidden",)),
    "pre_feedforward_layernorm.weight": Part("mlp_norm", ("hidden",)),
    "post_feedforward_layernorm.weight": Part("output_norm", ("hidden",)),
}

_POST: Parts = {
    "post_attention_layernorm.weight": Part("attention_norm", ("hidden",)),
    "post_feedforward_layernorm.weight": Part("output_norm", ("hidden",)),
}

_HEAD_NORMS: Parts = {
    "self_attn.q_norm.weight": Part("q_norm", ("head_dim",)),
    "self_attn.k_norm.weight": Part("k_norm", ("head_dim",)),
}

_SOME_NORMS: Parts = {name: part._replace(optional=True) for name, part in _HEAD_NORMS.items()}

_WIDE_NORMS: Parts = {
    "self_attn.q_norm.weight": Part("q_norm", ("q",)),
    "self_attn.k_norm.weight": Part("k_norm", ("kv",)),
}

_PHI3: Parts = {
    "self_attn.qkv_proj.weight": Part("qkv", (("q", "kv", "kv"), "hidden"), 1),
    "self_attn.o_proj.weight": Part("o", ("hidden", "q"), 1),
    "mlp.gate_up_proj.weight": Part("gate_up", (("ffn", "ffn"), "hidden"), 1),
    "mlp.down_proj.weight": Part("down", ("hidden", "ffn"), 1),
}


def _experts(inner: str) -> Parts:
    return {"mlp.gate.weight": Part("router", ("experts", "hidden"), 1), **_mlp("mlp.experts.*.", inner)}


_SIGMOID: Parts = {
    **_experts("expert_ffn"),
    "mlp.gate.e_score_correction_bias": Part("router_bias", ("experts",)),
    **_mlp("mlp.shared_experts.", "shared_ffn", "shared_"),
}
"""Routers of DeepSeek's kind: a sigmoid, a bias that only selects, and experts that every token passes."""

_GPT_OSS: Parts = {
    "self_attn.sinks": Part("sinks", ("heads",)),
    "mlp.router.weight": Part("router", ("experts", "hidden"), 1),
    "mlp.router.bias": Part("router_bias", ("experts",)),
    "mlp.experts.gate_up_proj": Part("gate_up", ("experts", "hidden", ("ffn", "ffn")), 1),
    "mlp.experts.gate_up_proj_bias": Part("gate_up_bias", ("experts", ("ffn", "ffn"))),
    "mlp.experts.down_proj": Part("down", ("experts", "ffn", "hidden"), 1),
    "mlp.experts.down_proj_bias": Part("down_bias", ("experts", "hidden")),
}

_GRANITE_MOE: Parts = {
    "block_sparse_moe.router.layer.weight": Part("router", ("experts", "hidden"), 1),
    "block_sparse_moe.input_linear.weight": Part("gate_up", ("experts", ("ffn", "ffn"), "hidden"), 2),
    "block_sparse_moe.output_linear.weight": Part("down", ("experts", "hidden", "ffn"), 2),
}

_MIXTRAL: Parts = {
    "block_sparse_moe.gate.weight": Part("router", ("experts", "hidden"), 1),
    **_mlp("block_sparse_moe.experts.*.", "ffn", names=("w1", "w3", "w2")),
}

_SHARED_QWEN: Parts = {
    **_mlp("mlp.shared_expert.", "shared_ffn", "shared_"),
    "mlp.shared_expert_gate.weight": Part("shared_switch", ("one", "hidden"), 1),
}

_LOCAL = {"experts": "num_local_experts"}
_ROUTED = {"experts": "n_routed_experts", "expert_ffn": "moe_intermediate_size", "shared_ffn": "n_shared_experts"}


def _entry(model_type: str, head: str, *layer: Parts, **facts: object) -> Architecture:
    parts = {name: part for group in layer for name, part in group.items()}
    return Architecture(model_type, head, OUTSIDE, parts, **facts)  # type: ignore[arg-type]


_ALL = (
    _entry("llama", "LlamaForCausalLM", _PRE, _ATTENTION, _DENSE),
    _entry("mistral", "MistralForCausalLM", _PRE, _ATTENTION, _DENSE),
    _entry("qwen2", "Qwen2ForCausalLM", _PRE, _ATTENTION, _DENSE),
    _entry("qwen3", "Qwen3ForCausalLM", _PRE, _ATTENTION, _HEAD_NORMS, _DENSE),
    _entry("granite", "GraniteForCausalLM", _PRE, _ATTENTION, _DENSE),
    _entry("smollm3", "SmolLM3ForCausalLM", _PRE, _ATTENTION, _DENSE),
    _entry("phi3", "Phi3ForCausalLM", _PRE, _PHI3),
    _entry("gemma", "GemmaForCausalLM", _PRE, _ATTENTION, _DENSE, plus_one=True, embed_scale=True),
    _entry("gemma2", "Gemma2ForCausalLM", _SANDWICH, _ATTENTION, _DENSE, plus_one=True, embed_scale=True),
    _entry(
        *("gemma3_text", "Gemma3ForCausalLM", _SANDWICH, _ATTENTION, _HEAD_NORMS, _DENSE),
        plus_one=True,
        embed_scale=True,
    ),
    _entry("olmo2", "Olmo2ForCausalLM", _POST, _ATTENTION, _WIDE_NORMS, _DENSE, post_norm=True),
    _entry("olmo3", "Olmo3ForCausalLM", _POST, _ATTENTION, _WIDE_NORMS, _DENSE, post_norm=True),
    _entry("gpt_oss", "GptOssForCausalLM", _PRE, _ATTENTION, _GPT_OSS, sizes=_LOCAL, interleaved=True),
    _entry("mixtral", "MixtralForCausalLM", _PRE, _ATTENTION, _MIXTRAL, sizes=_LOCAL),
    _entry(
        *("qwen2_moe", "Qwen2MoeForCausalLM", _PRE, _ATTENTION, _experts("expert_ffn"), _SHARED_QWEN, _DENSE),
        sizes={
            "experts": "num_experts",
            "expert_ffn": "moe_intermediate_size",
            "shared_ffn": "shared_expert_intermediate_size",
        },
    ),
    _entry(
        *("qwen3_moe", "Qwen3MoeForCausalLM", _PRE, _ATTENTION, _HEAD_NORMS, _experts("expert_ffn"), _DENSE),
        sizes={"experts": "num_local_experts", "expert_ffn": "moe_intermediate_size"},
    ),
    _entry(
        *("olmoe", "OlmoeForCausalLM", _PRE, _ATTENTION, _WIDE_NORMS, _experts("ffn")), sizes={"experts": "num_experts"}
    ),
    _entry(
        *("flex_olmo", "FlexOlmoForCausalLM", _POST, _ATTENTION, _WIDE_NORMS, _experts("ffn")),
        sizes={"experts": "num_experts"},
        post_norm=True,
    ),
    _entry("glm4_moe", "Glm4MoeForCausalLM", _PRE, _ATTENTION, _SOME_NORMS, _SIGMOID, _DENSE, sizes=_ROUTED),
    _entry("dots1", "Dots1ForCausalLM", _PRE, _ATTENTION, _HEAD_NORMS, _SIGMOID, _DENSE, sizes=_ROUTED),
    _entry("solar_open", "SolarOpenForCausalLM", _PRE, _ATTENTION, _SIGMOID, sizes=_ROUTED),
    _entry("granitemoe", "GraniteMoeForCausalLM", _PRE, _ATTENTION, _GRANITE_MOE, sizes=_LOCAL),
)

ARCHITECTURES: Mapping[str, Architecture] = {arch.model_type: arch for arch in _ALL}
"""By ``model_type``."""
