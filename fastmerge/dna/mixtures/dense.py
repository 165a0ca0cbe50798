"""Dense models of one architecture into one mixture of experts: a draft. Reads headers only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fastmerge.checkpoint.header import listing
from fastmerge.dna import cuts
from fastmerge.dna.anatomy import Anatomy, anatomy
from fastmerge.dna.draft import Draft, Request, Slot
from fastmerge.dna.mixtures.document import Expert, MoEMergeConfig, canonical, models
from fastmerge.dna.mixtures.gates import Gates, Values, alike
from fastmerge.dna.mixtures.trunk import Trunk, place
from fastmerge.dna.parent import Parent
from fastmerge.dna.upcycling.twins import TWINS, Twin, config_of, problems_of
from fastmerge.dtypes import BY_NAME, F32, FLOATS, DType
from fastmerge.errors import CheckpointError, RecipeError, hint
from fastmerge.keys import tensor_key
from fastmerge.methods.linear import Linear
from fastmerge.ops.made import Constant, Noise
from fastmerge.ops.spec import Source
from fastmerge.planning import tokens
from fastmerge.planning.compare import disagreements

NAMES: Mapping[str, str] = {"mixtral": "mixtral", "qwen moe": "qwen2_moe", "qwen3 moe": "qwen3_moe"}
"""mergekit's names of architectures; it takes any beginning of one."""

ROLES = ("gate", "up", "down")


def twin_for(config: MoEMergeConfig, kind: str) -> Twin:
    """The type of mixture that is wanted, or the first that fits: without a shared expert, unless one is asked for.

    Raises:
        RecipeError: there is none.
    """
    mine = [t for t in TWINS if kind in t.sources or (kind == "mistral" and "llama" in t.sources)]
    names = [t.target for t in mine]
    if not mine:
        known = sorted({s for t in TWINS for s in t.sources})
        raise RecipeError(f"base_model: expected a dense model of type {', '.join(known)}, got {kind!r}")
    if config.architecture is not None:
        word = str(config.architecture).lower()
        if word and "deepseek".startswith(word):
            raise RecipeError(
                "architecture: deepseek: its first kind runs code of the hub only; glm4_moe and solar_open are of its "
                f"later kind; {kind} becomes one of {', '.join(names)}"
            )
        wanted = [NAMES.get(n, n) for n in [*NAMES, *names] if n.startswith(word)]
        mine = [t for t in mine if t.target in wanted]
        if not mine:
            raise RecipeError(
                f"architecture: {kind} becomes one of {', '.join(names)}, got {word!r:.80}{hint(word, names)}"
            )
    fitting = [t for t in mine if t.shared != "none" or not config.shared_experts]
    if not fitting:
        raise RecipeError(f"shared_experts: {', '.join(t.target for t in mine)} has none; expected it left out")
    return next((t for t in fitting if (t.shared != "none") == bool(config.shared_experts)), fitting[0])


def plan_moe_merge(parents: Sequence[Parent], config: MoEMergeConfig, gates: Gates) -> Draft:
    r"""The draft of a mixture whose experts are the MLPs of dense models.

    In each layer :math:`\sum_{e \in \text{top}_k} w_e\, r_e\, \text{MLP}_e(x)`, with the weights of the architecture's
    router over ``gates`` (summing to 1) and :math:`r_e` the ``residual_scale``; everything else is the base model's,
    or merged (``trunk``). A shared expert adds :math:`\sigma(g x)\, r\, \text{MLP}_s(x)`, with its own row ``g``, zeros
    without prompts; where the architecture must have one and none is given, its output is zero.

    Args:
        parents: those of :func:`fastmerge.dna.mixtures.document.models`, in that order; on disk with their positions.
        config: what is wanted.
        gates: of :func:`fastmerge.dna.mixtures.gates.router_rows`.

    Raises:
        RecipeError: the models' type cannot have what was asked for, or the method of the trunk does not fit.
        CheckpointError: models that differ in type or size, or are damaged.
    """
    return _Merge.of(parents, config).draft(gates)


def check_moe_merge(parents: Sequence[Parent], config: MoEMergeConfig) -> None:
    """All that :func:`plan_moe_merge` refuses before it looks at the gates; arguments and errors are its."""
    _Merge.of(parents, config)


