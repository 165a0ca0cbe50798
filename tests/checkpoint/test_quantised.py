"""Which tensors are codes and scales: layouts that are read, and what is refused or called damaged."""

import json

import pytest

from fastmerge.checkpoint import Checkpoint, quantised
from fastmerge.dtypes import BF16, F16
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import save, tensor

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
W = "l.weight"


def opened(directory, tensors, said=BLOCKS):
    save(directory, {"model.safetensors": tensors})
    if said:
        (directory / "config.json").write_text(json.dumps({"quantization_config": said}))
    return Checkpoint.open(directory, quantised=True)


def refused(directory, tensors, said=BLOCKS) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(directory, tensors, said)
    return "\n".join(caught.value.problems)


GRIDS = [
    ([256, 384], [2, 3], BLOCKS, (1, 256, 384), (128, 128)),
    ([300, 200], [3, 2], BLOCKS, (1, 300, 200), (128, 128)),
    ([300, 200], [3, 2], {"quant_method": "fp8"}, (1, 300, 200), (128, 128)),
    ([300, 200], [5, 4], {"quant_method": "fp8", "weight_block_size": [64, 64]}, (1, 300, 200), (64, 64)),
    ([60, 40], [6, 8], {"quant_method": "fp8"}, (1, 60, 40), (10, 5)),  # as transformers divides
    ([60, 40], [1, 40], {"quant_method": "fp8"}, (1, 60, 40), (60, 1)),  # the same
    ([60, 40], [1, 1], BLOCKS, (1, 60, 40), (60, 40)),
    ([60, 40], [1], BLOCKS, (1, 60, 40), (60, 40)),
    ([60, 40], [], BLOCKS, (1, 60, 40), (60, 40)),
    ([60, 40], [60], BLOCKS, (1, 60, 40), (1, 40)),
    ([60, 40], [60, 1], BLOCKS, (1, 60, 40), (1, 40)),
    ([3, 256, 384], [3, 2, 3], BLOCKS, (3, 256, 384), (128, 128)),
    ([3, 60, 40], [3, 60, 1], BLOCKS, (3, 60, 40), (1, 40)),
    ([3, 60, 40], [3, 60], BLOCKS, (3, 60, 40), (1, 40)),
    ([3, 60, 40], [3, 1, 1], BLOCKS, (3, 60, 40), (60, 40)),
    ([3, 60, 40], [], BLOCKS, (1, 180, 40), (180, 40)),
]


@pytest.mark.parametrize(("shape", "grid", "said", "stored", "block"), GRIDS)
@pytest.mark.parametrize("tail", ["_scale_inv", "_scale"])
def test_scales_of_float8(tmp_path, shape, grid, said, stored, block, tail):
    model = opened(tmp_path, {W: tensor("F8_E4M3", *shape), W + tail: tensor("F32", *grid)}, said)
    weight = model.quantised[W]
    assert (weight.code, weight.shape, weight.stored, weight.block) == ("float8_e4m3fn", tuple(shape), stored, block)
    assert weight.dtype is BF16


@pytest.mark.parametrize("grid", [[2, 5], [3, 3], [387], [2], [256, 2, 1]])
def test_scales_that_fit_no_weight(tmp_path, grid):
    said = refused(tmp_path, {W: tensor("F8_E4M3", 256, 387), W + "_scale_inv": tensor("F32", *grid)})
    assert f"scales {grid} that do not fit weights [256, 387]: 'l.weight'" in said


@pytest.mark.parametrize(
    ("tensors", "code", "block", "shape"),
    [
        ({W: tensor("I8", 32, 64), W + "_scale": tensor("BF16", 32, 1)}, "int8", (1, 64), (32, 64)),
        ({W: tensor("F8_E5M2", 32, 64), W + "_scale": tensor("BF16", 1)}, "float8_e5m2", (32, 64), (32, 64)),
        (
            {W + "_packed": tensor("U8", 32, 32), W + "_scale": tensor("U8", 32, 2)},
            "float4_e2m1fn", (1, 32), (32, 64),
        ),
        (
            {
                W + "_packed": tensor("U8", 32, 32),
                W + "_scale": tensor("F8_E4M3", 32, 4),
                W + "_global_scale": tensor("F32", 1),
            },
            "float4_e2m1fn", (1, 16), (32, 64),
        ),
        ({W + "_packed": tensor("I32", 32, 8), W + "_scale": tensor("F16", 32, 4)}, "int4", (1, 16), (32, 64)),
        ({W + "_packed": tensor("I32", 32, 16), W + "_scale": tensor("F16", 32, 4)}, "int8", (1, 16), (32, 64)),
    ],
)  # fmt: skip
def test_layouts_of_compressed_tensors(tmp_path, tensors, code, block, shape):
    weights = {"num_bits": 4, "type": "int", "group_size": 16}
    said = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}
    model = opened(tmp_path, tensors | {"l.input_scale": tensor("F32", 1)}, said)
    weight = model.quantised[W]
    assert (weight.code, weight.block, weight.shape) == (code, block, shape)
    assert weight.dtype is (F16 if tensors[W + "_scale"][0] == "F16" else BF16)
    assert [i.name for i in weight.rest] == ["l.input_scale"]


