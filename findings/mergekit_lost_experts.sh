#!/usr/bin/env bash
# mergekit 0.1.5: a merge of two DeepSeek-V3 models has no routed experts, and nothing says so.
#
# mergekit works on the names that transformers 5 gives a model in memory, where the experts of a layer are two fused
# tensors; the files have three tensors per expert. For Mixtral or Qwen3-MoE it finds the way from one to the other. For
# DeepSeek-V3 the fused tensors are taken for optional and left out: the merge ends with success, and transformers
# fills the experts of every layer with random values when it loads the result.
#
# Seen with transformers 5.23.0: 41 tensors in each input, 12 of them of experts; 29 and 0 in the output.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 mergekit==0.1.5
cd "$room"
HF_HUB_OFFLINE=1 venv/bin/python - 2>/dev/null <<'PYTHON'
from importlib.metadata import version
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

config = DeepseekV3Config(
    vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1,
    n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)
for seed, name in enumerate(("a", "b")):
    torch.manual_seed(seed)
    DeepseekV3ForCausalLM(config).save_pretrained(name)
models = [{"model": str(Path(name).resolve()), "parameters": {"weight": 1}} for name in ("a", "b")]
run_merge(MergeConfiguration(merge_method="linear", models=models), "out", MergeOptions())


def names(directory):
    return [n for file in Path(directory).glob("*.safetensors") for n in safe_open(file, "pt").keys()]


found = {d: (len(names(d)), sum(".experts." in n for n in names(d))) for d in ("a", "out")}
print(f"mergekit {version('mergekit')}: tensors of an input {found['a'][0]}, of experts {found['a'][1]}")
print(f"of the merge {found['out'][0]}, of experts {found['out'][1]}")
_, info = DeepseekV3ForCausalLM.from_pretrained("out", output_loading_info=True)
missing = sorted(info["missing_keys"])
print(f"missing when it is loaded: {', '.join(missing)}")
assert found == {"a": (41, 12), "out": (29, 0)}, found
assert missing == ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"], missing
PYTHON
