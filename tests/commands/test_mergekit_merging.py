"""mergekit-pytorch and mergekit-multi."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fastmerge.cli import main
from fastmerge.recipe import Recipe
from tests import tiny


def run(*words):
    return CliRunner().invoke(main, [str(w) for w in words])


def merged(path):
    return load_file(Path(path) / "model.safetensors")


@pytest.fixture
def files(tmp_path):
    """Two files of tensors, of which each has one of its own, beside a config that is none of theirs."""
    g = torch.Generator().manual_seed(0)
    common = {"w": (40, 30), "blocks.0.b": (7,), "scale": ()}
    for name, own in (("a", "left"), ("b", "right")):
        save_file(
            {n: torch.randn(s, generator=g) for n, s in {**common, own: (3,)}.items()}, tmp_path / f"{name}.safetensors"
        )
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 40, "quantization_config": {"bits": 4}}')
    (tmp_path / "tokenizer.json").write_text("nonsense")
    recipe = "merge_method: linear\nmodels:\n" + "".join(
        f"  - {{model: {tmp_path / name}.safetensors, parameters: {{weight: {w}}}}}\n"
        for name, w in (("a", 1), ("b", 3))
    )
    (tmp_path / "raw.yml").write_text(recipe)
    return tmp_path


def test_raw_files_must_have_the_same_tensors(files):
    done = run("mergekit-pytorch", files / "raw.yml", files / "out")
    assert done.exit_code == 3
    assert "a.safetensors: lacks 'right'" in done.output
    assert "-u merges it from the others" in done.output
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("flag", "own"), [("-i", set()), ("-u", {"left", "right"}), ("--tensor-union", {"left", "right"})]
)
def test_raw_files_merge_name_by_name(files, flag, own):
    done = run("mergekit-pytorch", files / "raw.yml", files / "out", flag)
    assert done.exit_code == 0, done.output
    assert {f.name for f in (files / "out").iterdir()} == {"model.safetensors", "merge_report.json"}
    a, b, out = load_file(files / "a.safetensors"), load_file(files / "b.safetensors"), merged(files / "out")
    assert set(out) == {"w", "blocks.0.b", "scale"} | own
    torch.testing.assert_close(out["w"], (a["w"] + 3 * b["w"]) / 4)
    assert all(torch.equal(out[n], {**a, **b}[n]) for n in own)
    assert ("2 tensors that some model lacks are left out" in done.output) is (flag == "-i")


def test_raw_merges_agree_with_mergekit_s(files):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.scripts.merge_raw_pytorch import main as theirs

        done = CliRunner().invoke(theirs, [str(files / "raw.yml"), str(files / "theirs"), "-i"])
    assert done.exit_code == 0, done.output
    assert run("mergekit-pytorch", files / "raw.yml", files / "mine", "-i").exit_code == 0
    mine, want = merged(files / "mine"), merged(files / "theirs")
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in want.items()}
    for name, tensor in want.items():
        torch.testing.assert_close(mine[name], tensor)


def test_pickles_need_a_flag(files):
    for name in ("a", "b"):
        state = load_file(files / f"{name}.safetensors")
        torch.save({"state_dict": {**state, "w": state["w"].T.contiguous().T}}, files / f"{name}.pt")
    text = (files / "raw.yml").read_text()
    (files / "pickles.yml").write_text(text.replace(".safetensors", ".pt"))
    done = run("mergekit-pytorch", files / "pickles.yml", files / "out", "-u")
    assert done.exit_code == 3
    assert "--allow-pickle reads tensors alone" in done.output
    for recipe, out, flags in (("pickles.yml", "out", ["--allow-pickle"]), ("raw.yml", "same", [])):
        assert run("mergekit-pytorch", files / recipe, files / out, "-u", *flags).exit_code == 0
    mine, want = merged(files / "out"), merged(files / "same")
    assert mine.keys() == want.keys()
    assert all(torch.equal(mine[n], want[n]) for n in want)
    assert [f.name for f in files.iterdir() if f.name.startswith(".")] == [], "no temporary file is left"


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [{"w": Harmful()}, [torch.zeros(2)], {"w": 3}], ids=["code", "list", "number"])
def test_pickles_of_anything_else_are_refused(files, content, capfd):
    (files / "b.pt").write_bytes(pickle.dumps(content)) if isinstance(content, dict) else torch.save(
        content, files / "b.pt"
    )
    (files / "bad.yml").write_text((files / "raw.yml").read_text().replace("b.safetensors", "b.pt"))
    done = run("mergekit-pytorch", files / "bad.yml", files / "out", "--allow-pickle")
    assert done.exit_code == 3
    assert "b.pt: " in done.output
    assert "ran" not in capfd.readouterr().out
    assert not (files / "out").exists()


def test_raw_files_have_no_tokenizer(files):
    (files / "more.yml").write_text((files / "raw.yml").read_text() + "tokenizer_source: union\n")
    done = run("mergekit-pytorch", files / "more.yml", files / "out", "-u")
    assert done.exit_code == 2
    assert "tokenizer_source" in done.output


@pytest.fixture
def stages(tmp_path):
    """A stage, a final merge that uses it, and the same by hand."""
    paths = tiny.family(tmp_path / "models")
    stage = tiny.recipe(paths, "linear", names=("a", "b"), base=None, weight=0.5)
    last = f"merge_method: slerp\nbase_model: {paths['base']}\nmodels:\n  - model: {paths['base']}\n  - model: both\n"
    last += "parameters: {t: 0.3}\ndtype: bfloat16\n"
    (tmp_path / "all.yml").write_text(f"name: both\n{stage}---\n{last}")
    (tmp_path / "stage.yml").write_text(stage)
    return tmp_path


needs_stages = pytest.mark.skipif(not hasattr(Recipe, "load_all"), reason="files of several documents are not read yet")


@needs_stages
def test_stages_are_streamed_into_the_result(stages):
    done = run("mergekit-multi", stages / "all.yml", "-I", stages / "between", "--out-path", stages / "out")
    assert done.exit_code == 0, done.output
    assert not (stages / "between").exists()
    assert (stages / "out" / "config.json").exists()


@needs_stages
def test_stages_are_written_where_they_are_asked_for(stages):
    words = ("mergekit-multi", stages / "all.yml", "-I", stages / "between", "--out-path", stages / "out")
    assert run(*words, "--keep-stages").exit_code == 0
    assert run("merge", stages / "stage.yml", stages / "both", "--device", "cpu").exit_code == 0
    assert merged(stages / "between" / "both").keys() == merged(stages / "both").keys()
    kept, alone = merged(stages / "between" / "both"), merged(stages / "both")
    assert all(torch.equal(kept[n], alone[n]) for n in alone)
    before = (stages / "out" / "model.safetensors").stat().st_mtime_ns
    assert run(*words).exit_code == 0, "lazy: what is finished is kept"
    assert (stages / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert run(*words, "--random-seed", 3).exit_code == 4, "another merge is there"
    assert run(*words, "--no-lazy").exit_code == 0
    assert (stages / "out" / "model.safetensors").stat().st_mtime_ns != before


@needs_stages
def test_the_result_needs_a_place(stages):
    done = run("mergekit-multi", stages / "all.yml", "-I", stages / "between")
    assert done.exit_code == 2
    assert "--out-path is needed" in done.output


def test_one_recipe_is_a_file_of_one(stages):
    words = ("mergekit-multi", stages / "stage.yml", "-I", stages / "between", "--out-path", stages / "out", "--quiet")
    assert (run(*words).exit_code, run(*words).exit_code) == (0, 0)
    assert run("merge", stages / "stage.yml", stages / "same", "--device", "cpu").exit_code == 0
    assert (stages / "out" / "model.safetensors").read_bytes() == (stages / "same" / "model.safetensors").read_bytes()
