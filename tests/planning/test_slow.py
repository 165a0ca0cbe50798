"""Tokenizers without tokenizer.json, read and written, beside what transformers makes of the same files."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

import fastmerge
from fastmerge.errors import RecipeError
from fastmerge.planning import carry, slow
from fastmerge.planning.tokenizers import read, unite
from tests.recipe.fakes import llama

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ("a b", "Ġ a", "ab a")
WORDS = [*LETTERS, "ab", "Ġa", "aba"]
N = len(WORDS)
END = "<|endoftext|>"
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "b"]
ROWS = {"a": 1000, "b": 1000}


def flags(content, **more):
    return slow.FLAGS | {"content": content} | more


def make(directory, kind, files, **config):
    """A directory with the files of a tokenizer and a config.json."""
    directory.mkdir()
    files = {"config.json": {"model_type": kind, **config}, **files}
    for name, content in files.items():
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False))
    return llama(path=str(directory), ref=directory.name, config=files["config.json"])


def bytewise(*more, merges=MERGES, **files):
    """The files of a byte-level BPE; ``more`` are entries of its vocabulary behind the common ones."""
    words = {word: i for i, word in enumerate([*WORDS, *more])}
    names = {name.replace("__", "."): content for name, content in files.items()}
    return {"vocab.json": words, "merges.txt": "\n".join(["#version: 0.2", *merges, ""])} | names


def lines(*more, **files):
    names = {name.replace("__", "."): content for name, content in files.items()}
    return {"vocab.txt": "\n".join([*BERT, *more, ""])} | names


def theirs(directory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(directory)


PAD = {"added_tokens_decoder": {str(N + 1): flags("<pad>", special=True, normalized=False)}}
MASK = {"__type": "AddedToken", **flags("<mask>", lstrip=True)}
TOKENIZERS = {
    "plain": ("gpt2", bytewise(END)),
    "the class adds its own": ("gpt2", bytewise()),
    "by class, not type": ("llama", bytewise(END, tokenizer_config__json={"tokenizer_class": "GPT2TokenizerFast"})),
    "numbers with a gap": ("gpt2", bytewise(END, added_tokens__json={"<p>": N + 4, "<q>": N + 9})),
    "special among added": ("gpt2", bytewise(END, added_tokens__json={"<p>": N + 1, "<q>": N + 2},
                                             special_tokens_map__json={"pad_token": "<p>"})),
    "decoder hides the rest": ("gpt2", bytewise(END, added_tokens__json={"<q>": N + 2}, tokenizer_config__json=PAD,
                                                special_tokens_map__json={"sep_token": "<sep>"})),
    "settings": ("gpt2", bytewise(END, tokenizer_config__json={"pad_token": "<pad>", "mask_token": MASK})),
    "a map": ("gpt2", bytewise(END, special_tokens_map__json={"additional_special_tokens": ["<x>", "<y>"],
                                                              "bos_token": flags("<s>", normalized=True)})),
    "no token": ("qwen2", bytewise(tokenizer_config__json={"pad_token": None, "eos_token": "<e>"})),
    "qwen3": ("qwen3", bytewise(added_tokens__json={END: N, "<|im_start|>": N + 1})),
    "roberta": ("roberta", bytewise("<s>", "<pad>", "</s>", "<unk>", "<mask>", added_tokens__json={"<k>": N + 5})),
    "neox": ("gpt_neox", bytewise(END)),
    "whisper": ("whisper", bytewise(added_tokens__json={END: N, "<|en|>": N + 1})),
    "bert": ("bert", lines()),
    "twice, and space behind": ("distilbert", lines("b", "x ", "y", "à", "…")),
    "bert with more": ("bert", lines(added_tokens__json={"[E1]": 8},
                                     special_tokens_map__json={"bos_token": "[BOS]", "unk_token": "[UNK]"})),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_numbers_are_those_of_transformers(tmp_path, name):
    found = read(make(tmp_path / "a", *TOKENIZERS[name]))
    their = theirs(tmp_path / "a")
    assert found.numbers == their.get_vocab()
    assert {t: f["special"] for t, f in found.added.items()} == {
        t.content: t.special for t in their.added_tokens_decoder.values()
    }


OTHERS = {
    "bytes": ("gpt2", bytewise(END, "ba", "aba!", "abab", "<|new|>", merges=(*MERGES, "b a", "aba b"),
                               added_tokens__json={"<o1>": N + 6},
                               special_tokens_map__json={"pad_token": flags("<o2>", lstrip=True)})),
    "lines": ("bert", lines("##ba", "cab", "[E2]", added_tokens__json={"[E3]": 11},
                            special_tokens_map__json={"additional_special_tokens": ["[E3]", "[E4]"]})),
}  # fmt: skip
TEXTS = ("abab aba! bab aab", "ab a<x> b<pad>a <|endoftext|>", "a ##b cab b [E1] ab [MASK]", "<mask> <k><p>  <q>a", "")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_added_where_they_are_said(tmp_path, name):
    """The output's tokenizer, as transformers reads it, has every token's number and cuts old texts as the model's."""
    kind, files = TOKENIZERS[name]
    one = make(tmp_path / "a", kind, files)
    two = make(tmp_path / "b", *OTHERS["lines" if "vocab.txt" in files else "bytes"])
    base, other = read(one), read(two)
    united = unite(base, [other], ROWS, {"<asked>": None})
    out = tmp_path / "out"
    out.mkdir()
    taken, _ = carry.carry(None, one, one, [], [], {}, united)
    for file, content in taken:
        (out / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    (out / "config.json").write_text((tmp_path / "a/config.json").read_text())
    assert not (out / "tokenizer.json").exists()
    before, after, third = theirs(tmp_path / "a"), theirs(out), theirs(tmp_path / "b")
    assert after.get_vocab() == united.numbers
    assert base.numbers.items() <= united.numbers.items()
    assert other.numbers.keys() | {"<asked>"} <= united.numbers.keys()
    for text in TEXTS:
        new = {t for t in before.tokenize(text) if t not in after.tokenize(text)}
        assert not new or set(after.tokenize(text)) & (united.numbers.keys() - base.numbers.keys()), (text, new)
    assert before(" aab b ").input_ids == after(" aab b ").input_ids
    flagged = {t.content: t for t in before.added_tokens_decoder.values()}
    more = {t.content: t for t in after.added_tokens_decoder.values()}
    assert {t: str(more[t]) for t in flagged} == {t: str(flagged[t]) for t in flagged}
    gained = {t.content: str(t) for t in third.added_tokens_decoder.values() if t.content not in base.numbers}
    assert {t: str(more[t]) for t in gained} == gained
    texts = ["cab"] if "vocab.txt" in files else ["ba", "abab", "b<o2>"]
    for text in texts:
        assert after.tokenize(text) == third.tokenize(text)


def test_tokens_without_a_row_leave_the_files(tmp_path):
    one = make(tmp_path / "a", *TOKENIZERS["a map"])
    united = unite(read(one), [], {"a": N - 1}, {})
    files = dict(carry.carry(None, one, one, [], [], {}, united)[0])
    assert list(json.loads(files["vocab.json"])) == WORDS[:-1]
    assert files["merges.txt"] == b"#version: 0.2\na b\n\xc4\xa0 a\n"
    assert json.loads(files["special_tokens_map.json"]) == {"additional_special_tokens": []}
    assert json.loads(files["tokenizer_config.json"])["added_tokens_decoder"] == {}
    two = make(tmp_path / "b", *TOKENIZERS["bert with more"])
    united = unite(read(two), [], {"b": 7}, {})
    assert united.files["vocab.txt"].decode().split() == BERT[:7]


@pytest.mark.parametrize(
    ("kind", "files", "why"),
    [
        ("ctrl", bytewise(END), "of a class that is known here"),
        ("gpt2", {"vocab.json": {"a": 0}}, "nor a vocab.json with merges.txt"),
        ("gpt2", bytewise(tokenizer_config__json={"auto_map": {"AutoTokenizer": ["x.T", None]}}), "that is known here"),
        ("gpt2", {"tokenizer.model": ""}, "cannot read the vocabulary"),
    ],
)
def test_other_files_take_no_tokens(tmp_path, kind, files, why):
    with pytest.raises(RecipeError, match=why):
        unite(read(make(tmp_path / "a", kind, files)), [], ROWS, {"<asked>": None})


def test_a_line_holds_one_token(tmp_path):
    one = read(make(tmp_path / "a", "bert", lines(added_tokens__json={"x ": 8})))
    two = read(make(tmp_path / "b", "bert", lines("more")))
    with pytest.raises(RecipeError, match=r"'x ' cannot be a line"):
        unite(one, [two], ROWS, {})


BESIDE = {
    "pad": ("llama", {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", "pad_token": "[PAD]"}, {}),
    "files": ("llama", {}, {"added_tokens.json": {"<w>": 3}, "special_tokens_map.json": {"pad_token": "[PAD]"}}),
    "class": ("gpt2", {"tokenizer_class": "GPT2Tokenizer"}, {}),
    "decoder": ("qwen2", {"added_tokens_decoder": {"3": flags("<z>", lstrip=True)}, "pad_token": "[PAD]"}, {}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_settings_add_to_a_tokenizer_json(tmp_path, name):
    """A pad token that only tokenizer_config.json names has a number, and keeps it when tokens are added."""
    kind, settings, more = BESIDE[name]
    tree = {"model": {"type": "BPE", "vocab": {"?": 0, "a": 1, "b": 2}, "merges": []}, "version": "1.0"}
    tree |= {"pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
    one = make(tmp_path / "a", kind, {"tokenizer.json": tree, "tokenizer_config.json": settings, **more})
    base = read(one)
    assert base.numbers == theirs(tmp_path / "a").get_vocab()
    united = unite(base, [], ROWS, {"<new>": None})
    (out := tmp_path / "out").mkdir()
    for file, content in carry.carry(None, one, one, [], [], {}, united)[0]:
        (out / file).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    (out / "config.json").write_text((tmp_path / "a/config.json").read_text())
    after = theirs(out)
    assert after.get_vocab() == united.numbers == base.numbers | {"<new>": len(base.numbers)}
    assert {t.content: t.special for t in after.added_tokens_decoder.values()} == {
        token: found["special"] for token, found in base.added.items()
    } | {"<new>": False}


@pytest.mark.parametrize("text", ['{"pad_token": ', "[]"])
def test_settings_that_cannot_be_read_lose_no_token(tmp_path, text):
    one = make(tmp_path / "a", "gpt2", bytewise(END))
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"^tokenizer: {path}: (cannot be read|expected a mapping)"):
        read(one)


def test_a_merge_of_such_models(tmp_path):
    """Rows go by tokens, and the output is read back with a row for each."""
    name, width = "transformer.wte.weight", 3
    parts = {"a": bytewise(END), "b": bytewise("ba", END, "<|new|>", merges=(*MERGES, "b a"))}
    tables, rows = {}, {}
    for seed, (model, files) in enumerate(parts.items()):
        tables[model] = files["vocab.json"]
        size = len(tables[model])
        make(tmp_path / model, "gpt2", files, vocab_size=size)
        rows[model] = torch.randn(size, width, generator=torch.Generator().manual_seed(seed))
        save_file({name: rows[model]}, tmp_path / model / "model.safetensors")
    models = ", ".join(f"{{model: {tmp_path / m}, parameters: {{weight: 1}}}}" for m in parts)
    recipe = f"merge_method: linear\nmodels: [{models}]\nbase_model: {tmp_path / 'a'}\ntokenizer_source: union\n"
    fastmerge.merge(fastmerge.Recipe.load(recipe), tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out/model.safetensors")[name]
    numbers = theirs(tmp_path / "out").get_vocab()
    assert sorted(numbers.values()) == list(range(len(merged))) == list(range(N + 3))
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == N + 3
    for token, number in numbers.items():
        one, two = (rows[m][tables[m][token]] if token in tables[m] else None for m in "ab")
        want = two if one is None else one if two is None else (one + two) / 2
        assert torch.equal(merged[number], want), token
