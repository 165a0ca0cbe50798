"""What people ask for by mistake: a clear error, and nothing is written."""

import json

import pytest
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
        (b"\xff\n", 2, "expected UTF-8"),
        (b'{"text": "hello"}\n', 3, "no tokenizer"),
    ],
)
def test_calibration_files(models, tmp_path, lines, code, why):
    (tmp_path / "data").write_bytes(lines)
    options = ("--target-layers", 2, "--calibration", tmp_path / "data")
    assert asked("slice", models / "llama", tmp_path / "out", *options)[0] == code
    assert why in asked("slice", models / "llama", tmp_path / "out", *options)[1]
