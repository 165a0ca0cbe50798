"""mergekit's run_merge and its command with the adapter: what the engine merges, and what it leaves to mergekit."""

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import click
import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.adapters import mergekit as adapter
from fastmerge.adapters.mergekit import merges, options
from tests import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a name of numpy's that mergekit 0.1.5 uses
    import mergekit.merge as mkmerge
    import mergekit.options as mkoptions
    import mergekit.scripts.run_yaml as mkyaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge_methods import registry

CONFIG = dict(hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, vocab_size=300)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    base = tiny.state(0)
    found = {"base": tiny.write(root / "base", base, config=CONFIG)}
    for i, name in enumerate("abc"):
        found[name] = tiny.write(root / name, tiny.state(i + 1, base=base), shards=i + 1, config=CONFIG)
    return found


@pytest.fixture
def installed():
    adapter.install()
    yield adapter
    adapter.uninstall()


def config(paths, method="ties", **parts):
    text = tiny.recipe(paths, method, weight=0.5, density=0.4)
    return MergeConfiguration.model_validate({**yaml.safe_load(text), **parts})


def weights(directory):
    return {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}


def test_a_merge_from_disk_to_disk_is_the_engines(paths, tmp_path, installed, caplog):
    out, options = tmp_path / "out", mkoptions.MergeOptions(quiet=True)
    out.mkdir()  # mergekit's callers often make it
    assert mkmerge.run_merge(config(paths), str(out), options) is None
    assert caplog.text == ""
    assert json.loads((out / "merge_report.json").read_text())["backend"] == "native"
    adapter.uninstall()
    mkmerge.run_merge(config(paths), str(tmp_path / "theirs"), options)
    ours, theirs = weights(out), weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all((ours[n] - theirs[n]).abs().max() <= 0.01 for n in ours)
    assert {p.name for p in (tmp_path / "theirs").iterdir()} <= {p.name for p in out.iterdir()}
    adapter.install()
    mkmerge.run_merge(config(paths), str(tmp_path / "theirs"), options)  # an output of mergekit's is replaced
    assert weights(tmp_path / "theirs").keys() == ours.keys()
    assert (tmp_path / "theirs" / "merge_report.json").exists()


def test_every_part_of_a_configuration_is_said_alike(paths):
    text = f"""
merge_method: ties
base_model: {paths["base"]}
slices:
  - sources:
      - {{model: {paths["base"]}, layer_range: [0, 1]}}
      - {{model: {paths["a"]}, layer_range: [0, 1], parameters: {{weight: [0.1, 0.9], density: 0.4}}}}
      - {{model: {{model: {{path: {paths["b"]}}}}}, layer_range: [0, 1], parameters: {{weight: 1}}}}
    parameters: {{normalize: false}}
parameters: {{density: [{{filter: mlp, value: 0.2}}, {{value: 0.6}}], lambda: 0.5, int8_mask: true}}
dtype: float16
out_dtype: bfloat16
"""
    plain = merges.plain(MergeConfiguration.model_validate(yaml.safe_load(text)))
    assert fm.Recipe.load(plain) == fm.Recipe.load(text)
    lora = MergeConfiguration(merge_method="linear", models=[{"model": "x@1+y"}])
    (given,) = merges.plain(lora)["models"]
    assert given == {"model": {"model": {"path": "x", "revision": "1"}, "lora": {"path": "y"}}}


def test_options_are_carried_out(paths, tmp_path, installed, monkeypatch):
    asked, engine = [], merges.engine
    seen = SimpleNamespace(
        plan=engine.plan, merge=lambda *a, **k: (asked.append(k["device"]), engine.merge(*a, **k))[1]
    )
    monkeypatch.setattr(merges, "engine", seen)
    small = mkoptions.MergeOptions(
        out_shard_size=100_000, write_model_card=False, copy_tokenizer=False, random_seed=7, quiet=True
    )
    mkmerge.run_merge(config(paths, "dare_linear"), str(tmp_path / "out"), small)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert not names & {"README.md", "mergekit_config.yml", "tokenizer_config.json"}
    assert len([n for n in names if n.endswith(".safetensors")]) > 2
    fm.merge(merges.plain(config(paths, "dare_linear")), tmp_path / "same", seed=7)
    want = weights(tmp_path / "same")
    assert all(torch.equal(t, want[n]) for n, t in weights(tmp_path / "out").items())
    assert asked == ["cpu"]
    for given, where in (
        (dict(device="cuda:1"), "cuda:1"),
        (dict(cuda=True), "cuda"),
        (dict(multi_gpu=True, cuda=True), "auto"),
        (dict(gpu_rich=True), "auto"),
        (dict(device="xpu"), "cpu"),
    ):
        assert options.device(mkoptions.MergeOptions(**given)) == where


@pytest.mark.parametrize(
    ("parts", "kwargs", "words"),
    [
        ({}, dict(safe_serialization=False), "safetensors only"),
        ({}, dict(transformers_cache="somewhere"), "org/none"),
        (dict(parameters={"density": -0.5}, models=None), {}, "density"),
        (dict(dtype="float64"), {}, "mergekit computes in it"),
        ({"foreign": "notes.txt"}, {}, "holds 'notes.txt'"),
    ],
)
def test_what_is_refused_is_mergekits_with_the_reason(paths, tmp_path, monkeypatch, caplog, parts, kwargs, words):
    given = config(paths)
    if foreign := parts.pop("foreign", None):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / foreign).write_text("mine")
    if "models" in parts:
        parts["models"] = [{"model": str(paths["a"]), "parameters": {"weight": 1}}]
    if "transformers_cache" in kwargs:
        parts["base_model"] = "org/none"
    given = config(paths, **parts)
    theirs = []
    monkeypatch.setattr(mkmerge, "run_merge", lambda *a: theirs.append(a))
    adapter.install(methods=False)
    try:
        mkmerge.run_merge(given, str(tmp_path / "out"), call := mkoptions.MergeOptions(**kwargs))
    finally:
        adapter.uninstall()
    assert theirs == [(given, str(tmp_path / "out"), call, None)]
    assert "mergekit merges this itself: " in caplog.text
    assert words in caplog.text
    assert not foreign or (tmp_path / "out" / foreign).read_text() == "mine"


