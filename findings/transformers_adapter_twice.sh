#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: a merged model saved beside its adapter gets the adapter once more when loaded.
#
# `merge_and_unload().save_pretrained(directory)` into the directory where training left the adapter is the obvious
# last line of a script. `from_pretrained` then takes the merged `model.safetensors`, sees `adapter_config.json` next
# to it, and puts the adapter on top: the update is in the weights and is added again in each forward pass. Neither
# the class of the model nor its config differ from the merged model's, and nothing is said.
#
# Seen: what is loaded differs from the merged model, and equals it with its update doubled. Without the adapter's two
# files, it is the merged model. With transformers 5.24.0 the same.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$room"
HF_HUB_OFFLINE=1 venv/bin/python - 2>log <<'PYTHON'
from pathlib import Path

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
base = LlamaForCausalLM.from_pretrained("base")
config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
tuned = peft.get_peft_model(LlamaForCausalLM.from_pretrained("base"), config)
tuned.save_pretrained("run")
merged = tuned.merge_and_unload()
merged.save_pretrained("run")
print(f"transformers {transformers.__version__}: {', '.join(sorted(file.name for file in Path('run').iterdir()))}")


def query(model):
    """What the projection computes: its matrix, whatever the layer is made of."""
    with torch.no_grad():
        return model.model.layers[0].self_attn.q_proj(torch.eye(16)).T


update = query(merged) - query(base)
for load in (LlamaForCausalLM, AutoModelForCausalLM):
    loaded = load.from_pretrained("run")
    times = ((query(loaded) - query(base)) * update).sum() / (update * update).sum()
    print(f"{load.__name__}: a {type(loaded).__name__} with {times:.3f} times the update")
    assert type(loaded) is LlamaForCausalLM
    assert torch.allclose(query(loaded), query(base) + 2 * update, atol=1e-5)
for name in ("adapter_config.json", "adapter_model.safetensors"):
    Path("run", name).unlink()
assert torch.equal(query(LlamaForCausalLM.from_pretrained("run")), query(merged))
print("without the adapter's files: the merged model")
PYTHON
if grep -iE "adapter|already|merged|LOAD REPORT" log; then
  echo "something is said now" >&2
  exit 1
fi
