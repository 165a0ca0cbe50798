"""The model card and the recipe beside it: other people's text stays where it belongs, and no path of this machine."""

import json

import pytest
import yaml

from fastmerge.recipe import Recipe
from fastmerge.report.card import card
from fastmerge.report.licences import licence
from fastmerge.report.names import Names
from fastmerge.report.report import Report
from tests.recipe.fakes import checkpoint

LINEAR = "merge_method: linear\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 1}\n"


def make(name="out", models=(("a", False),), recipe="x: 1\n"):
    return card(name, "ties", "base + sum", "https://arxiv.org/abs/1", models, recipe)


def test_the_whole_card():
    assert make(models=(("org/a", True), ("b", False), ("org/a", True))) == (
        "---\nbase_model:\n- org/a\nlibrary_name: transformers\ntags:\n- mergekit\n- merge\n- fastmerge\n---\n"
        "# out\n\n"
        "This model was merged with fastmerge by the method **ties** ([paper](https://arxiv.org/abs/1)).\n\n"
        "`base + sum`\n\n## Models\n\n* [org/a](https://huggingface.co/org/a)\n* `b`\n\n"
        "## Recipe\n\n```yaml\nx: 1\n```\n"
    )


def test_licences_of_the_inputs(tmp_path):
    cards = {
        "a": "---\nlicense: apache-2.0\ntags: [x]\n---\nlicense: mit\n",
        "b": "---\r\nlicense: other\r\nlicense_name: llama3.1\r\n---\r\n",
        "c": "# No front matter\nlicense: mit\n",
        "d": "---\nlicense: 'a`b'\n---\n",
        "e": '---\nlicense: "mit"\n---',
    }
    for name, text in cards.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(text, newline="")
    found = {name: licence(tmp_path / name) for name in [*cards, "f"]}
    assert found == {"a": "apache-2.0", "b": "llama3.1", "c": None, "d": None, "e": "mit", "f": None}
    one = card("out", "ties", "f", "", (("org/a", True), ("b", False)), "x: 1\n", {"org/a": "mit", "b": "mit"})
    assert yaml.safe_load(one.split("---")[1])["license"] == "mit"
    assert "* [org/a](https://huggingface.co/org/a), licence `mit`\n* `b`, licence `mit`\n" in one
    for licences in ({"org/a": "mit", "b": "apache-2.0"}, {"b": "mit"}):
        several = card("out", "ties", "f", "", (("org/a", True), ("b", False)), "x: 1\n", licences)
        assert "license" not in yaml.safe_load(several.split("---")[1])
        assert f"`b`, licence `{licences['b']}`" in several


@pytest.mark.parametrize("text", ["x\n# Injected", "x\r\n\r\n# Injected", "x\u2028# Injected", "---\nlicense: mit"])
def test_names_stay_on_their_line(text):
    found = make(name=text, models=((text, False), (text, True)))
    assert found.count("\n#") == make().count("\n#")
    assert found.count("\n---") == 1
    assert yaml.safe_load(found.split("---")[1])["library_name"] == "transformers"
    assert "base_model" not in found, "what is no id is not listed as one"


def test_names_hold_no_markup():
    title = make(name="<script>[a](b) *c* `d` e_f-1.0").splitlines()[7]
    assert title == r"# \<script\>\[a\]\(b\) \*c\* \`d\` e_f-1.0"
    assert "``a`b``" in make(models=(("a`b", False),))
    assert "`` `a ``" in make(models=(("`a", False),))


def test_a_fence_is_longer_than_what_it_holds():
    text = make(recipe="a: |\n  ```\n  # Injected\n  `````\n")
    assert text.endswith("## Recipe\n\n``````yaml\na: |\n  ```\n  # Injected\n  `````\n``````\n")


def test_templates_of_several_lines_are_one_line_of_yaml():
    template = "{{ messages }}\n```\n\n# Injected\n"
    recipe = Recipe.load({**yaml.safe_load(LINEAR % ("a", "b")), "chat_template": template})
    text = recipe.to_yaml()
    assert "\n# Injected" not in text
    assert Recipe.load(text) == recipe


def names(text, *paths):
    recipe = Recipe.load(text)
    return Names(recipe, [(recipe, [checkpoint({}, path=path) for path in paths])])


def test_local_models_are_called_by_the_last_part_of_their_path():
    text = LINEAR % ("/home/me/x/final", "y/final/") + "base_model: /data/base\n"
    found = names(text, "/data/base", "/home/me/x/final", "/cwd/y/final")
    assert found.shown == [("base", False), ("final", False), ("final-2", False)]
    text = found.to_yaml()
    assert [m["model"] for m in yaml.safe_load(text)["models"]] == ["final", "final-2"]
    assert yaml.safe_load(text)["base_model"] == "base"
    assert "/" not in text
    assert Recipe.load(text).merge_method == "linear"


def test_models_of_the_hub_keep_their_id():
    cache = "/home/me/.cache/huggingface/hub/models--org--name/snapshots"
    found = names(LINEAR % ("org/name", f"{cache}/c0ffee"), f"{cache}/abc", f"{cache}/c0ffee")
    assert found.shown == [("org/name", True), ("org/name", True)]
    assert Recipe.load(found.to_yaml()).models[0].model.path == "org/name"
    assert "/home" not in found.to_yaml()
    assert "c0ffee" in found.to_yaml()


def test_adapters_have_names_too():
    text = LINEAR % ("/x/base+/y/lora", "/x/base")
    found = names(text, "/x/base", "/x/base", "/y/lora")
    assert found.shown == [("base", False), ("base", False), ("lora", False)]
    assert Recipe.load(found.to_yaml()).models[1].model.path == "base"
    assert "/x" not in found.to_yaml()
    assert "lora" in found.to_yaml()


def test_a_relative_path_is_no_id():
    found = names(LINEAR % ("models/a", "models/b"), "/cwd/models/a", "/cwd/models/b")
    assert found.shown == [("a", False), ("b", False)]


def test_a_path_without_a_name(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    assert names(LINEAR % (".", "b"), here, "/b").shown == [("here", False), ("b", False)]


def test_reports_of_earlier_versions_load(tmp_path):
    report = Report("out", 1.0, 1, 1, {}, "read", 1, ("cpu",), "native", "f", account={"counts": {}})
    (tmp_path / "merge_report.json").write_text(report.to_json())
    assert Report.load(tmp_path) == Report.load(tmp_path)
    assert Report.load(tmp_path).account == {"counts": {}}
    old = {k: v for k, v in json.loads(report.to_json()).items() if k != "account"}
    (tmp_path / "merge_report.json").write_text(json.dumps(old))
    assert Report.load(tmp_path).account == {}
