"""What the tensors of an adapter's file are: halves of updates, whole tensors, rows of tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fastmerge.checkpoint.header import TensorInfo, listing
from fastmerge.checkpoint.patterns import Patterns
from fastmerge.checkpoint.update import Tokens, Update

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
_LARGEST = 1e30

_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB]|magnitude_vector)(\.default)?(\.weight|(?P<bias>\.bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(\.default)?")
_BIAS, _MAGNITUDE = "B.bias", "magnitude_vector"
_WRAPPED, _UNKNOWN = ".base_layer", ""

_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
"""Parameters of modules of fused experts as transformers registers them: peft wraps the first one innermost."""


class Found:
    """What the tensors of a file are.

    Attributes:
        replaced: whole tensors, by the name of the tensor whose place they take.
        problems: what keeps the adapter from being applied.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> None:
        self.replaced: dict[str, TensorInfo] = {}
        self.problems: list[str] = []
        self._config = config
        self._sides: dict[tuple[str, bool], dict[str, TensorInfo]] = {}
        self._tokens: dict[str, TensorInfo] = {}
        self._sort(tensors)

    def _sort(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Every tensor is half an update, or takes the place of one of the base, or of rows of one."""
        odd, bare, twice = [], [], []
        for name, info in tensors.items():
            inner = name.removeprefix(PREFIX)
            if inner == name:
                bare.append(name)
                continue
            where: dict[str, TensorInfo]
            if match := _LORA.fullmatch(inner):
                key = match["side"] + (match["bias"] or "")
                where = self._sides.setdefault((match["module"], match["kind"] is not None), {})
            elif match := _TOKENS.fullmatch(inner):
                key, where = match["module"], self._tokens
            elif any(word in inner for word in ("lora_", "token_adapter.", "original_module.")):
                odd.append(name)
                continue
            else:
                key = inner.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
                where = self.replaced
            if key in where:
                twice.append(name)
            where[key] = info
        sides = self._sides
        for module in [m for m, embedding in sides if embedding]:
            if set(sides.get((module, False), ())) == {_MAGNITUDE}:  # its name does not say which kind it is
                sides[module, True] |= sides.pop((module, False))
        twice += [f"{PREFIX}{module}" for module, embedding in sides if embedding and (module, False) in sides]
        for what, names in (
            (f"names do not begin with {PREFIX!r}", bare),
            ("tensors of an unknown kind", odd),
            ("tensors that are given twice", twice),
        ):
            if names:
                self.problems.append(f"{what}: {listing(names)}")
        if not tensors:
            self.problems.append("no tensors: the adapter changes nothing")

    def updates(self) -> dict[str, Update]:
        """The low-rank updates by the name of their weight; one line for each kind of problem."""
        config, said = self._config, _Said()
        out: dict[str, Update] = {}
        parameters = self._parameters(said)
        asked = [parameters.get(module, module) for module, _ in self._sides]
        try:
            ranks = Patterns(config.get("rank_pattern") or {}, asked)
            alphas = Patterns(config.get("alpha_pattern") or {}, asked)
        except ValueError as error:
            self.problems.append(f"patterns in {CONFIG}: {error}")
            return {}
        for (module, embedding), pair in self._sides.items():
            if parameters.get(module) == _UNKNOWN:
                continue
            if not {"A", "B"} <= set(pair):
                said.add("lora_A without lora_B, or the other way round", module)
                continue
            a, b, bias, magnitude = pair["A"], pair["B"], pair.get(_BIAS), pair.get(_MAGNITUDE)
            target = parameters.get(module, module)
            rank = ranks.find(target, config.get("r", 8))
            alpha = alphas.find(target, config.get("lora_alpha", 8))
            experts = 1
            if module in parameters and type(rank) is int and rank > 0 and a.shape[0] % rank == 0:
                experts = a.shape[0] // rank
            wrong = _pair(a, b) or _numbers(rank, alpha, a.shape[0] // experts)
            wrong = wrong or _vectors(config, pair, plain=not embedding)
            if wrong:
                said.add(wrong, module)
                continue
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            name = target if module in parameters else f"{module}.weight"
            out[name] = Update(a, b, scale, embedding, magnitude, experts)
            if bias is not None:
                out[f"{module}.bias"] = Update(bias._replace(shape=(1, *bias.shape)), None, scale)
        self.problems += said.lines()
        return out

    def _parameters(self, said: _Said) -> dict[str, str]:
        """Of modules that peft wrapped around single parameters, the parameter: keys in the file do not name it.

        ``_UNKNOWN`` where that cannot be told, which is said.

        Of several parameters of one module the innermost wrapper is that of the first; the keys of the outermost are
        the module's own, and each wrapper inside adds ``.base_layer``.
        """
        targets = self._config.get("target_parameters") or []
        levels: dict[str, list[str]] = {}
        for module in dict.fromkeys(module for module, _ in self._sides):
            bare = module
            while bare.endswith(_WRAPPED):
                bare = bare.removesuffix(_WRAPPED)
            levels.setdefault(bare, []).append(module)
        out: dict[str, str] = {}
        for bare, wrapped in levels.items():
            names = {target.rpartition(".")[2] for target in targets if _targets(target, bare)}
            if not names and wrapped == [bare]:
                continue
            depths = sorted(wrapped, key=len, reverse=True)
            full = [_UNKNOWN] * len(depths)
            if len(names) != len(wrapped) or len(depths[0]) != len(bare) + len(_WRAPPED) * (len(wrapped) - 1):
                said.add(f"wrapped {len(wrapped)} times, and target_parameters names {sorted(names)}", bare)
            elif len(names) > 1 and not names <= set(_REGISTERED):
                said.add(f"which of {sorted(names)} each update belongs to is not known", bare)
            else:
                ordered = [name for name in _REGISTERED if name in names] if len(names) > 1 else names
                full = [f"{bare}.{name}" for name in ordered]
            out |= dict(zip(depths, full, strict=True))
        return out

    def tokens(self) -> dict[str, Tokens]:
        """The rows that the file holds itself, by the name of the tensor that has them."""
        setting, said = self._config.get("trainable_token_indices"), _Said()
        out: dict[str, Tokens] = {}
        for module, info in self._tokens.items():
            rows = setting
            if isinstance(setting, Mapping):
                rows = next((r for key, r in setting.items() if f".{module}".endswith(f".{key}")), None)
            if not isinstance(rows, list) or any(type(i) is not int or i < 0 for i in rows):
                said.add(f"rows of tokens, and trainable_token_indices is {setting!r:.80} in {CONFIG}", module)
            elif len(set(rows)) != len(rows):
                said.add(f"trainable_token_indices in {CONFIG} names tokens twice", module)
            elif len(info.shape) != 2 or info.shape[0] != len(rows) or not info.dtype.mergeable:
                what = f"{info.dtype.name} {list(info.shape)}"
                said.add(f"trainable_tokens_delta {what} does not fit {len(rows)} tokens of {CONFIG}", module)
            else:
                out[f"{module}.weight"] = Tokens(tuple(rows), info)
        self.problems += said.lines()
        if setting and not self._tokens and not self.problems:
            self.problems.append(f"no rows of tokens, and trainable_token_indices is {setting!r:.80} in {CONFIG}")
        return out


class _Said:
    """Problems, each with all that it is about."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        self._names.setdefault(what, []).append(name)

    def lines(self) -> list[str]:
        return [f"{what}: {listing(names)}" for what, names in self._names.items()]


def _targets(target: str, module: str) -> bool:
    """Whether an entry of ``target_parameters`` means a parameter of a module: the end of its name.

    A parameter without its module is one of experts: alone, the name is that of ordinary layers too.
    """
    inner = target.rpartition(".")[0]
    return f".{module}".endswith(f".{inner or 'experts'}")


def _pair(a: TensorInfo, b: TensorInfo) -> str | None:
    """What is wrong with the tensors of an update; None for nothing."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        return f"lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit each other; expected [r, in] and [out, r]"
    if not (a.dtype.mergeable and b.dtype.mergeable):
        return f"lora_A {a.dtype.name} and lora_B {b.dtype.name}; expected floating-point types"
    return None


def _vectors(config: Mapping[str, Any], pair: Mapping[str, TensorInfo], *, plain: bool) -> str | None:
    """What is wrong with the vectors beside an update, or their absence; None for nothing.

    ``lora_bias`` is one of linear layers, so ``plain`` says whether the module may be one.
    """
    for setting, key in (("use_dora", _MAGNITUDE), ("lora_bias", _BIAS)):
        info, wanted = pair.get(key), bool(config.get(setting)) and (plain or key != _BIAS)
        if wanted != (info is not None):
            return f"{'no ' if wanted else ''}lora_{key}, and {setting} is {config.get(setting)!r} in {CONFIG}"
        if info is not None and (info.shape != pair["B"].shape[:1] or not info.dtype.mergeable):
            return f"lora_{key} {info.dtype.name} {list(info.shape)} does not fit lora_B {list(pair['B'].shape)}"
    return None


def _numbers(rank: Any, alpha: Any, given: int) -> str | None:
    """What is wrong with the numbers of an update; None for nothing."""
    if type(rank) is not int or rank != given:
        return f"rank {given} in the file, {rank!r:.80} in {CONFIG}"
    if type(alpha) not in (int, float) or not 0 < abs(alpha) < _LARGEST:
        return f"lora_alpha {alpha!r:.80} in {CONFIG}; expected a number other than 0"
    return None
