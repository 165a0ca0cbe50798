"""Files of the output: tokenizers, templates, code."""

import json

from fastmerge.planning.templates import TEMPLATES
from fastmerge.recipe.checks import BUILT_IN_TEMPLATES
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
    words = vocabulary(x=0)
    a = write(tmp_path / "a", tokenizer__json=words, generation_config__json="{}", code__py="x", optimizer__pt="x")
    b = write(tmp_path / "b", tokenizer__json=words)
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


def vocabulary(added="<s>", **tokens):
    """Nine tokens, and an added one of number 9."""
    others = {f"w{i}": i for i in range(9) if i not in tokens.values()}
    return {"model": {"vocab": tokens | others}, "added_tokens": [{"content": added, "id": 9}]}


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


def test_every_file_of_a_tokenizer_and_of_a_model_is_carried(tmp_path):
    vocabulary = (
        "tiktoken.model", "source.spm", "target.spm", "bpe.codes", "vocab.bpe", "tokenizer.model.v3", "normalizer.json",
        "sentencepiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "vocab.txt", "tekken.json",
    )  # fmt: skip
    other = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "modules.json", "sentence_bert_config.json",
             "config_sentence_transformers.json", "generation_config.json")  # fmt: skip
    left = ("tokenizer.py", "vocab.bin", "README.md", "training_args.bin", "params.json", "tokenizer\n.json")
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        for file in (*vocabulary, *other, *left):
            (directory / file).write_text("[]")
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    a, b = (llama(path=str(tmp_path / name)) for name in ("a", "b"))
    got = carried(LINEAR + "tokenizer_source: b\n", a=a, b=b)
    templates = "additional_chat_templates/tool_use.jinja"
    assert got == {
        **{name: tmp_path / "b" / name for name in (*vocabulary, templates)},
        **{name: tmp_path / "a" / name for name in other},
    }


def test_modules_of_sentence_transformers(tmp_path):
    modules = [
        {"path": ""},
        {"path": "1_Pooling"},
        {"path": "2_Dense/"},
        {"path": "../secret"},
        {"path": "/etc"},
        {},
        3,
    ]
    a = write(tmp_path / "a", modules__json=modules)
    write(a / "1_Pooling", config__json='{"pooling_mode_cls_token": true}', code__py="x")
    write(a / "2_Dense", config__json="{}", model__safetensors="x")
    write(a / "3_Other", config__json="{}")
    write(tmp_path / "secret", config__json="{}")
    made = make(LINEAR, a=llama(path=str(a), ref="a"), b=llama())
    names = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors")
    assert dict(made.carry) == {name: a / name for name in names}
    assert made.warnings == (
        "modules.json names '../secret', which is no plain directory of the model; not copied",
        "modules.json names '/etc', which is no plain directory of the model; not copied",
        "copied from 'a', not merged: 2_Dense/model.safetensors",
    )


def test_downloads_that_are_linked_into_the_cache_are_followed(tmp_path):
    blob = tmp_path / "models--x--y" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    a = write(tmp_path / "a")
    (a / "tokenizer.json").symlink_to(blob)
    assert carried(LINEAR, a=llama(path=str(a)), b=llama()) == {"tokenizer.json": a / "tokenizer.json"}