@dataclass(frozen=True)
class _Merge:
    config: MoEMergeConfig
    models: tuple[Anatomy, ...]
    twin: Twin
    trunk: Trunk | None
    merged: tuple[int, ...]

    @classmethod
    def of(cls, parents: Sequence[Parent], config: MoEMergeConfig) -> _Merge:
        """Checks everything but the gates."""
        twin = twin_for(config, str(parents[0].config.get("model_type")))
        found = tuple([anatomy(p) for p in parents])
        problems = [*problems_of(twin, found[0]), *_unlike(found)]
        merged = _of_trunk(config)
        trunk = None
        if config.trunk is not None:
            problems += _untied(found, merged)
            there = [parents[i].checkpoint for i in merged if i]
            if parents[0].checkpoint is not None:
                problems += tokens.check(parents[0].checkpoint, [c for c in there if c is not None])[0]
            method = config.trunk
            based = Trunk.wants_base(method.merge_method)
            names = [str(i) for i in merged]
            trunk = Trunk(
                method.merge_method,
                method.parameters,
                names[based:],
                base=names[0] if based else None,
                preset=method.preset,
            )
        if problems:
            raise CheckpointError(problems)
        return cls(config, found, twin, trunk, merged)

    @property
    def base(self) -> Anatomy:
        """The first model."""
        return self.models[0]

    def draft(self, gates: Gates) -> Draft:
        """Everything."""
        config, twin, base = self.config, self.twin, self.base
        e, s = len(config.experts), len(config.shared_experts)
        expected = (base.layers, e + s, base.sizes["hidden"])
        if gates.shape != expected:
            raise RecipeError(f"gates: expected shape {list(expected)}, got {list(gates.shape)}")
        width = base.sizes["ffn"]
        out = config_of(
            twin, base, experts=e, active=config.experts_per_token, width=width,
            shared_width=0 if twin.shared == "none" else width, balance=0.001,
        )  # fmt: skip
        if self.dtype is not None:
            for key in [k for k in ("dtype", "torch_dtype") if k in out] or ["dtype"]:
                out[key] = self.dtype.name
        parents = tuple([m.parent for m in self.models])
        draft = Draft(
            Request("mergekit-moe", tuple([p.ref for p in parents]), config.options()), parents, out, config.seed
        )
        done: set[int] = set()
        for name, (part, layer, _) in base.places.items():
            if layer is not None and part.role in (*ROLES, "gate_up"):
                if layer not in done:
                    done.add(layer)
                    self._layer(draft, layer, gates[layer])
            else:
                for target, cut in self._outside(part.role, layer):
                    self._shared_by_all(
                        draft, target, [cut(self.models[i], name) for i in (self.merged or (0,))], layer
                    )
        draft.facts |= {
            "target": twin.target,
            "experts": [{"layers": base.layers, "model": self._of(one).parent.ref} for one in config.experts],
            "shared_experts": [self._of(one).parent.ref for one in config.shared_experts],
            "trunk": config.trunk.merge_method if config.trunk is not None else base.parent.ref,
            "gates": {"mode": config.gate_mode, "router": config.router, "digest": _digest(gates)},
        }
        draft.warnings += self._warnings(gates)
        return draft

    @property
    def dtype(self) -> DType | None:
        """That of the result; None leaves the base's."""
        return None if self.config.dtype is None else BY_NAME[str(self.config.dtype).removeprefix("torch.")]

    def _type(self, source: Source) -> DType:
        return self.dtype if self.dtype is not None and source.dtype in FLOATS else source.dtype

    def _of(self, expert: Expert) -> Anatomy:
        every = models(self.config)
        wanted = canonical(expert.source_model, self.config)
        return next(m for m, given in zip(self.models, every, strict=True) if given is wanted)

    def _outside(self, role: str, layer: int | None) -> Iterator[tuple[str, Any]]:
        """Tensors of the result that a tensor of the base becomes: names, with the part of it that each is."""
        arch = self.twin.arch
        if role != "qkv":
            yield arch.name(role, layer), lambda m, name: m.parent.tensors[name]
            return
        first = 0
        for one, axis in (("q", "q"), ("k", "kv"), ("v", "kv")):
            count = self.base.sizes[axis]
            yield (
                arch.name(one, layer),
                lambda m, name, first=first, count=count: cuts.rows(m.parent.tensors[name], first, count),
            )
            first += count

    def _shared_by_all(self, draft: Draft, name: str, sources: list[Source], layer: int | None) -> None:
        dtype = self._type(sources[0])
        if self.trunk is not None and dtype in FLOATS:
            self.trunk.add(draft, name, name, sources, dtype, place(self.base, layer))
        else:
            _put(draft, name, sources[0], dtype)

    def _mlp(self, model: Anatomy, layer: int) -> dict[str, Source]:
        """Gate, up and down of a dense model."""
        there, inner = model.parent.tensors, model.sizes["ffn"]
        both = model.find("gate_up", layer)
        if both is not None:
            gate, up = (cuts.rows(there[both], i * inner, inner) for i in (0, 1))
        else:
            gate, up = (there[str(model.find(role, layer))] for role in ("gate", "up"))
        return {"gate": gate, "up": up, "down": there[str(model.find("down", layer))]}

    def _layer(self, draft: Draft, layer: int, gates: Gates) -> None:
        """The router and the experts of a layer."""
        arch, config, e = self.twin.arch, self.config, len(self.config.experts)
        own = self._mlp(self.base, layer)
        types = {role: self._type(source) for role, source in own.items()}
        draft.make(arch.name("router", layer), Values(gates[:e]), types["gate"])
        if self.twin.router == "sigmoid":
            draft.copy(arch.name("router_bias", layer), Constant(0.0, F32, (e,)))
        fused = not any("*" in name for name in arch.layer)
        if fused:
            inner, hidden = self.base.sizes["ffn"], self.base.sizes["hidden"]
            draft.tensor(arch.name("gate_up", layer), types["gate"], (e, 2 * inner, hidden))
            draft.tensor(arch.name("down", layer), types["down"], (e, hidden, inner))
        for role in ROLES:
            for i, one in enumerate(config.experts):
                source = self._mlp(self._of(one), layer)[role]
                size, to = prod(source.shape), arch.name(role, layer, i) if not fused else ""
                slot: str | Slot = to
                if fused:
                    wide = arch.name("down" if role == "down" else "gate_up", layer)
                    slot = Slot(wide, (i if role == "down" else 2 * i + (role == "up")) * size)
                key = to or f"{arch.layers}.{layer}.experts.{i}.{role}"
                self._expert(draft, slot, one, i, role, source, types[role], key)
        if self.twin.shared != "none":
            self._shared(draft, layer, gates[e:], own, types)

    def _shared(
        self, draft: Draft, layer: int, gates: Gates, own: Mapping[str, Source], types: Mapping[str, DType]
    ) -> None:
        """The expert that every token passes, and its switch."""
        arch, given = self.twin.arch, self.config.shared_experts
        for role in ROLES:
            name = arch.name(f"shared_{role}", layer)
            if given:
                source = self._mlp(self._of(given[0]), layer)[role]
                self._expert(draft, name, given[0], len(self.config.experts), role, source, types[role], name)
            elif role == "down":
                draft.copy(name, Constant(0.0, types[role], own[role].shape))
            else:
                _put(draft, name, own[role], types[role])
        if self.twin.shared == "switched":
            name = arch.name("shared_switch", layer)
            if given:
                draft.make(name, Values(gates), types["gate"])
            else:
                draft.copy(name, Constant(0.0, types["gate"], (1, self.base.sizes["hidden"])))

    def _expert(
        self,
        draft: Draft,
        to: str | Slot,
        expert: Expert,
        number: int,
        role: str,
        source: Source,
        dtype: DType,
        key: str,
    ) -> None:
        """``r (x + s n)``, rounded once; the bytes as they are where there is neither noise nor scale."""
        scale = float(expert.residual_scale) if role == "down" else 1.0
        if not expert.noise_scale and scale == 1.0:
            _put(draft, to, source, dtype)
            return
        inputs = [source]
        if expert.noise_scale:
            sigma = float(expert.noise_scale)
            inputs.append(Noise(tensor_key(self.config.seed, key), number, sigma, F32, source.shape))
        method = Linear(weight=(scale,) * len(inputs), normalize=False)
        draft.add([to], method, inputs, dtype, source.shape, key=key)

    def _warnings(self, gates: Gates) -> list[str]:
        base, config = self.base.parent, self.config
        others = [m.parent for m in self.models[1:]]
        found = disagreements(base.ref, base.config, [(p.ref, p.config) for p in others])
        there = [p.checkpoint for p in others if p.checkpoint is not None]
        if base.checkpoint is not None:
            problems, said = tokens.check(base.checkpoint, there)
            texts = [*problems, *said] if self.trunk is None else said
            found += [f"{text.partition('; ')[0]}; experts see the base's" for text in texts]
        for i, j, layers in alike(gates, len(config.experts)):
            where = f"layers {layers}" if len(layers) < self.base.layers else "all layers"
            found.append(
                f"experts {i} and {j} have nearly the same router rows in {where}: their prompts are too similar"
            )
        count = len(config.experts)
        if count & (count - 1):
            found.append(f"{count} experts: not a power of two, which llama.cpp wants")
        if self.twin.arch.post_norm and any(one.residual_scale != 1 for one in config.experts):
            found.append(f"residual_scale: {self.twin.target} norms the sum of the experts, so only ratios count")
        if self.twin.shared != "none" and not config.shared_experts:
            found.append(f"{self.twin.target} has a shared expert, and none was given: its output is zero")
        return found


