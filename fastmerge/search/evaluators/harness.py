"""Tasks of the LM Evaluation Harness as an evaluator; the extra ``eval`` installs it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastmerge.errors import BackendUnavailable, RecipeError
from fastmerge.search.evaluators.base import known_items
from fastmerge.search.evaluators.data import tokenizer_of
from fastmerge.search.evaluators.lines import evaluating


class Harness:
    """Tasks of lm-eval, whose documents are the items: those of the first task, then those of the second, and so on.

    The tasks are loaded once, and the live model is wrapped in lm-eval's ``HFLM`` where it is. A metric that is better
    when smaller is negated.

    Args:
        tasks: names as lm-eval knows them, groups and tags too.
        tokenizer: of transformers, or the model (a directory, a hub id) whose tokenizer it is.
        metric: what a document's score is, by the name that the task gives it.
        filter: which of a task's filters is read; the first where absent.
        num_fewshot: examples before each document; the task's own number where absent.
        include_path: a directory of tasks beside lm-eval's own.
        batch_size: of ``HFLM``.
        options: further arguments of ``lm_eval.simple_evaluate``.

    Raises:
        BackendUnavailable: lm-eval is not installed.
        RecipeError: there is no such task, or a number is out of range.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: Any,
        *,
        metric: str = "acc",
        filter: str | None = None,  # noqa: A002  as lm-eval calls it
        num_fewshot: int | None = None,
        include_path: str | os.PathLike[str] | None = None,
        batch_size: int = 16,
        **options: Any,
    ) -> None:
        if isinstance(tasks, str) or not tasks or not all(isinstance(t, str) for t in tasks):
            raise RecipeError(f"tasks: expected names of tasks, got {tasks!r:.80}")
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise BackendUnavailable(f"tasks need lm-eval: pip install 'fastmerge[eval]' ({error})") from None
        self._evaluate, self._wrap = lm_eval.simple_evaluate, HFLM
        self._tokenizer = tokenizer_of(tokenizer)
        self._metric, self._filter, self._batch_size = metric, filter, batch_size
        self._options: dict[str, Any] = {"num_fewshot": num_fewshot, "bootstrap_iters": 0, **options}
        manager = TaskManager(include_path=None if include_path is None else os.fspath(include_path))
        if unknown := [t for t in tasks if t not in manager.all_tasks]:
            raise RecipeError([f"tasks: lm-eval knows no {t!r}" for t in unknown])
        self._tasks: dict[str, Any] = manager.load(list(tasks))["tasks"]
        self._items = [(name, i) for name, task in self._tasks.items() for i in range(len(task.eval_docs))]

    def __len__(self) -> int:
        return len(self._items)

    def __call__(self, model: Any, items: Sequence[int]) -> list[float]:
        """Runs the documents that are asked for.

        Raises:
            RecipeError: there is no such item, or the task has no such metric or filter.
        """
        asked = [self._items[i] for i in known_items(items, len(self))]
        if not asked:
            return []
        documents: dict[str, list[int]] = {}
        for name, i in asked:
            documents.setdefault(name, []).append(i)
        with evaluating(model):
            found = self._evaluate(
                model=self._wrap(pretrained=model, tokenizer=self._tokenizer, batch_size=self._batch_size),
                tasks=[self._tasks[name] for name in documents],
                samples={name: sorted(some) for name, some in documents.items()},
                log_samples=True,
                **self._options,
            )
        scores = {(name, i): s for name in documents for i, s in self._scores(name, found["samples"][name]).items()}
        return [scores[one] for one in asked]

    def _scores(self, name: str, samples: Sequence[Mapping[str, Any]]) -> dict[int, float]:
        """The metric of each document of a task."""
        filters = list(dict.fromkeys(str(s["filter"]) for s in samples))
        wanted = self._filter or filters[0]
        mine = [s for s in samples if s["filter"] == wanted]
        if not mine:
            raise RecipeError(f"{name}: expected one of its filters {', '.join(filters)}, got {wanted!r}")
        if self._metric not in mine[0]["metrics"]:
            known = ", ".join(mine[0]["metrics"])
            raise RecipeError(f"{name}: expected one of its metrics {known}, got {self._metric!r}")
        if odd := [s[self._metric] for s in mine if not isinstance(s[self._metric], int | float)]:
            raise RecipeError(f"{name}: {self._metric} is no number of each document, but such as {odd[0]!r:.80}")
        better = self._tasks[name].higher_is_better().get(self._metric, True)
        return {int(s["doc_id"]): float(s[self._metric]) * (1 if better else -1) for s in mine}
