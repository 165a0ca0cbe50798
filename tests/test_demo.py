"""End to end on trained models: specialists know one skill, merged models know three."""

import os
from pathlib import Path

import pytest
import yaml

import fastmerge as fm

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.demo_fixture import SKILLS, accuracy, fixture

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def models():
    return fixture(Path(os.environ.get("FASTMERGE_DEMO_CACHE") or ROOT / ".cache" / "demo"))


def test_specialists_know_one_skill_each(models):
    for name in SKILLS:
        scores = accuracy(models[name])
        assert scores[name] > 0.9
        assert all(score < 0.6 for skill, score in scores.items() if skill != name)


@pytest.mark.parametrize(
    ("method", "parameters", "shared"),
    [("task_arithmetic", {"weight": 0.65}, {}), ("ties", {"weight": 1.0, "density": 0.2}, {"lambda": 1.25})],
)
def test_one_merged_model_holds_three_skills(models, tmp_path, method, parameters, shared):
    recipe = {
        "merge_method": method,
        "base_model": str(models["base"]),
        "models": [{"model": str(models[name]), "parameters": parameters} for name in SKILLS],
        "parameters": shared,
        "dtype": "bfloat16",
    }
    fm.merge(yaml.safe_dump(recipe), tmp_path / "out")
    scores = accuracy(tmp_path / "out")
    assert min(scores.values()) > 0.75, scores
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "config.json", "model.safetensors"}
