"""``fastmerge soup`` from the command line."""

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.cli import main
from tests.search import small


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("soups")
    return [str(small.save(root / f"m{seed}", seed)) for seed in range(3)]


@pytest.fixture
def lines(tmp_path):
    rows = [{"prompt": "ab", "completion": c, "category": "xy"[i % 2]} for i, c in enumerate(("cd", "ef", "gh", "ij"))]
    return str(small.write(tmp_path / "lines.jsonl", *rows))


def run(*words):
    return CliRunner().invoke(main, ["soup", *words])


def weights(directory):
    return load_file(f"{directory}/model.safetensors")


def test_uniform(family, tmp_path):
    done = run("uniform", *family)
    assert done.exit_code == 0
    recipe = yaml.safe_load(done.output)
    assert recipe == {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in family],
    }
    out, file = tmp_path / "out", tmp_path / "soup.yml"
    done = run("uniform", *family, "--out", str(out), "--recipe", str(file))
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(file.read_text()) == recipe
    fm.merge(recipe, tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_greedy(family, lines, tmp_path):
    from fastmerge.search.evaluators import Perplexity
    from fastmerge.search.soups import greedy_soup

    expected = greedy_soup(family, Perplexity(lines, small.tokenizer()))
    out = tmp_path / "out"
    done = run("greedy", *family, "--perplexity", lines, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert done.stderr.count("stays") == len(expected.weights)
    assert done.stderr.count("by itself scores") == 3
    assert all(torch.equal(t, expected.model.state_dict()[n]) for n, t in weights(out).items())
    file = tmp_path / "evaluator.yml"
    file.write_text(f"perplexity: {{data: {lines}, batch_size: 2}}\n")
    done = run("greedy", *family, "--evaluator", str(file), "--accept", "ge")
    assert [m["model"] for m in yaml.safe_load(done.stdout)["models"]] == list(expected.weights)


def test_category(family, lines, tmp_path):
    done = run("category", *family, "--perplexity", lines)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["x", "y"]
    assert sum(m["parameters"]["weight"] for m in yaml.safe_load(done.stdout)["models"]) == 2.0
    (tmp_path / "score.py").write_text("def by(model):\n    return {'a': 1, 'b': 2, 'c': 3}\n")
    done = run("category", *family, "--function", f"{tmp_path / 'score.py'}:by")
    assert yaml.safe_load(done.stdout)["models"] == [{"model": family[0], "parameters": {"weight": 3.0}}]


def test_what_is_wrong_is_said_before_anything_is_evaluated(family, lines, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (tmp_path / "never.py").write_text("def score(model):\n    raise AssertionError\n")
    never = f"{tmp_path / 'never.py'}:score"
    (tmp_path / "two.yml").write_text("perplexity: a\naccuracy: b\n")
    for words, code, what in [
        (("greedy", *family), 2, "expected one of --accuracy"),
        (("greedy", *family, "--perplexity", lines, "--function", never), 2, "got 2"),
        (("greedy", *family, "--function", never, "--out", str(there)), 4, "exists; --overwrite replaces it"),
        (("greedy", *family, "/nowhere/x", "--function", never), 3, "nowhere"),
        (("greedy", family[0], family[0], "--function", never), 2, "is there twice"),
        (("uniform", *family, "--recipe", lines), 4, "exists"),
        (("uniform",), 2, "Missing argument"),
        (("greedy", *family, "--evaluator", str(tmp_path / "two.yml")), 2, "expected a mapping with one of"),
        (("category", *family, "--function", "math:pi"), 2, "expected a function"),
    ]:
        done = run(*words)
        assert done.exit_code == code, (words, done.output)
        assert what in done.output
    assert list(there.iterdir()) == []
