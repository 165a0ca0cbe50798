"""Rows by tokens, beside mergekit's own embedding step; skipped where it is not installed."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastmerge.ops.made import load
from fastmerge.ops.sources import Memory
from fastmerge.planning.rows import Models
from fastmerge.planning.vocabulary import Vocabulary, align
from fastmerge.recipe.refs import ModelRef
from fastmerge.recipe.schema import Token, TokenSource
from tests.ops.test_made import bring, memory
from tests.recipe.fakes import checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mergekit")
    from mergekit.common import ModelReference
    from mergekit.tokenizer.config import ModelTokenEmbedding, TokenEmbeddingConfig, ZeroEmbedding
    from mergekit.tokenizer.embed import PermutedVocabulary

WORDS = ["u x y both z", "u z both a1 x three", "both u b1 three y"]
OUT = ["u", "x", "y", "both", "z", "a1", "three", "b1", "new"]
NAME = "model.embed_tokens.weight"
REFS = [ModelRef(n) for n in "abc"]
THEIRS = {r.path: ModelReference.parse(r.path) for r in REFS}


def theirs(xs, base, tokens, multiple):
    numbers = {t: i for i, t in enumerate(OUT)}
    own = {r: w.split() for r, w in zip(THEIRS.values(), WORDS, strict=True)}
    permutations = {r: {i: w.index(t) if t in w else -1 for t, i in numbers.items()} for r, w in own.items()}
    originals = {r: {t: i for i, t in enumerate(w)} for r, w in own.items()}
    info = SimpleNamespace(
        tokenizer=SimpleNamespace(get_vocab=lambda: numbers), permutations=permutations, original_vocabs=originals
    )
    task = PermutedVocabulary.model_construct(
        tokens=tokens, pad_to_multiple_of=multiple, base_model=THEIRS.get(base), vocabulary_axis=0
    )
    return list(task.execute(tokenizer_info=info, tensors=dict(zip(THEIRS.values(), xs, strict=True))).values())


def ours(xs, base, explicit, multiple):
    tables = [{t: i for i, t in enumerate(w.split())} for w in WORDS]
    rows = {r: len(x) for r, x in zip(REFS, xs, strict=True)}
    own, there = align({t: i for i, t in enumerate(OUT)}, dict(zip(REFS, tables, strict=True)), rows)
    models = Models({r: checkpoint({NAME: tuple(x.shape)}) for r, x in zip(REFS, xs, strict=True)}, {})
    size = -(-len(OUT) // multiple) * multiple
    made = Vocabulary(models, rows, own, there, size, explicit, dict(enumerate(OUT)))
    files: list[Memory] = [memory(x) for x in xs]
    sources = made.sources(NAME, REFS, [NAME] * 3, files, REFS.index(ModelRef(base)) if base else None)
    return [torch.from_numpy(load(bring, s, 0, size * 4)).reshape(size, 4) for s in sources]


@pytest.mark.parametrize("base", ["a", "c", None])
@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("named", [False, True])
def test_rows_are_those_of_mergekit(base, multiple, named):
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(len(w.split()), 4, generator=g) for w in WORDS]
    a, b, _ = REFS
    explicit = {
        OUT.index("y"): (Token(TokenSource(a, token="x"), force=True), a, 1),
        OUT.index("three"): (Token(TokenSource(None)), None, -1),
        OUT.index("b1"): (Token(TokenSource(b, token_id=3)), b, 3),
    }
    tokens = {
        "y": TokenEmbeddingConfig(
            source=ModelTokenEmbedding(kind="model_token", model=THEIRS["a"], token="x"), force=True
        ),
        "three": TokenEmbeddingConfig(source=ZeroEmbedding(kind="zero")),
        "b1": TokenEmbeddingConfig(source=ModelTokenEmbedding(kind="model_token", model=THEIRS["b"], token_id=3)),
    }
    want = theirs(xs, base, tokens if named else None, multiple)
    got = ours(xs, base, explicit if named else {}, multiple)
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert np.allclose(x, y, rtol=1e-6, atol=1e-6)
