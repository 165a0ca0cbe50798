#!/usr/bin/env bash
# transformers 5.23.0 and 4.57.6: what the new one saves, the old one loads with other rotary embeddings, without a word.
#
# Version 5 writes rope_parameters and leaves rope_theta and rope_scaling out of config.json. Version 4 does not know
# the new key, and takes its defaults: for Llama and Qwen2 a base of 10,000 and no scaling. The weights fit, the model
# loads, and positions mean something else.
#
# Seen: Llama saved with theta 500,000 and llama3 scaling is read with 10,000 and None; Qwen2's 1,000,000 becomes 10,000.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
for version in 5.23.0 4.57.6; do
    python3 -m venv "$room/$version"
    "$room/$version/bin/pip" install --quiet transformers=="$version"
done
cd "$room"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=warning
5.23.0/bin/python - 2>/dev/null <<'PYTHON'
from transformers import LlamaConfig, Qwen2Config

scaling = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LlamaConfig(rope_parameters=scaling, max_position_embeddings=131072).save_pretrained("llama")
Qwen2Config(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}).save_pretrained("qwen2")
PYTHON
4.57.6/bin/python - 2>said <<'PYTHON'
import json
from pathlib import Path

import transformers

print(f"transformers {transformers.__version__}")
for name, theta in (("llama", 500000.0), ("qwen2", 1000000.0)):
    written = json.loads(Path(f"{name}/config.json").read_text())
    read = transformers.AutoConfig.from_pretrained(name)
    print(f"{name}: written {written['rope_parameters']['rope_theta']:,.0f}, read {read.rope_theta:,.0f}, {read.rope_scaling}")
    assert written["rope_parameters"]["rope_theta"] == theta, written
    assert "rope_theta" not in written, written
    assert "rope_scaling" not in written, written
    assert read.rope_theta == 10000.0, read.rope_theta
    assert read.rope_scaling is None, read.rope_scaling
PYTHON
if grep -i rope said; then
    echo "it says something of it now"
    exit 1
fi
