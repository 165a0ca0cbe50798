"""LoRA adapters merged with each other, into an adapter that peft loads; no base is read.

The kinds are those of peft's ``add_weighted_adapter``:

=========================================================  ==========================================================
``cat``                                                    the sum of the updates: factors side by side, ranks add up
``svd``                                                    the best approximation of that sum of a rank
``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd``,      the method on the updates ``s B A`` themselves, then the
``magnitude_prune_svd``                                    best approximation of a rank
``linear``, ``ties``, ``dare_linear``, ``dare_ties``,      the method on A and on B each, as peft: a rough
``magnitude_prune``                                        approximation of anything, since a product is not linear
=========================================================  ==========================================================
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.api.mixed import MIXED, mixed
from fastmerge.checkpoint.adapter import CONFIG, WEIGHTS, Adapter, Update
from fastmerge.checkpoint.header import listing
from fastmerge.dtypes import F32
from fastmerge.errors import BudgetError, CheckpointError, RecipeError, hint
from fastmerge.sizes import default_memory, parse_bytes, show_bytes

if TYPE_CHECKING:
    from fastmerge.checkpoint import Files, TensorInfo, Writer
    from fastmerge.ops.factored import Array, Factors

log = logging.getLogger("fastmerge")

KINDS = ("cat", "svd", *MIXED, *(f"{kind}_svd" for kind in MIXED[1:]))
"""All; those of :data:`MIXED` work on A and B each, but for ``..._svd``."""

_BAKE = "bake them into the base (fastmerge lora bake), which applies everything"
_ENDS = (".weight", ".bias")
_SAME = ("modules_to_save", "bias")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_PREFIX = "base_model.model."


class _Module(NamedTuple):
    """A weight that adapters change.

    Attributes:
        name: of the module.
        updates: by position of the adapter.
    """

    name: str
    updates: dict[int, Update]

    @property
    def first(self) -> Update:
        """One of them: all have its kind and sizes."""
        return next(iter(self.updates.values()))

    def names(self) -> tuple[str, str]:
        """Of the result's A and B."""
        kind, end = ("embedding_", "") if self.first.embedding else ("", ".weight")
        return f"{_PREFIX}{self.name}.lora_{kind}A{end}", f"{_PREFIX}{self.name}.lora_{kind}B{end}"


