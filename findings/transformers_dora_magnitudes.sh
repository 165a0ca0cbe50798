#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: a DoRA adapter is loaded without its magnitudes, and the load succeeds.
#
# peft's files name the trained magnitude of each row `...lora_magnitude_vector`; in memory the name ends with the
# adapter's name and `.weight`. peft's own loader bridges the two. `load_adapter` of transformers, and with it
# `from_pretrained` on the adapter's directory, appends the name of the adapter alone, as for A and B of LoRA: the
# magnitudes match nothing, and the model keeps those that it computed from the base. A report in the log lists them
# as unexpected ("can be ignored") and missing. What is saved from there has the wrong magnitudes under the right names.
#
# Seen with magnitudes that training has doubled: peft loads them, transformers has the base's row norms, both ways.
# transformers 5.24.0 loads the same; to save, it asks for a peft that was not there yet.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$room"
HF_HUB_OFFLINE=1 venv/bin/python - 2>/dev/null <<'PYTHON'
import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")


def base():
    return LlamaForCausalLM.from_pretrained("base")


norms = base().model.layers[0].self_attn.q_proj.weight.detach().norm(dim=1)
config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
trained = peft.get_peft_model(base(), config)
with torch.no_grad():
    for name, parameter in trained.named_parameters():
        if "magnitude" in name:
            parameter.mul_(2)  # what training might have done
trained.save_pretrained("adapter")


def times(model):
    """The magnitudes in units of the norms of the base's rows."""
    (found,) = (value for name, value in model.state_dict().items() if "magnitude" in name)
    ratio = found / norms
    assert (ratio - ratio[0]).abs().max() < 1e-5, ratio
    return round(ratio.mean().item(), 3)


def attached():
    model = base()
    model.load_adapter("adapter")
    return model


loaders = {
    "peft.PeftModel.from_pretrained": lambda: peft.PeftModel.from_pretrained(base(), "adapter"),
    "load_adapter of transformers": attached,
    "AutoModelForCausalLM.from_pretrained": lambda: AutoModelForCausalLM.from_pretrained("adapter"),
}
print(f"transformers {transformers.__version__}, peft {peft.__version__}: magnitudes over the base's row norms")
found = {"in training": times(trained)} | {name: times(load()) for name, load in loaders.items()}
for name, value in found.items():
    print(f"{name}: {value}")
assert list(found.values()) == [2.0, 2.0, 1.0, 1.0], found

attached().save_pretrained("again")
saved = {where: load_file(f"{where}/adapter_model.safetensors") for where in ("adapter", "again")}
assert saved["adapter"].keys() == saved["again"].keys(), saved
(key,) = (name for name in saved["again"] if "magnitude" in name)
ratio = (saved["again"][key] / saved["adapter"][key]).mean().item()
print(f"saved again, {key.split('.')[-1]} is {ratio:.2f} times what it was")
assert abs(ratio - 0.5) < 1e-5, ratio
PYTHON
