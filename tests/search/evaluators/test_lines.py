"""Perplexity and accuracy on JSON lines, against plain forward passes, one text at a time."""

import json
import logging

import pytest
import torch

from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.search.evaluators import Accuracy, Perplexity, score
from tests.search import small

BOS = 1


def ids(text):
    return [small.WORDS.index(c) for c in text if c != " "]


@pytest.fixture
def token():
    return small.tokenizer()


def written(model, prompt, length):
    """What a model writes after a prompt, greedily."""
    so_far = [BOS, *ids(prompt)]
    for _ in range(length):
        with torch.no_grad():
            so_far.append(int(model(input_ids=torch.tensor([so_far])).logits[0, -1].argmax()))
    return "".join(small.WORDS[i] for i in so_far[-length:])


TEXTS = ["abcdefg", "q", "zz top", "the quick brown fox jumps over the lazy dog", "hello", "a" * 40]


def test_perplexity_is_the_mean_log_probability_of_each_text(tmp_path, token):
    model = small.model()
    found = Perplexity(small.write(tmp_path / "t.jsonl", *({"text": t} for t in TEXTS)), token, batch_size=4)
    expected = [float(small.log_p(model, [BOS, *ids(t)]).mean()) for t in TEXTS]
    assert len(found) == 6
    assert found(model, range(6)) == pytest.approx(expected, rel=1e-5)
    assert found(model, [4, 0]) == pytest.approx([expected[4], expected[0]], rel=1e-5)
    assert found(model, range(6)) == found(model, range(6))
    assert score(found, model) == pytest.approx(sum(expected) / 6, rel=1e-5)


def test_a_text_without_a_first_token_of_its_own_is_told_one(tmp_path):
    model, token = small.model(), small.tokenizer(bos=False)
    found = Perplexity(small.write(tmp_path / "t.jsonl", {"text": "abcd"}), token)
    assert found(model, [0]) == pytest.approx([float(small.log_p(model, ids("abcd")).mean())], rel=1e-5)
    with pytest.raises(RecipeError, match=r"t.jsonl:2: nothing to score"):
        Perplexity(small.write(tmp_path / "t.jsonl", {"text": "ab"}, {"text": "a"}), token)


@pytest.mark.parametrize("room", [1, 4 * len(small.WORDS) * 3, 4 * len(small.WORDS) * 70])
def test_logits_are_bounded_and_scores_are_the_same(tmp_path, token, room):
    model = small.model()
    file = small.write(tmp_path / "t.jsonl", *({"text": t} for t in TEXTS), {"prompt": "abc", "completion": "defgh"})
    seen = []

    def watch(module, args, output):
        seen.append(output.logits.shape)

    expected = Perplexity(file, token)(model, range(7))
    handle = model.register_forward_hook(watch)
    found = Perplexity(file, token, logits_bytes=room)(model, range(7))
    handle.remove()
    assert found == pytest.approx(expected, rel=1e-5)
    assert max(rows * positions * width * 4 for rows, positions, width in seen) <= max(room, 4 * len(small.WORDS))


def test_a_model_that_cannot_keep_part_of_its_logits_gives_the_same(tmp_path, token):
    model = small.model()
    file = small.write(tmp_path / "t.jsonl", *({"text": t} for t in TEXTS), {"prompt": "abc", "completion": "defgh"})

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    evaluate = Perplexity(file, token)
    assert evaluate(Plain(), range(7)) == pytest.approx(evaluate(model, range(7)), rel=1e-5)


def test_a_model_in_bf16_is_scored_in_fp32(tmp_path, token):
    model = small.model(dtype=torch.bfloat16)
    found = Perplexity(small.write(tmp_path / "t.jsonl", {"text": "abcdefgh"}), token)(model, [0])
    expected = float(small.log_p(model, [BOS, *ids("abcdefgh")]).mean())
    assert found == pytest.approx([expected], rel=1e-6), "a bf16 softmax would be off by 1e-2"


def test_of_a_completion_only_its_own_tokens_count(tmp_path, token):
    model = small.model()
    file = small.write(
        tmp_path / "t.jsonl", {"prompt": "abcd", "completion": "efg"}, {"prompt": "", "completion": "ab"}
    )
    expected = [small.log_p(model, [BOS, *ids("abcdefg")])[-3:].mean(), small.log_p(model, [BOS, *ids("ab")]).mean()]
    assert Perplexity(file, token)(model, [0, 1]) == pytest.approx([float(e) for e in expected], rel=1e-5)


def test_a_completion_is_right_when_the_model_would_write_it(tmp_path, token):
    model = small.model()
    right = written(model, "abc", 5)
    wrong = right[:-1] + ("a" if right[-1] != "a" else "b")
    file = small.write(
        tmp_path / "t.jsonl",
        {"prompt": "abc", "completion": " " + right, "category": "x", "id": 7},
        {"prompt": "abc", "completion": wrong, "category": "y"},
        {"prompt": "abc", "completion": right[:2], "category": "x"},
    )
    evaluate = Accuracy(file, token)
    assert evaluate(model, [2, 1, 0]) == [1.0, 0.0, 1.0]
    assert {name: score(one, model) for name, one in evaluate.by_category().items()} == {"x": 1.0, "y": 0.0}


