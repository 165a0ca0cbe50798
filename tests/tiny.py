"""Small Llama-shaped families on disk, written with safetensors itself."""

import json

import torch
from safetensors.torch import save_file


def state(seed, *, layers=2, hidden=64, vocab=300, dtype=torch.bfloat16, spread=0.02, base=None):
    """A state dict with the names and order of a Llama checkpoint; a fine-tune of ``base`` where that is given."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        p = f"model.layers.{i}"
        shapes |= {
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.mlp.down_proj.weight": (hidden, 3 * hidden),
            f"{p}.mlp.gate_proj.weight": (3 * hidden, hidden),
            f"{p}.mlp.up_proj.weight": (3 * hidden, hidden),
            f"{p}.post_attention_layernorm.weight": (hidden,),
            f"{p}.self_attn.k_proj.weight": (hidden // 2, hidden),
            f"{p}.self_attn.o_proj.weight": (hidden, hidden),
            f"{p}.self_attn.q_proj.weight": (hidden, hidden),
            f"{p}.self_attn.v_proj.weight": (hidden // 2, hidden),
        }
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    if base is None:
        return {n: (torch.randn(s, generator=g) * spread).to(dtype) for n, s in shapes.items()}
    return {n: (base[n].float() + torch.randn(s, generator=g) * spread * 0.01).to(dtype) for n, s in shapes.items()}


def write(directory, tensors, *, shards=1, layers=2, config=None):
    """Writes a checkpoint directory, in one file or several with an index."""
    directory.mkdir(parents=True)
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps({**facts, **(config or {})}))
    (directory / "tokenizer_config.json").write_text("{}")
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    per = -(-len(names) // shards)
    where = {}
    for s in range(shards):
        part = names[s * per : (s + 1) * per]
        file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": where,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def adapter(directory, module, rows, columns, *, rank=2, seed=0):
    """Writes a LoRA adapter of one layer."""
    directory.mkdir(parents=True)
    g = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, columns), "B": (rows, rank)}
    factors = {f"base_model.model.{module}.lora_{n}.weight": torch.randn(s, generator=g) for n, s in shapes.items()}
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_modules": [module.rpartition(".")[2]]}
    (directory / "adapter_config.json").write_text(json.dumps(facts))
    return directory


def family(root, *, models=3, shards=(1, 2, 1, 3), **shape):
    """A base and fine-tunes of it: directories by name (base, a, b, c)."""
    base = state(0, **shape)
    layers = shape.get("layers", 2)
    paths = {"base": write(root / "base", base, shards=shards[0], layers=layers)}
    for i, name in enumerate("abcdefgh"[:models]):
        paths[name] = write(root / name, state(i + 1, base=base, **shape), shards=shards[(i + 1) % 4], layers=layers)
    return paths


def recipe(paths, method, *, names=("a", "b", "c"), base="base", dtype="bfloat16", extra="", **per_model):
    """YAML text of a merge of the family."""
    lines = [f"merge_method: {method}", "models:"]
    for name in names:
        lines.append(f"  - model: {paths[name]}")
        if per_model:
            lines.append("    parameters:")
            lines += [f"      {k}: {v}" for k, v in per_model.items()]
    if base:
        lines.append(f"base_model: {paths[base]}")
    return "\n".join([*lines, f"dtype: {dtype}", extra, ""])
