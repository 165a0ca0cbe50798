"""The commands of DNA transfer: options from configurations, dry runs, and what they write."""

import json

import pytest
from click.testing import CliRunner

from fastmerge.cli import main
from tests.dna import zoo


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "llama"
    return path, zoo.saved("llama", path)


def run(*arguments, code=0):
    found = CliRunner().invoke(main, [str(a) for a in arguments])
    assert found.exit_code == code, found.output
    return found.stdout if code == 0 else found.output


def test_a_dry_run_shows_what_would_be_made(model, tmp_path):
    path, _ = model
    out = run("upcycle", path, tmp_path / "out", "--num-experts", 4, "--expert-init-noise", 0, "--dry-run")
    assert not (tmp_path / "out").exists()
    assert "num_local_experts" in out
    assert "- -> 4" in out
    assert "llama -> mixtral" in out
    facts = json.loads(run("grow", path, tmp_path / "out", "--width-multiplier", 2, "--dry-run", "--json"))
    assert facts["operation"]
    assert facts["config"]["hidden_size"] == [32, 64]
    assert facts["options"]["width_multiplier"] == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "layers", "most"),
    [
        (["upcycle", "--num-experts", "4", "--expert-init-noise", "0"], 3, 1e-5),
        (["depth-upscale", "--arrangement", "0-1,1-2", "--init-noise", "0", "--preserve-output"], 4, 0),
        (["grow", "--method", "net2wider", "--width-multiplier", "1.5"], 3, 1e-5),
        (["grow", "--method", "net2deeper", "--insertion-positions", "0,2"], 5, 0),
    ],
    ids=["upcycle", "depth-upscale", "wider", "deeper"],
)
def test_what_is_written_computes_the_same(model, tmp_path, arguments, layers, most):
    path, dense = model
    command, *options = arguments
    run(command, path, tmp_path / "out", *options, "--quiet")
    made = zoo.load(tmp_path / "out")
    assert made.config.num_hidden_layers == layers
    assert zoo.difference(dense, made) <= most
    report = json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())
    assert report["operation"]
    run(command, path, tmp_path / "out", *options, code=4)  # what is there is not overwritten
    run(command, path, tmp_path / "out", *options, "--overwrite", "--json")


def test_wrong_requests_write_nothing(model, tmp_path):
    path, _ = model
    text = run("upcycle", path, tmp_path / "out", "--num-experts", 2, "--num-experts-per-token", 3, code=2)
    assert "num_experts_per_token: expected at most num_experts (2), got 3" in text
    text = run("depth-upscale", path, tmp_path / "out", "--arrangement", "0,7", code=2)
    assert "expected layers from 0 to 2, got 7" in text
    text = run("depth-upscale", path, tmp_path / "out", "--arrangement", "0,x", code=2)
    assert "expected whole numbers such as 0,4-9, got 'x'" in text
    text = run("grow", path, tmp_path / "out", "--hidden-size", 31, code=2)
    assert "hidden_size" in text
    assert list(tmp_path.iterdir()) == []


def test_slices_families_and_mixtures(model, tmp_path):
    path, dense = model
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text("[3, 4, 5, 6]\n\n" + json.dumps({"input_ids": zoo.tokens(1, 20)[0].tolist()}))
    sliced = ("slice", path, tmp_path / "small", "--target-layers", 2, "--target-intermediate-size", 40)
    run(*sliced, "--calibration", tokens, "--quiet")
    assert zoo.load(tmp_path / "small").config.intermediate_size == 40
    run("family", path, tmp_path / "family", "--size", "3x32", "--size", "2x16", "--quiet")
    assert zoo.difference(dense, zoo.load(tmp_path / "family" / "3L_32D")) == 0
    assert zoo.load(tmp_path / "family" / "2L_16D").config.hidden_size == 16
    moe = tmp_path / "moe"
    run("upcycle", path, moe, "--num-experts", 4, "--quiet")
    run("experts", "more", moe, tmp_path / "eight", "--quiet")
    same = json.loads(run("compare", moe, tmp_path / "eight", "--json"))
    assert same["same"] is True
    run("experts", "fewer", moe, tmp_path / "two", "--num-experts", 2, "--rest", "merge", "--quiet")
    assert "of the largest logit" in run("compare", moe, tmp_path / "two", "--calibration", tokens, code=1)
    run("experts", "join", moe, tmp_path / "two", tmp_path / "six", "--quiet")
    assert zoo.load(tmp_path / "six").config.num_local_experts == 6


def test_wrong_sizes_and_tokens_are_said(model, tmp_path):
    path, _ = model
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text('[3, 4]\n{"words": 3}\n[-1]\n')
    text = run("slice", path, tmp_path / "out", "--target-layers", 2, "--calibration", tokens, code=2)
    assert "line 2: expected token ids" in text
    assert "line 3: expected token ids" in text
    assert "expected LAYERSxHIDDEN" in run("family", path, tmp_path / "out", "--size", "3-32", code=2)
    assert "expected --num-experts" in run("experts", "fewer", path, tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_every_option_says_what_it_does():
    import click

    from fastmerge.commands.dna.commands import ALL, experts

    for command in (*ALL.values(), *experts.commands.values()):
        for option in command.params:
            if isinstance(option, click.Option) and not isinstance(option.type, click.Choice):
                assert len(option.help or "") > 8, (command.name, option.name)
