"""mergekit's options: what they come to here, and how its command line says them, both without loading mergekit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fastmerge.planning.carry import is_tokenizer

if TYPE_CHECKING:
    from fastmerge.planning import Plan
    from fastmerge.recipe import Recipe

GIGABYTE = 10**9


@dataclass(frozen=True)
class Options:
    """``mergekit.options.MergeOptions`` of 0.1.5: the same fields and defaults.

    Those that are read nowhere have no effect here: memory is bounded always, reading and writing overlap, every core
    works, no pickle is read, no code is run, no table of architectures is asked, and adapters need no copies on disk.
    """

    allow_crimes: bool = False
    unsafe_truncate_embeddings: bool = False
    transformers_cache: str | None = None
    lora_merge_cache: str | None = None
    lora_merge_dtype: str | None = None
    cuda: bool = False
    device: str | None = None
    low_cpu_memory: bool = False
    out_shard_size: int = 5 * GIGABYTE
    copy_tokenizer: bool = True
    clone_tensors: bool = False
    trust_remote_code: bool = False
    random_seed: int | None = None
    lazy_unpickle: bool = False
    write_model_card: bool = True
    safe_serialization: bool = True
    verbosity: int = 0
    quiet: bool = False
    read_to_gpu: bool = False
    multi_gpu: bool = False
    num_threads: int | None = None
    gpu_rich: bool = False
    async_write: bool = False
    write_threads: int = 1


def device(options: Any) -> str:
    """Where to compute, as ``device`` of :func:`fastmerge.merge`; the CPU for accelerators without kernels."""
    asked = str(options.device or "cpu")
    if options.multi_gpu or options.gpu_rich or asked == "auto":
        return "auto"
    return asked if asked.startswith("cuda") else "cuda" if options.cuda else "cpu"


def beside(planned: Plan, options: Any) -> Plan:
    """The plan, whose output has only those files beside the weights that the options leave."""
    recipe = cast("Recipe", planned.recipe)
    if not options.copy_tokenizer and recipe.tokenizer_source is None and recipe.tokenizer is None:
        carry = tuple([c for c in planned.carry if not is_tokenizer(c[0])])
        planned = dataclasses.replace(planned, carry=carry)
    if not options.write_model_card:
        planned = dataclasses.replace(planned, card=False, fingerprint=f"{planned.fingerprint}-bare")
    return planned


class Command(NamedTuple):
    """A command line of ``mergekit-yaml``."""

    config: str
    out: str
    options: Options


_FIELDS = {f.name.replace("_", "-"): f for f in dataclasses.fields(Options) if f.name != "verbosity"}
_SHORT = {"-j": "--num-threads"}


def parse(words: Sequence[str]) -> Command | None:
    """Reads the command line of ``mergekit-yaml``; None for what mergekit is to read, and to answer, itself."""
    values: dict[str, Any] = {}
    places: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = _SHORT.get(word, word).partition("=")
        if word.startswith("-v") and set(word[1:]) == {"v"}:
            values["verbosity"] = values.get("verbosity", 0) + len(word) - 1
        elif not word.startswith("-"):
            places.append(word)
        elif (field := _FIELDS.get(name.removeprefix("--").removeprefix("no-"))) is None or not name.startswith("--"):
            return None
        elif field.type == "bool":
            if equals or (name == "--no-gpu-rich"):
                return None
            values[field.name] = not name.startswith("--no-")
        elif name.startswith("--no-") or not (equals or left):
            return None
        else:
            text = value if equals else left.pop(0)
            try:
                values[field.name] = _value(field, text)
            except ValueError:
                return None
    if len(places) != 2:
        return None
    return Command(places[0], places[1], Options(**values))


def _value(field: Any, text: str) -> str | int:
    """A value as mergekit's command reads it: sizes may end in k, m or b (10^3, 10^6, 10^9)."""
    if not field.type.startswith("int"):
        return text
    unit = {"k": 10**3, "m": 10**6, "b": GIGABYTE}.get(text[-1:].lower(), 1) if field.name == "out_shard_size" else 1
    return int(text[:-1] if unit > 1 else text) * unit
