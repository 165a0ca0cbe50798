#!/usr/bin/env bash
# torch 2.13.0: torch.optim.swa_utils.AveragedModel keeps its averages in the model's type, where they hardly move.
#
# Each update adds a small share of the difference between model and average, and rounds to the type of the parameters.
# In bf16 the steps of an exponential average with the default decay of 0.999 are below half a unit of the last place
# for nearly every weight: the average stays what the model was at the start, and nothing warns of it. A running mean
# (the default of AveragedModel) slows down in the same way as its steps become smaller. There is no option for another
# type, and an average of an fp32 copy takes no bf16 updates. Who merges such "EMA weights" merges the first checkpoint.
#
# Seen with a model that is at another place from the first update on, 3,000 times: the average in fp32 has gone 0.95 of
# the way, in bf16 0.004, and 99 % of its weights have not moved. The mean of 200 models has 5.4 times the error of the
# rounded mean.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6
cd "$room"
venv/bin/python - <<'PYTHON'
import warnings

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

warnings.simplefilter("error")  # what is seen below comes without one
torch.set_num_threads(1)
UPDATES, MODELS = 3000, 200


def model(weight):
    made = nn.Linear(*weight.shape, bias=False).to(weight.dtype)
    made.weight.data.copy_(weight)
    return made


def exact(averaged):
    return averaged.module.weight.detach().double()


print(f"torch {torch.__version__}")
want = 1 - 0.999**UPDATES
found = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    start = torch.randn(64, 64).to(dtype)
    end = (start.float() + 0.02 * torch.randn(64, 64)).to(dtype)
    ema, moved = AveragedModel(model(start), multi_avg_fn=get_ema_multi_avg_fn()), model(end)
    ema.update_parameters(model(start))
    for _ in range(UPDATES):
        ema.update_parameters(moved)
    way, got = end.double() - start, exact(ema)
    gone = (((got - start) * way).sum() / way.square().sum()).item()
    same = ((got == start) | (start == end)).double().mean().item()

    torch.manual_seed(1)
    models = [(start.float() + 0.02 * torch.randn(64, 64)).to(dtype) for _ in range(MODELS)]
    swa = AveragedModel(model(models[0]))
    for weight in models:
        swa.update_parameters(model(weight))
    mean = torch.stack([weight.double() for weight in models]).mean(0)
    error = ((exact(swa) - mean).norm() / (mean.to(dtype).double() - mean).norm()).item()
    found[dtype] = gone, same, error
    print(f"{dtype}: gone {gone:.4f} of the way, in exact numbers {want:.4f}; {same:.1%} of the weights stand still;")
    print(f"  the mean of {MODELS} models has {error:.1f} times the error of the rounded mean")
try:
    ema = AveragedModel(model(torch.zeros(2, 2)), multi_avg_fn=get_ema_multi_avg_fn())
    for _ in range(2):
        ema.update_parameters(model(torch.zeros(2, 2).bfloat16()))
except RuntimeError as error:
    print(f"an average in fp32 of a model in bf16: {error}")
else:
    raise SystemExit("an average in fp32 takes updates in bf16 now")
assert abs(found[torch.float32][0] - want) < 1e-3, found
assert found[torch.bfloat16][0] < 0.01, found
assert found[torch.bfloat16][1] > 0.98, found
assert found[torch.bfloat16][2] > 3, found
PYTHON