def merge_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    kind: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    memory: str | float | None = None,
    overwrite: bool = False,
) -> Path:
    """Merges LoRA adapters of one base into a new adapter directory, one layer at a time.

    Scalings (alpha, rank-stabilised, patterns) come before the weights, and the result's own is 1. A layer that only
    some adapters have is merged of these. Smaller ranks are filled up with zeros, so that one ``r`` is that of all.

    Args:
        adapters: directories or hub ids, each of ``A [r, I]`` and ``B [O, r]`` in any floating-point type.
        out: the directory to create: ``adapter_model.safetensors`` in fp32, and ``adapter_config.json``.
        weights: of the adapters; 1 each where absent.
        kind: one of :data:`KINDS`.
        rank: of the result, for ``svd`` and ``..._svd``; the largest of the adapters where absent.
        density: share that stays, for the kinds that thin.
        seed: of random masks.
        memory: budget in bytes (``"8GB"``) for the largest layer; ``..._svd`` takes whole matrices.
        overwrite: replace an existing output.

    Returns:
        The output directory.

    Raises:
        RecipeError: the kind, a weight or a parameter is wrong.
        CheckpointError: an adapter holds what a sum of updates does not express, or they do not fit each other.
        OutputError: the output exists.
        BudgetError: a layer takes more than the budget.
    """
    from fastmerge.checkpoint import Files, Writer, layout

    factors = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    _check(len(adapters), factors, kind, rank, density)
    opened = [Adapter.open(os.fspath(a)) for a in adapters]
    modules, carried = _modules(opened, kind)
    width = _rank(modules, kind, rank)
    need, name = max((_need(m, kind, width), m.name) for m in modules)
    if need > (budget := parse_bytes(memory) if memory is not None else default_memory()):
        raise BudgetError(
            f"{name}: {kind} takes {show_bytes(need)}, and the budget is {show_bytes(budget)}: see --memory"
        )
    rows = []
    for module in modules:
        for name, shape in zip(module.names(), _shapes(module, width), strict=True):
            rows.append((name, F32, shape))
    rows += [(name, info.dtype, info.shape) for name, (_, info) in carried.items()]
    facts = {"kind": kind, "weights": factors, "rank": width, "density": density, "seed": seed}
    facts["inputs"] = [a.checkpoint.identity for a in opened]
    laid = layout(rows, shard_size=sys.maxsize, metadata={"fastmerge_lora": json.dumps(facts, sort_keys=True)})
    laid = replace(laid, shards=(replace(laid.shards[0], name=WEIGHTS),))
    checkpoints = [a.checkpoint for a in opened]
    for warning in [w for c in checkpoints for w in c.warnings]:
        log.warning("%s", warning)
    paths = [c.path for c in checkpoints]
    with (
        Files(checkpoints) as files,
        Writer(out, laid, fingerprint=laid.digest, overwrite=overwrite, inputs=paths) as writer,
    ):
        for module in modules:
            made = _merged(module, files, factors, kind, width, density, seed)
            for name, array in zip(module.names(), made, strict=True):
                _write(writer, name, array)
        for name, (model, info) in carried.items():
            _copy(writer, name, files.fd(model, info.file), info)
        for checkpoint in checkpoints:
            checkpoint.recheck()
        config = _config(opened, modules, width)
        writer.add(CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        writer.commit()
    return writer.target


def _check(count: int, weights: Sequence[float], kind: str, rank: int | None, density: float | None) -> None:
    """Refuses arguments that mean nothing, all at once."""
    problems = []
    if kind not in KINDS:
        problems.append(f"{kind!r} is no kind of merge of adapters{hint(kind, KINDS)}; known: {', '.join(KINDS)}")
    if not count:
        problems.append("adapters: expected at least one, got none")
    if len(weights) != count:
        problems.append(f"weights: expected {count}, one for each adapter; got {len(weights)}")
    problems += [f"weight {w}: expected a finite number other than 0" for w in weights if not math.isfinite(w) or not w]
    thins = kind in KINDS and kind not in ("cat", "svd", "linear")
    if thins and (density is None or not 0 < density < 1):
        problems.append(f"density {density}: {kind} needs one between 0 and 1")
    if not thins and density is not None:
        problems.append(f"density: {kind} takes none")
    if "ties" in kind and any(w <= 0 for w in weights):
        problems.append(f"weights {list(weights)}: {kind} elects a sign, which takes positive ones")
    if rank is not None and not kind.endswith("svd"):
        problems.append(f"rank: {kind} takes none; svd approximates")
    if rank is not None and rank < 1:
        problems.append(f"rank {rank}: expected at least 1")
    if problems:
        raise RecipeError(problems)


def _modules(adapters: Sequence[Adapter], kind: str) -> tuple[list[_Module], dict[str, tuple[int, TensorInfo]]]:
    """What the adapters change, in the order of their first appearance, and whole tensors that all of them share.

    Raises:
        CheckpointError: with everything that is in the way.
    """
    from fastmerge.planning.tied import same

    found: dict[str, dict[int, Update]] = {}
    problems: list[str] = []
    for i, adapter in enumerate(adapters):
        ref, updates = adapter.checkpoint.ref, adapter.updates
        for what, names in (
            ("DoRA and lora_bias are no low-rank updates", [n for n, u in updates.items() if not _plain(u)]),
            ("updates of single parameters are merged by no kind", [n for n in updates if not n.endswith(_ENDS)]),
            ("rows of tokens are no low-rank updates", list(adapter.tokens)),
        ):
            if names:
                problems.append(f"{ref}: {what} ({listing(names)}): {_BAKE}")
        for name, update in adapter.updates.items():
            found.setdefault(name.removesuffix(".weight"), {})[i] = update
    modules = [_Module(name, updates) for name, updates in found.items()]
    if not modules:
        problems.append("no adapter holds a low-rank update: there is nothing to merge")
    odd: dict[str, list[str]] = {}
    for module in modules:
        sizes = {(u.embedding, u.b and u.b.shape[0], u.a.shape[1]) for u in module.updates.values()}
        ranks = {u.a.shape[0] for u in module.updates.values()}
        if len(sizes) > 1:
            odd.setdefault("the adapters' layers have different sizes or kinds", []).append(module.name)
        elif kind in MIXED and len(ranks) > 1:
            odd.setdefault(f"{kind} needs equal ranks, and they are {sorted(ranks)}", []).append(module.name)
        elif kind in ("ties", "dare_ties") and any(u.scale < 0 for u in module.updates.values()):
            odd.setdefault(f"{kind} of factors elects a sign, and lora_alpha is negative", []).append(module.name)
    problems += [f"{what}: {listing(names)}" for what, names in odd.items()]
    carried: dict[str, tuple[int, TensorInfo]] = {}
    whole: dict[str, dict[int, TensorInfo]] = {}
    for i, adapter in enumerate(adapters):
        for name, info in adapter.replaced.items():
            whole.setdefault(name, {})[i] = info
    differ = []
    for name, infos in whole.items():
        (first, info), *others = infos.items()
        home = adapters[first].checkpoint
        # A copy of the base beside an update says nothing of its own; a trained tensor must be everybody's.
        enough = len(infos) == len(adapters) or name.removesuffix(".weight") in found
        if enough and all(same(home, info, x, adapters[i].checkpoint) for i, x in others):
            carried[info.name] = first, info
        else:
            differ.append(name)
    for setting in ("layer_replication", "target_parameters"):
        if len({_said(a, (setting,)) if a.checkpoint.config.get(setting) else "" for a in adapters}) > 1:
            problems.append(f"{setting} is not the same in all adapters: {_BAKE}")
    # What training a module as a whole means, and which biases were trained, is said in the settings.
    differ += [k for k in _SAME if len({_said(a, (k,)) for a in adapters}) > 1 and carried]
    if differ:
        problems.append(
            f"whole tensors (modules_to_save, biases) that are not the same in all: {listing(differ)}: {_BAKE}"
        )
    if problems:
        raise CheckpointError(problems)
    return modules, carried


def _plain(update: Update) -> bool:
    """Whether an update is a product of two factors alone."""
    return update.b is not None and update.magnitude is None


def _rank(modules: Sequence[_Module], kind: str, rank: int | None) -> int:
    """The rank of the result."""
    if rank is not None:
        return rank
    ranks = [[u.a.shape[0] for u in m.updates.values()] for m in modules]
    return max(map(sum if kind == "cat" else max, ranks))


def _need(module: _Module, kind: str, rank: int) -> int:
    """Bytes that a layer takes at most: estimates, a tenth (ties_svd) to twice (cat) above what was measured."""
    (_, columns), (rows, _) = _shapes(module, rank)
    factors = sum(u.a.shape[0] for u in module.updates.values()) + rank
    if kind.endswith("_svd"):
        return 4 * rows * columns * (len(module.updates) + 9)
    return (8 * 4 if kind == "svd" else 4 * 4) * (rows + columns) * factors


def _shapes(module: _Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B of the result."""
    a, b = module.first.a, module.first.b
    assert b is not None
    return (rank, a.shape[1]), (b.shape[0], rank)


def _merged(
    module: _Module, files: Files, weights: Sequence[float], kind: str, rank: int, density: float | None, seed: int
) -> Factors:
    """A and B of a layer, in fp32; smaller ranks are filled up with zeros.

    Raises:
        CheckpointError: the factors are not finite where they are decomposed.
    """
    import numpy as np

    from fastmerge.ops.factored import stacked, truncated

    parts = [(_array(files, i, u.a), _array(files, i, u.b)) for i, u in module.updates.items()]
    scaled = [weights[i] * u.scale for i, u in module.updates.items()]
    try:
        if kind == "cat":
            made = stacked(parts, scaled)
        elif kind == "svd":
            made = truncated(parts, scaled, rank)
        else:
            own = [weights[i] for i in module.updates]
            made = _mixed(module, parts, scaled, own, kind, rank, density or 1.0, seed)
    except ValueError as error:
        raise CheckpointError(f"{module.name}: {error} among the factors") from None
    full = []
    for array, shape in zip(made, _shapes(module, rank), strict=True):
        out = np.zeros(shape, np.float32)
        out[: array.shape[0], : array.shape[1]] = array
        full.append(out)
    return full[0], full[1]


def _mixed(
    module: _Module,
    parts: Sequence[Factors],
    scaled: Sequence[float],
    weights: Sequence[float],
    kind: str,
    rank: int,
    density: float,
    seed: int,
) -> Factors:
    """The kinds that compute on A and B each, or on the updates themselves."""
    import torch

    f32 = torch.float32
    pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in parts]
    names = module.names()
    if not kind.endswith("_svd"):
        # The sign of a weight goes to A alone, as in peft: on both it would cancel.
        roots = [math.sqrt(abs(w)) for w in scaled]
        signed = [math.copysign(r, w) for r, w in zip(roots, scaled, strict=True)]
        a, b = (
            mixed(kind, [p[side] for p in pairs], w, out_dtype=f32, density=density, name=names[side], seed=seed)
            for side, w in enumerate((signed, roots))
        )
        return a.numpy(), b.numpy()
    deltas = [b @ a * (s / w) for (a, b), s, w in zip(pairs, scaled, weights, strict=True)]
    whole = mixed(
        kind.removesuffix("_svd"), deltas, weights, out_dtype=f32, density=density, name=module.name, seed=seed
    )
    if not whole.isfinite().all():
        raise ValueError("NaN or infinity")
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    return vh[:rank].numpy(), (u * s)[:, :rank].numpy()


def _array(files: Files, model: int, info: TensorInfo | None) -> Array:
    """A tensor as fp32 (fp64 stays)."""
    import numpy as np

    from fastmerge.ops.made import load
    from fastmerge.ops.sources import FileRange

    assert info is not None
    fd = files.fd(model, info.file)

    def bring(_: Any, runs: Any) -> None:
        rows = np.empty((len(runs), 4), np.int64)
        rows[:, 0], rows[:, 2] = fd, runs[:, 2]
        rows[:, 1], rows[:, 3] = info.offset + runs[:, 0] * info.dtype.size, runs[:, 1] * info.dtype.size
        files.read(rows)

    return load(bring, FileRange(info, model), 0, prod(info.shape)).reshape(info.shape)


def _write(writer: Writer, name: str, array: Array) -> None:
    """A tensor of the result."""
    import numpy as np

    place = writer.layout.places[name]
    writer.write(np.array([[place.shard, place.offset, array.ctypes.data, place.nbytes]], np.int64))


def _copy(writer: Writer, name: str, fd: int, info: TensorInfo) -> None:
    """A tensor that all adapters have as it is."""
    import numpy as np

    place = writer.layout.places[name]
    writer.copy(np.array([[fd, info.offset, place.shard, place.offset, place.nbytes]], np.int64))


def _said(adapter: Adapter, keys: Sequence[str]) -> str:
    """Settings as text that is equal where they mean the same: peft writes sets as lists in any order."""
    found = [adapter.checkpoint.config.get(key) for key in keys]
    return json.dumps([sorted(map(str, v)) if isinstance(v, list) else v for v in found])


def _config(adapters: Sequence[Adapter], modules: Sequence[_Module], rank: int) -> dict[str, Any]:
    """That of the first adapter, with what the result is: one rank, a scaling of 1, and its own modules."""
    first: Mapping[str, Any] = adapters[0].checkpoint.config
    made = {**first, "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    made |= {"init_lora_weights": True, "inference_mode": True}
    if len({_said(a, _TARGETS) for a in adapters}) > 1:
        # Names that end others' names would hit those too; whole ones are peft's names of what is here alone.
        made |= {**dict.fromkeys(_TARGETS), "target_modules": sorted(m.name for m in modules)}
    bases = {_said(a, ("base_model_name_or_path",)) for a in adapters}
    if len(bases) > 1:
        log.warning("the adapters name different bases: %s; the first is taken over", listing(sorted(bases)))
    return made
