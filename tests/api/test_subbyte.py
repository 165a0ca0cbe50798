"""Types below a byte (F4, F6_E2M3, F6_E3M2) and other exotic ones: copied as they are, else refused by name."""

import pytest
from safetensors import safe_open

import fastmerge
from fastmerge.commands.verify import verify
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import save, tensor

TAGS = ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"]


def model(directory, tag, seed=0):
    tensors = {"a": tensor("BF16", 8), "codes": tensor(tag, 6, 4, seed=seed), "last": tensor(tag, 4, seed=seed + 1)}
    return save(directory, {"model.safetensors": tensors})


@pytest.mark.parametrize("tag", TAGS)
def test_passthrough_copies_them(tmp_path, tag):
    path = model(tmp_path / "m", tag)
    out = tmp_path / "out"
    fastmerge.merge({"merge_method": "passthrough", "models": [{"model": str(path)}]}, out, device="cpu")
    found = verify(out)
    assert found.ok, found.problems
    assert (
        found.checked == found.nbytes == sum(len(t[2]) for t in (tensor("BF16", 8), tensor(tag, 6, 4), tensor(tag, 4)))
    )
    with safe_open(out / "model.safetensors", "np") as file:
        assert (file.get_slice("codes").get_dtype(), file.get_slice("codes").get_shape()) == (tag, [6, 4])
    data = (out / "model.safetensors").read_bytes()
    assert tensor(tag, 6, 4)[2] in data
    assert tensor(tag, 4, seed=1)[2] in data


@pytest.mark.parametrize("tag", ["F4", "F6_E2M3", "F6_E3M2"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_arithmetic_on_them_is_refused_by_name(tmp_path, tag, dtype):
    paths = [model(tmp_path / n, tag, seed) for n, seed in (("x", 0), ("y", 5))]
    recipe = {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 1}} for p in paths]}
    if dtype:
        recipe["dtype"] = dtype
    name = {"F4": "float4_e2m1fn", "F6_E2M3": "float6_e2m3fn", "F6_E3M2": "float6_e3m2fn"}[tag]
    with pytest.raises(CheckpointError, match=rf"codes: .*{name}"):
        fastmerge.merge(recipe, tmp_path / "out", device="cpu")
