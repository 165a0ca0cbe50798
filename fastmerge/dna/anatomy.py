"""What each tensor of a model is: its role, what each of its dimensions counts, and which of them it reads.

A weight ``[out, in]`` *reads* its second dimension and writes its first. Of the residual stream (``hidden``), tensors
that read it are consumers (query, gate, head, router), those that have it otherwise are producers (embedding rows,
outputs of attention and of the MLP, their biases), and norms scale it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fastmerge.checkpoint.header import listing
from fastmerge.dna.parent import Parent
from fastmerge.errors import CheckpointError

Axis = str | tuple[str, ...]
"""What a dimension counts: ``vocab``, ``hidden``, ``ffn`` (inner size of the MLP), ``q`` and ``kv`` (heads times their
size), ``heads``, ``head_dim``, ``experts``, ``expert_ffn``, ``shared_ffn``, ``one``. A tuple: several, one behind the
other (a fused weight)."""

Side = Literal["reads", "writes", "scales"]


class Part(NamedTuple):
    """What tensors of one name are.

    Attributes:
        role: ``embed``, ``head``, ``input_norm`` and ``mlp_norm`` (before attention and MLP), ``attention_norm`` and
            ``output_norm`` (behind them), ``final_norm``, ``q_norm``, ``k_norm``, ``q``, ``k``, ``v``, ``qkv``, ``o``,
            ``sinks``, ``gate``, ``up``, ``gate_up``, ``down``, ``router``, ``router_bias``, ``shared_gate``,
            ``shared_up``, ``shared_down``, ``shared_switch``; biases have the role of their weight and ``_bias``.
        axes: what each dimension counts.
        reads: the dimension that is summed over; None for norms, biases and the embedding.
        optional: whether models of this architecture may lack it.
    """

    role: str
    axes: tuple[Axis, ...]
    reads: int | None = None
    optional: bool = False

    def side(self, dimension: int) -> Side:
        """What the tensor does along a dimension."""
        if dimension == self.reads:
            return "reads"
        return "scales" if self.role.endswith("_norm") else "writes"


@dataclass(frozen=True)
class Architecture:
    """What is the same in all models of one type.

    Attributes:
        model_type: of config.json.
        head: name of its class with a language model head.
        outside: parts by their name, of tensors outside the layers.
        layer: parts by their name behind ``<layers>.<index>.``; ``*`` is the number of an expert.
        layers: prefix of the layers.
        sizes: keys of config.json by axis, where the usual ones do not hold.
        post_norm: consumers read the residual stream as it is, and norms follow attention and MLP (OLMo-2).
        plus_one: norms scale by one plus their weight (Gemma).
        embed_scale: the embedding is multiplied by the root of the hidden size (Gemma).
        interleaved: gate and up alternate in fused expert weights (GPT-OSS), ``[E, in, out]``.
        dense_layers: a layer may have an MLP in place of experts.
    """

    model_type: str
    head: str
    outside: Mapping[str, Part]
    layer: Mapping[str, Part]
    layers: str = "model.layers"
    sizes: Mapping[str, str] = field(default_factory=dict)
    post_norm: bool = False
    plus_one: bool = False
    embed_scale: bool = False
    interleaved: bool = False

    @property
    def experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any(part.role == "router" for part in self.layer.values())

    def name(self, role: str, layer: int | None = None, expert: int | None = None) -> str:
        """The name of the tensor with a role; KeyError where there is none."""
        if layer is None:
            return next(name for name, part in self.outside.items() if part.role == role)
        for name, part in self.layer.items():
            if part.role == role and ("*" in name) == (expert is not None):
                return f"{self.layers}.{layer}.{name.replace('*', str(expert))}"
        raise KeyError(role)

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Part]]:
        return [(re.compile(re.escape(n).replace(r"\*", r"(\d+)")), part) for n, part in self.layer.items()]

    def locate(self, name: str) -> Located | None:
        """What a tensor is; None where the architecture has none of that name."""
        if name in self.outside:
            return Located(self.outside[name], None, None)
        if not name.startswith(self.layers + "."):
            return None
        index, _, rest = name[len(self.layers) + 1 :].partition(".")
        for pattern, part in self._patterns if index.isdecimal() else ():
            found = pattern.fullmatch(rest)
            if found:
                return Located(part, int(index), int(found[1]) if found.groups() else None)
        return None


class Located(NamedTuple):
    """Where in a model a tensor is: its part, its layer and its expert, if it is in any."""

    part: Part
    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Anatomy:
    """A model whose every tensor is known.

    Attributes:
        parent: the model.
        arch: its architecture.
        sizes: how many there are of each axis.
        layers: number of layers.
        tied: whether the head is the embedding.
        places: what each tensor is, by name, in the parent's order.
    """

    parent: Parent
    arch: Architecture
    sizes: Mapping[str, int]
    layers: int
    tied: bool
    places: Mapping[str, Located]

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the parent."""
        return self.parent.config

    def find(self, role: str, layer: int | None = None, expert: int | None = None) -> str | None:
        """The name of the tensor with a role; None where the model has none."""
        return self._by_role.get((role, layer, expert))

    @functools.cached_property
    def _by_role(self) -> dict[tuple[str, int | None, int | None], str]:
        return {(part.role, layer, expert): name for name, (part, layer, expert) in self.places.items()}

    def of_layer(self, layer: int) -> Iterator[tuple[str, Located]]:
        """The tensors of a layer."""
        return ((name, found) for name, found in self.places.items() if found.layer == layer)

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.find("router", layer) is not None

    def size(self, axis: Axis) -> int:
        """How many an axis counts."""
        return sum(self.sizes[a] for a in axis) if isinstance(axis, tuple) else self.sizes[axis]


