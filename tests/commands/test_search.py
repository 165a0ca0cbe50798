"""``fastmerge search``: its file, what it shows, and what it refuses."""

import json

import pytest
import yaml
from click.testing import CliRunner

from fastmerge.cli import main
from fastmerge.errors import RecipeError
from fastmerge.recipe import Recipe
from fastmerge.search.document import Document
from tests import tiny

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 48, "tie_word_embeddings": False}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5}
SCORE = """
def score(model, data):
    return -float((model.lm_head.weight - 0.02).square().sum())
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    paths = tiny.family(tmp_path / "models", models=2, hidden=16, vocab=40)
    for path in paths.values():
        config = path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | SIZES))
    weight = {"low": 0.0, "high": 2.0}
    models = [{"model": f"models/{m}", "parameters": {"weight": dict(weight)}} for m in "ab"]
    recipe = {"merge_method": "task_arithmetic", "base_model": "models/base", "models": models, "dtype": "bfloat16"}
    document = {"recipe": recipe, "evaluator": {"function": "lm_head_score.py:score"}, "sampler": "sobol", "budget": 6}
    (tmp_path / "lm_head_score.py").write_text(SCORE)
    (tmp_path / "search.yml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words):
    return CliRunner().invoke(main, ["search", *words])


def changed(place, **keys):
    document = yaml.safe_load((place / "search.yml").read_text()) | keys
    (place / "other.yml").write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    return "other.yml"


def test_a_search_from_a_file(place):
    shown = call("search.yml", "out", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "a/all/weight: 0 to 2" in shown.output
    assert "2 genes, 6 candidates" in shown.output
    middle = shown.output.split("the middle one:\n\n")[1]
    assert [m.parameters["weight"].plain() for m in Recipe.load(middle).models] == [1.0, 1.0]
    assert not (place / "out").exists()
    done = call("search.yml", "out")
    assert done.exit_code == 0, done.output
    assert "best: evaluation" in done.output
    assert "uniform on the same items" in done.output
    assert [p.name for p in sorted((place / "out").iterdir())] == [
        "best.yml",
        "evaluations.jsonl",
        "result.json",
        "search.json",
    ]
    again = call("search.yml", "out")
    assert again.exit_code == 4
    assert "continue it with --resume" in again.output
    more = call("search.yml", "out", "--resume", "--budget", "9", "-q")
    assert (more.exit_code, more.stdout) == (0, "")
    assert len((place / "out" / "evaluations.jsonl").read_text().splitlines()) == 9
    other = call(changed(place, seed=1), "out", "--resume")
    assert other.exit_code == 4
    assert "is another search" in other.output
    best = json.loads((place / "out" / "result.json").read_text())
    lines = [json.loads(line) for line in (place / "out" / "evaluations.jsonl").read_text().splitlines()]
    assert best["scores"]["score"] == max(line["scores"]["score"] for line in lines)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"recipe": None, "evaluator": None}, r"2 problems:(.|\n)*evaluator: this key is required"),
        ({"evaluator": {"perplexity": {}, "accuracy": {}}}, "evaluator: expected one name with what it takes; got"),
        ({"sampler": ["cma"]}, "sampler: expected a name, or one name with its options; got a list"),
        ({"budget": 0}, "other.yml:1: budget: expected greater than or equal to 1; got 0"),
        ({"held_out": 1.5}, "held_out: expected less than 1; got 1.5"),
        ({"seed": "x"}, "seed: expected a valid integer; got 'x'"),
        ({"bugdet": 5}, r"bugdet: unknown key \(did you mean 'budget'\?\)"),
        ({"sampler": "cmaes"}, r"did you mean 'cma'"),
        ({"sampler": {"cma": {"sgima": 1}}}, r"cma has no option 'sgima' \(did you mean 'sigma'\?\)"),
        ({"evaluator": {"function": "lm_head_score.py:scroe"}}, "did you mean 'score'"),
        ({"evaluator": {"function": "no_such_score:score"}}, "No module named 'no_such_score', here"),
        ({"evaluator": {"perplexty": "x"}}, r"did you mean 'perplexity'"),
        ({"recipe": {"merge_method": "linear"}}, "nothing is left to search for"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_a_wrong_file_is_refused_before_anything_is_written(place, keys, said):
    done = call(changed(place, **keys), "out")
    assert done.exit_code == 2, done.output
    with pytest.raises(RecipeError, match=said):
        raise RecipeError(done.output)
    assert not (place / "out").exists()


def test_files_that_are_no_search(place):
    for text, said in (
        ("", "expected a mapping with 'recipe' and 'evaluator'; this is empty"),
        ("- 1\n", "expected a mapping with 'recipe' and 'evaluator'; this holds a list"),
        ("recipe: {}\n---\nrecipe: {}\n", "expected one document"),
        ("recipe: [", "not valid YAML"),
        (
            "merge_method: ties\nmodels: []\n",
            r"^[^\n]*:1: merge_method: this is a recipe, which 'fastmerge merge' merges",
        ),
    ):
        (place / "x.yml").write_text(text)
        with pytest.raises(RecipeError, match=said):
            Document.load(place / "x.yml")
    (place / "x.yml").write_bytes(b"\xff")
    with pytest.raises(RecipeError, match="not UTF-8"):
        Document.load(place / "x.yml")
