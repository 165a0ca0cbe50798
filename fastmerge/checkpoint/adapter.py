"""LoRA adapters as peft saves them: which tensors they change, and how, from config and header alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import discover, hub
from fastmerge.checkpoint.header import TensorInfo, listing, read_header
from fastmerge.checkpoint.model import Checkpoint, ShardFile
from fastmerge.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")
_INITS = (True, False, "gaussian", None)
"""``init_lora_weights`` that leave the base as it is; others (pissa, olora, ...) change it when training starts."""

_CONV1D = frozenset({"gpt2", "openai-gpt", "gpt_bigcode", "imagegpt", "decision_transformer"})
"""Model types whose linear layers store ``[in, out]``; square ones cannot be told by their shapes."""


@dataclass(frozen=True)
class Update:
    """One low-rank update: ``scale (B A)`` is added to a weight.

    Attributes:
        a: ``[R, I]``.
        b: ``[O, R]``.
        scale: alpha / r, or alpha / sqrt(r).
        embedding: the weight is ``[I, O]``.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base.

    Attributes:
        checkpoint: its file, for reading.
        updates: low-rank updates by the name of the weight.
        replaced: whole tensors by the name of the tensor whose place they take.
        conv1d: whether square weights are stored ``[in, out]`` where the base says nothing.
    """

    checkpoint: Checkpoint
    updates: Mapping[str, Update] = field(repr=False)
    replaced: Mapping[str, TensorInfo] = field(repr=False)
    transposed: bool = False

    @classmethod
    def open(cls, ref: str, *, revision: str | None = None) -> Adapter:
        """Opens an adapter directory or a hub id.

        Raises:
            CheckpointError: with everything that keeps it from being applied exactly.
        """
        path = Path(ref).expanduser()
        if not os.path.lexists(path) and hub.looks_like_id(ref):
            snapshot = hub.resolve(ref, revision=revision)
            ref, path = snapshot.ref, snapshot.path
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{ref}: expected a LoRA adapter, a directory with {CONFIG}")
        config = discover.read_json(path / CONFIG, strict=False)
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(f"{path}: no {WEIGHTS}; pickled adapters are not read")
        header = read_header(path / WEIGHTS)
        problems = [f"{path / CONFIG}: {p}" for p in _unsupported(config)]
        updates, replaced, more = _read({i.name: i for i in header.tensors}, config)
        problems += [f"{path / WEIGHTS}: {p}" for p in more]
        if problems:
            raise CheckpointError(problems)
        file = ShardFile(path / WEIGHTS, header.size, header.identity, header.digest, header.metadata)
        checkpoint = Checkpoint(ref, path, (file,), {i.name: i for i in header.tensors}, config)
        return cls(checkpoint, updates, replaced, bool(config.get("fan_in_fan_out")))

    def transposes(self, name: str, shape: tuple[int, ...], model_type: object) -> bool | None:
        """Whether a weight of that shape is stored ``[in, out]``; None where the update does not fit it.

        The shapes decide (peft goes by the layer's type, whatever ``fan_in_fan_out`` says); where the weight is
        square, the type of the model, or the flag.
        """
        update = self.updates[name]
        plain = (update.b.shape[0], update.a.shape[1])
        if update.embedding:
            return True if shape == plain[::-1] else None
        if shape == plain and shape == plain[::-1]:
            return self.transposed or model_type in _CONV1D
        return False if shape == plain else True if shape == plain[::-1] else None


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Options that ``W + s B A`` does not express; applied by that formula, they would be wrong without a word."""
    found = []
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        found.append(f"peft_type {config['peft_type']!r}; expected LORA")
    if config.get("init_lora_weights", True) not in _INITS:
        found.append(
            f"init_lora_weights {config['init_lora_weights']!r} changed the base when training started; convert the "
            "adapter with peft (path_initial_model_for_weight_conversion), or merge it there"
        )
    names = ("use_dora", "lora_bias", "trainable_token_indices", "layer_replication", "target_parameters", "use_qalora")
    found += [
        f"{key} is not supported: merge the adapter into its base with peft first" for key in names if config.get(key)
    ]
    return found


def _read(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> tuple[dict[str, Update], dict[str, TensorInfo], list[str]]:
    """Updates, whole tensors, and what is wrong; every tensor is one or the other."""
    sides: dict[str, dict[str, TensorInfo]] = {}
    kinds: dict[str, bool] = {}
    replaced: dict[str, TensorInfo] = {}
    odd = []
    for name, info in tensors.items():
        inner = name.removeprefix(_PREFIX)
        match = _LORA.fullmatch(inner)
        if match:
            sides.setdefault(match["module"], {})[match["side"]] = info
            kinds[match["module"]] = match["kind"] is not None
        elif "lora_" in inner or "token_adapter" in inner or inner == name:
            odd.append(name)
        else:
            replaced[inner.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")] = info
    problems = [f"tensors of an unknown kind: {listing(odd)}"] if odd else []
    updates: dict[str, Update] = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            problems.append(f"{module}: lora_A without lora_B, or the other way round")
            continue
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            problems.append(f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit each other")
            continue
        if not (a.dtype.mergeable and b.dtype.mergeable):
            problems.append(f"{module}: {a.dtype.name} and {b.dtype.name}; expected floating-point types")
            continue
        rank = _of(config, "rank_pattern", module, config.get("r"))
        alpha = _of(config, "alpha_pattern", module, config.get("lora_alpha"))
        if rank != a.shape[0] or not isinstance(alpha, int | float):
            problems.append(f"{module}: rank {a.shape[0]} in the file, {rank!r} in {CONFIG} (lora_alpha {alpha!r})")
            continue
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        updates[f"{module}.weight"] = Update(a, b, scale, kinds[module])
    if not updates and not replaced and not problems:
        problems.append("no tensors: the adapter changes nothing")
    return updates, replaced, problems


def _of(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as peft has it."""
    patterns = config.get(key)
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error:
            continue
    return default