def test_shapes_are_read_only_where_groups_do_not_tell(tmp_path, monkeypatch):
    weights = {"num_bits": 4, "type": "int", "group_size": 16}
    said = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}
    shape = ("I64", [2], (32).to_bytes(8, "little") + (61).to_bytes(8, "little"))
    rows = {W + "_packed": tensor("I32", 32, 8), W + "_scale": tensor("F16", 32, 1), W + "_shape": shape}
    assert opened(tmp_path / "channel", rows, said).quantised[W].shape == (32, 61)
    groups = {**rows, W + "_scale": tensor("F16", 32, 4)}
    with monkeypatch.context() as m:
        m.setattr(quantised._Search, "_shape", lambda *_: pytest.fail("read"))
        assert opened(tmp_path / "groups", groups, said).quantised[W].shape == (32, 64)
    lies = ("I64", [2], (32).to_bytes(8, "little") + (90).to_bytes(8, "little"))
    assert "weight_shape does not fit" in refused(tmp_path / "lies", {**rows, W + "_shape": lies}, said)


def test_blocks_of_gpt_oss(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": tensor("U8", 2, 6, 3, 16), f"{name}_scales": tensor("U8", 2, 6, 3)}
    weight = opened(tmp_path, tensors, {"quant_method": "mxfp4"}).quantised[name]
    assert (weight.shape, weight.stored, weight.transposed) == ((2, 96, 6), (2, 6, 96), True)
    wrong = {**tensors, f"{name}_scales": tensor("U8", 2, 6, 4)}
    assert "MXFP4 blocks and scales that do not fit" in refused(tmp_path / "x", wrong, {"quant_method": "mxfp4"})


DAMAGED = [
    ({W: tensor("F8_E4M3", 8, 8)}, BLOCKS, "float8_e4m3fn: 'l.weight': without scales, which turn such codes into"),
    (
        {W: tensor("F8_E4M3", 8, 8), W + "_scale_inv": tensor("F32", 1, 1), "m.weight": tensor("F8_E4M3", 8, 8)},
        BLOCKS,
        "float8_e4m3fn: 'm.weight': without scales",
    ),
    (
        {W: tensor("F8_E4M3", 8, 8), W + "_scale_inv": tensor("F32", 1, 1), "m.weight_scale_inv": tensor("F32", 1, 1)},
        BLOCKS,
        "scales of weights that are not there, or not quantised: 'm.weight_scale_inv'",
    ),
    ({"e.gate_up_proj_blocks": tensor("BF16", 2, 8, 8)}, None, "bfloat16 weights under the names of MXFP4 blocks"),
    ({W: tensor("BF16", 8, 8), W + "_scale_inv": tensor("F32", 1, 1)}, BLOCKS, "beside weights that are not FP8"),
    (
        {
            "l.w": tensor("BF16", 8, 8),
            "l.w_packed": tensor("U8", 8, 16),
            "l.w_scale": tensor("U8", 8, 1),
        },
        {"quant_method": "compressed-tensors"},
        "weights both as they are and quantised: 'l.w'",
    ),
    (
        {W + "_packed": tensor("I32", 8, 4), W + "_scale": tensor("BF16", 8, 2), W + "_g_idx": tensor("I32", 32)},
        {"quant_method": "compressed-tensors"},
        "groups in the order of activations",
    ),
    (
        {W: tensor("I8", 8, 8), W + "_scale": tensor("BF16", 8, 1), W + "_zero_point": tensor("I32", 8, 1)},
        {"quant_method": "compressed-tensors"},
        "zero points that do not fit",
    ),
]


@pytest.mark.parametrize(("tensors", "said", "problem"), DAMAGED)
def test_damage_is_named(tmp_path, tensors, said, problem):
    assert problem in refused(tmp_path, tensors, said)


SPARSE = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}
ROTATED = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {}}}}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"quant_method": "gptq"}, "quantised with GPTQ"),
        ({"quant_method": "new"}, "quantised with new"),
        (SPARSE, "expected dense weights, got 'sparse-24-bitmask'"),
        (ROTATED, "those of a rotated model"),
    ],
)
def test_what_codes_and_scales_alone_do_not_give(tmp_path, said, problem):
    tensors = {W: tensor("F8_E4M3", 8, 8), W + "_scale": tensor("BF16", 8, 1)}
    assert problem in refused(tmp_path, tensors, said)


def test_scales_of_which_the_configuration_says_nothing(tmp_path):
    tensors = {W: tensor("F8_E4M3", 8, 8), W + "_scale_inv": tensor("F32", 1, 1)}
    model = opened(tmp_path, tensors, None)
    assert W in model.quantised
    assert "no quantization_config, and weights that are quantised: 'l.weight'" in model.warnings[0]


def test_scales_of_activations_belong_to_no_weight(tmp_path):
    tensors = {W: tensor("F8_E4M3", 8, 8), W + "_scale": tensor("BF16", 8, 1), "attn.k_scale": tensor("F32", 1)}
    model = opened(tmp_path, tensors, {"quant_method": "compressed-tensors"})
    assert [i.name for i in model.about] == ["attn.k_scale"]


@pytest.mark.parametrize("value", [[], "x", {"g": 1}, {"g": {"weights": 3}}, {"g": {"weights": {"group_size": []}}}])
def test_odd_settings_are_no_errors(tmp_path, value):
    said = {"quant_method": "fp8", "config_groups": value, "weight_block_size": [0, "x"]}
    model = opened(tmp_path, {W: tensor("F8_E4M3", 8, 8), W + "_scale": tensor("BF16", 8, 1)}, said)
    assert W in model.quantised


def test_nobody_else_gets_codes(tmp_path):
    """Programs that do not ask for quantised weights are told of them, as before."""
    save(tmp_path, {"model.safetensors": {W: tensor("F8_E4M3", 8, 8), W + "_scale": tensor("BF16", 8, 1)}})
    with pytest.raises(CheckpointError, match="quantised with FP8 with scales: 'l.weight'"):
        Checkpoint.open(tmp_path)
