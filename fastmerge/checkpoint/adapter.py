"""LoRA adapters as peft saves them: which tensors they change, and how, from config and header alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmerge.checkpoint import discover, hub
from fastmerge.checkpoint.adapter_tensors import CONFIG, Found
from fastmerge.checkpoint.header import TensorInfo, listing, read_header
from fastmerge.checkpoint.model import Checkpoint, ShardFile
from fastmerge.checkpoint.system import open_regular
from fastmerge.checkpoint.update import Tokens, Update, stored_transposed
from fastmerge.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"

_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""``init_lora_weights`` that leave the base as it is."""

_CONVERTED = (
    "save the adapter again with peft's path_initial_model_for_weight_conversion (it takes the adapter as it was "
    "before training)"
)
_AGAIN = f"{_CONVERTED}, or merge it into its base with peft, which makes that change again"
_GONE = f"{_CONVERTED}; peft does not make that change again when it loads the adapter, and merges something else"
_CHANGING = {
    "pissa_niter": _GONE,  # of random numbers
    "pissa": _AGAIN,
    "olora": _AGAIN,
    "corda": _GONE,
    "lora_ga": _GONE,
    "loftq": "merge it with the quantised base that it was trained on, or with peft, which quantises the base again",
}
"""How ``init_lora_weights`` begin that change the base when training starts, and the way around."""

_MERGED = "merge the adapter into its base with peft first"
_OTHER = {
    **dict.fromkeys(("use_qalora", "kasa_config", "use_bdlora", "monteclora_config"), _MERGED),
    "alora_invocation_tokens": "such an adapter acts behind its tokens only, which no merged weight does",
    "arrow_config": "it chooses among adapters for each token, which no merged weight does",
}
"""Settings that say something else than ``W + s B A``, and the way around."""

_PLAIN = frozenset({
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config"),
    *("ensure_weight_tying", "enable_lora", "merge_weights", "use_dora", "lora_bias"),
    *("trainable_token_indices", "target_parameters", "layer_replication"),
})  # fmt: skip
"""Settings that are read here, or change nothing in what the file's tensors mean."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base.

    Attributes:
        checkpoint: its file, for reading.
        updates: low-rank updates by the name of the weight.
        replaced: whole tensors by the name of the tensor whose place they take; an update may come on top (peft
            keeps a copy of an embedding that it trains).
        tokens: rows by the name of the tensor in which they take the places of its own.
        replication: runs ``[first, end)`` of the base's layers that one after the other are those of the model which
            the adapter belongs to; empty where it belongs to the base as it is.
        flag: ``fan_in_fan_out``.
    """

    checkpoint: Checkpoint
    updates: Mapping[str, Update] = field(repr=False)
    replaced: Mapping[str, TensorInfo] = field(repr=False)
    tokens: Mapping[str, Tokens] = field(repr=False, default_factory=dict)
    replication: tuple[tuple[int, int], ...] = ()
    flag: bool = False

    @classmethod
    def open(cls, ref: str, *, revision: str | None = None) -> Adapter:
        """Opens an adapter directory or a hub id.

        Raises:
            CheckpointError: with everything that keeps it from being applied exactly.
        """
        ref, path = hub.locate(ref, revision)
        if not os.path.lexists(path / CONFIG):
            raise CheckpointError(f"{ref}: expected a LoRA adapter, a directory with {CONFIG}")
        config = discover.read_json(path / CONFIG, strict=False)
        if problems := _unsupported(config):
            raise CheckpointError([f"{path / CONFIG}: {p}" for p in problems])
        if not os.path.lexists(path / WEIGHTS):
            pickle = ", and pickled ones are not read" if os.path.lexists(path / PICKLED) else ""
            raise CheckpointError(f"{path}: the adapter has no {WEIGHTS}{pickle}: save it again with peft")
        header = read_header(path / WEIGHTS)
        tensors = {i.name: i for i in header.tensors}
        found = Found(tensors, config)
        updates, tokens = found.updates(), found.tokens()
        if found.problems:
            raise CheckpointError([f"{path / WEIGHTS}: {p}" for p in found.problems])
        odd = [key for key in sorted(config) if key not in _PLAIN and config[key] and key not in _OTHER]
        warnings = [f"{path / CONFIG}: settings that are not known are ignored: {listing(odd)}"] if odd else []
        whole = found.replaced or tokens or any(u.magnitude for u in updates.values())
        if not whole and _silent(path / WEIGHTS, updates.values()):
            warnings.append(f"{path / WEIGHTS}: every update is zero, as of an adapter that was never trained, or that "
                            f"peft loaded without its weights and saved again: the base stays as it is")  # fmt: skip
        # The settings are as much of what the adapter is as its tensors are.
        flag, replication = bool(config.get("fan_in_fan_out")), config.get("layer_replication") or []
        told: list[Any] = [header.digest, [[name, u.scale] for name, u in updates.items()], flag]
        told += [[[name, t.rows] for name, t in tokens.items()], replication] if tokens or replication else []
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        file = ShardFile(path / WEIGHTS, header.size, header.identity, digest, header.metadata)
        checkpoint = Checkpoint(ref, path, (file,), tensors, config, tuple(warnings))
        runs = tuple((first, end) for first, end in replication)
        return cls(checkpoint, updates, found.replaced, tokens, runs, flag)


