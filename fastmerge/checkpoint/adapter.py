"""LoRA adapters as peft saves them: which tensors they change, and how, from config and header alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastmerge.checkpoint import discover, hub
from fastmerge.checkpoint.header import TensorInfo, listing, read_header
from fastmerge.checkpoint.model import Checkpoint, ShardFile
from fastmerge.checkpoint.patterns import Patterns
from fastmerge.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_LARGEST = 1e30

_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB]|magnitude_vector)(\.default)?(\.weight|(?P<bias>\.bias))?"
)
_BIAS, _MAGNITUDE = "B.bias", "magnitude_vector"
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""``init_lora_weights`` that leave the base as it is; others (pissa, olora, ...) change it when training starts."""

_MERGED = "merge the adapter into its base with peft first"
_OTHER = {
    **dict.fromkeys(("use_qalora", "kasa_config", "use_bdlora", "monteclora_config"), _MERGED),
    **dict.fromkeys(("trainable_token_indices", "target_parameters"), _MERGED),
    "layer_replication": "repeat the base's layers by a passthrough recipe of slices, take the setting out of the "
    "adapter's config, and apply it to that model",
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
})  # fmt: skip
"""Settings that are read here, or change nothing in what the file's tensors mean."""

_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D_MODULES = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})
"""Model types, and layers of theirs, that store ``[in, out]``; square ones cannot be told by their shapes."""


def stored_transposed(name: str, model_type: object) -> bool:
    """Whether models of a type store a weight of this name ``[in, out]``."""
    return model_type in _CONV1D and name.split(".")[-2] in _CONV1D_MODULES


class Update(NamedTuple):
    """One low-rank update: ``scale (B A)`` is added to a weight.

    Attributes:
        a: ``[R, I]``; of a bias, what is added to it, ``[1, O]``.
        b: ``[O, R]``; None for a bias.
        scale: alpha / r, or alpha / sqrt(r).
        embedding: the weight is ``[I, O]``.
        magnitude: ``[O]``, lengths that the rows of the sum are given (DoRA); None where they stay.
    """

    a: TensorInfo
    b: TensorInfo | None
    scale: float
    embedding: bool = False
    magnitude: TensorInfo | None = None

    def transposes(self, name: str, shape: tuple[int, ...], model_type: object, *, flag: bool) -> bool | None:
        """Whether a weight is stored ``[in, out]``; None where the update does not fit it.

        The shapes decide: peft goes by the layer's type, whatever ``fan_in_fan_out`` says. Where the weight is
        square, the model's type and the layer's name tell that; the flag does where the type is not known.

        Args:
            name: of the weight.
            shape: of the weight.
            model_type: of the base.
            flag: ``fan_in_fan_out`` of the adapter.
        """
        if self.b is None:
            return False if shape == self.a.shape[1:] else None
        plain = (self.b.shape[0], self.a.shape[1])
        if self.embedding:
            return True if shape == plain[::-1] else None
        if shape == plain and shape == plain[::-1]:
            if not isinstance(model_type, str):
                return flag
            return stored_transposed(name, model_type)
        return False if shape == plain else True if shape == plain[::-1] else None


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base.

    Attributes:
        checkpoint: its file, for reading.
        updates: low-rank updates by the name of the weight.
        replaced: whole tensors by the name of the tensor whose place they take; an update may come on top (peft
            keeps a copy of an embedding that it trains).
        flag: ``fan_in_fan_out``.
    """

    checkpoint: Checkpoint
    updates: Mapping[str, Update] = field(repr=False)
    replaced: Mapping[str, TensorInfo] = field(repr=False)
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
        found = _Found()
        found.sort(tensors)
        updates = found.updates(config)
        if found.problems:
            raise CheckpointError([f"{path / WEIGHTS}: {p}" for p in found.problems])
        odd = [key for key in sorted(config) if key not in _PLAIN and config[key] and key not in _OTHER]
        warnings = [f"{path / CONFIG}: settings that are not known are ignored: {listing(odd)}"] if odd else []
        # The settings are as much of what the adapter is as its tensors are.
        told = [header.digest, [[name, u.scale] for name, u in updates.items()], bool(config.get("fan_in_fan_out"))]
        digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        file = ShardFile(path / WEIGHTS, header.size, header.identity, digest, header.metadata)
        checkpoint = Checkpoint(ref, path, (file,), tensors, config, tuple(warnings))
        return cls(checkpoint, updates, found.replaced, bool(config.get("fan_in_fan_out")))


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
        found.append(
            f"init_lora_weights {init!r:.80} changed the base when training started: save the adapter again with "
            "peft's path_initial_model_for_weight_conversion, or merge it into its base with peft first"
        )
    flags, maps = ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"), ("rank_pattern", "alpha_pattern")
    odd = [(k, "true or false") for k in flags if config.get(k) not in (None, False, True, [])]
    odd += [(k, "a map from patterns to numbers") for k in maps if not isinstance(config.get(k) or {}, Mapping)]
    return found + [f"{key} {config[key]!r:.80}; expected {what}" for key, what in odd]


class _Found:
    """What the tensors of a file are."""

    def __init__(self) -> None:
        self.sides: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
        self.replaced: dict[str, TensorInfo] = {}
        self.problems: list[str] = []

    def sort(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Every tensor is half an update, or takes the place of one of the base."""
        odd, bare, twice = [], [], []
        for name, info in tensors.items():
            inner = name.removeprefix(_PREFIX)
            match = _LORA.fullmatch(inner)
            if inner == name:
                bare.append(name)
                continue
            if match:
                key = match["side"] + (match["bias"] or "")
                where = self.sides.setdefault((match["module"], match["kind"] is not None), {})
            elif any(word in inner for word in ("lora_", "token_adapter.", "original_module.")):
                odd.append(name)
                continue
            else:
                key = inner.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
                where = self.replaced
            if key in where:
                twice.append(name)
            where[key] = info
        for module in [m for m, embedding in self.sides if embedding]:
            if set(self.sides.get((module, False), ())) == {_MAGNITUDE}:  # its name does not say which kind it is
                self.sides[module, True] |= self.sides.pop((module, False))
        twice += [
            f"{_PREFIX}{module}" for module, embedding in self.sides if embedding and (module, False) in self.sides
        ]
        for what, names in (
            (f"names do not begin with {_PREFIX!r}", bare),
            ("tensors of an unknown kind", odd),
            ("tensors that are given twice", twice),
        ):
            if names:
                self.problems.append(f"{what}: {listing(names)}")
        if not tensors:
            self.problems.append("no tensors: the adapter changes nothing")

    def updates(self, config: Mapping[str, Any]) -> dict[str, Update]:
        """The low-rank updates by the name of their weight; one line for each kind of problem."""
        said: dict[str, list[str]] = {}
        out: dict[str, Update] = {}
        modules = [module for module, _ in self.sides]
        try:
            ranks = Patterns(config.get("rank_pattern") or {}, modules)
            alphas = Patterns(config.get("alpha_pattern") or {}, modules)
        except ValueError as error:
            self.problems.append(f"patterns in {CONFIG}: {error}")
            return {}
        for (module, embedding), pair in self.sides.items():
            if not {"A", "B"} <= set(pair):
                said.setdefault("lora_A without lora_B, or the other way round", []).append(module)
                continue
            a, b, bias, magnitude = pair["A"], pair["B"], pair.get(_BIAS), pair.get(_MAGNITUDE)
            rank = ranks.find(module, config.get("r", 8))
            alpha = alphas.find(module, config.get("lora_alpha", 8))
            wrong = _pair(a, b) or _numbers(rank, alpha, a.shape[0]) or _vectors(config, pair, embedding=embedding)
            if wrong:
                said.setdefault(wrong, []).append(module)
                continue
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            out[f"{module}.weight"] = Update(a, b, scale, embedding, magnitude)
            if bias is not None:
                out[f"{module}.bias"] = Update(bias._replace(shape=(1, *bias.shape)), None, scale)
        self.problems += [f"{what}: {listing(names)}" for what, names in said.items()]
        return out


