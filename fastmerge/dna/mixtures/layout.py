"""Experts of mixtures as they lie on disk: one tensor each, or entries of a fused one; and mixtures made of others'."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from fastmerge.dna import cuts
from fastmerge.dna.anatomy import Anatomy, Part, anatomy
from fastmerge.dna.draft import Draft, Slot
from fastmerge.dna.parent import Parent
from fastmerge.dna.upcycling.twins import TWINS
from fastmerge.errors import CheckpointError
from fastmerge.methods.linear import Linear
from fastmerge.methods.passthrough import COPY
from fastmerge.methods.replicate import Replicate
from fastmerge.ops.made import Rows
from fastmerge.ops.spec import Source

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of config.json that count experts; a configuration has one or two of them."""

ACTIVE = ("num_experts_per_tok", "experts_per_token")
"""Keys that say how many of them a token passes."""


class Blend(NamedTuple):
    """One expert of the result: the weighted mean of experts of the parents, which is a copy where it is of one.

    Attributes:
        members: (model, expert) of each.
        weights: of each; they need not sum to 1.
        router: the same for its row of the router; the first member's row alone where None.
        noise: standard deviation of the noise on each of its weights.
        relative: it is in units of the tensor's root mean square.
    """

    members: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] = (1.0,)
    router: tuple[float, ...] | None = None
    noise: float = 0.0
    relative: bool = True


def mixture(parent: Parent) -> Anatomy:
    """The anatomy of a mixture of experts.

    Raises:
        CheckpointError: it is none, or does not say how many experts a token passes.
    """
    found = anatomy(parent)
    if not found.arch.experts:
        raise CheckpointError(f"{parent.ref}: expected a mixture of experts, got the dense model type "
                              f"{found.arch.model_type}; 'upcycle' makes one of it")  # fmt: skip
    active(found.config, parent.ref)
    return found


def active(config: Mapping[str, Any], ref: str) -> int:
    """How many experts a token passes.

    Raises:
        CheckpointError: the configuration does not say.
    """
    for key in ACTIVE:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise CheckpointError(
        f"{ref}: config.json: {ACTIVE[0]}: expected a whole number above 0, got {config.get(ACTIVE[0])!r}"
    )


def groups(config: Mapping[str, Any]) -> int:
    """Groups of experts among which a router chooses first (DeepSeek's kind); 1 where there are none."""
    return int(config.get("n_group") or 1)


def set_experts(config: dict[str, Any], model: Anatomy, experts: int, k: int) -> None:
    """Writes both counts, under every key that the configuration or a reader of its type has for them."""
    kind = model.arch.model_type
    known = [key for twin in TWINS if twin.target == kind for key in twin.counts]
    for key in dict.fromkeys([*[key for key in EXPERTS if key in config], model.arch.sizes["experts"], *known]):
        config[key] = experts
    for key in [k for k in ACTIVE if k in config] or ACTIVE[:1]:
        config[key] = k


def check_active(k: int, experts: int, what: str = "num_experts_per_token") -> list[str]:
    """What is wrong with a number of experts per token."""
    whole = isinstance(k, int) and not isinstance(k, bool)
    return [] if whole and 1 <= k <= experts else [f"{what}: expected a whole number in 1 .. {experts}, got {k!r}"]


def parts(model: Anatomy, layer: int) -> Iterator[tuple[str, Part]]:
    """Name patterns of the tensors of a layer that belong to single experts, in the order of the table."""
    for name, part in model.arch.layer.items():
        single = "*" in name or (part.axes[0] == "experts" and not part.role.startswith("router"))
        if single and f"{model.arch.layers}.{layer}.{name.replace('*', '0')}" in model.places:
            yield name, part


def expert(model: Anatomy, layer: int, pattern: str, number: int) -> Source:
    """A tensor of one expert, or its entry ``[1, ...]`` of a fused one."""
    name = f"{model.arch.layers}.{layer}.{pattern.replace('*', str(number))}"
    source = model.parent.tensors[name]
    return source if "*" in pattern else cuts.rows(source, number, 1)


