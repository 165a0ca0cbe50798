"""The adapter of lm-eval, against a module of its shape, and lm-eval itself where that is installed."""

import importlib.util
import sys
import types

import pytest
import torch

from fastmerge.errors import BackendUnavailable, RecipeError
from fastmerge.search.evaluators import named, score
from fastmerge.search.evaluators.harness import Harness
from tests.search import small


class Task:
    def __init__(self, name, documents):
        self.name, self.eval_docs = name, list(range(documents))

    def higher_is_better(self):
        return {"acc": True, "loss": False}


class Manager:
    all_tasks = ("one", "two", "both")

    def __init__(self, include_path=None):
        self.path = include_path

    def load(self, names):
        every = {"one": Task("one", 3), "two": Task("two", 2)}
        return {"tasks": every if "both" in names else {n: every[n] for n in names}, "groups": {}, "group_map": {}}


class Wrapped:
    def __init__(self, pretrained, tokenizer, batch_size):
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size


@pytest.fixture
def calls(monkeypatch):
    """lm-eval's names, and what its main function was called with."""
    seen = []

    def simple_evaluate(*, model, tasks, samples, log_samples, **options):
        seen.append((model, [t.name for t in tasks], samples, options, model.model.training))
        out = {}
        for task in tasks:
            rows = [
                {
                    "doc_id": i,
                    "filter": f,
                    "metrics": ["acc", "loss", "words"],
                    "acc": n + i + len(task.name),
                    "words": "x",
                }
                for n, f in enumerate(("none", "strict"))
                for i in samples[task.name]
            ]
            out[task.name] = [row | {"loss": row["acc"]} for row in rows]
        return {"samples": out}

    modules = {
        n: types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    }
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = Wrapped
    modules["lm_eval.tasks"].TaskManager = Manager
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_documents_of_tasks_are_items(calls):
    model, token = torch.nn.Linear(1, 1), object()
    harness = named({"lm_eval": {"tasks": ["one", "two"], "num_fewshot": 2, "batch_size": 3}}, tokenizer=token)
    assert len(harness) == 5
    assert harness(model, [4, 0, 2]) == [4.0, 3.0, 5.0]
    wrapped, tasks, samples, options, training = calls[0]
    assert (wrapped.model, wrapped.tokenizer, wrapped.batch_size) == (model, token, 3)
    assert (tasks, samples) == (["two", "one"], {"two": [1], "one": [0, 2]})
    assert options == {"num_fewshot": 2, "bootstrap_iters": 0}
    assert not training
    assert model.training
    assert harness(model, []) == []
    assert Harness(["both"], token, metric="loss", filter="strict")(model, [0, 3]) == [-4.0, -4.0]


def test_what_tasks_do_not_have_is_refused(calls):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(RecipeError, match="lm-eval knows no 'three'"):
        Harness(["one", "three"], object())
    for tasks in ([], "one", [1]):
        with pytest.raises(RecipeError, match="tasks: expected names"):
            Harness(tasks, object())
    with pytest.raises(RecipeError, match="metrics acc, loss, words, got 'f1'"):
        Harness(["one"], object(), metric="f1")(model, [0])
    with pytest.raises(RecipeError, match="filters none, strict, got 'loose'"):
        Harness(["one"], object(), filter="loose")(model, [0])
    with pytest.raises(RecipeError, match="words is no number"):
        Harness(["one"], object(), metric="words")(model, [0])


def test_its_absence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BackendUnavailable, match=r"fastmerge\[eval\]"):
        named({"lm_eval": ["one"]}, tokenizer=object())


TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.conformance
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
@pytest.mark.filterwarnings("ignore")
def test_lm_eval_itself_agrees_with_accuracy(tmp_path, monkeypatch):
    """The same questions, as a task of lm-eval's and as lines of our own, on a model in fp32."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    questions = [
        {"question": q, "choices": ["ab", "cde", "fghi"], "answer": i % 3} for i, q in enumerate("qrstuvwxyzabcdef")
    ]
    file = small.write(tmp_path / "questions.jsonl", *questions)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK.replace("FILE", str(file)))
    model, token = small.model(), small.tokenizer()
    ours = named({"accuracy": {"data": str(file), "normalise": "none"}}, tokenizer=token)
    theirs = named({"lm_eval": {"tasks": ["letters"], "include_path": str(tmp_path / "tasks")}}, tokenizer=token)
    assert len(theirs) == len(ours) == 16
    expected = ours(model, range(16))
    assert 0 < score(ours, model) < 1
    assert theirs(model, range(16)) == expected
    assert theirs(model, [7, 2]) == [expected[7], expected[2]]
