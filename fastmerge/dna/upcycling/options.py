"""What an upcycling asks for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastmerge.dna.draft import MOST_COPIES
from fastmerge.errors import RecipeError, hint

WORDS = {
    "weight_scale": ("exact", "megatron", "none"),
    "shared": ("auto", "none", "zero", "half", "dense"),
    "noise_mode": ("relative", "absolute"),
    "router_init": ("normal", "uniform", "zero"),
}


@dataclass(frozen=True)
class UpcyclingConfig:
    """How a dense model becomes a mixture of experts.

    Attributes:
        num_experts: experts of each layer.
        num_experts_per_token: how many of them a token passes.
        expert_init_noise: standard deviation of the noise that tells experts apart.
        router_init_std: standard deviation of the router's weights, with ``router_init`` normal.
        copy_all_ffn_weights: every expert starts as the MLP; False: only the first does, and the others from normal
            numbers of the model's ``initializer_range``, so the model's function is lost.
        jitter_noise: multiplicative noise of the router's input in training (Mixtral).
        auxiliary_loss_weight: coefficient of the loss that balances the experts.
        target_arch: type of the mixture; ``auto``: the one that fits the model.
        granularity: G, into how many experts of a G-th of its width the MLP is cut.
        weight_scale: what makes up for G experts that each weigh a G-th: ``exact`` (the linear output, times G),
            ``megatron`` (the cube root of G on gate, up and down: not exact), ``none``.
        shared: the expert that every token passes: ``zero`` (its output is 0), ``half`` (it and the others give half
            each), ``dense`` (it gives all, the others 0), ``none``; ``auto``: ``zero`` where the type has one.
        noise_mode: ``relative``: noise in units of the root mean square of the tensor; ``absolute``: as it is.
        first_clean: the first copy of the MLP gets no noise, and loses nothing.
        drop_ratio: share of each expert's inner units that are drawn anew, with the mean and the deviation of the
            weights that they replace (Drop-Upcycling); the others get the noise.
        independent: draw other units for gate, up and down, as the paper's code does, which loses more of them.
        router_init: ``normal``, ``uniform`` or ``zero``.
        router_scale: half the width of the uniform distribution; 1 / sqrt(hidden size) where absent.
        layers: which layers get experts: ``all``, every n-th (n or ``every_n``), or their numbers.
        fused: write the experts of a layer as one tensor, as transformers 5 keeps them in memory.
        seed: of all random numbers.
    """

    num_experts: int = 8
    num_experts_per_token: int = 2
    expert_init_noise: float = 0.01
    router_init_std: float = 0.02
    copy_all_ffn_weights: bool = True
    jitter_noise: float = 0.0
    auxiliary_loss_weight: float = 0.01
    target_arch: str = "auto"
    granularity: int = 1
    weight_scale: str = "exact"
    shared: str = "auto"
    noise_mode: str = "relative"
    first_clean: bool = True
    drop_ratio: float = 0.0
    independent: bool = False
    router_init: str = "normal"
    router_scale: float | None = None
    layers: str | int | Sequence[int] = "all"
    fused: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Takes an Enum's member for its value.

        Raises:
            RecipeError: with every field that is out of range.
        """
        for key in (*WORDS, "target_arch"):
            given = getattr(self, key)
            if isinstance(given, Enum):
                object.__setattr__(self, key, given.value)
        if isinstance(self.layers, Iterable) and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", tuple(self.layers))
        problems = list(self._problems())
        if problems:
            raise RecipeError(problems)

    def _problems(self) -> list[str]:
        found = []
        for key, words in WORDS.items():
            given = getattr(self, key)
            if given not in words:
                near = hint(given, words) if isinstance(given, str) else ""
                found.append(f"{key}: expected one of {', '.join(words)}, got {given!r:.80}{near}")
        for key, least in (("num_experts", 2), ("num_experts_per_token", 1), ("granularity", 1)):
            given = getattr(self, key)
            if type(given) is not int or not least <= given <= MOST_COPIES:
                found.append(f"{key}: expected a whole number from {least} to {MOST_COPIES}, got {given!r:.80}")
        bounds = {"drop_ratio": 1, "jitter_noise": 1}
        for key in ("expert_init_noise", "router_init_std", "jitter_noise", "auxiliary_loss_weight", "drop_ratio"):
            given, most = getattr(self, key), bounds.get(key, 1_000_000)
            if not _number(given) or not 0 <= given <= most:
                found.append(f"{key}: expected a number from 0 to {most}, got {given!r:.80}")
        if self.router_scale is not None and (not _number(self.router_scale) or self.router_scale < 0):
            found.append(f"router_scale: expected a number of 0 or more, got {self.router_scale!r:.80}")
        if found:
            return found
        e, k, g = self.num_experts, self.num_experts_per_token, self.granularity
        if k > e:
            found.append(f"num_experts_per_token: expected at most num_experts ({e}), got {k}")
        for key, given in (("num_experts", e), ("num_experts_per_token", k)):
            if given % g:
                found.append(f"{key}: expected a multiple of granularity ({g}), got {given}")
        if self.router_scale is not None and self.router_init != "uniform":
            found.append(f"router_scale: has no effect with router_init: {self.router_init}")
        if self.independent and not self.drop_ratio:
            found.append("independent: has no effect without drop_ratio")
        return found

    def chosen(self, layers: int) -> list[int]:
        """The layers that get experts, of a model with so many.

        Raises:
            RecipeError: there are no such layers.
        """
        given = self.layers
        if isinstance(given, str) and given != "all":
            word, _, number = given.partition("_")
            if word != "every" or not number.isdecimal():
                raise RecipeError(f"layers: expected all, every_n or numbers of layers, got {given!r:.80}")
            given = int(number)
        if isinstance(given, str):
            return list(range(layers))
        if isinstance(given, int):
            if isinstance(given, bool) or not 1 <= given <= layers:
                raise RecipeError(f"layers: expected every n-th of {layers}, got n = {given!r}")
            return list(range(given - 1, layers, given))
        if not isinstance(given, tuple):
            raise RecipeError(f"layers: expected all, every_n or numbers of layers, got {given!r:.80}")
        wrong = [i for i in given if type(i) is not int or not 0 <= i < layers]
        if wrong or not given or len(set(given)) < len(given):
            raise RecipeError(f"layers: expected different numbers from 0 to {layers - 1}, got {list(given)!r:.80}")
        return sorted(given)

    def options(self) -> dict[str, Any]:
        """As values that YAML can hold."""
        found = dataclasses.asdict(self)
        del found["seed"]
        return found | {"layers": list(self.layers) if isinstance(self.layers, tuple) else self.layers}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
