"""The file of a farm: templates and grids, and everything that can be wrong in it."""

import sys

import pytest
import yaml

from fastmerge.errors import BackendUnavailable, RecipeError
from fastmerge.farm import run as farms
from fastmerge.farm.file import load
from fastmerge.farm.spread import merge_spread

RECIPE = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]\n"


def problems(source):
    with pytest.raises(RecipeError) as error:
        load(source)
    return error.value.problems


def test_paths_documents_and_templates(tmp_path):
    (tmp_path / "one.yml").write_text(RECIPE)
    (tmp_path / "template.yml").write_text(RECIPE.replace("weight: 1", "weight: '${w}'") + "seed: ${seed}\n")
    (tmp_path / "farm.yml").write_text(
        "store: results\nseed: 7\nrecipes:\n"
        f"- one.yml\n- {yaml.safe_load(RECIPE)}\n- one.yml\n"
        "- template: template.yml\n  grid: {w: [0.5, [0, 1]], seed: [1, 2]}\n"
        "- name: sizes\n  grid: {m: [c, d]}\n  template:\n    merge_method: linear\n"
        "    models: [{model: 'x-${m}', parameters: {weight: 1}}]\n"
    )
    file, found = load(tmp_path / "farm.yml")
    assert file.store == str(tmp_path / "results")
    assert [w.name for w in found] == [
        "one.yml",
        "recipe 2",
        "one.yml (2)",
        "template.yml:w=0.5,seed=1",
        "template.yml:w=0.5,seed=2",
        "template.yml:w=[0, 1],seed=1",
        "template.yml:w=[0, 1],seed=2",
        "sizes:m=c",
        "sizes:m=d",
    ]
    recipes = [w.recipe for w in found]
    assert recipes[0] == recipes[1] == recipes[2]
    assert [r.seed for r in recipes] == [7, 7, 7, 1, 2, 1, 2, 7, 7]
    weights = [r.models[0].parameters["weight"].plain() for r in recipes[3:7]]
    assert weights == [0.5, 0.5, [0, 1], [0, 1]]
    assert str(recipes[-1].models[0].model) == "x-d"


def test_all_problems_come_at_once(tmp_path):
    path = tmp_path / "farm.yml"
    path.write_text(
        "store: s\nworkers: 0\nmemory: much\nlease: 0\nkep: 3\ndevice: [cpu, 3]\n"
        "ray: {num_cpu: 1}\nrecipes: [nothing.yml]\n"
    )
    said = problems(path)
    assert sorted({text.split(": ")[0].rpartition(":")[2] for text in said}) == ["2", "4", "5", "6", "7"]
    assert any("kep: unknown key (did you mean 'keep'?)" in text for text in said)
    assert any("num_cpu: unknown key (did you mean 'num_cpus'?)" in text for text in said)
    path.write_text("store: s\nmemory: much\nkeep: 3\nslurm: {}\nrecipes: [nothing.yml, 3]\n")
    said = problems(path)
    assert len(said) == 5
    assert said[0].startswith(f"{path}:2: memory: size 'much'")
    assert "'score' says how" in said[1]
    assert "is for 'executor: slurm'" in said[2]
    assert "nothing.yml: cannot read the recipe" in said[3]
    assert "expected a path, a recipe, or a template and its grid; got a number" in said[4]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"template": "no.yml", "grid": {"w": [1]}}, "template: cannot read 'no.yml'"),
        ({"template": 3, "grid": {"w": [1]}}, "template: expected a recipe or its path; got a number"),
        ({"template": {"merge_method": "${w}"}, "grid": []}, "grid: expected a mapping of names to lists"),
        ({"template": {"merge_method": "${w}"}, "grid": {"w": []}}, "grid.w: expected a list of values"),
        ({"template": {"merge_method": "${weigt}"}, "grid": {"weight": [1]}}, "'grid' (did you mean 'weight'?)"),
        ({"template": {"merge_method": "linear"}, "grid": {"w": [1]}}, "grid.w: the template has no ${w}"),
        ({"template": {"merge_method": "${w}"}, "grid": {"w": ["linera"]}}, "unknown method 'linera'"),
        ({"template": {}, "gird": {"w": [1]}, "grid": {}}, "gird: unknown key (did you mean 'grid'?)"),
        ({"template": {"a": "${a}${b}${c}"}, "grid": {c: [*range(101)] for c in "abc"}}, "at most 1,000,000"),
        ([1], "expected a path, a recipe, or a template"),
    ],
)  # fmt: skip
def test_items_that_are_wrong(item, said):
    found = problems({"store": "s", "recipes": [item]})
    assert any(said in text for text in found), found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a mapping with 'store' and 'recipes'; this is empty"),
        ("[1]", "expected a mapping with 'store' and 'recipes'; this holds a list"),
        ("store: s\n---\nstore: t\n", "expected one document; got 2"),
        ("recipes: [a.yml]", "store: this key is required"),
        ("store: s\nrecipes: []", "recipes: "),
        ("store: {", "not valid YAML"),
    ],
)
def test_files_that_are_none(tmp_path, text, said):
    (tmp_path / "farm.yml").write_text(text)
    assert any(said in line for line in problems(tmp_path / "farm.yml"))
    (tmp_path / "farm.yml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in problems(tmp_path / "farm.yml")[0]
    assert "cannot read the file of the farm" in problems(tmp_path / "none.yml")[0]


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    (tmp_path / "one.yml").write_text(RECIPE)
    monkeypatch.setitem(sys.modules, "ray", None)
    source = {"store": str(tmp_path / "store"), "recipes": [str(tmp_path / "one.yml")], "executor": "ray"}
    with pytest.raises(BackendUnavailable, match=r"Ray is not installed: pip install 'fastmerge\[farm\]'"):
        farms.run(source)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(BackendUnavailable, match=r"submitit is not installed: pip install 'fastmerge\[farm\]'"):
        farms.run({**source, "executor": "slurm"})
    assert not (tmp_path / "store").exists()
    models = {"merge_method": "passthrough", "models": [{"model": "a"}]}
    with pytest.raises(BackendUnavailable, match=r"pip install 'fastmerge\[farm\]'"):
        merge_spread(models, tmp_path / "out")