def _silent(path: Path, updates: Iterable[Update]) -> bool:
    """Whether one factor of every update is zero: 4 KiB of one tell nearly always that it is not.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        fd = open_regular(path)
        try:
            return all(_zero(fd, u.a) or (u.b is not None and _zero(fd, u.b)) for u in updates)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None


def _zero(fd: int, info: TensorInfo) -> bool:
    """Whether all bytes of a tensor are zero; a file that ends early is no business of this."""
    at, step = info.offset, 1 << 12
    end = at + info.nbytes
    while at < end:
        data = os.pread(fd, min(step, end - at), at)
        if not data or data.count(0) < len(data):
            return False
        at, step = at + len(data), 1 << 20
    return True


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Options that ``W + s B A`` does not express; applied by that formula, they would be wrong without a word."""
    kind, init = config.get("peft_type", "LORA"), config.get("init_lora_weights", True)
    if str(kind).upper() != "LORA":
        return [f"peft_type {kind!r:.80} is not supported; expected LORA"]
    found = [
        f"{key} is not supported: {around}"
        for key, around in _OTHER.items()
        if config.get(key) not in (None, False, [], {})
    ]
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        found.append(f"init_lora_weights {init!r:.80} {_about(init)}")
    flags, maps = ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"), ("rank_pattern", "alpha_pattern")
    odd = [(k, "true or false") for k in flags if config.get(k) not in (None, False, True, [])]
    odd += [(k, "a map from patterns to numbers") for k in maps if not isinstance(config.get(k) or {}, Mapping)]
    targets, runs = (config.get(k) or [] for k in ("target_parameters", "layer_replication"))
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        odd.append(("target_parameters", "a list of names"))
    if not isinstance(runs, list) or not all(map(_run, runs)):
        odd.append(("layer_replication", "pairs [first, end) with 0 <= first < end"))
    return found + [f"{key} {config[key]!r:.80}; expected {what}" for key, what in odd]


def _about(init: Any) -> str:
    """What an initialisation did to the base, and what to do about it."""
    around = next((a for name, a in _CHANGING.items() if str(init).lower().startswith(name)), None)
    if around is not None:
        return f"changed the base when training started: {around}"
    known = ", ".join(str(i).lower() for i in _INITS if i is not None)
    return f"is not known, and may have changed the base when training started; expected {known}"


def _run(value: Any) -> bool:
    """Whether a value is the run of layers ``[first, end)``."""
    pair = isinstance(value, list) and len(value) == 2
    return pair and all(type(i) is int for i in value) and 0 <= value[0] < value[1]


__all__ = ["CONFIG", "PICKLED", "WEIGHTS", "Adapter", "Tokens", "Update", "stored_transposed"]