@pytest.mark.parametrize(("how", "divisor"), [("characters", [2, 9]), ("tokens", [2, 8]), ("none", [1, 1])])
def test_choices_are_compared_by_normalised_likelihood(tmp_path, token, how, divisor):
    choices = ["ab", "cdef ghij"]
    for seed in range(6):
        model = small.model(seed)
        lines = [{"question": "xyz", "choices": choices, "answer": a} for a in (0, 1, "ab", "cdef ghij")]
        evaluate = Accuracy(small.write(tmp_path / "t.jsonl", *lines), token, normalise=how)
        sums = [float(small.log_p(model, [BOS, *ids("xyz" + c)])[3:].sum()) for c in choices]
        best = max((0, 1), key=lambda c: sums[c] / divisor[c])
        assert evaluate(model, range(4)) == [1.0 - best, float(best)] * 2
    assert Perplexity(tmp_path / "t.jsonl", token)(model, [1]) == pytest.approx([sums[1] / 8], rel=1e-5)


def test_a_model_is_left_as_it_was(tmp_path, token):
    model = small.model()
    model.train()
    model.model.norm.eval()
    Perplexity(small.write(tmp_path / "t.jsonl", {"text": "abc"}), token)(model, [0])
    assert [m.training for m in model.modules()].count(False) == 1
    assert not model.model.norm.training
    assert all(p.grad is None for p in model.parameters())


def test_long_texts_are_cut_where_it_matters_least(tmp_path, token, caplog):
    model = small.model()
    file = small.write(tmp_path / "t.jsonl", {"text": "abcdefgh"}, {"prompt": "abcdef", "completion": "gh"})
    with caplog.at_level(logging.WARNING):
        found = Perplexity(file, token, max_length=5)(model, [0, 1])
    assert "2 texts are longer than max_length 5" in caplog.text
    expected = small.log_p(model, [BOS, *ids("abcd")]).mean(), small.log_p(model, ids("defgh"))[-2:].mean()
    assert found == pytest.approx([float(e) for e in expected], rel=1e-5)
    with pytest.raises(RecipeError, match="longer than max_length 2"):
        Perplexity(small.write(tmp_path / "t.jsonl", {"prompt": "ab", "completion": "cde"}), token, max_length=2)


def test_every_bad_line_is_named_with_its_number(tmp_path, token):
    bad = [
        ('{"text": "ab"}', None),
        ("{text: 1}", "not JSON"),
        ("", None),
        ("[1]", "expected a JSON object, got list"),
        ('{"text": 3}', "text: expected text, got 3"),
        ('{"text": ""}', "text: expected text"),
        ('{"txt": "ab"}', "expected text, or prompt and completion"),
        ('{"text": "ab", "prompt": "x"}', "expected text, or prompt and completion"),
        ('{"text": "ab", "text": "b"}', "'text' is there twice"),
        ('{"prompt": "ab", "completion": ""}', "completion: expected text"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "choices: expected a list of two"),
        ('{"question": "q", "choices": ["a", "a"], "answer": 0}', "two of them are equal"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer: expected one of the choices"),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "answer: expected one of the choices"),
        ('{"text": "ab", "category": 1}', "category: expected text"),
        ("[" * 100_000, "not JSON"),
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(line for line, _ in bad))
    with pytest.raises(RecipeError) as caught:
        Perplexity(tmp_path / "t.jsonl", token)
    expected = [(n, what) for n, (_, what) in enumerate(bad, 1) if what]
    assert len(caught.value.problems) == len(expected)
    for (number, what), problem in zip(expected, caught.value.problems, strict=True):
        assert f"t.jsonl:{number}: " in problem
        assert what in problem


def test_line_separators_inside_a_text_are_part_of_it(tmp_path, token):
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "ab\u2028cd"}, ensure_ascii=False) + "\n", "utf-8")
    assert len(Perplexity(tmp_path / "t.jsonl", token)) == 1


def test_what_cannot_be_evaluated_is_refused(tmp_path, token):
    text = small.write(tmp_path / "t.jsonl", {"text": "abc"})
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for wrong, what in {
        tmp_path / "none.jsonl": "cannot read",
        tmp_path / "latin.jsonl": "UTF-8",
        tmp_path / "empty.jsonl": "got none",
        tmp_path: "cannot read",
    }.items():
        with pytest.raises(RecipeError, match=what):
            Perplexity(wrong, token)
    with pytest.raises(RecipeError, match="a text alone has no right answer"):
        Accuracy(text, token)
    with pytest.raises(RecipeError, match=r"(?s)batch_size.*max_length.*separator"):
        Perplexity(text, token, batch_size=0, max_length=True, separator=None)
    with pytest.raises(RecipeError, match="normalise"):
        Accuracy(text, token, normalise="bytes")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        Perplexity(text, tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        Perplexity(text, tmp_path / "nowhere")
    evaluate = Perplexity(text, token)
    with pytest.raises(RecipeError, match="items"):
        evaluate(small.model(), [1])
    with pytest.raises(RecipeError, match="expected a category"):
        evaluate.by_category()
    model = small.model()
    model.resize_token_embeddings(4)
    with pytest.raises(RecipeError, match="the model has 4 embeddings"):
        evaluate(model, [0])


def test_a_model_of_nan_knows_nothing(tmp_path, token):
    model = small.model()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    file = small.write(tmp_path / "t.jsonl", {"question": "q", "choices": ["a", "b"], "answer": 0})
    assert Accuracy(file, token)(model, [0]) == [0.0]
    assert score(Perplexity(file, token), model) == -float("inf")
