"""What becomes of each tensor of a fine-tune in the adapter that is extracted from it, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from fastmerge.checkpoint.adapter import stored_transposed
from fastmerge.checkpoint.header import listing
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.planning import tied
from fastmerge.planning.missing import buffer

if TYPE_CHECKING:
    from fastmerge.checkpoint import Checkpoint, TensorInfo
    from fastmerge.commands.mergekit.extract import Options

Fate = Literal["low rank", "whole", "bias", "equal"]

_TABLES = re.compile(r"(^|[._])(embed\w*|embeddings?|\w*_embeddings?|wte|wpe)$")
"""Modules that are looked up: transposed in an adapter, as peft has it."""


class Module(NamedTuple):
    """One tensor of the fine-tune.

    Attributes:
        name: of the module, without ``.weight``.
        info: the tensor in the fine-tune.
        base: the same in the base; None where it has none of this shape.
        fate: ``low rank``; ``whole`` (in ``modules_to_save``); ``bias`` of a module of low rank; ``equal``: an adapter
            has no place for it, so that it must be as the base has it.
        table: it is an embedding.
        transposed: it is stored ``[in, out]``.
        asked: it is kept whole even where it is unchanged.
    """

    name: str
    info: TensorInfo
    base: TensorInfo | None
    fate: Fate
    table: bool = False
    transposed: bool = False
    asked: bool = False


def sort(base: Checkpoint, model: Checkpoint, options: Options) -> list[Module]:
    """All tensors of the fine-tune that the adapter may hold, in the order of its files; those without a place first.

    Raises:
        RecipeError: an expression that is none.
        CheckpointError: the models do not belong together, or hold types that cannot be subtracted.
    """
    include, exclude = _expressions(options.include_regex), _expressions(options.exclude_regex)
    problems = _strangers(base, model)
    heads = {name.rpartition(".")[0] for name in tied.candidates(model.tensors)}
    found: list[Module] = []
    for name, info in model.tensors.items():
        if buffer(name, info):
            continue
        module, _, last = name.rpartition(".")
        other = base.tensors.get(name)
        if other is not None and other.shape != info.shape:
            other = None
        table = bool(_TABLES.search(module))
        excluded = any(e.search(module) for e in exclude)
        wanted = not excluded and (not include or any(e.search(module) for e in include))
        asked = module in options.modules_to_save or module.rpartition(".")[2] in options.modules_to_save
        if not asked and not options.embed_lora and (table or module in heads) and not excluded:
            fate: Fate = "whole"
        elif asked:
            fate = "whole"
        elif not wanted:
            continue
        elif last == "weight" and len(info.shape) == 2 and other is not None:
            fate = "low rank"
        elif last in ("weight", "bias"):
            fate = "whole"
        else:
            fate = "equal"
        if not info.dtype.mergeable or (other is not None and not other.dtype.mergeable):
            fate = "equal"
        transposed = fate == "low rank" and stored_transposed(name, model.config.get("model_type"))
        found.append(Module(module, info, other, fate, table, transposed, asked))
    low = {m.name for m in found if m.fate == "low rank"}
    found = [m._replace(fate="bias") if m.fate == "whole" and m.name in low and not m.asked else m for m in found]
    if problems:
        raise CheckpointError(problems)
    if options.skip_undecomposable:
        found = [m for m in found if m.fate in ("low rank", "bias") or m.asked or m.table or m.name in heads]
    if not found:
        raise RecipeError("nothing to extract: the expressions leave no module")
    return sorted(found, key=lambda m: m.fate != "equal")


def _expressions(texts: Sequence[str]) -> list[re.Pattern[str]]:
    found, problems = [], []
    for text in texts:
        try:
            found.append(re.compile(text))
        except re.error as error:
            problems.append(f"{text!r}: no regular expression: {error}")
    if problems:
        raise RecipeError(problems)
    return found


def _strangers(base: Checkpoint, model: Checkpoint) -> list[str]:
    """What keeps a model from being a fine-tune of the base: tables of tokens may grow, and a head may be new."""
    free = set(tied.candidates([*base.tensors, *model.tensors]))
    problems = []
    for what, mine, other in (("lacks", model, base), ("has new", base, model)):
        names = [n for n, i in other.tensors.items() if n not in mine.tensors and n not in free and not buffer(n, i)]
        if names:
            problems.append(f"{model.ref}: {what} tensors beside {base.ref}: {listing(names)}")
    shapes = [
        f"{n} {list(i.shape)}, {list(base.tensors[n].shape)} in the base"
        for n, i in model.tensors.items()
        if n in base.tensors and i.shape != base.tensors[n].shape and n not in free and not buffer(n, i)
    ]
    return problems + ([f"{model.ref}: other shapes: {listing(shapes)}"] if shapes else [])


def tied_head(model: Checkpoint, name: str) -> str | None:
    """The head that a model without one of its own ties to an embedding: peft has to be given its copy as well."""
    classes = model.config.get("architectures")
    headed = isinstance(classes, list) and any(str(c).endswith(tied.HEADED) for c in classes)
    if not headed or [n for n in tied.candidates(model.tensors) if n.rpartition(".")[0] != name]:
        return None
    return "embed_out" if name.endswith("embed_in") else "lm_head"


def suffixes(names: Iterable[str]) -> list[str]:
    """The last parts of modules' names, as adapters list them."""
    return sorted({name.rpartition(".")[2] for name in names})
