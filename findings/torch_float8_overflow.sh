#!/usr/bin/env bash
# torch 2.13.0 and ml_dtypes 0.6.0: of one weight that does not fit float8, one writes 448 and the other NaN.
#
# Up to 464, which rounds to the largest float8_e4m3fn, both casts have the same bits. Beyond, torch takes 448 for
# everything, infinity too: a model that overflowed becomes one of finite numbers, which no check for infinities finds
# any more. ml_dtypes, which jax, onnx and numpy programs cast with, takes NaN, which the type has in place of
# infinities. For float8_e5m2 and the fnuz types both agree, on infinity and on NaN. For float8_e8m0fnu, the type of
# scales, torch drops the sign and makes 2^-127 of zero, where ml_dtypes takes NaN.
#
# Seen: 480 and infinity as below; of the 65,282 bfloat16 values that are not NaN, 30,512 differ for float8_e4m3fn.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$room"
venv/bin/python - <<'PYTHON'
import math

import ml_dtypes
import numpy as np
import torch

print(f"torch {torch.__version__}, ml_dtypes {ml_dtypes.__version__}")


def both(values, name):
    """The values cast by torch and by ml_dtypes."""
    with np.errstate(over="ignore", invalid="ignore"):
        there = values.astype(getattr(ml_dtypes, name))
    here = torch.from_numpy(values).to(getattr(torch, name)).view(torch.uint8).numpy()
    return here.view(there.dtype), there


def cast(value, name):
    return tuple(float(x[0]) for x in both(np.array([value], np.float32), name))


nan, inf = math.nan, math.inf
wanted = {
    "float8_e4m3fn": {464: (448, 448), 480: (448, nan), 1e30: (448, nan), inf: (448, nan), -inf: (-448, nan)},
    "float8_e5m2": {1e30: (inf, inf), inf: (inf, inf)},
    "float8_e4m3fnuz": {1e30: (nan, nan), inf: (nan, nan)},
    "float8_e8m0fnu": {4: (4, 4), -4: (4, nan), 0: (2**-127, nan), inf: (nan, nan)},
}
for name, values in wanted.items():
    for value, want in values.items():
        found = cast(value, name)
        print(f"{name} of {value:g}: torch {found[0]:g}, ml_dtypes {found[1]:g}")
        assert repr(found) == repr(tuple(map(float, want))), (name, value, found)

every = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)  # all of bfloat16
every = every[~np.isnan(every)]
here, there = both(every, "float8_e4m3fn")
differ = here.view(np.uint8) != there.view(np.uint8)
print(f"of {every.size} bfloat16 values {differ.sum()} differ, all beyond 464: {(np.abs(every[differ]) > 464).all()}")
assert (differ == (np.abs(every) > 464)).all() and (every.size, differ.sum()) == (65282, 30512)
PYTHON
