"""Files of the output: tokenizers, templates, code."""

import json

import pytest

from fastmerge.errors import RecipeError
from tests.planning.plans import LINEAR, make
from tests.recipe.fakes import llama


def write(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, data in files.items():
        (directory / name.replace("__", ".")).write_text(data if isinstance(data, str) else json.dumps(data))
    return directory


def carried(text, **models):
    return dict(make(text, **models).carry)


def test_tokenizer_files_come_from_the_base_else_the_first(tmp_path):
    a = write(tmp_path / "a", tokenizer__json="{}", generation_config__json="{}", code__py="x", optimizer__pt="x")
    b = write(tmp_path / "b", tokenizer__json="{}")
    models = {"a": llama(path=str(a)), "b": llama(path=str(b))}
    assert carried(LINEAR, **models) == {
        "tokenizer.json": a / "tokenizer.json",
        "generation_config.json": a / "generation_config.json",
    }
    assert carried(LINEAR + "base_model: b\n", **models) == {"tokenizer.json": b / "tokenizer.json"}
    got = carried(LINEAR + "tokenizer_source: b\n", **models)
    assert got == {"tokenizer.json": b / "tokenizer.json", "generation_config.json": a / "generation_config.json"}


def test_links_that_leave_the_model_are_not_followed(tmp_path):
    (tmp_path / "secret").write_text("s")
    a = write(tmp_path / "a", tokenizer__json="{}")
    (a / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    made = make(LINEAR, a=llama(path=str(a)), b=llama())
    assert dict(made.carry) == {"tokenizer.json": a / "tokenizer.json"}
    assert "a link that leaves the model's directory; not copied" in made.warnings[0]


def vocabulary(**tokens):
    return {"model": {"vocab": tokens}, "added_tokens": [{"content": "<s>", "id": 9}]}


def test_asking_for_a_tokenizer_needs_equal_vocabularies(tmp_path):
    text = LINEAR + "tokenizer: {source: a}\n"
    a = write(tmp_path / "a", tokenizer__json=vocabulary(x=0, y=1))
    same = write(tmp_path / "same", tokenizer__json={"version": 2, **vocabulary(y=1, x=0)})
    other = write(tmp_path / "other", tokenizer__json=vocabulary(x=1, y=0))
    none = write(tmp_path / "none", tokenizer__json="{not json")
    models = {n: llama(path=str(p), ref=n) for n, p in {"a": a, "same": same, "other": other, "none": none}.items()}
    assert make(text, a=models["a"], b=models["same"]).warnings == ()
    for bad in ("other", "none"):
        with pytest.raises(RecipeError, match=f"'{bad}' has another vocabulary than 'a'"):
            make(text, a=models["a"], b=models[bad])
    assert "cannot be compared" in make(text, a=models["a"], b=llama()).warnings[0]


def test_chat_templates_are_data(tmp_path):
    jinja = "{% for m in messages %}{{ m }}{% endfor %}"
    a = write(tmp_path / "a", tokenizer_config__json={"chat_template": "old {{ x }}", "k": 1}, tokenizer__json="{}")
    b = write(tmp_path / "b", chat_template__jinja=jinja)
    c = write(tmp_path / "c", tokenizer_config__json={"chat_template": [{"name": "default", "template": jinja}]})
    models = {"a": llama(path=str(a)), "b": llama(path=str(b)), "c": llama(path=str(c))}
    got = carried(LINEAR + f"chat_template: '{jinja}'\n", a=models["a"], b=models["b"])
    assert got["chat_template.jinja"] == jinja.encode()
    assert json.loads(got["tokenizer_config.json"]) == {"chat_template": jinja, "k": 1}
    three = LINEAR.replace("{model: b}", "{model: b}, {model: c}") + "chat_template: auto\n"
    assert carried(three, **models)["chat_template.jinja"] == jinja.encode()
    assert "no model has one" in make(LINEAR + "chat_template: auto\n", a=llama(), b=llama()).warnings[0]


def test_custom_code_is_named_and_left():
    made = make(LINEAR, a=llama(config={"auto_map": {"AutoModel": "x.Y"}}), b=llama())
    assert "custom code" in made.warnings[0]
