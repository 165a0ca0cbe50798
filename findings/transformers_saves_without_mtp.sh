#!/usr/bin/env bash
# transformers 5.23.0: loading and saving a model takes its multi-token-prediction layers away, and reports nothing.
#
# Checkpoints of Qwen3-Next, DeepSeek-V3, GLM-4.5 and others hold layers beside the model's own that predict further
# tokens, for speculative decoding. transformers has no modules for them, and lists their names among those that may be
# ignored: no warning, and `output_loading_info` is empty. What `save_pretrained` then writes is a model without them,
# whose config.json still promises them (`num_nextn_predict_layers`). Whatever fine-tunes or merges through
# transformers loses them so.
#
# Seen: two tensors of Qwen3-Next and three of DeepSeek-V3 with 61 layers are in the file, and none once it is saved again.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cd "$room"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=warning
venv/bin/python - 2>log <<'PYTHON'
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
qwen = Qwen3NextConfig(
    **sizes, num_hidden_layers=4, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8,
)
deepseek = DeepseekV3Config(
    **sizes, num_hidden_layers=61, first_k_dense_replace=61, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, num_nextn_predict_layers=1,
)
extra = {
    "qwen": ("mtp.fc.weight", "mtp.norm.weight"),
    "deepseek": tuple(f"model.layers.61.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")),
}
models = {"qwen": (Qwen3NextForCausalLM, qwen), "deepseek": (DeepseekV3ForCausalLM, deepseek)}
print(f"transformers {transformers.__version__}")
for name, (kind, config) in models.items():
    torch.manual_seed(0)
    kind(config).save_pretrained(name)
    file = Path(name, "model.safetensors")
    tensors = load_file(file)
    tensors |= {key: torch.randn(32, 64 if key.endswith(("fc.weight", "eh_proj.weight")) else 1) for key in extra[name]}
    save_file(tensors, file, {"format": "pt"})
    model, said = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    model.save_pretrained(f"{name}-saved")
    saved = load_file(Path(f"{name}-saved", "model.safetensors"))
    lost = sorted(tensors.keys() - saved.keys())
    promised = json.loads(Path(f"{name}-saved", "config.json").read_text()).get("num_nextn_predict_layers")
    print(f"{name}: {len(tensors)} tensors, saved again {len(saved)}; lost {', '.join(lost)}; in config.json: {promised}")
    assert lost == sorted(extra[name]), lost
    assert saved.keys() <= tensors.keys(), saved.keys() - tensors.keys()
    assert not any(said.values()), said
    assert promised == (1 if name == "deepseek" else None), promised
PYTHON
if grep -iE "mtp|layers.61|unexpected|ignored" log; then
    echo "something is said now" >&2
    exit 1
fi
