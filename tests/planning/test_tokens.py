"""Vocabularies: the same numbers for the same tokens, whatever the files look like."""

import json
import struct

import pytest

from fastmerge.errors import RecipeError
from fastmerge.planning import tokens
from tests.planning.plans import LINEAR, make
from tests.recipe.fakes import llama

WORDS = [f"w{i}" for i in range(10)]


def tokenizer(words=WORDS, added=(), **more):
    return {
        "added_tokens": [{"id": i, "content": t} for i, t in added],
        "model": {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": [], **more},
    }


def model(directory, content, name="tokenizer.json"):
    directory.mkdir()
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    (directory / name).write_bytes(content)
    return llama(path=str(directory), ref=directory.name)


def swapped(*pairs):
    words = list(WORDS)
    for i, j in pairs:
        words[i], words[j] = words[j], words[i]
    return words


def test_vocabularies_are_compared_without_being_asked(tmp_path):
    a = model(tmp_path / "a", tokenizer())
    other = model(tmp_path / "b", tokenizer(swapped((2, 3))))
    (warning,) = make(LINEAR, a=a, b=other).warnings
    assert warning == (
        "tokenizer: 'b' has other tokens than 'a', whose tokenizer the output takes: 2 of 10 tokens differ "
        "(2 is 'w2' and 'w3'; 3 is 'w3' and 'w2'); their rows are merged as they are"
    )
    most = model(tmp_path / "c", tokenizer(swapped((0, 1), (2, 3), (4, 5))))
    with pytest.raises(RecipeError, match="'c' has another vocabulary than 'a': 6 of 10 tokens differ"):
        make(LINEAR, a=a, b=most)
    assert make(LINEAR + "tokenizer_source: a\n", a=a, b=most).warnings == (), "then rows are merged by their tokens"


def test_equal_tokens_in_unequal_files(tmp_path):
    words = ["é", "x", "😀", '"vocab": {'] + WORDS
    a = model(tmp_path / "a", json.dumps(tokenizer(words), ensure_ascii=False))
    b = model(tmp_path / "b", json.dumps(tokenizer(words), ensure_ascii=True, indent=1))
    assert make(LINEAR, a=a, b=b).warnings == ()
    shuffled = tokenizer(words, added=[(20, "<s>")])
    shuffled["model"]["vocab"] = dict(reversed(shuffled["model"]["vocab"].items()))
    more = model(tmp_path / "more", shuffled)
    assert make(LINEAR, a=a, b=more).warnings == (), "a token that one of them has is in no other's way"


def test_files_that_differ_elsewhere_are_not_parsed(tmp_path, monkeypatch):
    def ordered(version, added="<s>", last="w9"):
        tree = tokenizer(["vocab", "merges", "added_tokens", "normalizer", *WORDS[4:9], last], added=[(10, added)])
        return {"version": version, "added_tokens": tree["added_tokens"], "normalizer": None, "model": tree["model"]}

    a, b = model(tmp_path / "a", ordered("1")), model(tmp_path / "b", ordered("2"))
    c = model(tmp_path / "c", ordered("1", "<x>"))
    assert tokens.compare(a, c, {}) == (11, 1, ((10, "<s>", "<x>"),))
    d = model(tmp_path / "d", ordered("1", last="other"))
    assert tokens.compare(a, d, {}) == (11, 1, ((9, "w9", "other"),))
    monkeypatch.setattr(tokens, "tokens", lambda path: pytest.fail("parsed"))
    assert tokens.compare(a, b, {}) == (0, 0, ())


def test_added_tokens_count(tmp_path):
    a = model(tmp_path / "a", tokenizer(WORDS[:9], added=[(9, "<|reserved|>"), (10, "<s>")]))
    b = model(tmp_path / "b", tokenizer(WORDS[:9], added=[(9, "<|im_end|>"), (10, "<s>")]))
    assert "1 of 11 tokens differ (9 is '<|reserved|>' and '<|im_end|>')" in make(LINEAR, a=a, b=b).warnings[0]


def pieces(*words):
    """A sentencepiece model: pieces with scores, then a trainer's settings."""
    out = b""
    for word in words:
        text = word.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + struct.pack("<f", -1.0) + b"\x18\x01"
        out += b"\x0a" + bytes([len(piece)]) + piece
    return out + b"\x12\x02\x08\x01"


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("tokenizer.json", {"model": {"vocab": [["a", -1], ["b", -2]]}}, {"model": {"vocab": [["a", -1], ["c", -2]]}}),
        ("vocab.json", {"a": 0, "b": 1}, {"c": 1, "a": 0}),
        ("vocab.txt", "a\nb", "a\nc\n"),
        ("tokenizer.model", pieces("a", "b"), pieces("a", "c")),
        ("tiktoken.model", "a 0\nb 1\n", "a 0\nc 1\n"),
        ("tekken.json", {"vocab": [{"token_bytes": "a"}, {"token_bytes": "b"}]},
         {"vocab": [{"token_bytes": "a"}, {"token_bytes": "c"}]}),
    ],
)  # fmt: skip
def test_other_files(tmp_path, name, one, two):
    a, b = model(tmp_path / "a", one, name), model(tmp_path / "b", two, name)
    assert tokens.tokens(a.path / name) == {0: "a", 1: "b"}
    found = tokens.compare(a, b, {})
    assert found[1:] == (1, ((1, "b", "c"),))
    assert tokens.compare(a, model(tmp_path / "c", one, name), {}).other == 0


@pytest.mark.parametrize("content", ["{not json", "{}", "[" * 100_000, '{"vocab": 3}', '{"vocab": {"a": "b"}}'])
def test_what_is_not_understood_is_said(tmp_path, content):
    a, b = model(tmp_path / "a", tokenizer()), model(tmp_path / "b", content)
    assert make(LINEAR, a=a, b=b).warnings == ("tokenizer: the vocabularies of 'a' and 'b' cannot be compared",)


def test_large_files_are_compared_but_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "MOST", 10)
    a, b = model(tmp_path / "a", tokenizer()), model(tmp_path / "b", tokenizer())
    assert make(LINEAR, a=a, b=b).warnings == ()
    other = model(tmp_path / "c", tokenizer(swapped((1, 2))))
    assert "cannot be compared" in make(LINEAR, a=a, b=other).warnings[0]


def test_layers_alone_may_come_from_a_model_with_other_tokens(tmp_path):
    a = model(tmp_path / "a", tokenizer())
    other = model(tmp_path / "b", tokenizer(swapped((0, 1), (2, 3), (4, 5))))
    text = "merge_method: passthrough\nslices:\n"
    for name, first in (("a", 0), ("b", 1), ("a", 2)):
        text += f"  - sources: [{{model: {name}, layer_range: [{first}, {first + 1}]}}]\n"
    assert make(text, a=a, b=other).warnings == ()
    with pytest.raises(RecipeError, match="another vocabulary"):
        make("".join(text.splitlines(keepends=True)[:-1]), a=a, b=other)
