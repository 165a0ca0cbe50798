"""The examples of the README run as they stand."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.cli import main
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 192, "tie_word_embeddings": False}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 128}
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def weights(directory):
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.fixture
def place(tmp_path, monkeypatch):
    paths = tiny.family(tmp_path / "family", models=2)
    (tmp_path / "models").mkdir()
    for name, source in (("base", "base"), ("math", "a"), ("code", "b")):
        shutil.copytree(paths[source], tmp_path / "models" / name)
        config = tmp_path / "models" / name / "config.json"
        config.write_text(json.dumps(SIZES | json.loads(config.read_text())))
    for seed, name in enumerate(("chat", "maths")):
        tiny.adapter(tmp_path / "adapters" / name, "model.layers.0.self_attn.q_proj", 64, 64, seed=seed)
    (tmp_path / "recipe.yml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


MERGE, TENSORS, EXPERTS = blocks("python")


def run(code):
    """The names that an example leaves."""
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_merge_in_python_runs(place, capsys):
    report = run(MERGE)["report"]
    printed = capsys.readouterr().out
    inputs = [place / "models" / name for name in ("base", "math", "code")]
    assert printed == f"{report}\n{sum(t.nbytes for path in inputs for t in weights(path).values())}\n"
    merged, base = weights(place / "merged-again"), weights(inputs[0])
    assert set(merged) == set(base)
    assert [n for n in base if torch.equal(merged[n], base[n])] == []


def test_the_recipes_in_one_file_run(place):
    (place / "stages.yml").write_text(blocks("yaml")[1])
    assert fm.merge("stages.yml", "staged").warnings == ()
    assert set(weights(place / "staged")) == set(weights(place / "models" / "base"))


def test_the_merges_in_memory_run():
    names = run(TENSORS)
    base, a, merged, states = (names[n] for n in ("base", "a", "merged", "states"))
    moved = merged != base
    assert 0.2 <= moved.float().mean() <= 0.4, "a fifth of each model's changes, at different elements"
    assert list(states) == ["w"]
    assert torch.cosine_similarity(states["w"].flatten(), (base + a).flatten(), dim=0) > 0.99, "half the way"


def test_the_experts_run():
    names = run(EXPERTS)
    dense, (clean, *noisy) = names["dense"].float(), names["experts"]
    assert torch.equal(clean, names["dense"])
    assert len(noisy) == 7
    for expert in noisy:
        assert (expert.float() - dense).norm() / dense.norm() == pytest.approx(0.1, rel=0.05)


def test_shell_examples_run(place):
    lines = [
        line.split("#")[0].split()
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("fastmerge")
    ]
    assert len(lines) >= 3
    first = subprocess.run([sys.executable, "-m", *lines[0]], capture_output=True, text=True, check=False, env=env())
    assert (first.returncode, first.stdout != "") == (0, True), first.stderr
    for words in lines[1:]:  # here: torch takes long to load
        done = CliRunner().invoke(main, words[1:])
        assert (done.exit_code, done.stdout != "") == (0, True), done.output
    assert set(weights(place / "merged")) == set(weights(place / "models/base"))


def env():
    import os

    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *others])}


def test_the_method_table_is_complete():
    from fastmerge.methods import METHODS

    table = TEXT.split("| method | presets")[1].split("\n\n")[0]
    rows = {name: row for row in table.splitlines() for name in re.findall(r"[|,] `(\w+)`", row.rsplit("|", 2)[0])}
    assert set(rows) == set(METHODS)
    for name, method in METHODS.items():
        if not set(method.presets) - {"mergekit"}:
            continue
        shown = CliRunner().invoke(main, ["methods", name]).stdout
        listed = shown if f"see `fastmerge methods {name}`" in rows[name] else rows[name]
        assert [p for p in method.presets if p != "mergekit" and p not in listed] == [], name


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^make (\w+)", TEXT, re.MULTILINE))
    assert {"demo", "test", "gpu"} <= targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_page_of_dna_transfer_runs_and_lists_what_there_is(place):
    from fastmerge.dna.architectures import ARCHITECTURES
    from fastmerge.dna.upcycling.twins import TWINS

    page = (ROOT / "docs" / "dna.md").read_text()
    run(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    assert {"twice-as-wide", "four-experts"} <= {p.name for p in place.iterdir()}
    known = page.split("Known types: ")[1].split(". Any other")[0]
    assert set(re.findall(r"\b[a-z][a-z0-9_]+\b", known)) - {"and", "of", "mixtures"} == set(ARCHITECTURES)
    rows = re.findall(r"^\| ([\w, ]+) \| ([\w, ]+) \|$", page.split("| dense |")[1].split("\n\n")[0], re.MULTILINE)
    listed = {(d, m) for dense, mixtures in rows for d in dense.split(", ") for m in mixtures.split(", ")}
    assert listed == {(source, twin.target) for twin in TWINS for source in twin.sources}


def test_the_page_of_searches_runs(place, capsys):
    from fastmerge.search import SAMPLERS

    page = (ROOT / "docs" / "search.md").read_text()
    run(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    printed = capsys.readouterr().out
    assert "best: evaluation" in printed
    assert "uniform on the same items" in printed
    assert set(weights(place / "smallest")) == set(weights(place / "models" / "base"))
    (place / "search.yml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    (place / "score.py").write_text("def score(model, data):\n    return -float(model.lm_head.weight.float().norm())\n")
    for line in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[0].splitlines():
        done = CliRunner().invoke(main, line.split("#")[0].split()[1:])  # here: transformers takes long to load
        assert done.exit_code == 0, done.output
    assert set(weights(place / "merged")) == set(weights(place / "models" / "base"))
    table = page.split("| sampler |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(r.split("|")[1] for r in table.splitlines()[2:]))) == set(SAMPLERS)


def test_the_page_of_evaluators_runs(place, capsys):
    from fastmerge.search.evaluators.named import ARGUMENTS
    from tests.search import small

    for name in ("base", "math", "code"):
        small.tokenizer().save_pretrained(place / "models" / name)
    page = (ROOT / "docs" / "evaluators.md").read_text()
    soup, served, packed = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    run(soup)
    assert "stays" in capsys.readouterr().out
    assert set(weights(place / "soup")) == set(weights(place / "models" / "base"))
    run(served)
    assert capsys.readouterr().out == "[1.0, 4.0]\n"
    for line in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[0].splitlines():
        done = CliRunner().invoke(main, line.split("#")[0].split()[1:])
        assert done.exit_code == 0, done.output
    names = run(packed)
    fm.merge(names["recipe"], "mean")
    mean = weights(place / "mean")
    for name, whole in names["packed"].items():
        parts = [mean[name.replace("qkv_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(whole, torch.cat(parts))
    assert set(re.findall(r"^\| `(\w+):", page, re.MULTILINE)) == set(ARGUMENTS)


def test_the_page_of_adapters_runs(place):
    page = (ROOT / "docs" / "adapters.md").read_text()
    (lines,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in lines.splitlines():
        done = CliRunner().invoke(main, [*line.split()[1:], "--device", "cpu", "--quiet"])
        assert (done.exit_code, done.output) == (0, "")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    name = "model.layers.0.self_attn.q_proj"
    q = f"{name}.weight"
    fm.merge(text, "mapped", device="cpu")
    pairs = [load_file(place / "adapters" / n / "adapter_model.safetensors") for n in ("chat", "maths")]
    chat, maths = (
        1.5
        * p[f"base_model.model.{name}.lora_B.weight"].double()
        @ p[f"base_model.model.{name}.lora_A.weight"].double()
        for p in pairs
    )
    base = weights(place / "models" / "base")[q].double()
    for out, share in (("baked", (1, 0)), ("both", (0.7, 0.3)), ("mapped", (0.7, -0.3))):
        want = base + share[0] * chat + share[1] * maths
        assert torch.allclose(weights(place / out)[q].double(), want, rtol=2**-8, atol=1e-6)
