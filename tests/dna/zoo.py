"""Tiny models of every architecture with logits of order one: with transformers' own start everything would be equal.

``model(kind)`` makes one, ``saved(kind, path)`` writes it, ``gate`` holds two models to the same logits.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)  # models this small gain nothing from a second thread, which waits spinning

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
ROUTED = {
    **HEAD,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
}

DENSE = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": HEAD,
    "qwen3 tied": {**HEAD, "tie_word_embeddings": True},
    "gemma": HEAD,
    "gemma2": {**HEAD, "sliding_window": 16},
    "gemma3_text": {**HEAD, "sliding_window": 16},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.4,
    },
    "phi3": {},
    "smollm3": {"num_hidden_layers": 4},
}
SPARSE = {
    "gpt_oss": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {
        **HEAD,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "glm4_moe": {**ROUTED, "first_k_dense_replace": 1},
    "dots1": {**ROUTED, "first_k_dense_replace": 1},
    "solar_open": ROUTED,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
KINDS = {**DENSE, **SPARSE}


def model(kind, *, seed=0, dtype=torch.float32, **settings):
    """A model of a kind of :data:`KINDS`, in evaluation mode."""
    config = AutoConfig.for_model(kind.split()[0], **{**SIZES, **KINDS[kind], **settings})
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
            elif name.endswith("bias") or p.ndim == 1:
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_((1.0 if "embed" in name else 0.15) * torch.randn_like(p))
    return made.to(dtype).eval()


def saved(kind, path, **settings):
    """Writes one to a directory; gives the model."""
    made = model(kind, **settings)
    made.save_pretrained(path)
    return made


def load(path, dtype=torch.float32):
    """What transformers makes of a directory, which must be complete."""
    made, said = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(said.values()), said
    return made.eval()


def tokens(batch=3, length=24):
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model):
    model.config._attn_implementation = "eager"
    return model(tokens()).logits.float()


def difference(model, other):
    """Largest difference of the logits, in units of the largest logit."""
    a, b = logits(model), logits(other)
    return ((a - b).abs().max() / a.abs().max()).item()


def generated(model, *, cache=True):
    return model.generate(tokens(2, 6), max_new_tokens=8, do_sample=False, use_cache=cache, pad_token_id=0)
