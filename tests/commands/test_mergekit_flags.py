"""The flags of mergekit's commands: each of them is known, and does what the table says."""

import importlib
import logging
import os
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from fastmerge.cli import main
from fastmerge.commands.mergekit.commands import ALL
from fastmerge.commands.mergekit.flags import COMMANDS, FLAGS, YAML, markdown, shared
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
THEIRS = {
    "mergekit-yaml": "run_yaml",
    "mergekit-multi": "multimerge",
    "mergekit-pytorch": "merge_raw_pytorch",
    "mergekit-moe": "moe",
    "mergekit-extract-lora": "extract_lora",
}


def spelled(command):
    """Every way to write an option, with the name, kind and default of its value."""
    found = {}
    for p in command.params:
        if isinstance(p, click.Option):
            facts = (p.name, bool(p.is_flag), p.count, p.multiple, p.nargs)
            found |= dict.fromkeys((*p.opts, *p.secondary_opts), facts)
    return found


def arguments(command):
    return [p.nargs for p in command.params if isinstance(p, click.Argument)]


@pytest.fixture
def quiet():
    """Importing mergekit warns of numpy's old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("quiet")
def test_every_flag_of_mergekit_is_known(name):
    theirs = importlib.import_module(f"mergekit.scripts.{THEIRS[name]}").main
    mine, given = spelled(ALL[name]), spelled(theirs)
    renamed = {"exclude_regexes": "exclude_regex", "include_regexes": "include_regex"}
    renamed["i_understand_this_is_not_useful_without_training"] = "untrained"
    wanted = {o: (renamed.get(n, n), *kind) for o, (n, *kind) in given.items()}
    assert {o: mine.get(o) for o in wanted} == wanted
    assert arguments(ALL[name]) == arguments(theirs)
    defaults = {p.name: p.default for p in ALL[name].params}
    shared_defaults = {p.name: p.default for p in theirs.params if p.name in {f.field for f in FLAGS}}
    shared_defaults["out_shard_size"] = "5B"
    shared_defaults["device"] = None
    assert {n: defaults[n] or None for n in shared_defaults} == {n: d or None for n, d in shared_defaults.items()}


@pytest.mark.usefixtures("quiet")
def test_the_table_is_in_the_order_of_mergekit_s_options_and_in_the_docs():
    from mergekit.options import MergeOptions

    assert [f.field for f in FLAGS] == list(MergeOptions.model_fields)
    assert (ROOT / "docs" / "mergekit.md").read_text() == markdown(), "python -m fastmerge.commands.mergekit.flags"


def test_help_lists_them_and_shows_theirs():
    listed = CliRunner().invoke(main, ["--help"]).output
    assert [n for n in COMMANDS if f"  {n} " not in listed] == []
    for name in COMMANDS:
        assert "--lora-merge-cache" in CliRunner().invoke(main, [name, "--help"]).output


def settings_of(*words, name=YAML):
    """What flags come to, and the command's result."""
    found = []

    @click.command()
    @shared(name)
    def command(settings):
        found.append(settings)

    done = CliRunner().invoke(command, words)
    return (found[0] if found else None), done


@pytest.mark.parametrize(
    ("words", "device"),
    [
        ((), "cpu"),
        (("--cuda",), "cuda"),
        (("--cuda", "--no-cuda"), "cpu"),
        (("--device", "cuda:1"), "cuda:1"),
        (("--device", "auto"), "auto"),
        (("--multi-gpu",), "auto"),
        (("--gpu-rich",), "auto"),
        (("--cuda", "--multi-gpu"), "auto"),
        (("--device", "cuda:1", "--gpu-rich"), "cuda:1"),
    ],
)
def test_devices(words, device):
    settings, done = settings_of(*words)
    assert settings.device == device, done.output


