"""``fastmerge lora``: what becomes of its words, and that a bake is the recipe's merge."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fastmerge.cli import main
from fastmerge.commands.lora import recipe, weighted
from fastmerge.errors import RecipeError
from tests.tiny import adapter, state, write

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two adapters of one layer."""
    root = tmp_path_factory.mktemp("models")
    write(root / "base", state(0, hidden=16, vocab=40))
    for seed, name in enumerate("ab"):
        adapter(root / name, Q, 16, 16, seed=seed)
    return root


def run(*words):
    return CliRunner().invoke(main, ["lora", *map(str, words)])


def delta(path):
    t = load_file(path / "adapter_model.safetensors")
    s = json.loads((path / "adapter_config.json").read_text())
    a, b = (t[f"base_model.model.{Q}.lora_{x}.weight"].double() for x in "AB")
    return (b @ a) * s["lora_alpha"] / s["r"]


def test_merge(models, tmp_path):
    done = run("merge", f"{models}/a:0.5", f"{models}/b:-2", tmp_path / "out")
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path}/out\n")
    want = 0.5 * delta(models / "a") - 2 * delta(models / "b")
    assert torch.allclose(delta(tmp_path / "out"), want, rtol=1e-6, atol=1e-6)
    done = run("merge", f"{models}/a", f"{models}/b", tmp_path / "two", "--method", "linear")
    assert done.exit_code == 0
    assert "warning: linear works on A and on B each" in done.stderr


@pytest.mark.parametrize(("words", "want"), [(["a:0.5", "b"], (0.5, 1)), (["a"], (1, 0)), (["a:-1"], (-1, 0))])
def test_bake(models, tmp_path, words, want):
    done = run("bake", models / "base", *(models / w for w in words), tmp_path / "out", "--device", "cpu", "-q")
    assert (done.exit_code, done.output) == (0, "")
    got, x = (load_file(p / "model.safetensors") for p in (tmp_path / "out", models / "base"))
    merged = x[f"{Q}.weight"].double() + want[0] * delta(models / "a") + want[1] * delta(models / "b")
    # Twice a rounding in fp32 may carry one of some hundred elements over the middle between two bf16 numbers.
    assert (got[f"{Q}.weight"] != merged.bfloat16()).sum() <= (want != (1, 0))
    assert all(torch.equal(got[n], x[n]) for n in x if n != f"{Q}.weight")


def test_a_bake_with_a_method_is_that_of_the_recipe(models, tmp_path):
    words = ["bake", models / "base", f"{models}/a:0.7", models / "b", tmp_path / "out", "--method", "ties"]
    words += ["--density", "0.3", "--device", "cpu"]
    shown = run(*words, "--dry-run")
    assert shown.exit_code == 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "recipe.yml").write_text(shown.stdout)
    assert run(*words).exit_code == 0
    done = CliRunner().invoke(
        main, ["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "same"), "--device", "cpu", "-q"]
    )
    assert done.exit_code == 0
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "same"))
    assert one == two


def test_a_bake_loads_no_torch(models, tmp_path):
    words = ["lora", "bake", str(models / "base"), f"{models}/a:0.5", str(tmp_path / "out"), "--device", "cpu"]
    code = f"import sys\nfrom fastmerge.cli import main\ntry: main({words!r})\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_weights_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:2").mkdir()
    names = ["x:2", "x:2:0.5", "org/name:-1e-1", "plain", "org/name@v1:3"]
    assert weighted(names) == (["x:2", "x:2", "org/name", "plain", "org/name@v1"], [1.0, 0.5, -0.1, 1.0, 3.0])
    for odd in ("a:b", "a:nan", "a:inf"):
        with pytest.raises(RecipeError, match=odd):
            weighted([odd])
    for words in (("a+b", ["c"]), ("a", ["b+c"])):
        with pytest.raises(RecipeError, match="expected one model or adapter"):
            recipe(*words, [1.0], "ties", None)


def test_what_is_refused(models, tmp_path):
    out = tmp_path / "out"
    for words, code, said in (
        (["merge", models / "a"], 2, "Missing argument"),
        (["merge", models / "a", models / "base", out], 3, "expected a LoRA adapter"),
        (["merge", models / "a", out, "--method", "cat", "--rank", "3"], 2, "rank: cat takes none"),
        (["bake", models / "base", models / "base", out], 3, "expected a LoRA adapter"),
        (["bake", models / "base", models / "a", out, "--density", "0.5"], 2, "density: sum takes none"),
        (["bake", models / "a", models / "b", out], 3, "a LoRA adapter, not a model"),
        (["cook"], 2, "No such command 'cook'"),
    ):
        done = run(*words)
        assert (done.exit_code, said in done.output) == (code, True), done.output
        assert not out.exists()
