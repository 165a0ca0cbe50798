"""Targets that fit, and those that do not."""

import pytest
import torch

import fastmerge as fm
from fastmerge.errors import RecipeError, ShapeError
from tests import tiny
from tests.session.family import different, recipe


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    paths = tiny.family(tmp_path_factory.mktemp("models"), hidden=32, vocab=70)
    with fm.Session(list(paths.values())) as session:
        yield session, recipe(paths, "linear", weight=0.5), session.render(recipe(paths, "linear", weight=0.5))


def empty(tensors):
    """A target of the same shapes."""
    return {n: torch.full_like(t, 7) for n, t in tensors.items()}


HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {NORM: torch.zeros(5, dtype=torch.bfloat16)}, r"model.norm.weight: expected the shape \[32\]"),
        (lambda t: t | {NORM: torch.zeros(32)}, "recipe makes bfloat16, got a tensor of float32.*out_dtype: float32"),
        (lambda t: t | {NORM: torch.zeros(64, dtype=torch.bfloat16)[::2]}, "contiguous"),
        (lambda t: t | {NORM: torch.zeros(32, dtype=torch.bfloat16, device="meta")}, "on the CPU.*meta"),
        (lambda t: {n: v for n, v in t.items() if n != NORM}, "no place for model.norm.weight"),
        (lambda t: t | {"more": torch.zeros(3)}, "more: the recipe makes no such tensor"),
        (lambda t: t | {HEAD: t["model.embed_tokens.weight"]}, "the same memory as"),
        (lambda t: t | {NORM: t[HEAD].view(-1)[8:40]}, "overlap"),
        (lambda t: t | {NORM: 3}, "expected a torch tensor"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(held, change, words):
    session, document, tensors = held
    target = empty(tensors)
    with pytest.raises(ShapeError, match=words):
        session.render(document, change(target))
    assert all(bool((t == 7).all()) for t in target.values())


def test_no_target(held):
    session, document, _ = held
    with pytest.raises(RecipeError, match="expected a module or a mapping"):
        session.render(document, 3)


def test_a_prefix_is_explained(held):
    session, document, tensors = held
    target = {n.removeprefix("model."): t for n, t in empty(tensors).items()}
    session.render(document, target)
    assert different({n if n == HEAD else f"model.{n}": t for n, t in target.items()}, tensors) == []


def test_models_are_no_targets():
    states = {n: {"x": torch.full((4,), float(i)), "y": torch.ones(3)} for i, n in enumerate("ab")}
    document = recipe({n: n for n in "ab"}, "linear", names=("a", "b"), dtype="float32", weight=0.5)
    with fm.Session(states) as session:
        with pytest.raises(ShapeError, match="x: is a tensor of one of the session's models"):
            session.render(document, states["a"])
        assert states["a"]["x"].tolist() == [0.0] * 4


def test_tied_tensors_are_written_once():
    class Tied(torch.nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.embed = torch.nn.Embedding(4, 3)
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight
            self.embed.weight.data.fill_(fill)

    target = Tied(0.0)
    document = recipe({n: n for n in "ab"}, "linear", names=("a", "b"), dtype="float32", weight=0.5)
    with fm.Session({"a": Tied(1.0), "b": Tied(3.0)}) as session:
        session.render(document, target)
        assert bool((target.head.weight == 2.0).all())


def test_buffers_that_models_make_for_themselves_need_no_place():
    states = {n: {"x": torch.ones(4), "layers.0.rotary_emb.inv_freq": torch.ones(3)} for n in "ab"}
    document = recipe({n: n for n in "ab"}, "linear", names=("a", "b"), dtype="float32", weight=0.5)
    with fm.Session(states) as session:
        target = {"x": torch.zeros(4)}
        session.render(document, target)
        assert target["x"].tolist() == [1.0] * 4


def test_inference_mode_and_gradients(held):
    session, document, tensors = held
    with torch.inference_mode():
        target = empty(tensors)
        session.render(document, target)
        session.render(document, target)
        assert different(target, tensors) == []
    leaf = {n: torch.nn.Parameter(t) for n, t in empty(tensors).items()}
    session.render(document, leaf)
    assert different(leaf, tensors) == []
