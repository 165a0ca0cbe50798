#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0: a tensor of 4-bit floats can be read as a whole, but no slice of it.
#
# torch keeps two such numbers in an element (float4_e2m1fn_x2), the file counts each: [4, 16] of torch is [4, 32] in
# the header. get_tensor halves the last dimension again; get_slice reports the shape of the file and then tries to give
# it to elements of torch, so that every slice raises, even the one that is all of the tensor.
#
# Seen: RuntimeError "shape '[4, 32]' is invalid for input of size 64" for [0:2], [0:4] and [:, 0:16].
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.2.6 safetensors==0.8.0
cd "$room"
venv/bin/python - <<'PYTHON'
import safetensors
import torch
from safetensors.torch import save_file

codes = torch.arange(64, dtype=torch.uint8).reshape(4, 16)
save_file({"codes": codes, "pairs": codes.clone().view(torch.float4_e2m1fn_x2)}, "model.safetensors")
with safetensors.safe_open("model.safetensors", "pt") as file:
    whole, part = file.get_tensor("pairs"), file.get_slice("pairs")
    print(f"safetensors {safetensors.__version__}, torch {torch.__version__}")
    print(f"get_tensor: {list(whole.shape)} {whole.dtype}; get_slice: {part.get_shape()} {part.get_dtype()}")
    assert list(whole.shape) == [4, 16], whole.shape
    assert torch.equal(whole.view(torch.uint8), codes)
    assert (part.get_shape(), part.get_dtype()) == ([4, 32], "F4"), (part.get_shape(), part.get_dtype())
    assert torch.equal(file.get_slice("codes")[0:2], codes[0:2])
    for what, index in {"[0:2]": slice(0, 2), "[0:4]": slice(0, 4), "[:, 0:16]": (slice(None), slice(0, 16))}.items():
        try:
            found = part[index]
        except RuntimeError as error:
            print(f"{what}: {error}")
            assert "is invalid for input of size" in str(error), error
        else:
            raise SystemExit(f"{what} works now: {list(found.shape)}")
PYTHON