def assemble(
    draft: Draft,
    models: Sequence[Anatomy],
    layers: Mapping[int, Sequence[Blend]],
    trunk: Callable[[str], None],
) -> None:
    """Fills a draft with mixtures' layers made of others, in the order of the first model's tensors.

    Args:
        draft: empty.
        models: of one architecture.
        layers: the experts of each layer that has some.
        trunk: makes a tensor that is no expert's and no router's, by its name.
    """
    first = models[0]
    done: set[int] = set()
    for name, (part, layer, number) in first.places.items():
        if layer is None or layer not in layers or (number is None and part.axes[0] != "experts"):
            trunk(name)
            continue
        if layer in done:
            continue
        done.add(layer)
        _router(draft, models, layer, layers[layer])
        for pattern, each in parts(first, layer):
            _experts(draft, models, layer, pattern, each, layers[layer])


def _router(draft: Draft, models: Sequence[Anatomy], layer: int, blends: Sequence[Blend]) -> None:
    """Rows of the routers, and their biases: gathered, or means of rows."""
    for role in ("router", "router_bias"):
        name = models[0].find(role, layer)
        if name is None:
            continue
        sources = tuple([m.parent.tensors[name] for m in models])
        above = np.cumsum([0, *[s.shape[0] for s in sources]])
        dtype = sources[0].dtype

        def rows(of: Sequence[int], sources: tuple[Source, ...] = sources) -> Rows:
            return Rows(sources, np.array(of, np.int64))

        numbers = [[int(above[m]) + e for m, e in blend.members] for blend in blends]
        draft.tensor(name, dtype, (len(blends), *sources[0].shape[1:]))
        if all(b.router is None or len(b.members) == 1 for b in blends):
            gathered = rows([n[0] for n in numbers])
            (draft.copy if gathered.dtype is dtype else functools.partial(draft.make, dtype=dtype))(
                Slot(name), gathered
            )
            continue
        width = prod(sources[0].shape[1:])
        for e, blend in enumerate(blends):
            chosen = numbers[e] if blend.router is not None else numbers[e][:1]
            weights = blend.router or (1.0,)
            inputs = [rows([n]) for n in chosen]
            draft.add([Slot(name, e * width)], Linear(weight=weights, normalize=True), inputs, dtype, inputs[0].shape)


def _experts(
    draft: Draft, models: Sequence[Anatomy], layer: int, pattern: str, part: Part, blends: Sequence[Blend]
) -> None:
    """One kind of tensor of all experts of a layer; what several are copies of is read once."""
    prefix = f"{models[0].arch.layers}.{layer}."
    sample = expert(models[0], layer, pattern, 0)
    dtype, shape = sample.dtype, sample.shape
    if "*" in pattern:
        slots = [Slot(draft.tensor(prefix + pattern.replace("*", str(e)), dtype, shape)) for e in range(len(blends))]
    else:
        name = draft.tensor(prefix + pattern, dtype, (len(blends), *shape[1:]))
        slots = [Slot(name, e * prod(shape)) for e in range(len(blends))]
    copies: dict[tuple[int, int], list[int]] = {}
    for e, blend in enumerate(blends):
        if len(blend.members) == 1:
            copies.setdefault(blend.members[0], []).append(e)
            continue
        inputs = [expert(models[m], layer, pattern, number) for m, number in blend.members]
        draft.add([slots[e]], Linear(weight=blend.weights, normalize=True), inputs, dtype, shape)
    for (m, number), numbers in copies.items():
        source, to = expert(models[m], layer, pattern, number), [slots[e] for e in numbers]
        sigma = tuple([0.0 if part.role.endswith("_bias") else blends[e].noise for e in numbers])
        if any(sigma) or source.dtype is not dtype:
            noisy = Replicate(experts=tuple(numbers), sigma=sigma, relative=any(sigma) and blends[numbers[0]].relative)
            draft.add(to, noisy, [source], dtype, shape, key=prefix + pattern)
        else:
            draft.add(to, COPY, [source], dtype, shape)
