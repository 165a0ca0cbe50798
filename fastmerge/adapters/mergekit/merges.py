"""mergekit's merges from disk to disk, done by this engine; what it refuses, mergekit does itself."""

from __future__ import annotations

import fnmatch
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastmerge.adapters.mergekit import options as mapping
from fastmerge.api import merge as engine
from fastmerge.dtypes import F64
from fastmerge.errors import BackendUnavailable, FastMergeError
from fastmerge.planning.carry import OTHERS, TOKENIZER
from fastmerge.recipe import Recipe

log = logging.getLogger("fastmerge")

OUTPUT = (
    "model*.safetensors", "model.safetensors.index.json", "config.json", "README.md", "mergekit_config.yml",
    "merge_report.json", *TOKENIZER, *OTHERS,
)  # fmt: skip
"""Names of what merges write: a directory that holds nothing else may be replaced."""


def install() -> Callable[[], None]:
    """Puts this engine in front of ``run_merge`` wherever a module has it; returns what takes that back."""
    from mergekit import merge

    own = merge.run_merge

    @functools.wraps(own)
    def run_merge(merge_config: Any, out_path: str, options: Any, config_source: str | None = None) -> None:
        reason = attempt(plain(merge_config), out_path, options)
        if reason is not None:
            log.warning("mergekit merges this itself: %s", reason)
            own(merge_config, out_path, options, config_source)

    _rename(own, run_merge)
    return functools.partial(_rename, run_merge, own)


def _rename(old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("run_merge") is old:
            vars(module)["run_merge"] = new


def attempt(recipe: str | Mapping[str, Any], out: str, options: Any) -> str | None:
    """Merges with this engine.

    As with mergekit, an output of an earlier merge is replaced (here at the end, and at once).

    Args:
        recipe: a file, or the same as a mapping.
        out: the output directory.
        options: mergekit's, or those of :func:`fastmerge.adapters.mergekit.options.parse`.

    Returns:
        None where that is done; else why mergekit is to do it, and nothing was written.

    Raises:
        FastMergeError: the merge failed after it had begun.
    """
    target = os.path.realpath(out)
    if not options.safe_serialization:
        return "--no-safe-serialization: this engine writes safetensors only"
    if foreign := _foreign(target):
        return f"{out} holds {foreign!r}, which replacing the directory would lose"
    try:
        loaded = Recipe.load(recipe)
        remote = [str(ref) for ref in (*loaded.refs, *loaded.adapters) if not Path(ref.path).expanduser().exists()]
        if options.transformers_cache is not None and remote:
            return f"--transformers-cache: {remote[0]} is in a cache of mergekit's choice"
        planned = engine.plan(loaded, seed=options.random_seed, shard_size=options.out_shard_size)
    except FastMergeError as refused:
        return str(refused)
    if loaded.dtype == F64.name and any(op.spec.grain != "copy" and set(op.spec.dtypes) != {F64} for op in planned.ops):
        return "dtype: float64: mergekit computes in it, this engine only where models have it"
    planned = mapping.beside(planned, options)
    where = mapping.device(options)
    try:
        engine.merge(planned, target, device=where, overwrite=os.path.lexists(target))
    except BackendUnavailable as refused:
        return str(refused)
    return None


def _foreign(target: str) -> str | None:
    """Something in the output directory that no merge writes; None where there is nothing."""
    if not os.path.isdir(target):  # noqa: PTH112
        return None
    names = sorted(os.listdir(target))  # noqa: PTH208
    return next((n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in OUTPUT)), None)


def plain(value: Any) -> Any:
    """A configuration of mergekit's as a recipe's mapping; a reference in the form that has no second meaning."""
    if hasattr(value, "local_path"):
        return {"model": plain(value.model), **({"lora": plain(value.lora)} if value.lora else {})}
    if hasattr(value, "model_fields_set"):
        return {name: plain(v) for name, v in value if v is not None}
    if isinstance(value, Mapping):
        return {name: plain(v) for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