def test_errors_of_a_merge_that_began_are_raised(paths, tmp_path, installed):
    with pytest.raises(fm.OutputError, match="holds the input"):
        mkmerge.run_merge(config(paths), str(paths["a"]), mkoptions.MergeOptions())
    assert (paths["a"] / "config.json").exists()


def snapshot():
    names = {m: vars(sys.modules[m]).get("run_merge") for m in (mkmerge.__name__, mkyaml.__name__, __name__)}
    return names, dict(registry._METHODS), [dict(vars(m)) for m in registry._METHODS.values()]


def test_uninstall_restores_every_object(monkeypatch):
    monkeypatch.setitem(globals(), "run_merge", mkmerge.run_merge)
    before = snapshot()
    for levels in ({}, dict(methods=False), dict(merges=False)):
        adapter.install(**levels)
        once = snapshot()
        assert once != before
        adapter.install(**levels)
        assert snapshot() == once
        adapter.uninstall()
        assert snapshot() == before
    adapter.install()
    assert globals()["run_merge"] is mkyaml.run_merge is mkmerge.run_merge is not before[0][__name__]
    adapter.uninstall()
    adapter.uninstall()
    assert snapshot() == before


@pytest.mark.parametrize(("version", "words"), [("0.1.4", "mergekit 0.1.4: expected 0.1.5"), (None, "not installed")])
def test_other_versions_are_refused(monkeypatch, version, words):
    from importlib import metadata

    def found(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    before = snapshot()
    monkeypatch.setattr(metadata, "version", found)
    with pytest.raises(fm.BackendUnavailable, match=words):
        adapter.install()
    assert snapshot() == before


# ---- the command -------------------------------------------------------------------------------------------

LINES = [
    "c.yml out",
    "c.yml out --cuda --low-cpu-memory --out-shard-size 2B",
    "--random-seed=7 c.yml --no-copy-tokenizer out -vv -v -j 4 --device cuda:1",
    "c.yml out --out-shard-size 500m --no-write-model-card --gpu-rich",
    "c.yml out --no-safe-serialization --transformers-cache x --lora-merge-dtype float16 --quiet --no-quiet",
]


def test_options_and_their_defaults_are_mergekits():
    theirs = {n: f.default for n, f in mkoptions.MergeOptions.model_fields.items()}
    assert vars(options.parse(["c.yml", "out"]).options) == theirs


@pytest.mark.parametrize("line", LINES)
def test_command_lines_are_read_as_mergekit_reads_them(line):
    @click.command()
    @click.argument("config")
    @click.argument("out")
    @mkoptions.add_merge_options
    def command(config, out, merge_options):
        return config, out, merge_options

    config, out, theirs = command.main(line.split(), standalone_mode=False)
    ours = options.parse(line.split())
    assert (ours.config, ours.out) == (config, out)
    derived = {"device", "cuda", "low_cpu_memory", "read_to_gpu", "multi_gpu"}  # by mergekit's validators
    ours_of, theirs_of = vars(ours.options), theirs.model_dump()
    assert {n: v for n, v in ours_of.items() if n not in derived} == {
        n: v for n, v in theirs_of.items() if n not in derived
    }
    assert options.device(ours.options) == options.device(theirs)


@pytest.mark.parametrize(
    "line",
    ["", "c.yml", "a b c", "--help", "a b --unknown", "a b --device", "a b --random-seed x", "a b --out-shard-size x",
     "a b --no-device cpu", "a b --no-gpu-rich", "a b --cuda=1", "a b -x"],
)  # fmt: skip
def test_other_command_lines_are_mergekits_to_answer(line):
    assert options.parse(line.split()) is None


def test_the_command_merges_without_loading_mergekit_or_torch(paths, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(tiny.recipe(paths, "ties", weight=0.5, density=0.4))
    code = (
        "import sys; from fastmerge.adapters.mergekit.__main__ import main; main(sys.argv[1:]); "
        "print(sorted({'mergekit', 'torch', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "mergekit-yaml", str(recipe), str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    fm.merge(recipe, tmp_path / "same")
    want = weights(tmp_path / "same")
    assert all(torch.equal(t, want[n]) for n, t in weights(tmp_path / "out").items())


def test_what_the_command_cannot_take_mergekits_own_does(paths, tmp_path, monkeypatch, caplog):
    from fastmerge.adapters.mergekit import __main__ as command

    recipe = tmp_path / "recipe.yml"
    recipe.write_text(tiny.recipe(paths, "linear", weight=0.5))
    seen = []
    monkeypatch.setattr(mkyaml, "run_merge", lambda *a, **k: seen.append((a, k)))
    monkeypatch.setattr(sys, "argv", ["python"])
    try:
        with pytest.raises(SystemExit) as ended:
            command.main(["mergekit-yaml", str(recipe), str(tmp_path / "out"), "--no-safe-serialization"])
        assert ended.value.code == 0
        with pytest.raises(SystemExit, match="usage"):
            command.main(["mergekit-nothing"])
    finally:
        adapter.uninstall()
    assert [a[1] for a, _ in seen] == [str(tmp_path / "out")]
    assert "safetensors only" in caplog.text
