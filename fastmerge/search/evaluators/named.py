"""Evaluators as recipes of a search, and the command line, name them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from fastmerge.errors import RecipeError, hint
from fastmerge.search.evaluators.base import Evaluator, Function
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
    count) or ``file.py:name``, or a mapping of ``call``, which is that, and of the arguments of :class:`Function`. It
    names a function of (model) or (model, data), or an evaluator. The code is run.

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
        return evaluator(given.pop("call"), **given)
    from fastmerge.search.evaluators.harness import Harness

    return Harness(**given)


def evaluator(place: str, data: Any = None, *, each: bool = False) -> Evaluator:
    """The evaluator or function that ``module:name`` or ``file.py:name`` names, as an evaluator.

    Args:
        place: an importable module or a Python file, and what it calls it; the module is run.
        data: as of :class:`Function`.
        each: as of :class:`Function`.

    Raises:
        RecipeError: there is no such module or name, or an evaluator was given data.
    """
    found = _found(place)
    if inspect.isclass(found):
        raise RecipeError(f"function: {place}: expected a function or an evaluator, got the class {found.__name__}")
    if not isinstance(found, Evaluator):
        return Function(found, data, each=each)
    if data is not None or each:
        raise RecipeError(f"function: {place} is an evaluator, which has its own data")
    return found


def _found(place: str) -> Any:
    module, _, name = place.rpartition(":") if isinstance(place, str) else ("", "", "")
    if not module or not name:
        raise RecipeError(f"function: expected module:name or file.py:name, got {place!r:.80}")
    try:
        loaded = _from_file(module) if module.endswith(".py") else _imported(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise RecipeError(f"function: {place}: {error}, here or among those installed") from None
    except OSError as error:
        raise RecipeError(f"function: {module}: cannot read: {error.strerror}") from None
    found: Any = loaded
    for part in name.split("."):
        if not hasattr(found, part):
            there = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise RecipeError(f"function: module {module!r} has no {name!r}{hint(part, there)}")
        found = getattr(found, part)
    return found


def _imported(module: str) -> Any:
    """A module; those of the working directory count, however this program was started."""
    here = os.getcwd()  # noqa: PTH109  as sys.path has it
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _from_file(path: str) -> Any:
    """A module of its own for a file; the same one whenever it is asked for."""
    name = f"fastmerge evaluators in {os.path.realpath(path)}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickles look there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
