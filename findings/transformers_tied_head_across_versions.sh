#!/usr/bin/env bash
# transformers 4.57.6 and 5.23.0: of one directory, one takes the head from the file and the other drops it for the
# embedding.
#
# The config says that head and embedding are tied, and the file holds both, with different values: so does what comes
# out of tools that train or merge an untied head and leave the config alone. Version 5 sees that they differ and does
# not tie them, with a warning. Version 4 ties them, and says nothing: the head of the file is in no model, nor in what
# is saved from it. Two people with the same files have different models.
#
# Seen with a head that is twice the embedding: 5.23.0 computes with it, 4.57.6 does not, and saves a file without it.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
for version in 5.23.0 4.57.6; do
    python3 -m venv "$room/$version"
    "$room/$version/bin/pip" install --quiet torch==2.13.0 transformers=="$version"
done
cd "$room"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=warning
5.23.0/bin/python - 2>/dev/null <<'PYTHON'
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained("model")
tensors = load_file("model/model.safetensors")
tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
save_file(tensors, "model/model.safetensors", {"format": "pt"})
PYTHON
cat >loaded.py <<'PYTHON'
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def ratio(model):
    """The head in units of the embedding."""
    return (model.lm_head.weight / model.model.embed_tokens.weight).mean().item()


version, want = transformers.__version__, float(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained("model")
model.save_pretrained(f"saved-{version}")
saved = load_file(f"saved-{version}/model.safetensors")
print(f"transformers {version}: the head is {ratio(model):.3f} times the embedding; saved: {'lm_head.weight' in saved}")
assert abs(ratio(model) - want) < 1e-6, ratio(model)
assert ("lm_head.weight" in saved) == (want != 1), saved.keys()
hidden = torch.ones(1, 16)
assert torch.allclose(model.lm_head(hidden), want * hidden @ model.model.embed_tokens.weight.T)
PYTHON
5.23.0/bin/python loaded.py 2 2>five
4.57.6/bin/python loaded.py 1 2>four
grep -o "both are present in the checkpoints with different values" five
if grep -iE "tie|lm_head" four; then
    echo "4.57.6 says something of it now" >&2
    exit 1
fi
