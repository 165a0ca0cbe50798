"""Experts of one layer, as a model writes them: a tensor for each, or stacks of them; and the same in another layout.

Found by names and shapes. Names tell the roles (gate, up, down), shapes tell whether stacks are ``[out, in]`` or
``[in, out]``; only whether the rows of gate and up alternate is told by the model type (GPT-OSS). An expert computes
``down (act(gate x) * up x)``, or ``down act(up x)`` without a gate.

==========================  ============================================================
Mixtral, PhiMoE, MiniMax    ``experts.E.w1`` (gate), ``.w3`` (up), ``.w2`` (down)
most others                 ``experts.E.gate_proj``, ``.up_proj``, ``.down_proj``
fused                       ``experts.gate_up_proj`` [E, 2I, H], ``down_proj`` [E, H, I]
Llama-4, GPT-OSS            the same names, [E, H, 2I] and [E, I, H]
Granite                     ``input_linear.weight``, ``output_linear.weight`` as fused
==========================  ============================================================
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.planning.structure import TEXT_CONFIGS

if TYPE_CHECKING:
    from fastmerge.checkpoint import TensorInfo

GATE, UP, DOWN = "gate", "up", "down"

_ROLES = (
    {"gate_proj": GATE, "up_proj": UP, "down_proj": DOWN},
    {"w1": GATE, "w3": UP, "w2": DOWN},
    {"linear": GATE, "linear_v": UP, "linear_1": DOWN},
    {"up_proj": UP, "down_proj": DOWN},
)
"""What the tensors of one expert are called."""

_STACKS = (
    ("gate_up_proj", "down_proj", True),
    ("input_linear.weight", "output_linear.weight", True),
    ("up_proj", "down_proj", False),
)
"""What stacks are called, and whether the first holds gates; a bias has the name with ``_bias``."""

_WOVEN = ("gpt_oss",)
"""Model types whose rows of gate and up alternate, where a stack holds both: shapes cannot tell."""

_TURNED = ("gpt_oss", "llama4")
"""Model types whose stacks are ``[E, in, out]``, for models that hold no stack which would tell."""

_PARENTS = dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m2"), ("block_sparse_moe", "mlp"))
"""Model types that call the module of the experts otherwise where each has tensors of its own, and where not."""

_SINGLE = re.compile(r"(.*\bexperts)\.(0|[1-9][0-9]{0,5})\.(\w+)\.(weight|bias)")
_LAYER = re.compile(r"(.*\.\d+)\.(.+)")


class Spelling(NamedTuple):
    """How a model writes the experts of its layers.

    Attributes:
        path: of the module, from the layer on.
        roles: role by name of an expert's tensor; empty for stacks.
        stacks: names of the two stacks; empty where every expert has its own tensors.
        gated: whether there are gates.
        turned: stacks are ``[E, in, out]``.
        woven: rows of gate and up alternate in a stack.
    """

    path: str
    roles: tuple[tuple[str, str], ...] = ()
    stacks: tuple[str, ...] = ()
    gated: bool = True
    turned: bool = False
    woven: bool = False

    @property
    def parent(self) -> str:
        """The module that holds router and experts."""
        return self.path.removesuffix(".experts")

    @property
    def like(self) -> tuple[object, ...]:
        """Equal for spellings that differ in the module's name at most."""
        return self[1:]

    def shown(self) -> str:
        """For a message."""
        if not self.stacks:
            return f"{self.path}.*.{self.roles[0][0]}"
        return f"{self.path}.{self.stacks[0]}{' [E, in, out]' if self.turned else ''}"


class Experts(NamedTuple):
    """The experts of one layer of a model.

    Attributes:
        layer: name of the layer; empty outside layers.
        spelling: how they are written.
        number: how many there are.
        inner: rows of the gate of one of them.
        hidden: columns of it.
        biased: whether there are biases.
    """

    layer: str
    spelling: Spelling
    number: int
    inner: int
    hidden: int
    biased: bool

    def of(self, role: str, expert: int, *, bias: bool = False) -> str:
        """The tensor of one expert, where each has its own."""
        return f"{self._module}.{expert}.{self._tail(role, bias=bias)}"

    def stack(self, role: str, *, bias: bool = False) -> str:
        """The stack that holds a role."""
        name = self.spelling.stacks[role == DOWN]
        return f"{self._module}.{name}{'_bias' if bias else ''}"

    @property
    def roles(self) -> tuple[str, ...]:
        """Of its matrices, in the order in which a stack holds them."""
        return (GATE, UP, DOWN) if self.spelling.gated else (UP, DOWN)

    @property
    def names(self) -> list[str]:
        """All tensors, expert after expert."""
        kinds = (False, True) if self.biased else (False,)
        if self.spelling.stacks:
            return [self.stack(role, bias=b) for role in (UP, DOWN) for b in kinds]
        module, tails = self._module, [self._tail(role, bias=b) for role in self.roles for b in kinds]
        return [f"{module}.{e}.{tail}" for e in range(self.number) for tail in tails]

    def _tail(self, role: str, *, bias: bool) -> str:
        return f"{_leaf(self.spelling.roles, role)}.{'bias' if bias else 'weight'}"

    @property
    def _module(self) -> str:
        return f"{self.layer}.{self.spelling.path}" if self.layer else self.spelling.path


