#!/usr/bin/env bash
# mergekit 0.1.5: SCE weighs all models alike where they differ little from the base, as fine-tunes do.
#
# The method weighs each model by the mean square of its task vector. Where these sum to less than 1e-6, which stands for
# "all zero", every model counts the same. Task vectors of bf16 fine-tunes are often of the order of 1e-4, and their
# squares 1e-8: the weights that the method is about are then never used, and the result is the plain mean. Scaling the
# same deltas up changes which model dominates.
#
# Seen with torch 2.13.0: of deltas d and 3d the result is 2.0 d for d up to 3e-4, and 2.8 d from 1e-3 on.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 mergekit==0.1.5
cd "$room"
HF_HUB_OFFLINE=1 venv/bin/python - 2>/dev/null <<'PYTHON'
from importlib.metadata import version

import torch
from mergekit.merge_methods import merge_tensors


def share(delta):
    base = torch.zeros(4096)
    models = [torch.full((4096,), delta), torch.full((4096,), 3 * delta)]
    merged = merge_tensors([base, *models], "sce", parameters={"select_topk": 1.0}, base_index=0)
    return merged.mean().item() / delta


found = {delta: round(share(delta), 3) for delta in (1e-5, 1e-4, 3e-4, 1e-3, 1e-2)}
print(f"mergekit {version('mergekit')}: merged delta of d and 3d, in units of d")
for delta, times in found.items():
    print(f"d = {delta:g}: {times}")
assert found == {1e-5: 2.0, 1e-4: 2.0, 3e-4: 2.0, 1e-3: 2.8, 1e-2: 2.8}, found
PYTHON
