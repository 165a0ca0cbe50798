"""What people ask for by mistake: a clear error, and nothing is written."""

import json

import pytest
import torch
from click.testing import CliRunner

from fastmerge import dna
from fastmerge.cli import main
from fastmerge.errors import CheckpointError, RecipeError
from tests.dna import zoo


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for kind in ("llama", "mixtral"):
        zoo.saved(kind, path / kind)
    return path


def asked(*words):
    """The exit code of a command, and what it says."""
    result = CliRunner().invoke(main, [str(w) for w in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("upcycle llama --num-experts 1000000000", "num_experts: expected a whole number from 2 to 65536"),
        ("experts more mixtral --num-experts 1000000000", "at most 65536, got 1000000000"),
        ("depth-upscale llama --target-layers 700000000", "expected at most 65536 layers, got 700000000"),
        ("depth-upscale llama --scale-factor 999999", "expected at most 65536 layers, got 2999997"),
        ("grow llama --method net2deeper --num-new-layers 1000000000", "num_new_layers: expected a whole number"),
        ("grow llama --width-multiplier 1000000", "width_multiplier: expected sizes up to 1048576"),
        ("grow llama --hidden-size 4000000000", "hidden_size: expected a whole number from 32, which it is now, to"),
        ("grow llama --method net2deeper --hidden-size 64", "hidden_size: new layers are as wide as the others"),
        ("grow llama --method net2deeper --width-multiplier 3", "width_multiplier: is for wider models"),
        ("grow llama --num-new-layers 2", "num_new_layers: is for deeper models: expected --method net2deeper"),
        ("upcycle mixtral", "mixtral has experts already; 'experts more' multiplies them"),
    ],
)
def test_requests_that_make_no_sense(models, tmp_path, words, why):
    command, _, rest = words.partition(" mixtral" if " mixtral" in words else " llama")
    model = models / ("mixtral" if " mixtral" in words else "llama")
    code, said = asked(*command.split(), model, tmp_path / "out", *rest.split(), "--dry-run")
    assert code == 2
    assert why in said


def test_a_result_has_so_many_tensors(monkeypatch):
    monkeypatch.setattr("fastmerge.dna.draft.MOST_TENSORS", 40)
    with pytest.raises(RecipeError, match="expected a result of at most 40 tensors"):
        dna.plan_upcycle(dna.Parent.open(zoo.model("llama")))


def test_a_family_is_refused_whole(models, tmp_path):
    (tmp_path / "out/2L_16D").mkdir(parents=True)
    code, said = asked("family", models / "llama", tmp_path / "out", "--size", "3x16", "--size", "2x16")
    assert code == 4
    assert "2L_16D: exists; --overwrite replaces it" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["2L_16D"]


def test_quantized_weights_are_refused(models):
    model = zoo.model("llama")
    config = {**model.config.to_dict(), "quantization_config": {"bits": 4}}
    for make in (
        lambda s: dna.upcycle_dense_to_moe(s, dna.UpcyclingConfig(), model_config=config),
        lambda s: dna.depth_upscale(s, dna.DepthUpscaleConfig(), model_config=config),
        lambda s: dna.slice_model(s, dna.ModelSlicingConfig(target_layers=2), model_config=config),
    ):
        with pytest.raises(CheckpointError, match="quantization_config: expected weights that are not quantized"):
            make(model.state_dict())


def test_models_that_transformers_cannot_load_are_not_compared(models, tmp_path):
    zoo.saved("llama", tmp_path / "broken")
    file = tmp_path / "broken/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "none_of_these"}))
    code, said = asked("compare", models / "llama", tmp_path / "broken")
    assert code == 3
    assert "transformers cannot load it" in said


@pytest.mark.parametrize(
    ("lines", "code", "why"),
    [
        (b"[1, 9223372036854775808]\n", 2, "line 1: expected token ids"),
        (b"[1, 97]\n", 2, "calibration_data: expected tokens from 0 to 96, got 97"),
        (b"\xff\n", 2, "expected UTF-8"),
        (b'{"text": "hello"}\n', 3, "no tokenizer"),
    ],
)
def test_calibration_files(models, tmp_path, lines, code, why):
    (tmp_path / "data").write_bytes(lines)
    options = ("--target-layers", 2, "--calibration", tmp_path / "data")
    assert asked("slice", models / "llama", tmp_path / "out", *options)[0] == code
    assert why in asked("slice", models / "llama", tmp_path / "out", *options)[1]


def test_tokens_of_no_vocabulary_are_not_routed(models, tmp_path):
    (tmp_path / "data").write_text("[97]")
    options = ("--num-experts", 2, "--keep-by", "counts", "--calibration", tmp_path / "data")
    code, said = asked("experts", "fewer", models / "mixtral", tmp_path / "out", *options)
    assert code == 2
    assert "expected tokens from 0 to 96, got 97" in said


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_key_value_heads", "2"), ("num_key_value_heads", 0), ("head_dim", -8), ("intermediate_size", None),
     ("rope_parameters", 5)],
)  # fmt: skip
def test_configurations_are_checked(key, value):
    model = zoo.model("llama")
    config = {**model.config.to_dict(), key: value}
    with pytest.raises(CheckpointError, match=f"config.json: {key}: expected"):
        dna.upcycle_dense_to_moe(model.state_dict(), dna.UpcyclingConfig(), model_config=config)


def test_arguments_of_other_types_are_refused():
    model = zoo.model("llama")
    state, config = model.state_dict(), model.config.to_dict()
    deeper = {"method": "net2deeper", "insertion_positions": None}
    for make, why in (
        (lambda: dna.upcycle_dense_to_moe(model, dna.UpcyclingConfig(seed=1.5)), "seed: expected a 64-bit"),
        (lambda: dna.upcycle_dense_to_moe(model, dna.UpcyclingConfig(layers=None)), "layers: expected all"),
        (lambda: dna.grow_model_depth(model, dna.ModelGrowthConfig(**deeper)), "insertion_positions: expected numbers"),
        (lambda: dna.create_model_family(model, None), "sizes: expected at least one pair"),
        (lambda: dna.create_dna_transfer_pipeline(model, ["slice"]), "target_config: expected a mapping"),
        (lambda: dna.create_dna_transfer_pipeline(model, {1: 2}), "1: UpcyclingConfig has no such field"),
    ):
        with pytest.raises(RecipeError, match=why):
            make()
    name = "model.layers.0.self_attn.q_proj.weight"
    small = {**state, name: state[name].to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=f"{name}: expected floating-point numbers, got float8_e4m3fn"):
        dna.slice_model(small, dna.ModelSlicingConfig(target_layers=2), model_config=config)
    with pytest.raises(CheckpointError, match=f"{name}: expected floating-point numbers, got float8_e4m3fn"):
        dna.grow_model_width(small, dna.ModelGrowthConfig(width_multiplier=1.5), model_config=config)
    with pytest.raises(CheckpointError, match="5: expected the name of a tensor"):
        dna.slice_model({**state, 5: state[name]}, dna.ModelSlicingConfig(target_layers=2), model_config=config)
