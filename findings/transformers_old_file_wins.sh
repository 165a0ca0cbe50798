#!/usr/bin/env bash
# transformers 5.24.0: a model saved in shards over one that was saved in one file is never loaded.
#
# `save_pretrained` with a `max_shard_size` that needs several files writes shards and an index, and leaves the
# `model.safetensors` of an earlier save in the directory. `from_pretrained` then takes that single file and does not
# look at the index: the weights of the last save are there, and the old ones are loaded, without a warning. The other
# way round (one file over shards) the shards are removed, the index stays, and what was saved last is loaded.
#
# Seen: after the second save the directory has both; what is loaded equals the first model.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$room"
HF_HUB_OFFLINE=1 venv/bin/python - 2>/dev/null <<'PYTHON'
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

NAME = "model.layers.0.mlp.up_proj.weight"
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def loaded(directory):
    return LlamaForCausalLM.from_pretrained(directory).state_dict()[NAME]


first, second = model(0), model(1)
first.save_pretrained("one")
second.save_pretrained("one", max_shard_size="8KB")
files = sorted(p.name for p in Path("one").glob("*.safetensors*"))
print(f"transformers {transformers.__version__}: one file, then shards in its directory: {', '.join(files)}")
stale, fresh = (torch.equal(loaded("one"), m.state_dict()[NAME]) for m in (first, second))
print(f"what is loaded equals the first save: {stale}, the second: {fresh}")
assert "model.safetensors" in files
assert "model.safetensors.index.json" in files
assert (stale, fresh) == (True, False)

first.save_pretrained("other", max_shard_size="8KB")
second.save_pretrained("other")
left = sorted(p.name for p in Path("other").glob("*.safetensors*"))
print(f"shards, then one file in their directory: {', '.join(left)}")
assert torch.equal(loaded("other"), second.state_dict()[NAME])
assert left == ["model.safetensors", "model.safetensors.index.json"], left
PYTHON
