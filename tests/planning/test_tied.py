"""Tied tensors: stand-ins, copies, heads of their own."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastmerge.checkpoint import Checkpoint
from fastmerge.errors import CheckpointError
from fastmerge.planning import plan, tied
from fastmerge.recipe import Recipe
from tests.planning.plans import LINEAR, SLERP, TIES, by_name, make, models_of, names, tensors_of
from tests.recipe.fakes import checkpoint, llama

DARE = TIES.replace("merge_method: ties", "merge_method: dare_ties")


@pytest.fixture
def stored(tmp_path):
    """Writes a model: values by name (a number fills a tensor of 4 rows; a name copies that tensor)."""
    count = iter(range(100))

    def write(config=None, **values):
        directory = tmp_path / str(next(count))
        directory.mkdir()
        made = {}
        for name, value in values.items():
            made[name] = made[value] if isinstance(value, str) else np.full((4, 3), value, np.float32)
        save_file(made, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config or {}))
        return Checkpoint.open(directory)

    return write


T5 = {"encoder.block.0.w": 5, "decoder.block.0.w": 6}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def family(*names):
    return [(f.names, set(f.heads)) for f in tied.families(tied.candidates(names))]


@pytest.mark.parametrize(
    ("original", "head"),
    [
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("gpt_neox.embed_in.weight", "embed_out.weight"),
        ("model.decoder.embed_tokens.weight", "proj_out.weight"),
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
        ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
        ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
        ("transformer.wte.weight", "lm_head.weight"),
        ("backbone.embeddings.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ],
)
def test_heads_and_their_embeddings(original, head):
    assert family(head, original, "model.layers.0.lm_head.weight", "mtp.embed_tokens.weight", "x") == [
        ((original, head), {head})
    ]


def test_families_of_several():
    t5 = ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight", "shared.weight"]
    want = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert [(set(n), n[0], h) for n, h in family(*t5)] == [(set(want), want[0], {"lm_head.weight"})]
    bart = [f"model.{n}" for n in t5 if n != "lm_head.weight"]
    assert family(*bart)[0][0][0] == "model.shared.weight"
    marian = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
    assert family(*marian) == [(("model.decoder.embed_tokens.weight", "lm_head.weight"), {"lm_head.weight"})]
    assert family("cls.predictions.bias", "cls.predictions.decoder.bias") == [
        (("cls.predictions.bias", "cls.predictions.decoder.bias"), set())
    ]
    assert family("embed_tokens.weight", "x.embed_tokens.weight", "lm_head.weight") == [], "which one is not known"
    assert family("model.embed_tokens.weight", "model.norm.weight") == []


def test_equal_bytes(tmp_path):
    a = np.arange(1 << 20, dtype=np.float32).reshape(-1, 16)
    last, middle = a.copy(), a.copy()
    last[-1, -1] = -1
    middle[70000 // 16, 5] = -1
    save_file(
        {"a": a, "b": a.copy(), "last": last, "middle": middle, "flat": a.reshape(-1), "e": a[:0], "f": a[:0]},
        tmp_path / "model.safetensors",
    )
    model = Checkpoint.open(tmp_path)
    t = model.tensors
    assert {n for n in t if tied.same(model, t["a"], t[n])} == {"a", "b"}
    assert tied.same(model, t["e"], t["f"])
    nowhere = checkpoint({"a": (2,), "b": (2,)})
    assert not tied.same(nowhere, nowhere.tensors["a"], nowhere.tensors["b"])


def test_models_without_a_head_stand_in_with_their_embedding():
    made = make(TIES, base=llama(head=False, config={"tie_word_embeddings": True}), a=llama(), b=llama())
    out = by_name(made)[HEAD]
    assert tensors_of(out) == [EMBED, HEAD, HEAD]
    assert made.config["tie_word_embeddings"] is False
    assert made.ties.untied
    assert f"missing from 'base': {HEAD}: the tied embedding takes its place" in made.warnings
    assert HEAD not in names(make(TIES, **{n: llama(head=False) for n in ("base", "a", "b")}))


@pytest.mark.parametrize("text", [LINEAR, SLERP, TIES, DARE], ids=["linear", "slerp", "ties", "dare"])
class TestRedundantHeads:
    """Heads that are stored although they equal the embedding."""

    def test_are_left_out_where_the_reference_has_none(self, stored, text):
        plain, more = stored(**{EMBED: 1, "x": 2}), stored(**{EMBED: 1.5, HEAD: EMBED, "x": 2})
        made = make(text, base=plain, a=plain, b=more)
        assert names(made) == [EMBED, "x"]
        assert made.ties == tied.Ties(untied=False, dropped=((HEAD, EMBED),))
        assert made.account.models["b"][HEAD] == f"dropped: a copy of {EMBED}"

    def test_are_written_again_where_the_reference_has_one(self, stored, text):
        plain, more = stored(**{EMBED: 1, "x": 2}), stored(**{EMBED: 1.5, HEAD: EMBED, "x": 2})
        made = make(text, base=more, a=more, b=plain)
        out = by_name(made)
        assert out[HEAD][1:4] == out[EMBED][1:4]
        assert made.ties == tied.Ties(copies=((HEAD, EMBED),))

    def test_are_heads_of_their_own_where_one_differs(self, stored, text):
        plain, own = stored(**{EMBED: 1, "x": 2}), stored(**{EMBED: 1.5, HEAD: 3, "x": 2})
        made = make(text, base=plain, a=plain, b=own)
        assert tensors_of(by_name(made)[HEAD])[0] == EMBED
        assert tensors_of(by_name(made)[HEAD])[-1] == HEAD
        assert made.ties.untied


def test_a_redundant_head_shares_the_mask_of_its_embedding(stored):
    models = [stored({"tie_word_embeddings": True}, **{EMBED: v, HEAD: EMBED}) for v in (1, 2, 3)]
    out = by_name(make(DARE, base=models[0], a=models[1], b=models[2]))
    assert out[HEAD].key == out[EMBED].key
    untied = [stored({"tie_word_embeddings": False}, **{EMBED: v, HEAD: EMBED}) for v in (1, 2, 3)]
    out = by_name(make(DARE, base=untied[0], a=untied[1], b=untied[2]))
    assert out[HEAD].key != out[EMBED].key


def test_the_paper_ranks_tied_tensors_once(stored):
    models = [stored(**{EMBED: v, HEAD: EMBED}) for v in (1, 2, 3)]
    made = make(TIES + "preset: paper\n", base=models[0], a=models[1], b=models[2])
    assert made.ties.copies == ((HEAD, EMBED),)


def test_a_tied_model_with_another_head_is_untied(stored):
    models = [stored({"tie_word_embeddings": True}, **{EMBED: 1, HEAD: v}) for v in (1, 2)]
    made = make(LINEAR, a=models[0], b=models[1])
    assert made.ties.untied
    assert made.config["tie_word_embeddings"] is False


def test_t5_of_either_form(stored):
    one = stored(**{"shared.weight": 1, **T5})
    other = stored(
        **{"decoder.embed_tokens.weight": 2, "encoder.embed_tokens.weight": "decoder.embed_tokens.weight", **T5}
    )
    made = make(LINEAR, a=one, b=other)
    assert set(names(made)) == {"shared.weight", *T5}
    assert tensors_of(by_name(made)["shared.weight"]) == ["shared.weight", "decoder.embed_tokens.weight"]
    made = make(LINEAR, a=other, b=one)
    assert set(names(made)) == {"decoder.embed_tokens.weight", "encoder.embed_tokens.weight", *T5}
    first, second = (by_name(made)[f"{side}.embed_tokens.weight"] for side in ("encoder", "decoder"))
    assert first.inputs == second.inputs
    assert not made.ties.untied


def test_bert_heads_and_their_biases(stored):
    word, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    plain = stored(**{word: 1, bias: 2, "x": 3})
    copies = stored(
        **{word: 1, bias: 2, "cls.predictions.decoder.weight": word, "cls.predictions.decoder.bias": bias, "x": 3}
    )
    made = make(LINEAR, a=copies, b=plain)
    out = by_name(made)
    assert out["cls.predictions.decoder.weight"].inputs == out[word].inputs
    assert out["cls.predictions.decoder.bias"].inputs == out[bias].inputs
    assert set(names(make(LINEAR, a=plain, b=copies))) == {word, bias, "x"}


def test_an_embedding_that_is_stored_as_a_head_only(stored):
    whole = stored(**{EMBED: 1, "x": 2})
    head = stored({"tie_word_embeddings": True}, **{HEAD: 1, "x": 2})
    made = make(LINEAR, a=whole, b=head)
    assert names(made) == [EMBED, "x"]
    assert tensors_of(by_name(made)[EMBED]) == [EMBED, HEAD]
    with pytest.raises(CheckpointError, match=EMBED):
        make(LINEAR, a=whole, b=stored(**{HEAD: 1, "x": 2}))


def test_a_configuration_that_says_nothing_of_ties_stays_so(stored):
    models = [stored({"k": 1}, **{EMBED: 1, HEAD: v}) for v in (1, 2, 3)]
    for text in (TIES, DARE):
        made = make(text, base=models[0], a=models[1], b=models[2])
        assert "tie_word_embeddings" not in made.config


def test_nothing_is_read_where_nothing_depends_on_it(stored, monkeypatch):
    monkeypatch.setattr(tied, "same", None)
    models = [stored(**{EMBED: v, HEAD: EMBED}) for v in (1, 2)]
    assert make(LINEAR, a=models[0], b=models[1])
    assert make(TIES, base=models[0], a=models[0], b=models[1])


def stack(*parts):
    text = "merge_method: passthrough\nslices:\n"
    return text + "".join(f"  - sources: [{{model: {m}, layer_range: [0, 4]}}]\n" for m in parts)


class TestStacks:
    """Embedding of the first slice, head of the last."""

    TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

    def model(self, *, head, vocab=32):
        config = self.UNTIED if head else self.TIED
        return llama(head=head, vocab=vocab, config={"num_hidden_layers": 4, **config})

    def test_the_last_is_tied(self):
        made = make(stack("a", "b"), a=self.model(head=True), b=self.model(head=False))
        out = by_name(made)[HEAD]
        assert (models_of(out), tensors_of(out)[0]) == ((1,), EMBED)
        assert made.config["tie_word_embeddings"] is False
        assert models_of(by_name(made)[EMBED]) == (0,)

    def test_the_first_is_tied(self):
        made = make(stack("a", "b"), a=self.model(head=False), b=self.model(head=True))
        out = by_name(made)[HEAD]
        assert (models_of(out), tensors_of(out)[0]) == ((1,), HEAD)
        assert made.config["tie_word_embeddings"] is False

    def test_both_are_tied(self):
        made = make(stack("a", "b"), a=self.model(head=False), b=self.model(head=False))
        assert HEAD not in names(made)
        assert made.config["tie_word_embeddings"] is True

    def test_one_model_keeps_its_head(self):
        made = make(stack("a", "a"), a=self.model(head=False))
        assert HEAD not in names(made)
        assert not made.ties.untied

    def test_a_redundant_head_of_the_first(self, stored):
        layers = {f"model.layers.{i}.w": 1 for i in range(2)}
        first = stored({"num_hidden_layers": 2, **self.TIED}, **{EMBED: 1, HEAD: EMBED, **layers})
        last = stored({"num_hidden_layers": 2, **self.TIED}, **{EMBED: 2, **layers})
        made = make(stack("a", "b").replace("0, 4", "0, 2"), a=first, b=last)
        assert HEAD not in names(made)
        assert not made.ties.untied

    @pytest.mark.parametrize("heads", [(True, True), (True, False), (False, True)])
    def test_vocabularies_of_different_size(self, heads):
        a, b = self.model(head=heads[0], vocab=33), self.model(head=heads[1], vocab=32)
        with pytest.raises(
            CheckpointError, match=r"embed_tokens\.weight: .* different ones: 'a' \[33, 8\], 'b' \[32, 8\]"
        ):
            make(stack("a", "b"), a=a, b=b)

    def test_embeddings_may_have_more_rows_than_heads(self):
        kept = {n: i.shape for n, i in self.model(head=True).tensors.items()} | {EMBED: (40, 8)}
        model = checkpoint(kept, config={"num_hidden_layers": 4, **self.UNTIED})
        assert make(stack("a", "b"), a=model, b=model)


def test_the_same_plan_twice(stored):
    """What a plan reads from files depends on nothing else."""
    models = {n: stored(**{EMBED: v, HEAD: EMBED}) for n, v in (("base", 1), ("a", 2), ("b", 3))}
    first, second = (plan(Recipe.load(DARE), models=models) for _ in range(2))
    assert [op._replace(spec=None) for op in first.ops] == [op._replace(spec=None) for op in second.ops]
