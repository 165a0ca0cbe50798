"""Tiny random models of many architectures, made with transformers: configurations, and what to call them with."""

from dataclasses import dataclass, field

import torch

VOCAB = 160
IDS = torch.tensor([[1, 17, 23, 9, 41, 5, 77, 30]])


@dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        config: name of its configuration in transformers.
        kind: name of its class there.
        values: of the configuration, beside those of :data:`COMMON`.
        group: what the table calls it.
        changes: ranges of layers that make the output of a depth change; empty where nothing has layers to move.
        refused: words of the message where that change has no configuration that says it.
        plain: the values of :data:`COMMON` are left out.
    """

    config: str
    kind: str
    values: dict = field(default_factory=dict)
    group: str = "dense"
    changes: tuple = ((0, 3), (1, 4))
    refused: str = ""
    plain: bool = False

    def build(self):
        """A model with random weights of one seed, in float32."""
        import transformers

        torch.manual_seed(0)
        values = {**({} if self.plain else COMMON), **self.values}
        config = getattr(transformers, self.config)(**values)
        model = getattr(transformers, self.kind)(config).eval()
        model.set_experts_implementation("eager")  # others have no fp64
        with torch.no_grad():
            for i, (name, tensor) in enumerate(sorted(model.state_dict().items())):
                if tensor.is_floating_point() and "inv_freq" not in name:
                    g = torch.Generator().manual_seed(i)
                    tensor.add_(torch.randn(tensor.shape, generator=g) * 0.05)
        return model


COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 8, "sliding_window": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
TEXT = {k: v for k, v in COMMON.items() if not k.endswith("_token_id")}
CLIP = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
SIGLIP = {**CLIP, "vision_use_head": False}
QWEN_VISION = {"depth": 2, "num_heads": 4, "patch_size": 4, "in_channels": 3}
TOKENS = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def causal(name, group="dense", **values):
    known = {k: values.pop(k) for k in ("changes", "refused") if k in values}
    return Model(f"{name}Config", f"{name}ForCausalLM", values, group, **known)


def seeing(name, config, **values):
    known = {k: values.pop(k) for k in ("changes", "refused") if k in values}
    return Model(config, f"{name}ForConditionalGeneration", values, "vision and language", plain=True, **known)


MODELS = {
    "llama": causal("Llama"),
    "mistral": causal("Mistral", **SLIDING),
    "qwen2": causal("Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2, tie_word_embeddings=True),
    "qwen3": causal("Qwen3", head_dim=8),
    "gemma2": causal("Gemma2", **SLIDING, query_pre_attn_scalar=8, tie_word_embeddings=True),
    "gemma3": Model("Gemma3TextConfig", "Gemma3ForCausalLM", {**SLIDING, "query_pre_attn_scalar": 8}),
    "phi3": causal("Phi3"),
    "olmo2": causal("Olmo2"),
    "olmo3": causal("Olmo3", sliding_window=4),
    "cohere2": causal("Cohere2", **SLIDING),
    "smollm3": causal("SmolLM3", no_rope_layers=[1, 0, 1, 1]),
    "granite": causal("Granite"),
    "starcoder2": causal("Starcoder2", tie_word_embeddings=True),
    "gpt2": Model("GPT2Config", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
                  "n_inner": 48, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}, plain=True),
    "gpt_neox": causal("GPTNeoX"),
    "mixtral": causal("Mixtral", "mixture of experts", num_local_experts=4, num_experts_per_tok=2),
    "phimoe": causal("Phimoe", "mixture of experts", num_local_experts=4, num_experts_per_tok=2),
    "minimax": causal("MiniMax", "mixture of experts", num_local_experts=4, num_experts_per_tok=2, block_size=8,
                      layer_types=["linear_attention", "full_attention"] * 2),
    "qwen2_moe": causal("Qwen2Moe", "mixture of experts", **MOE, shared_expert_intermediate_size=24),
    "qwen3_moe": causal("Qwen3Moe", "mixture of experts", **MOE, head_dim=8, decoder_sparse_step=1),
    "qwen3_next": causal("Qwen3Next", "mixture of experts", **MOE, head_dim=8, shared_expert_intermediate_size=24,
                         linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
                         linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"] * 2),
    "olmoe": causal("Olmoe", "mixture of experts", num_experts=4, num_experts_per_tok=2),
    "flex_olmo": causal("FlexOlmo", "mixture of experts", num_experts=4, num_experts_per_tok=2),
    "deepseek_v2": causal("DeepseekV2", "mixture of experts", **LATENT, changes=((0, 3), (1, 4))),
    "deepseek_v3": causal("DeepseekV3", "mixture of experts", **LATENT),
    "glm4_moe": causal("Glm4Moe", "mixture of experts", n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
                       n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, head_dim=8),
    "dots1": causal("Dots1", "mixture of experts", n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
                    n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, head_dim=8),
    "hunyuan_moe": causal("HunYuanMoEV1", "mixture of experts", num_experts=4, moe_topk=2, head_dim=8,
                          moe_intermediate_size=16),
    "ernie4_5_moe": causal("Ernie4_5_Moe", "mixture of experts", moe_num_experts=4, moe_k=2, moe_num_shared_experts=1,
                           moe_intermediate_size=16, moe_layer_start_index=1, moe_layer_end_index=3),
    "gpt_oss": causal("GptOss", "mixture of experts", **SLIDING, num_local_experts=4, num_experts_per_tok=2,
                      rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "llama4": Model("Llama4TextConfig", "Llama4ForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 1,
                    "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "head_dim": 8,
                    "attention_chunk_size": 4, "no_rope_layers": [1, 1, 1, 0]}, "mixture of experts"),
    "granitemoe": causal("GraniteMoe", "mixture of experts", num_local_experts=4, num_experts_per_tok=2),
    "jamba": causal("Jamba", "hybrid", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
                    expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4,
                    mamba_dt_rank=4, changes=((0, 2), (0, 4))),
    "granitemoehybrid": causal("GraniteMoeHybrid", "hybrid", num_local_experts=4, num_experts_per_tok=2,
                               shared_intermediate_size=24, layer_types=["mamba", "attention"] * 2, mamba_n_heads=8,
                               mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=8),
    "nemotron_h": causal("NemotronH", "hybrid", layers_block_type=["mamba", "moe", "attention", "mamba"],
                         mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=4, n_groups=1, chunk_size=8, head_dim=8,
                         n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                         moe_shared_expert_intermediate_size=16, n_group=1, topk_group=1),
    "lfm2": causal("Lfm2", "hybrid", layer_types=["conv", "conv", "full_attention", "conv"], block_multiple_of=8),
    "mamba": causal("Mamba", "state space", state_size=4, time_step_rank=4, use_mambapy=False),
    "falcon_mamba": causal("FalconMamba", "state space", state_size=4, time_step_rank=4, use_mambapy=False),
    "mamba2": causal("Mamba2", "state space", state_size=4, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "llava": seeing("Llava", "LlavaConfig", text_config={**TEXT, "model_type": "llama"},
                    vision_config={**CLIP, "model_type": "clip_vision_model"}, image_token_index=150),
    "gemma3_vision": seeing("Gemma3", "Gemma3Config", text_config={**TEXT, **SLIDING, "query_pre_attn_scalar": 8},
                            vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=150),
    "paligemma": seeing("PaliGemma", "PaliGemmaConfig", text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
                        vision_config={**SIGLIP, "model_type": "siglip_vision_model"}, image_token_index=150,
                        projection_dim=32),
    "mistral3": seeing("Mistral3", "Mistral3Config", text_config={**TEXT, "model_type": "mistral", "head_dim": 8},
                       vision_config={**CLIP, "model_type": "pixtral", "head_dim": 8}, image_token_index=150),
    "qwen2_vl": seeing("Qwen2VL", "Qwen2VLConfig", text_config={**TEXT, "rope_parameters": MROPE},
                       vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, **TOKENS),
    "qwen2_5_vl": seeing("Qwen2_5_VL", "Qwen2_5_VLConfig", text_config={**TEXT, "rope_parameters": MROPE},
                         vision_config={**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48,
                                        "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 8},
                         **TOKENS),
    "qwen3_vl": seeing("Qwen3VL", "Qwen3VLConfig", text_config={**TEXT, "head_dim": 8, "rope_parameters": MROPE},
                       vision_config={**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32,
                                      "deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **TOKENS),
    "idefics3": seeing("Idefics3", "Idefics3Config", text_config={**TEXT, "model_type": "llama"},
                       vision_config={**CLIP, "model_type": "idefics3_vision"}, image_token_id=150, scale_factor=2),
    "bert": Model("BertConfig", "BertForMaskedLM", {}, "encoder"),
    "roberta": Model("RobertaConfig", "RobertaForMaskedLM", {}, "encoder"),
    "modernbert": Model("ModernBertConfig", "ModernBertForMaskedLM", {"global_attn_every_n_layers": 2,
                        "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}, "encoder"),
    "t5": Model("T5Config", "T5ForConditionalGeneration", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3,
                "num_heads": 4, "vocab_size": VOCAB, "decoder_start_token_id": 0}, "encoder and decoder", (),
                plain=True),
    "whisper": Model("WhisperConfig", "WhisperForConditionalGeneration", {"d_model": 32, "encoder_layers": 2,
                     "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                     "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": VOCAB, "num_mel_bins": 8,
                     "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1,
                     "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
                     "begin_suppress_tokens": None}, "speech", (), plain=True),
}  # fmt: skip