def anatomy(parent: Parent) -> Anatomy:
    """Finds out what every tensor of a model is.

    Raises:
        CheckpointError: the type of model is not known, tensors are not of that type, are missing, or have other
            shapes than the configuration says; every problem is listed.
    """
    from fastmerge.dna.architectures import ARCHITECTURES

    config = parent.config
    kind = config.get("model_type")
    arch = ARCHITECTURES.get(str(kind))
    if arch is None:
        raise CheckpointError(
            f"{parent.ref}: model_type {kind!r} has no entry in fastmerge/dna/architectures.py: expected one of "
            f"{', '.join(sorted(ARCHITECTURES))}; an entry says which tensors read and write the residual stream, "
            "which norms there are, how heads are laid out, and which keys of config.json count them"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{parent.ref}: config.json: quantization_config: expected weights that are not quantized"
        )
    sizes = _sizes(parent, arch)
    layers = sizes["layers"]
    places: dict[str, Located] = {}
    unknown: list[str] = []
    problems: list[str] = []
    wrong: list[str] = []
    for name, source in parent.tensors.items():
        found = arch.locate(name)
        if found is None or (found.layer or 0) >= layers:
            unknown.append(name)
            continue
        places[name] = found
        expected = tuple([_size(axis, sizes) for axis in found.part.axes])
        if None not in expected and source.shape != expected:
            wrong.append(f"{name}: expected {list(expected)} as config.json says, got {list(source.shape)}")
    if unknown:
        problems.append(f"tensors that no {kind} model is known to have: {listing(unknown)}")
    tied = _tied(parent, arch)
    made = Anatomy(parent, arch, {k: v for k, v in sizes.items() if v is not None}, layers, tied, places)
    problems += wrong[:20] + _missing(made)
    if problems:
        raise CheckpointError([f"{parent.ref}: {p}" for p in problems])
    return made


def _sizes(parent: Parent, arch: Architecture) -> dict[str, int]:
    """Sizes by axis; the embedding counts the vocabulary, which may be padded."""
    config = parent.config
    keys = {"hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads", **arch.sizes}
    keys |= {"layers": "num_hidden_layers"}
    found: dict[str, int] = {"one": 1}
    problems = []
    for axis, key in keys.items():
        value = config.get(key)
        if axis == "experts" and value is None:  # transformers 4 and 5 differ in which they write
            value = config.get({"num_experts": "num_local_experts", "num_local_experts": "num_experts"}.get(key, key))
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[axis] = value
        elif key != "intermediate_size" or value is not None or not arch.experts:
            problems.append(f"{parent.ref}: config.json: {key}: expected a whole number above 0, got {value!r:.80}")
    heads = found.get("heads", 1)
    others = {"num_key_value_heads": heads, "head_dim": found.get("hidden", 0) // heads}
    for key, default in others.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            problems.append(f"{parent.ref}: config.json: {key}: expected a whole number above 0, got {value!r:.80}")
        others[key] = value or default
    if not isinstance(config.get("rope_parameters") or {}, Mapping):
        problems.append(f"{parent.ref}: config.json: rope_parameters: expected an object")
    if problems:
        raise CheckpointError(problems)
    found["kv_heads"], found["head_dim"] = others["num_key_value_heads"], others["head_dim"]
    found["q"], found["kv"] = heads * found["head_dim"], found["kv_heads"] * found["head_dim"]
    embed = parent.tensors.get(arch.name("embed"))
    found["vocab"] = embed.shape[0] if embed is not None and embed.shape else 0
    if "shared_ffn" in found and arch.sizes.get("shared_ffn") == "n_shared_experts":
        found["shared_ffn"] *= found["expert_ffn"]
    return found


def _size(axis: Axis, sizes: Mapping[str, int]) -> int | None:
    parts = [sizes.get(a) for a in (axis if isinstance(axis, tuple) else (axis,))]
    return None if None in parts else sum(p for p in parts if p is not None)


def _tied(parent: Parent, arch: Architecture) -> bool:
    """Whether the head is the embedding: it is not there, or is the same tensor."""
    head = arch.name("head")
    if head in parent.tensors:
        return False
    if head in parent.tied or parent.config.get("tie_word_embeddings", False):
        return True
    raise CheckpointError(
        f"{parent.ref}: {head} is missing, and config.json does not say that it is tied (tie_word_embeddings)"
    )


def _missing(made: Anatomy) -> list[str]:
    """Parts that a layer, or an expert of it, lacks."""
    absent = [n for n, p in made.arch.outside.items() if n not in made.places and not p.optional and p.role != "head"]
    experts = made.sizes.get("experts", 0)
    for layer in range(made.layers):
        sparse = made.is_sparse(layer)
        for name, part in made.arch.layer.items():
            inner = part.role.removesuffix("_bias") in ("gate", "up", "down", "gate_up")
            of_experts = "*" in name or "experts" in part.axes or part.role.startswith(("router", "shared"))
            if part.optional or (made.arch.experts and (inner or of_experts) and of_experts != sparse):
                continue
            for expert in range(experts) if "*" in name else (None,):
                full = f"{made.arch.layers}.{layer}.{name.replace('*', str(expert))}"
                if full not in made.places:
                    absent.append(full)
    return [f"tensors are missing: {listing(absent)}"] if absent else []
