"""Rows by tokens: merges of models with different vocabularies, beside an oracle that goes token by token."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

import fastmerge
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.ops.made import Rows
from fastmerge.ops.sources import FileRange
from fastmerge.planning import plan
from fastmerge.recipe import Recipe
from tests.planning.plans import LINEAR, by_name
from tests.planning.plans import make as planned
from tests.recipe.fakes import checkpoint, llama

H = 6
WORDS = {
    "base": ["<unk>", "<s>", "x", "y", "z"],
    "a": ["<unk>", "<s>", "z", "x", "a1", "both", "y", "<pad>"],
    "b": ["<unk>", "both", "x", "y", "b1", "<s>"],
}
ROWS = {"base": 8, "a": 8, "b": 6}
"""The base has three rows of padding."""

MEAN = ["both"]
"""What two models have and the base has not."""


def write(directory, words, rows, seed, *, dtype=torch.bfloat16, special=("<s>",), **config):
    directory.mkdir()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}')
    facts = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows}
    (directory / "config.json").write_text(json.dumps({**facts, **config}))
    g = torch.Generator().manual_seed(seed)
    names = {"lm_head.weight": (rows, H), "model.embed_tokens.weight": (rows, H), "lm_head.bias": (rows,),
             "model.norm.weight": (8,)}  # fmt: skip
    tensors = {n: torch.randn(s, generator=g).to(dtype) for n, s in names.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def paths(tmp_path):
    return {name: write(tmp_path / name, WORDS[name], ROWS[name], i) for i, name in enumerate(WORDS)}


def recipe(paths, tokenizer="tokenizer_source: union", names=("a", "b"), base="base", **more):
    lines = ["merge_method: linear", "parameters: {normalize: false}", "models:"]
    lines += [f"- {{model: {paths[n]}, parameters: {{weight: {w}}}}}" for n, w in weights(names, base).items()]
    lines += [f"base_model: {paths[base]}"] if base else []
    return "\n".join([*lines, *(f"{k}: {v}" for k, v in more.items()), tokenizer.format(**paths), ""])


def weights(names, base):
    return {n: 2.0**-i for i, n in enumerate((*names, *([base] if base else [])), 1)}


def merged(paths, tmp_path, *args, **more):
    out = tmp_path / "out"
    fastmerge.merge(recipe(paths, *args, **more), out, device="cpu", overwrite=True)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def oracle(paths, vocabulary, name, names, base, *, chosen=None, forced=(), padding=0):
    """The output tensor in fp64, token by token."""
    xs = {n: load_file(paths[n] / "model.safetensors")[name].double() for n in (*names, *([base] if base else []))}
    chosen = chosen or {}

    def own(n, token):
        i = WORDS[n].index(token) if token in WORDS[n] else -1
        return xs[n][i] if 0 <= i < len(xs[n]) else None

    def default(token):
        has = [own(n, token) for n in xs if own(n, token) is not None]
        if token in chosen:
            return chosen[token](xs)
        if base and own(base, token) is not None:
            return own(base, token)
        return torch.stack(has).mean(0) if has else torch.zeros_like(xs[names[0]][0])

    out = 0
    for n, w in weights(names, base).items():
        rows = [own(n, t) if own(n, t) is not None and t not in forced else default(t) for t in vocabulary]
        out = out + w * torch.stack([*rows, *[torch.stack(rows).mean(0)] * padding])
    return out


def close(got, want):
    return got.shape == want.shape and bool(((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-6).all())


TENSORS = ("lm_head.weight", "model.embed_tokens.weight", "lm_head.bias")
UNION = ["<unk>", "<s>", "x", "y", "z", "a1", "both", "<pad>", "b1"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("source", "vocabulary"), [("union", UNION), ("base", WORDS["base"]), ("{a}", WORDS["a"]), ("{b}", WORDS["b"])]
)
def test_every_source(tmp_path, source, vocabulary, dtype):
    paths = {name: write(tmp_path / name, WORDS[name], ROWS[name], i, dtype=dtype) for i, name in enumerate(WORDS)}
    got, config = merged(paths, tmp_path, f"tokenizer_source: {source}")
    assert config["vocab_size"] == len(vocabulary)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab() == {w: i for i, w in enumerate(vocabulary)}
    for name in TENSORS:
        assert close(got[name], oracle(paths, vocabulary, name, ("a", "b"), "base")), name
    assert got["model.norm.weight"].shape == (8,), "as many as the base has rows, and none of them"


@pytest.mark.parametrize("weights_too", [True, False])
def test_the_tokenizer_of_a_model_that_is_not_merged(paths, tmp_path, weights_too):
    """As mergekit takes it; a directory without weights does, and its place is in no file of the output."""
    if not weights_too:
        (paths["b"] / "model.safetensors").unlink()
    got, config = merged(paths, tmp_path, "tokenizer_source: {b}", names=("a",))
    assert config["vocab_size"] == len(WORDS["b"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.get_vocab() == {w: i for i, w in enumerate(WORDS["b"])}
    for name in TENSORS:
        assert close(got[name], oracle(paths, WORDS["b"], name, ("a",), "base")), name
    for name in ("README.md", "mergekit_config.yml"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert b"another" in (tmp_path / "out" / "model.safetensors").read_bytes()
    (paths["b"] / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match="b' has no tokenizer.json or other file that numbers its tokens"):
        merged(paths, tmp_path, "tokenizer_source: {b}", names=("a",))
    with pytest.raises(RecipeError, match="c' is not a model of this recipe.*, nor any other: .*no such file"):
        merged(paths | {"c": tmp_path / "c"}, tmp_path, "tokenizer_source: {c}", names=("a",))


def test_without_a_base_shared_tokens_are_means(paths, tmp_path):
    vocabulary = [*WORDS["a"], "b1"]
    got, _ = merged(paths, tmp_path, names=("a", "b"), base=None, dtype="float32")
    for name in TENSORS:
        want = oracle(paths, vocabulary, name, ("a", "b"), None)
        assert float((got[name].double() - want).abs().max()) < 1e-6, "nothing is rounded to bfloat16 on the way"


def test_rows_that_the_recipe_names(paths, tmp_path):
    text = (
        "tokenizer:\n  source: union\n  pad_to_multiple_of: 8\n  tokens:\n"
        "    a1: {{source: {{kind: zero}}, force: true}}\n"
        "    both: {{source: {b}}}\n"
        "    y: {{source: {{kind: model_token, model: {a}, token: x}}, force: true}}\n"
        "    new: {{source: {{kind: model_token, model: {base}, token_id: 4}}}}\n"
        "    bare:\n"
    )
    got, config = merged(paths, tmp_path, text, dtype="float32")
    chosen = {
        "a1": lambda x: x["a"][0] * 0,
        "both": lambda x: x["b"][1],
        "y": lambda x: x["a"][3],
        "new": lambda x: x["base"][4],
    }
    vocabulary = [*UNION, "new", "bare"]
    assert config["vocab_size"] == 16
    for name in TENSORS:
        want = oracle(paths, vocabulary, name, ("a", "b"), "base", chosen=chosen, forced=("a1", "y"), padding=5)
        assert float((got[name].double() - want).abs().max()) < 1e-6
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).token_to_id("bare") == 10


def test_the_same_bytes_whatever_the_memory(paths, tmp_path):
    text = recipe(paths, "tokenizer: {{source: union, pad_to_multiple_of: 64}}", base=None)
    outs = [tmp_path / "x", tmp_path / "y"]
    for out, memory in zip(outs, ("40MB", "1GB"), strict=True):
        fastmerge.merge(text, out, device="cpu", memory=memory)
    one, two = ((out / "model.safetensors").read_bytes() for out in outs)
    assert one == two


def test_equal_vocabularies_are_merged_as_they_are(tmp_path):
    paths = {n: write(tmp_path / n, UNION, 9, i) for i, n in enumerate("ab")}
    made = plan(Recipe.load(recipe(paths, names=("a", "b"), base=None)))
    assert all(type(s) is FileRange for op in made.ops for s in op.inputs)
    assert made.warnings == ()
    paths["c"] = write(tmp_path / "c", UNION, 12, 7)
    made = plan(Recipe.load(recipe(paths, names=("a", "c"), base=None)))
    kinds = {op.name: [type(s) for s in op.inputs] for op in made.ops}
    assert kinds["model.embed_tokens.weight"] == [FileRange, Rows], "nine of twelve rows"
    assert kinds["model.norm.weight"] == [FileRange, FileRange]


def test_padding_alone_is_no_other_vocabulary(tmp_path):
    paths = {n: write(tmp_path / n, UNION, rows, i) for i, (n, rows) in enumerate({"a": 9, "b": 12}.items())}
    for first, size in (("a", 9), ("b", 12)):
        other = "b" if first == "a" else "a"
        got, config = merged(paths, tmp_path, "", names=(first, other), base=None)
        assert config["vocab_size"] == size
        x, y = (load_file(paths[n] / "model.safetensors")[TENSORS[0]].double() for n in (first, other))
        assert close(got[TENSORS[0]][:9], 0.5 * x[:9] + 0.25 * y[:9])
        assert close(got[TENSORS[0]][9:], 0.75 * x[9:])
    warning = plan(Recipe.load(recipe(paths, "", names=("a", "b"), base=None))).warnings[0]
    assert "different numbers of rows for the same 9 tokens" in warning
    paths["c"] = write(tmp_path / "c", [*UNION, "one more"], 12, 3)
    with pytest.raises(ShapeError, match="'tokenizer_source: union'"):
        plan(Recipe.load(recipe(paths, "", names=("a", "c"), base=None)))


def test_what_is_not_there_is_refused_with_its_line(paths, tmp_path):
    def refused(tokenizer):
        with pytest.raises(RecipeError) as e:
            plan(Recipe.load(recipe(paths, tokenizer)))
        return str(e.value)

    text = "tokenizer:\n  tokens:\n    x: {{source: {{kind: model_token, model: {b}, %s}}}}"
    assert "b' has no token_id 6: expected 0 .. 5" in refused(text % "token_id: 6")
    assert "b' has no row for 'a1'" in refused(text % "token: a1")
    found = refused("tokenizer:\n  tokens:\n    a1: {{source: {b}}}")
    assert found.startswith("recipe:10: tokenizer.tokens.a1.source: ")
    assert "b' has no row for 'a1'" in found
    (paths["b"] / "tokenizer.json").unlink()
    assert "recipe:8: tokenizer_source: " in refused("tokenizer_source: union")
    assert "b' has no tokenizer.json or other file that numbers its tokens" in refused("tokenizer_source: {b}")
    made = plan(Recipe.load(recipe(paths, "tokenizer_source: base")))
    assert "b' has no tokenizer: its tokens are taken for those of" in made.warnings[0]
    (paths["b"] / "tokenizer.json").write_text("{")
    assert "tokenizer.json: cannot read the vocabulary" in refused("tokenizer_source: base")


def test_settings_follow_the_tokens(tmp_path):
    words = UNION[:8]
    paths = {"a": write(tmp_path / "a", words, 7, 0, pad_token_id=7, text_config={"vocab_size": 7})}
    paths["b"] = write(tmp_path / "b", UNION, 9, 1)
    settings = {"pad_token": "<pad>", "unk_token": {"content": "<unk>"}, "added_tokens_decoder": {"7": "x"}}
    (paths["a"] / "tokenizer_config.json").write_text(json.dumps({**settings, "extra_special_tokens": ["<pad>"]}))
    (paths["a"] / "added_tokens.json").write_text('{"<pad>": 7}')
    (paths["a"] / "vocab.txt").write_text("\n".join(words))
    made = plan(Recipe.load(recipe(paths, "tokenizer_source: {a}", names=("a", "b"), base=None)))
    files = dict(made.carry)
    assert json.loads(files["tokenizer_config.json"]) == {
        "unk_token": {"content": "<unk>"}, "added_tokens_decoder": {"7": "x"}, "extra_special_tokens": []
    }  # fmt: skip
    assert json.loads(files["added_tokens.json"]) == {}
    assert "vocab.txt" not in files, "it has a token more"
    assert (made.config["vocab_size"], made.config["text_config"]["vocab_size"]) == (7, 7)
    said = "\n".join(made.warnings)
    assert "left out of its settings: pad_token '<pad>'" in said
    assert "config.json: pad_token_id 7: the output has 7 rows" in said
    made = plan(Recipe.load(recipe(paths, names=("a", "b"), base=None)))
    assert dict(made.carry)["tokenizer_config.json"] == paths["a"] / "tokenizer_config.json", "ordinary tokens only"
    paths["c"] = write(tmp_path / "c", [*words, "<x>"], 9, 1, special=("<s>", "<x>"))
    made = plan(Recipe.load(recipe(paths, names=("a", "c"), base=None)))
    files = dict(made.carry)
    new = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]["8"]
    assert (new["content"], new["special"], "id" in new) == ("<x>", True, False)
    assert json.loads(files["added_tokens.json"]) == {"<x>": 8}


def test_tied_and_other_tensors(tmp_path):
    """A tied head takes its rows from the embedding; positions and codebooks are no tokens."""
    from tests.planning.test_tokenizers import bpe, make

    a = make(tmp_path / "a", bpe("?", "x", "y"))
    b = make(tmp_path / "b", bpe("?", "y", "z", "x"))
    extra = {"wpe.weight": (3, 8), "h.0.mlp.weight": (3, 8)}
    a = llama(path=a.path, ref="a", vocab=3, head=False, extra=extra, layers=1)
    b = llama(path=b.path, ref="b", vocab=4, layers=1, extra=extra)
    ops = by_name(planned(LINEAR + "tokenizer_source: union\n", a=a, b=b))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert ops[name].spec.shape == (4, 8)
    assert ops["wpe.weight"].spec.shape == (3, 8)
    assert type(ops["wpe.weight"].inputs[0]) is FileRange
    with pytest.raises(RecipeError, match="'b' has no embedding with a row for every token"):
        planned(
            LINEAR + "tokenizer_source: union\n", a=a, b=checkpoint({"model.norm.weight": (8,)}, path=b.path, ref="b")
        )
