"""One tokenizer with the tokens of several, read back by the library that other programs read it with."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastmerge.errors import RecipeError
from fastmerge.planning import tokens
from fastmerge.planning.tokenizers import FLAGS, read, unite
from tests.recipe.fakes import llama

ROWS = {"a": 1000, "b": 1000, "c": 1000}


def added(content, number, **flags):
    return {"id": number, "content": content, **FLAGS, "special": True, "normalized": False, **flags}


def make(directory, model, *tokens, byte_level=False):
    """A checkpoint with a tokenizer of the library; ``tokens`` are added behind its own."""
    directory.mkdir()
    tokenizer = Tokenizer(model)
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif not isinstance(model, models.Unigram):
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = list(tokens)
    (directory / "tokenizer.json").write_text(json.dumps(tree))
    return llama(path=str(directory), ref=directory.name)


def vocabulary(*words):
    return {w: i for i, w in enumerate(words)}


def bpe(*words, merges=()):
    return models.BPE(vocabulary(*words), list(merges), unk_token=words[0])


def loaded(united):
    return Tokenizer.from_str(json.dumps(united.tree))


def cut(tokenizer, text):
    return tokenizer.encode(text).tokens


def test_bpe_takes_tokens_and_their_merges(tmp_path):
    a = read(make(tmp_path / "a", bpe("?", "a", "b", "ab", merges=[("a", "b")]), added("<s>", 4)))
    words = ("?", "c", "a", "b", "ab", "abc", "ca")
    b = bpe(*words, merges=[("a", "b"), ("ab", "c"), ("c", "a")])
    b = read(make(tmp_path / "b", b, added("<x>", 7, lstrip=True), added("<s>", 8)))
    united = unite(a, [b], ROWS, {})
    assert united.numbers == vocabulary("?", "a", "b", "ab", "<s>", "c", "abc", "ca", "<x>")
    tokenizer = loaded(united)
    assert tokenizer.get_vocab() == united.numbers, "numbers as the library reads them"
    assert cut(tokenizer, "ab abc cab ca <s><x>") == ["ab", "abc", "c", "ab", "ca", "<s>", "<x>"]
    assert tokenizer.get_added_tokens_decoder()[8].lstrip
    assert [t["content"] for t in united.new] == ["<x>"]
    assert (united.ordinary, united.warnings) == (True, [])


@pytest.mark.parametrize("said", [{"<x>": 7, "<y>": 10}, {"<x>": 4, "<y>": 3}, {"a": 6, "<x>": 3}, {"<x>": 0, "?": 9}])
@pytest.mark.parametrize("model", [bpe("?", "a", "b"), models.Unigram([("?", 0.0), ("a", -1.0), ("b", -2.0)], 0)])
def test_added_tokens_have_the_numbers_that_the_library_gives_them(tmp_path, model, said):
    a = make(tmp_path / "a", model, *(added(token, number) for token, number in said.items()))
    path = tmp_path / "a" / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    assert read(a).numbers == library.get_vocab()
    assert tokens.tokens(path) == {i: token for token, i in library.get_vocab().items()}
    b = read(make(tmp_path / "b", model, added("<z>", 3)))
    united = unite(read(a), [b], ROWS, {})
    assert united.numbers == loaded(united).get_vocab() == library.get_vocab() | {"<z>": library.get_vocab_size()}


def test_equal_tokenizers_stay_as_they_are(tmp_path):
    model = bpe("?", "a", "b")
    a, b = (read(make(tmp_path / n, model, added("<s>", 3))) for n in "ab")
    united = unite(a, [b], ROWS, {})
    assert (united.tree, united.numbers) == (None, vocabulary("?", "a", "b", "<s>"))


@pytest.mark.parametrize(
    ("make_model", "text", "want"),
    [
        (lambda *w: models.WordLevel(vocabulary(*w), unk_token=w[0]), "x y z <s> <x>", ["x", "y", "z", "<s>", "<x>"]),
        (lambda *w: models.WordPiece(vocabulary(*w), unk_token=w[0]), "x yz <x>", ["x", "?", "<x>"]),
        (lambda *w: models.Unigram([(t, -float(i)) for i, t in enumerate(w)], unk_id=0), "zy<x>", ["z", "y", "<x>"]),
    ],
    ids=["WordLevel", "WordPiece", "Unigram"],
)
def test_other_kinds(tmp_path, make_model, text, want):
    a = read(make(tmp_path / "a", make_model("?", "x"), added("<s>", 2)))
    b = read(make(tmp_path / "b", make_model("?", "y", "z"), added("<x>", 3), added("?", 0)))
    united = unite(a, [b], ROWS, {})
    assert united.numbers == vocabulary("?", "x", "<s>", "y", "z", "<x>")
    tokenizer = loaded(united)
    assert tokenizer.get_vocab() == united.numbers
    assert cut(tokenizer, text) == want
    assert "?" in {t["content"] for t in united.tree["added_tokens"]}, "one model adds it: so does the output"


def test_tokenizers_of_two_kinds(tmp_path):
    a = read(make(tmp_path / "a", bpe("?", "t", "h", "e", "th", merges=[("t", "h")]), byte_level=True))
    b = read(make(tmp_path / "b", models.Unigram([("?", 0.0), ("the", -1.0), ("t", -2.0)], unk_id=0)))
    united = unite(a, [b], ROWS, {})
    assert cut(loaded(united), "the") == ["th", "e"], "the model's own text is cut as before"
    assert united.numbers["the"] == 5
    (warning,) = united.warnings
    assert warning.endswith("no text becomes them: its tokenizer is Unigram, that of 'a' byte-level BPE")
    united = unite(b, [a], ROWS, {})
    assert loaded(united).get_vocab() == united.numbers == vocabulary("?", "the", "t", "h", "e", "th")


def test_flags_of_the_first_count(tmp_path):
    a = read(make(tmp_path / "a", bpe("?", "a"), added("<s>", 2, lstrip=True)))
    b = read(make(tmp_path / "b", bpe("?", "a"), added("<s>", 2), added("<t>", 3, special=False)))
    c = read(make(tmp_path / "c", bpe("?", "a"), added("<t>", 2)))
    united = unite(a, [b, c], ROWS, {"<u>": None, "<v>": added("<v>", 9), "a": None})
    flags = loaded(united).get_added_tokens_decoder()
    assert {i: (t.content, t.lstrip, t.special) for i, t in flags.items()} == {
        2: ("<s>", True, True), 3: ("<t>", False, False), 4: ("<u>", False, False), 5: ("<v>", False, True)
    }  # fmt: skip
    assert united.warnings == [
        "tokenizer: models add these tokens with different flags; the first's are taken: '<s>', '<t>'"
    ]


def test_tokens_without_a_row_are_left_out(tmp_path):
    model = bpe("?", "a", "b", "ab", "abb", merges=[("a", "b"), ("ab", "b")])
    a = read(make(tmp_path / "a", model, added("<s>", 5), added("<pad>", 6)))
    b = read(make(tmp_path / "b", bpe("?", "a", "b"), added("<s>", 3), added("<pad>", 4)))
    united = unite(a, [], {"a": 4}, {})
    assert united.numbers == vocabulary("?", "a", "b", "ab")
    assert cut(loaded(united), "abb") == ["ab", "b"]
    assert "without a row of its embedding are left out: '<pad>', '<s>', 'abb'" in united.warnings[0]
    a = read(make(tmp_path / "c", model, added("<s>", 5), added("<pad>", 6)))
    united = unite(a, [b], {"c": 6, "b": 1000}, {})
    assert united.numbers["<pad>"] == 6, "another model has a row for it"
    assert loaded(united).get_vocab() == united.numbers


def test_vocabularies_in_other_files(tmp_path):
    a = make(tmp_path / "a", bpe("?", "a"), byte_level=True)
    b = tmp_path / "b"
    b.mkdir()
    (b / "vocab.json").write_text(json.dumps({"?": 0, "Ġé": 1, "a": 2, "aa": 5}, ensure_ascii=False))
    (b / "merges.txt").write_text("#version: 0.2\nĠ é\na a\n")
    decoder = {"4": {"content": "<x>", "special": True}, "x": 3}
    (b / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (b / "added_tokens.json").write_text('{"<y>": 3}')
    slow = read(llama(path=str(b), ref="b"))
    assert slow.numbers == {"?": 0, "Ġé": 1, "a": 2, "aa": 5, "<x>": 4}, "the decoder hides added_tokens.json"
    assert (slow.kind, slow.added["<x>"]["special"]) == ("byte-level BPE", True)
    united = unite(read(a), [slow], ROWS, {})
    assert united.numbers == vocabulary("?", "a", "Ġé", "aa", "<x>")
    assert cut(loaded(united), "aa?a") == ["aa", "?", "a"], "the merge whose parts are tokens came along"
    assert unite(slow, [], ROWS, {}).tree is None
    with pytest.raises(RecipeError, match=r"'b' has no tokenizer.json, .* take the tokens of the others \('new'\)"):
        unite(slow, [], ROWS, {"new": None})
    assert read(llama(path=str(tmp_path), ref="none")) is None


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"model": {}}', '{"model": {"type": "Tree", "vocab": {}}}', '{"model": {"vocab": {"a": -1}}}',
     '{"model": {"vocab": {"a": true}}}', '{"model": {"type": "BPE", "vocab": [["a", 0.0]]}}', "[" * 100_000],
)  # fmt: skip
def test_what_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RecipeError, match=r"tokenizer\.json: cannot read the vocabulary: expected the JSON"):
        read(llama(path=str(tmp_path)))