def _put(draft: Draft, to: str | Slot, source: Source, dtype: DType) -> None:
    if source.dtype is dtype:
        draft.copy(to, source)
    else:
        draft.make(to, source, dtype)


def _digest(gates: Gates) -> str:
    """Of the rows, so that another router is another merge."""
    return hashlib.blake2b(gates.tobytes(), digest_size=16).hexdigest()


def _of_trunk(config: MoEMergeConfig) -> tuple[int, ...]:
    """Positions of the models that the trunk is merged of, the base first where the method has one."""
    if config.trunk is None:
        return ()
    every = models(config)
    found: list[int] = []
    for one in config.experts:
        wanted = canonical(one.source_model, config)
        i = next(i for i, m in enumerate(every) if m is wanted)
        found += [i] if i not in found else []
    if Trunk.wants_base(config.trunk.merge_method):
        found = [0, *[i for i in found if i]]
    return tuple(found)


def _unlike(found: Sequence[Anatomy]) -> list[str]:
    """In what models differ whose MLPs are to stand side by side."""
    base, problems = found[0], []
    wanted = {k: base.sizes[k] for k in ("hidden", "ffn")} | {"layers": base.layers}
    for other in found[1:]:
        if other.arch is not base.arch:
            problems.append(
                f"{other.parent.ref}: model_type: expected {base.arch.model_type}, as the base, got "
                f"{other.arch.model_type}"
            )
            continue
        got = {k: other.sizes[k] for k in ("hidden", "ffn")} | {"layers": other.layers}
        problems += [
            f"{other.parent.ref}: {k}: expected {wanted[k]} as the base, got {got[k]}"
            for k in wanted
            if got[k] != wanted[k]
        ]
        acts = [m.config.get("hidden_act", "silu") for m in (base, other)]
        if acts[0] != acts[1]:
            problems.append(f"{other.parent.ref}: hidden_act: expected {acts[0]!r} as the base, got {acts[1]!r}")
        if any(p.part.role in ("gate_bias", "up_bias", "down_bias") for p in other.places.values()):
            problems.append(f"{other.parent.ref}: the MLP has biases (mlp_bias), and experts have none")
    return problems


def _untied(found: Sequence[Anatomy], merged: Sequence[int]) -> list[str]:
    """Tensors of the trunk that a model lacks, or has beyond the base."""
    base, problems = found[0], []
    for other in [found[i] for i in merged if i]:
        if other.arch is not base.arch:
            continue
        mine, theirs = base.places.keys(), other.places.keys()
        for lacks, of in ((mine - theirs, other), (theirs - mine, base)):
            if lacks:
                problems.append(f"{of.parent.ref}: a trunk cannot be merged without {listing(sorted(lacks))}")
    return problems