def _pair(a: TensorInfo, b: TensorInfo) -> str | None:
    """What is wrong with the tensors of an update; None for nothing."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit each other; expected [r, in] and [out, r]"
    if not (a.dtype.mergeable and b.dtype.mergeable):
        return f"lora_A {a.dtype.name} and lora_B {b.dtype.name}; expected floating-point types"
    return None


def _vectors(config: Mapping[str, Any], pair: Mapping[str, TensorInfo], *, embedding: bool) -> str | None:
    """What is wrong with the vectors beside an update, or their absence; None for nothing."""
    for setting, key in (("use_dora", _MAGNITUDE), ("lora_bias", _BIAS)):
        info, wanted = pair.get(key), bool(config.get(setting)) and not (embedding and key == _BIAS)
        if wanted != (info is not None):
            return f"{'no ' if wanted else ''}lora_{key}, and {setting} is {config.get(setting)!r} in {CONFIG}"
        if info is not None and (info.shape != pair["B"].shape[:1] or not info.dtype.mergeable):
            return f"lora_{key} {info.dtype.name} {list(info.shape)} does not fit lora_B {list(pair['B'].shape)}"
    if embedding and config.get("use_dora"):
        return f"DoRA of an embedding is not supported: {_MERGED}"
    return None


def _numbers(rank: Any, alpha: Any, given: int) -> str | None:
    """What is wrong with the numbers of an update; None for nothing."""
    if type(rank) is not int or rank != given:
        return f"rank {given} in the file, {rank!r:.80} in {CONFIG}"
    if type(alpha) not in (int, float) or not 0 < abs(alpha) < _LARGEST:
        return f"lora_alpha {alpha!r:.80} in {CONFIG}; expected a number other than 0"
    return None