def find(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[Experts]:
    """The experts of a model, layer by layer in the order of their names.

    Those that are not whole, or of sizes that do not fit each other, are not among them.
    """
    return [*_singles(tensors), *_stacks(tensors, model_types(config))]


def _singles(tensors: Mapping[str, TensorInfo]) -> Iterator[Experts]:
    modules: dict[str, dict[tuple[str, str], dict[int, str]]] = {}
    for name in tensors:
        found = _SINGLE.fullmatch(name)
        if found is not None:
            module, expert, leaf, what = found.groups()
            modules.setdefault(module, {}).setdefault((leaf, what), {})[int(expert)] = name
    for module, leaves in modules.items():
        weights = {leaf for leaf, what in leaves if what == "weight"}
        roles = next((r for r in _ROLES if r.keys() == weights), None)
        count = 1 + max(e for each in leaves.values() for e in each)
        if roles is None or any(len(each) != count for each in leaves.values()):
            continue
        biased = len(leaves) > len(roles)
        first = tensors[leaves[next(iter(roles)), "weight"][0]].shape
        if len(first) != 2 or (biased and len(leaves) != 2 * len(roles)):
            continue
        fits = True
        for (leaf, what), each in leaves.items():
            shape = first[::-1] if roles[leaf] == DOWN else first
            fits &= {tensors[n].shape for n in each.values()} == {shape if what == "weight" else shape[:1]}
        if fits:
            layer, path = _split(module)
            spelling = Spelling(path, tuple(roles.items()), gated=GATE in roles.values())
            yield Experts(layer, spelling, count, *first, biased)


def _stacks(tensors: Mapping[str, TensorInfo], types: Sequence[str]) -> Iterator[Experts]:
    for name, info in tensors.items():
        for first, last, gated in _STACKS if len(info.shape) == 3 else ():
            module, other = name.removesuffix(f".{first}"), tensors.get(name.removesuffix(first) + last)
            if module == name or other is None or len(other.shape) != 3 or other.shape[0] != info.shape[0]:
                continue
            (count, a, b), (_, c, d) = info.shape, other.shape
            turned = gated and b == 2 * c and a == d
            inner, hidden = (c, d) if turned else (d, c)
            if not turned and (a, b) != ((1 + gated) * inner, hidden):
                continue
            biases = [tensors.get(f"{module}.{n}_bias") for n in (first, last)]
            biased = biases[0] is not None
            sizes = [(count, (1 + gated) * inner), (count, hidden)] if biased else [None, None]
            if [None if i is None else i.shape for i in biases] != sizes:
                continue
            woven = gated and (any(t.startswith(_WOVEN) for t in types) or (biased and not types))
            layer, path = _split(module)
            yield Experts(layer, Spelling(path, (), (first, last), gated, turned, woven), count, inner, hidden, biased)


def model_types(config: Mapping[str, Any]) -> list[str]:
    """The type of a model and of its language model."""
    blocks = [config, *(config.get(name) for name in TEXT_CONFIGS)]
    return [str(b["model_type"]) for b in blocks if isinstance(b, Mapping) and "model_type" in b]


def other(spelling: Spelling, types: Sequence[str], *, fused: bool) -> Spelling:
    """What a model type's experts are called in the other layout, where no model is there to tell."""
    old, new = next((_PARENTS[t] for t in types if t in _PARENTS), ("", ""))
    parent = spelling.parent
    if parent == (old if fused else new):
        parent = new if fused else old
    path = f"{parent}.experts" if parent else "experts"
    if fused:
        stacks = next(s[:2] for s in _STACKS if s[2] == spelling.gated)
        turned, woven = (any(t.startswith(kinds) for t in types) for kinds in (_TURNED, _WOVEN))
        return Spelling(path, (), stacks, spelling.gated, turned, woven)
    roles = next(r for r in _ROLES[1 if old else 0 :] if (GATE in r.values()) == spelling.gated)
    return Spelling(path, tuple(roles.items()), gated=spelling.gated)


@functools.cache
def _leaf(roles: tuple[tuple[str, str], ...], role: str) -> str:
    return next(leaf for leaf, own in roles if own == role)


def _split(module: str) -> tuple[str, str]:
    """The layer of a module, and the module from there on."""
    found = _LAYER.fullmatch(module)
    return (found[1], found[2]) if found is not None else ("", module)
