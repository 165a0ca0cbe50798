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
    return found.output


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


@pytest.mark.parametrize("command", ["upcycle", "depth-upscale", "grow"])
def test_every_option_says_what_it_does(command):
    import click

    from fastmerge.commands.dna.commands import ALL

    for option in ALL[command].params:
        if isinstance(option, click.Option):
            assert len(option.help or "") > 8, option.name