def test_a_tokenizer_brings_its_special_tokens(tmp_path):
    base = write(
        tmp_path / "base", tokenizer__json=vocabulary(x=0), generation_config__json={"eos_token_id": 2, "k": 1}
    )
    chat = write(tmp_path / "chat", tokenizer__json=vocabulary(x=0), generation_config__json={"eos_token_id": [4, 5]})
    config = {"num_hidden_layers": 4, "bos_token_id": 1, "text_config": {"eos_token_id": 2}}
    a = llama(path=str(base), config={**config, "eos_token_id": 2, "pad_token_id": None}, ref="base")
    b = llama(path=str(chat), config={**config, "eos_token_id": 4, "pad_token_id": 0}, ref="chat")
    made = make(LINEAR + "tokenizer_source: b\n", a=a, b=b)
    ids = {key: made.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert ids == {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    assert made.config["text_config"]["eos_token_id"] == 4
    settings = json.loads(dict(made.carry)["generation_config.json"])
    assert settings == {"eos_token_id": [4, 5], "k": 1, "bos_token_id": 1, "pad_token_id": 0}
    (warning,) = made.warnings
    assert warning.startswith(
        "the tokenizer is that of 'chat' and the configuration that of 'base', with the tokenizer"
    )
    assert "eos_token_id 2 -> 4" in warning
    assert "eos_token_id 2 -> [4, 5] (generation)" in warning
    same = make(LINEAR, a=a, b=b)
    assert same.config["eos_token_id"] == 2
    assert dict(same.carry)["generation_config.json"] == base / "generation_config.json"


def test_the_tokenizer_itself_says_where_it_stops(tmp_path):
    chat = write(
        tmp_path / "chat",
        tokenizer__json=vocabulary("<é>"),
        tokenizer_config__json={"eos_token": {"content": "<é>"}, "bos_token": None},
    )
    text = LINEAR + "tokenizer_source: b\n"
    base = llama(config={"eos_token_id": 2}, ref="base")
    assert make(text, a=base, b=llama(path=str(chat), config={})).config["eos_token_id"] == 9
    for stops in (9, [2, 9]):
        made = make(text, a=base, b=llama(path=str(chat), config={"eos_token_id": stops}))
        assert (made.config["eos_token_id"], "not among" in str(made.warnings)) == (stops, False)
        assert "generation_config.json" not in dict(made.carry), "neither model has one"
    made = make(text, a=base, b=llama(path=str(chat), config={"eos_token_id": 2}, ref="chat"))
    assert made.warnings[1] == (
        "the tokenizer of 'chat' ends with '<é>' (9), which is not among the tokens that this model stops at: "
        "eos_token_id 2"
    )


def test_damaged_settings_are_copied_as_they_are(tmp_path):
    base = write(tmp_path / "base", generation_config__json="{no", tokenizer_config__json="[" * 100_000)
    b = write(tmp_path / "b", tokenizer__json=vocabulary(x=0))
    made = make(
        LINEAR + "tokenizer_source: b\n", a=llama(path=str(base)), b=llama(path=str(b), config={"eos_token_id": 7})
    )
    assert dict(made.carry)["generation_config.json"] == base / "generation_config.json"
    assert made.config["eos_token_id"] == 7


def test_named_templates():
    assert TEMPLATES.keys() == set(BUILT_IN_TEMPLATES)
    got = carried(LINEAR + "chat_template: chatml\n", a=llama(), b=llama())
    assert got == {"chat_template.jinja": TEMPLATES["chatml"].encode()}


CODE = {"AutoModel": "modeling_x.X", "AutoConfig": "other/repo--configuration_x.C"}


def test_code_beside_a_model_is_copied_with_what_it_imports(tmp_path):
    a = write(
        tmp_path / "a",
        modeling_x__py="from .layers.deep import y\n    from . import tools as t\nimport os\nraise SystemExit\n",
        layers__py="import .deeper\nfrom .modeling_x import X",
        deeper__py="",
        tools__py="",
        unrelated__py="",
        tokenization_x__py="",
        tokenizer_config__json={"auto_map": {"AutoTokenizer": ["tokenization_x.T", None]}},
    )
    config = {"auto_map": CODE, "num_hidden_layers": 4}
    made = make(LINEAR, a=llama(path=str(a), config=config), b=llama())
    copied = {name for name, _ in made.carry if name.endswith(".py")}
    assert copied == {"modeling_x.py", "layers.py", "deeper.py", "tools.py", "tokenization_x.py"}
    assert made.config["auto_map"] == CODE
    assert (
        "custom code (auto_map): copied, never run: modeling_x.py, layers.py, tools.py, deeper.py; programs"
        in made.warnings[0]
    )


def test_code_that_is_missing_is_named():
    made = make(LINEAR, a=llama(config={"auto_map": {"AutoModel": "x.Y", "AutoConfig": "../x.Z"}}), b=llama())
    assert made.warnings == (
        "config.json refers to custom code (auto_map) that is not beside it; without it the output loads nowhere: x.py",
    )


def test_code_on_the_hub_stays_there(tmp_path):
    snapshot = tmp_path / "models--org--name.v2" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    write(snapshot, modeling_x__py="", tokenizer_config__json={"auto_map": {"AutoTokenizer": ["t.T", None]}, "k": "é"})
    made = make(LINEAR, a=llama(path=str(snapshot), config={"auto_map": CODE}), b=llama())
    assert made.config["auto_map"] == {**CODE, "AutoModel": "org/name.v2--modeling_x.X"}
    settings = json.loads(dict(made.carry)["tokenizer_config.json"])
    assert settings == {"auto_map": {"AutoTokenizer": ["org/name.v2--t.T", None]}, "k": "é"}
    assert "which stays at org/name.v2 on the hub" in made.warnings[0]
    assert not any(name.endswith(".py") for name, _ in made.carry)


def test_a_template_that_utf8_cannot_hold_is_carried(tmp_path):
    from fastmerge.planning.carry import _set_template

    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"chat_template": "old", "y": "\\ud800 é"}')
    found = {"tokenizer_config.json": config}
    _set_template(found, "\ud800 x")
    assert found["chat_template.jinja"] == b"? x"
    assert json.loads(found["tokenizer_config.json"]) == {"chat_template": "\ud800 x", "y": "\ud800 é"}
