"""Functions, parts and engines as evaluators, and the mapping that names them."""

import inspect

import pytest
import torch

from fastmerge.errors import RecipeError
from fastmerge.search.evaluators import Accuracy, Function, Perplexity, Served, Subset, means, named, score, weights
from fastmerge.search.evaluators.harness import Harness
from fastmerge.search.evaluators.named import ARGUMENTS
from tests.search import small


def times(model, item):
    return model * item


def both(model, item):
    return {"up": model + item, "down": -item}


both.objectives = ("up", "down")


def plain(model):
    return 2 * model


def with_data(model, data):
    return model + data["more"]


EACH = Function(times, [1, 2, 3], each=True)


def test_a_function_of_each_item():
    assert EACH(10, [2, 0]) == [30, 10]
    assert len(EACH) == 3
    assert score(EACH, 10) == 20.0
    assert means(Function(both, [1, 2], each=True), 5) == {"up": 6.5, "down": -1.5}
    assert Function(both, [1], each=True).objectives == ("up", "down")
    assert score(plain, 4) == 8.0
    assert score(lambda model, more=5: model + more, 1) == 6.0, "without data it is called with the model alone"
    assert Function(with_data, {"more": 2})(1, [0]) == [3]
    assert Function(max, 5)(7, [0]) == [7.0], "a compiled function may have no signature"
    with pytest.raises(RecipeError, match="one objective, got up, down"):
        score(Function(both, [1, 2], each=True), 5)
    with pytest.raises(RecipeError, match="expected a number"):
        score(lambda model: "good", 1)
    with pytest.raises(RecipeError, match="items: expected numbers from 0 to 2, got 3"):
        EACH(10, [3])
    for data in ([], "abc", {"a": 1}, 3):
        with pytest.raises(RecipeError, match="data: expected a list"):
            Function(times, data, each=True)
    assert score(lambda model: float("nan"), 1) == -float("inf")


def test_part_of_an_evaluator():
    part = Subset(EACH, [2, 1])
    assert len(part) == 2
    assert part(1, [1, 0]) == [2, 3]
    with pytest.raises(RecipeError, match="items"):
        part(1, [2])
    with pytest.raises(RecipeError, match="items"):
        Subset(EACH, [3])


class Engine:
    """As serving engines take weights: names and tensors, copied while they come."""

    def __init__(self):
        self.held = {}

    def load_weights(self, pairs):
        for name, tensor in pairs:
            self.held[name] = tensor.clone()


def tied(seed):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2))
    module[1].weight = module[0].weight
    return module


def test_an_engine_gets_each_candidate_before_it_is_asked():
    engine, models = Engine(), [tied(0), tied(1)]

    def ask(items):
        return [float(engine.held["0.weight"].sum()) + i for i in items]

    served = Served(engine.load_weights, ask, 4)
    assert len(served) == 4
    for model in models:
        expected = float(model[0].weight.detach().sum())
        assert served(model, [3, 1]) == pytest.approx([expected + 3, expected + 1])
        assert list(engine.held) == ["0.weight", "1.bias"], "tied weights come once"
    assert [n for n, _ in weights(models[0].state_dict())] == ["0.weight", "1.bias"]
    with pytest.raises(RecipeError, match=r"2 were not, such as 0.weight"):
        Served(lambda pairs: None, ask, 4)(models[0], [0])


def test_evaluators_by_name(tmp_path):
    token = small.tokenizer()
    lines = small.write(tmp_path / "t.jsonl", {"prompt": "ab", "completion": "c"})
    assert isinstance(named({"perplexity": str(lines)}, tokenizer=token), Perplexity)
    assert isinstance(named({"accuracy": {"data": str(lines), "tokenizer": token, "normalise": "tokens"}}), Accuracy)
    here = __name__
    assert named({"function": f"{here}:plain"})(4, [0]) == [8]
    assert named({"function": {"call": f"{here}:with_data", "data": {"more": 3}}})(4, [0]) == [7]
    assert named({"function": {"call": f"{here}:times", "data": [5, 6], "each": True}})(2, [1]) == [12]
    assert named({"function": f"{here}:EACH"}) is EACH
    with pytest.raises(RecipeError, match="has its own data"):
        named({"function": {"call": f"{here}:EACH", "data": 1}})
    (tmp_path / "mine.py").write_text("def f(model):\n    return 3 * model\n")
    place = f"{tmp_path / 'mine.py'}:f"
    assert named({"function": place})(4, [0]) == [12]
    assert named({"function": place})._function is named({"function": place})._function


@pytest.mark.parametrize(
    ("mapping", "what"),
    [
        ({}, "expected a mapping with one of perplexity, accuracy"),
        ({"perplexity": "x", "accuracy": "y"}, "expected a mapping with one of"),
        ("accuracy", "expected a mapping with one of"),
        ({"acuracy": "x"}, r"got 'acuracy' \(did you mean 'accuracy'\?\)"),
        ({"accuracy": {"date": "x"}}, r"(?s)unknown argument 'date'.*did you mean 'data'.*expected tokenizer.*data"),
        ({"accuracy": 3}, "expected data, a text, got 3"),
        ({"lm_eval": "arc"}, "expected tasks, a list of names, got 'arc'"),
        ({"function": "nothing"}, "expected module:name or file.py:name"),
        ({"function": "no_such_module_here:f"}, "No module named 'no_such_module_here'"),
        ({"function": "no/such/file.py:f"}, "cannot read"),
        ({"function": "pathlib:Path"}, "expected a function or an evaluator, got the class Path"),
        ({"function": "math:nothing"}, "has no 'nothing'"),
        ({"function": "math:pi"}, "expected a function"),
        ({"function": {"call": "math:sqrt", "each": True}}, "data: expected a list of items"),
    ],
)
def test_wrong_names_are_refused(mapping, what):
    with pytest.raises(RecipeError, match=what):
        named(mapping)


def test_the_arguments_that_yaml_may_have_are_those_that_there_are():
    kinds = {"perplexity": Perplexity, "accuracy": Accuracy, "lm_eval": Harness}
    for name, kind in kinds.items():
        taken = {**inspect.signature(Perplexity).parameters, **inspect.signature(kind).parameters}
        missing = [a for a in ARGUMENTS[name] if a not in taken]
        more = {"apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "system_instruction"}
        assert set(missing) == (more if name == "lm_eval" else set())
