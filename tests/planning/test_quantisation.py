"""Models that are quantised in different ways: a warning with both values."""

import json

import pytest
import torch
from safetensors.torch import save_file

import fastmerge as fm

FP8 = {"quant_method": "fp8", "weight_block_size": [4, 4], "modules_to_not_convert": ["lm_head", "gate"]}
GROUP = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 4]}
PACKED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"a": {"weights": GROUP}}}


@pytest.fixture
def warned(tmp_path):
    """What a merge of models says of how they are quantised; each is its section, and the shape of its scales."""

    def run(*models):
        paths = []
        for said, grid in models:
            path = tmp_path / f"m{len(paths)}"
            path.mkdir(exist_ok=True)
            tensors = {"model.norm.weight": torch.ones(8)}
            if grid:
                tail = "_scale" if (said or {}).get("quant_method") == "compressed-tensors" else "_scale_inv"
                tensors |= {"q.weight": torch.ones(8, 8).to(torch.float8_e4m3fn), f"q.weight{tail}": torch.ones(grid)}
            else:
                tensors |= {"q.weight": torch.ones(8, 8)}
            save_file(tensors, path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({"quantization_config": said} if said else {}))
            paths.append(path)
        text = {"merge_method": "linear", "models": [{"model": str(p)} for p in paths], "parameters": {"weight": 1}}
        lines = [line for line in fm.plan(text).warnings if "rounded in different ways" in line]
        return [line.replace(str(tmp_path) + "/", "") for line in lines]

    return run


END = ": weights that were rounded in different ways are merged"


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ((FP8, (2, 2)), (None, None), "quantisation: fp8 in 'm0'; none in 'm1'"),
        ((None, None), (FP8, (2, 2)), "quantisation: none in 'm0'; fp8 in 'm1'"),
        ((FP8, (2, 2)), (PACKED, (2, 2)), "quantisation: fp8 in 'm0'; compressed-tensors in 'm1'"),
        ((FP8, (2, 2)), (FP8 | {"weight_block_size": [8, 4]}, (1, 2)),
         "blocks of quantised weights: 4 x 4 in 'm0'; 8 x 4 in 'm1'"),
        ((FP8, (2, 2)), (FP8 | {"weight_block_size": None}, (1,)),
         "blocks of quantised weights: 4 x 4 in 'm0'; none in 'm1'"),
        ((FP8, (2, 2)), (FP8 | {"modules_to_not_convert": ["lm_head"]}, (2, 2)),
         "modules that are not quantised: gate, lm_head in 'm0'; lm_head in 'm1'"),
        ((PACKED, (2, 2)), (PACKED | {"ignore": []}, (2, 2)),
         "modules that are not quantised: lm_head in 'm0'; none in 'm1'"),
    ],
)  # fmt: skip
def test_both_values_are_said(warned, one, other, said):
    assert warned(one, other) == [said + END]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            (FP8, (2, 2)),
            (FP8 | {"modules_to_not_convert": ["gate", "lm_head"], "activation_scheme": "dynamic"}, (2, 2)),
        ),
        ((FP8, (2, 2)), (FP8, (2, 2))),
        ((FP8, None), (None, None)),
        ((None, None), (None, None)),
        ((PACKED, (2, 2)), (PACKED | {"format": "float-quantized"}, (2, 2))),
    ],
)
def test_what_means_the_same_is_not_warned_of(warned, one, other):
    """Orders, what is said of activations, and a section that dequantised weights left behind are no differences."""
    assert warned(one, other) == []


def test_all_models_stand_in_one_line_and_long_lists_are_compared_whole(warned):
    many = [f"layers.{i}.gate" for i in range(40)]
    models = [FP8 | {"modules_to_not_convert": names} for names in (many, [*many[:-1], "other"], many)]
    (line,) = warned(*((said, (2, 2)) for said in models))
    assert "in 'm0'; " in line
    assert "in 'm1'" in line
    assert "'m2'" not in line
    lines = warned((None, None), (FP8, (2, 2)), (PACKED, (2, 2)))
    assert lines == ["quantisation: none in 'm0'; fp8 in 'm1', compressed-tensors in 'm2'" + END]