@pytest.mark.parametrize(
    ("text", "size"),
    [("5B", "5GB"), ("250m", "250MB"), ("7K", "7kB"), ("5GB", "5GB"), ("512MiB", "512MiB"), ("9", "9")],
)
def test_shard_sizes_of_both_kinds(text, size):
    assert settings_of("--out-shard-size", text)[0].shard_size == size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--no-safe-serialization",), "--no-safe-serialization is refused: results are safetensors"),
        (("--unsafe-truncate-embeddings",), "is refused: rows of embeddings"),
        (("--device", "cpu", "--cuda"), "leave one of them out"),
    ],
)
def test_refused_flags_say_why(words, said):
    settings, done = settings_of(*words)
    assert settings is None
    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize("flag", [f for f in FLAGS if f.fate == "no effect"], ids=lambda f: f.field)
def test_flags_without_effect_are_taken_with_a_line(flag):
    words = {bool: (), str: ("x",), int: ("7",)}[flag.type]
    settings, done = settings_of(flag.names[0].partition("/")[0], *words)
    (line,) = done.output.splitlines()
    assert flag.text in line
    assert settings == settings_of()[0]
    assert settings_of(flag.names[0].partition("/")[0], *words, "--quiet")[1].output == ""


def test_flags_that_say_the_default_are_taken_without_a_word():
    words = [
        n for f in FLAGS if f.type is bool for n in f.names[0].split("/")[f.default is False :][:1] if "/" in f.names[0]
    ]
    settings, done = settings_of(*words)
    assert settings == settings_of()[0]
    assert done.output == ""


def test_logging_and_the_hub_s_directory(monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "before")
    settings_of("-v", "--transformers-cache", "here")
    assert logging.getLogger("fastmerge").level == logging.INFO
    assert os.environ["HF_HUB_CACHE"] == "here"
    settings_of("-vv")
    assert logging.getLogger("fastmerge").level == logging.DEBUG


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("flags")
    paths = tiny.family(root)
    (root / "dare.yml").write_text(tiny.recipe(paths, "dare_linear", weight=0.5, density=0.4))
    return root


def run(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def test_mergekit_yaml_merges_like_merge(place):
    done = run("mergekit-yaml", place / "dare.yml", place / "same", "--random-seed", 7)
    assert done.exit_code == 0, done.output
    assert run("merge", place / "dare.yml", place / "merged", "--seed", 7, "--device", "cpu").exit_code == 0
    names = sorted(f.name for f in (place / "same").iterdir())
    assert names == sorted(f.name for f in (place / "merged").iterdir())
    weights = "model.safetensors"
    assert (place / "same" / weights).read_bytes() == (place / "merged" / weights).read_bytes()


def test_files_beside_the_weights_and_shards(place):
    flags = ("--no-copy-tokenizer", "--no-write-model-card", "--out-shard-size", "100K", "--quiet")
    done = run("mergekit-yaml", place / "dare.yml", place / "bare", *flags)
    assert (done.exit_code, done.output) == (0, "")
    shards = sorted(f.name for f in (place / "bare").glob("*.safetensors"))
    assert len(shards) == 3
    others = {f.name for f in (place / "bare").iterdir()} - set(shards)
    assert others == {"config.json", "merge_report.json", "model.safetensors.index.json"}


def test_an_output_that_exists(place):
    (place / "twice").mkdir()  # as mergekit's users do
    assert run("mergekit-yaml", place / "dare.yml", place / "twice", "--quiet").exit_code == 0
    before = load_file(place / "twice" / "model.safetensors")
    done = run("mergekit-yaml", place / "dare.yml", place / "twice", "--random-seed", 1)
    assert done.exit_code == 4
    assert "--overwrite replaces it" in done.output
    done = run("mergekit-yaml", place / "dare.yml", place / "twice", "--random-seed", 1, "--overwrite")
    assert done.exit_code == 0, done.output
    after = load_file(place / "twice" / "model.safetensors")
    assert any((before[n] != after[n]).any() for n in before)


def test_a_device_of_another_kind_is_refused(place):
    done = run("mergekit-yaml", place / "dare.yml", place / "none", "--device", "xpu")
    assert done.exit_code == 6
    assert "expected auto or cpu" in done.output
    assert not (place / "none").exists()
