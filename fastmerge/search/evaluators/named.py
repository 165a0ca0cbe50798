"""Evaluators as recipes of a search, and the command line, name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastmerge.errors import RecipeError, hint
from fastmerge.search.evaluation import Evaluator, evaluator, imported
from fastmerge.search.evaluators.base import Each
from fastmerge.search.evaluators.lines import Accuracy, Perplexity

_LINES = ("data", "tokenizer", "batch_size", "max_length", "separator", "logits_bytes")
_TASKS = ("tasks", "tokenizer", "metric", "filter", "num_fewshot", "include_path", "batch_size")

ARGUMENTS = {
    "perplexity": _LINES,
    "accuracy": (*_LINES, "normalise"),
    "lm_eval": (*_TASKS, "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "system_instruction"),
    "function": ("call", "data", "each"),
}
"""What may stand under each name; the first must."""


def named(mapping: Mapping[str, Any], *, tokenizer: Any = None) -> Evaluator:
    """The evaluator of a mapping with one key, as YAML has it.

    ::

        perplexity: {data: texts.jsonl}
        accuracy: {data: questions.jsonl, normalise: tokens}
        lm_eval: {tasks: [arc_easy], metric: acc_norm}
        function: package.module:function

    What stands under the key are the arguments of :class:`Perplexity`, :class:`Accuracy` and :class:`Harness`; a path
    alone is ``data``, a list alone is ``tasks``. ``function`` is ``module:name`` (modules of the working directory
    count), or a mapping of ``call``, which is that, ``data``, and ``each``: whether the elements of ``data`` are items
    (:class:`Each`). It names a function of (model) or (model, data), or an evaluator; the code is run.

    Args:
        mapping: one of these.
        tokenizer: where the arguments have none: of transformers, or the model (a directory, a hub id) that has it.

    Raises:
        RecipeError: there is no such evaluator, argument, file or function; or as the evaluator says.
    """
    if not isinstance(mapping, Mapping) or len(mapping) != 1:
        raise RecipeError(f"evaluator: expected a mapping with one of {', '.join(ARGUMENTS)}, got {mapping!r:.80}")
    ((name, value),) = mapping.items()
    if name not in ARGUMENTS:
        expected = f"expected one of {', '.join(ARGUMENTS)}"
        raise RecipeError(f"evaluator: {expected}; got {name!r:.80}{hint(str(name), ARGUMENTS)}")
    known = ARGUMENTS[name]
    given = dict(value) if isinstance(value, Mapping) else {known[0]: value}
    problems = [
        f"{name}: unknown argument {key!r:.80}{hint(str(key), known)}; known: {', '.join(known)}"
        for key in given
        if key not in known
    ]
    if "tokenizer" in known and given.setdefault("tokenizer", tokenizer) is None:
        problems.append(f"{name}: expected tokenizer: a model's directory or hub id")
    wanted = list if name == "lm_eval" else str
    if not isinstance(given.get(known[0]), wanted):
        shown = f", got {given[known[0]]!r:.80}" if known[0] in given else ""
        problems.append(f"{name}: expected {known[0]}, a {'list of names' if wanted is list else 'text'}{shown}")
    if problems:
        raise RecipeError(problems)
    if name == "perplexity":
        return Perplexity(**given)
    if name == "accuracy":
        return Accuracy(**given)
    if name == "function":
        return _function(**given)
    from fastmerge.search.evaluators.harness import Harness

    return Harness(**given)


def _function(call: str, data: Any = None, *, each: bool = False) -> Evaluator:
    """What ``module:name`` names, as an evaluator."""
    found = imported("evaluator: function", call)
    return Each(found, data) if each else evaluator(found, data)
