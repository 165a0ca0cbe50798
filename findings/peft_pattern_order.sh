#!/usr/bin/env bash
# peft 0.21.2: an adapter does not compute the same after it was saved and loaded, where two alpha patterns match a layer.
#
# The first pattern that matches a layer's name decides, in the order of the dictionary that LoraConfig was given. But
# adapter_config.json is written with sorted keys, so that after loading another pattern may be the first. Nothing is
# said. With rank patterns the same makes the adapter unloadable, as its ranks are then not those of its tensors.
#
# Seen with torch 2.13.0: alphas {"q_proj": 4, "layers.0.q_proj": 64} train layer 0 with a scale of 1; loaded, it is 16.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$room"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import warnings
from pathlib import Path

import peft
import torch
from torch import nn

warnings.simplefilter("error")  # what is seen below comes without one


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x):
        for layer in self.layers:
            x = layer.q_proj(x)
        return x


def scales(model):
    return [layer.q_proj.scaling["default"] for layer in model.base_model.model.layers]


torch.manual_seed(0)
base, again = Net(), Net()
again.load_state_dict(base.state_dict())
config = peft.LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj"],
    alpha_pattern={"q_proj": 4, "layers.0.q_proj": 64},
    init_lora_weights=False,
)
trained = peft.get_peft_model(base, config)
trained.save_pretrained("adapter")
loaded = peft.PeftModel.from_pretrained(again, "adapter")
order = list(json.loads(Path("adapter/adapter_config.json").read_text())["alpha_pattern"])
x = torch.ones(1, 8)
moved = (trained(x) - loaded(x)).abs().max().item() / trained(x).abs().max().item()
print(f"peft {peft.__version__}: scales {scales(trained)} in training, {scales(loaded)} once loaded")
print(f"patterns in the file: {order}; the output moves by {moved:.1f} times its size")
assert scales(trained) == [1.0, 1.0], scales(trained)
assert scales(loaded) == [16.0, 1.0], scales(loaded)
assert order == ["layers.0.q_proj", "q_proj"], order
assert moved > 1, moved

try:
    config = peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 4, "layers.0.q_proj": 8})
    peft.get_peft_model(Net(), config).save_pretrained("ranks")
    peft.PeftModel.from_pretrained(Net(), "ranks")
except RuntimeError as error:
    line = next(text.strip() for text in str(error).splitlines() if "size mismatch" in text)
    print(f"rank patterns: {line[:90]}...")
else:
    raise SystemExit("an adapter with two rank patterns for one layer loads now")
PYTHON
