"""Which layers a smaller model keeps, and that it is a module of those."""

import pytest
import torch

from fastmerge.dna import LayerSelection, Parent, choose_layers, plan_layers
from fastmerge.dna.results import module, state_dict, write
from fastmerge.errors import RecipeError
from tests.dna import zoo
from tests.dna.test_depth import by_hand, tensors_of, unlike

SCORES = [3.0, 9.0, 1.0, 5.0, 5.0, 2.0]


@pytest.mark.parametrize(
    ("keep", "selection", "expected", "preserving"),
    [
        (2, "uniform", [0, 5], [0, 5]),
        (3, "uniform", [0, 3, 5], [0, 3, 5]),
        (4, "uniform", [0, 2, 3, 5], [0, 2, 3, 5]),
        (3, "first", [0, 1, 2], [0, 1, 5]),
        (3, LayerSelection.LAST, [3, 4, 5], [0, 4, 5]),
        (3, "importance", [1, 3, 4], [0, 1, 5]),
        (4, "importance", [0, 1, 3, 4], [0, 1, 3, 5]),
        (2, "importance", [1, 3], [0, 5]),
        (6, "last", list(range(6)), list(range(6))),
    ],
)
def test_layers_are_chosen(keep, selection, expected, preserving):
    scores = SCORES if selection == "importance" else None
    assert choose_layers(6, keep, selection, scores=scores, preserve_first_last=False) == expected
    assert choose_layers(6, keep, selection, scores=scores) == preserving


def test_uniform_is_strictly_ascending_from_the_first_to_the_last():
    for n in range(2, 40):
        for k in range(2, n + 1):
            found = choose_layers(n, k, "uniform")
            assert found == sorted(set(found))
            assert len(found) == k
            assert (found[0], found[-1]) == (0, n - 1)
    assert choose_layers(5, 1, "uniform", preserve_first_last=False) == [0]


@pytest.mark.parametrize(
    ("words", "settings", "match"),
    [
        ((6, 0), {}, "target_layers: expected 1 to 6"),
        ((6, 7), {}, "target_layers: expected 1 to 6"),
        ((6, 1), {}, "expected 2 or more with preserve_first_last"),
        ((6, 3, "best"), {}, "layer_selection: expected one of importance, uniform, first, last"),
        ((6, 3), {}, "expected 6 scores, one per layer, got none"),
        ((6, 3), {"scores": [1.0]}, "got 1"),
        ((2, 2), {"scores": [1.0, float("nan")]}, "finite scores"),
    ],
    ids=str,
)
def test_wrong_choices_are_refused(words, settings, match):
    with pytest.raises(RecipeError, match=match):
        choose_layers(*words, **settings)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_of_some_layers_is_the_module_of_those(tmp_path, kind):
    model = zoo.saved(kind, tmp_path / "model", num_hidden_layers=4)
    draft = plan_layers(Parent.open(tmp_path / "model"), [0, 2, 3])
    write(draft, tmp_path / "out")
    new = zoo.load(tmp_path / "out")
    hand = by_hand(model, [0, 2, 3])
    assert zoo.difference(hand, new) == 0
    assert zoo.difference(model, new) > 1e-2
    assert torch.equal(zoo.generated(hand), zoo.generated(new))
    assert unlike(tensors_of(tmp_path / "out"), state_dict(draft)) == []
    assert draft.facts["layers"] == [0, 2, 3]


@pytest.mark.conformance
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_model_of_some_layers_of_any_architecture_is_the_module_of_those(kind):
    model = zoo.model(kind, num_hidden_layers=5)
    new = module(plan_layers(Parent.open(model), [0, 1, 4]))
    assert zoo.difference(by_hand(model, [0, 1, 4]), new) == 0


def test_all_layers_are_the_model():
    model = zoo.model("olmo2")
    parent = Parent.open(model)
    draft = plan_layers(parent, range(3))
    assert unlike(state_dict(draft), model.state_dict()) == []
    assert draft.config == parent.config


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 3], [-1], ["0"]], ids=str)
def test_wrong_layers_are_refused(kept):
    parent = Parent.open(zoo.model("llama"))
    with pytest.raises(RecipeError, match="layers: expected"):
        plan_layers(parent, kept)
