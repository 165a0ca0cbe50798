"""From a dense model to a mixture of experts: a draft. Reads headers only."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastmerge.dna import cuts
from fastmerge.dna.anatomy import Anatomy, anatomy
from fastmerge.dna.draft import Draft, Request, Slot
from fastmerge.dna.parent import Parent
from fastmerge.dna.upcycling.options import UpcyclingConfig
from fastmerge.dna.upcycling.router import Uniform
from fastmerge.dna.upcycling.twins import Twin, config_of, problems_of, twin_of
from fastmerge.dtypes import F32, FLOATS, DType
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.keys import tensor_key
from fastmerge.methods.passthrough import COPY, Passthrough
from fastmerge.methods.redraw import Redraw
from fastmerge.methods.replicate import Replicate
from fastmerge.ops.made import Constant, Noise, Rows
from fastmerge.ops.redraw import Units
from fastmerge.ops.sources import Result
from fastmerge.ops.spec import Op, Source, Spec

ROLES = ("gate", "up", "down")

SHARES: Mapping[str, tuple[float, float]] = {
    "none": (1.0, 0.0),
    "zero": (1.0, 0.0),
    "half": (0.5, 0.5),
    "dense": (0.0, 1.0),
}
"""What the routed experts give of the output, and what the shared one does."""

FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
"""Names of fused experts and of their router, as transformers 5 has them in memory."""


def plan_upcycle(dense: Parent, config: UpcyclingConfig | None = None) -> Draft:
    """The draft of a mixture of experts that starts as a dense model.

    Every expert is the MLP, so whichever are chosen give its output: ``sum_e w_e MLP(x) = MLP(x)``, as their weights
    sum to one. Of fine experts (granularity G) each has a G-th of the inner units; a token passes all G of a copy.

    Args:
        dense: the model.
        config: what to make of it.

    Raises:
        RecipeError: the type of model has no twin, or that cannot have what was asked for.
        CheckpointError: the model is not as its config.json says, or has what its twin cannot have.
    """
    config = config or UpcyclingConfig()
    found = anatomy(dense)
    if found.arch.experts:
        raise RecipeError(f"{dense.ref}: {found.arch.model_type} has experts already; 'experts more' multiplies them")
    return _Upcycling(found, twin_of(found.arch.model_type, config.target_arch), config).draft()


@dataclass(frozen=True)
class _Upcycling:
    dense: Anatomy
    twin: Twin
    config: UpcyclingConfig

    def draft(self) -> Draft:
        """Everything."""
        config, twin, dense = self.config, self.twin, self.dense
        asked, model = [*self._problems(), *self._types()], problems_of(twin, dense)
        if model:
            raise CheckpointError([*model, *asked])
        if asked:
            raise RecipeError(asked)
        out = config_of(
            twin,
            dense,
            experts=config.num_experts,
            active=config.num_experts_per_token,
            width=self.width,
            shared_width=0 if self.shared == "none" else dense.sizes["ffn"],
            dense_layers=[i for i in range(dense.layers) if i not in self.sparse],
            scaling=self.factors[3],
            balance=config.auxiliary_loss_weight,
            jitter=config.jitter_noise,
        )
        request = Request("upcycle", (dense.parent.ref,), config.options())
        draft = Draft(request, (dense.parent,), out, config.seed)
        draft.warnings += self._warnings()
        done: set[int] = set()
        for name, (part, layer, _) in dense.places.items():
            if layer in self.sparse and part.role in ("gate", "up", "down", "gate_up"):
                if layer not in done:
                    done.add(layer)
                    self._mixture(draft, layer)
            elif part.role == "qkv":
                self._attention(draft, layer or 0, dense.parent.tensors[name])
            elif part.role == "gate_up":
                sources = self._mlp(layer or 0)
                for role in ("gate", "up"):
                    draft.copy(twin.arch.name(role, layer), sources[role])
            else:
                draft.copy(twin.arch.name(part.role, layer), dense.parent.tensors[name])
        draft.facts |= self._facts()
        return draft

    # ---- what it comes to ------------------------------------------------------------------------------

    @functools.cached_property
    def sparse(self) -> list[int]:
        """Layers that get experts."""
        return self.config.chosen(self.dense.layers)

    @property
    def copies(self) -> int:
        """Copies of the MLP."""
        return self.config.num_experts // self.config.granularity

    @property
    def width(self) -> int:
        """Inner units of an expert."""
        return self.dense.sizes["ffn"] // self.config.granularity

    @property
    def shared(self) -> str:
        """The layout of the shared expert."""
        if self.config.shared != "auto":
            return self.config.shared
        return "none" if self.twin.shared == "none" else "zero"

    @property
    def factors(self) -> tuple[float, float, float, float]:
        """Of gate, up and down, and of the sum of routed experts where the router is a sigmoid."""
        g, share = float(self.config.granularity), SHARES[self.shared][0] or 1.0
        if self.config.weight_scale == "megatron":
            gate = up = down = g ** (1 / 3)
        else:
            gate, up, down = 1.0, 1.0, g if self.config.weight_scale == "exact" else 1.0
        if self.twin.router == "sigmoid" and self.config.weight_scale != "megatron":
            return 1.0, 1.0, 1.0, down * share  # the sum has a factor: no weight changes
        return gate, up, down * share, 1.0

    @property
    def exact(self) -> bool:
        """Whether the model computes what the dense one does."""
        config = self.config
        alike = not config.expert_init_noise and not config.drop_ratio and config.copy_all_ffn_weights
        whole = config.granularity == 1 or config.weight_scale == "exact"
        return self.shared == "dense" or (alike and whole)

    def _problems(self) -> Iterator[str]:
        config, twin, sizes = self.config, self.twin, self.dense.sizes
        if sizes["ffn"] % config.granularity:
            yield (
                f"granularity: expected a divisor of the MLP's inner size {sizes['ffn']} (intermediate_size), "
                f"got {config.granularity}"
            )
        if (twin.shared == "none") != (self.shared == "none"):
            has = "one, so zero, half or dense" if twin.shared != "none" else "none"
            yield f"shared: {twin.target} has {has}; got {config.shared!r}"
        dense = [i for i in range(self.dense.layers) if i not in self.sparse]
        if (dense and twin.layers == "none") or (twin.layers == "first" and dense != list(range(len(dense)))):
            can = "no dense layers" if twin.layers == "none" else "dense layers before all others only"
            yield f"layers: {twin.target} can have {can}; got {config.layers!r:.80}, which leaves {dense} dense"
        if config.copy_all_ffn_weights:
            return
        if config.drop_ratio:
            yield "drop_ratio: expected 0 where experts are no copies (copy_all_ffn_weights: false)"

    def _types(self) -> Iterator[str]:
        for layer in self.sparse:
            for role, source in self._mlp(layer).items():
                if source.dtype not in FLOATS:
                    yield f"layer {layer}, {role}: expected floats of 16 bits or more, got {source.dtype.name}"

    def _warnings(self) -> Iterator[str]:
        config, twin = self.config, self.twin
        if config.num_experts_per_token == 1:
            yield "num_experts_per_token is 1: the chosen expert always weighs 1, so the loss does not train the router"
        if config.jitter_noise and twin.target != "mixtral":
            yield f"jitter_noise has no effect: {twin.target} has none"
        if not config.copy_all_ffn_weights:
            yield "copy_all_ffn_weights is false: all experts but the first are random, and the model's skills are lost"
        if config.granularity > 1:
            if config.weight_scale != "exact":
                yield f"weight_scale {config.weight_scale}: the mixture does not compute what the dense model does"
            elif twin.router == "softmax" and any(s.dtype is not F32 for s in self._mlp(self.sparse[0]).values()):
                yield (
                    f"granularity {config.granularity}: the router of {twin.target} works in the model's type, where "
                    "parts of two copies may tie; the function is exact in float32, and with routers that work in it"
                )
        if config.router_init == "zero":
            yield "router_init zero: all experts tie, so every token passes the same ones until the router learns"

    def _facts(self) -> dict[str, object]:
        config = self.config
        g = config.granularity
        return {
            "target": self.twin.target,
            "matched": {"layers": self.sparse, "mlp_tensors": 3 * len(self.sparse)},
            "experts": [{"copy": e // g, "part": e % g} for e in range(config.num_experts)],
            "shared": self.shared,
            "exact": self.exact,
        }

    # ---- tensors ---------------------------------------------------------------------------------------

    def _mlp(self, layer: int) -> dict[str, Source]:
        """Gate, up and down of the dense model."""
        tensors, find = self.dense.parent.tensors, self.dense.find
        both, inner = find("gate_up", layer), self.dense.sizes["ffn"]
        if both is not None:
            gate, up = (cuts.rows(tensors[both], i * inner, inner) for i in (0, 1))
        else:
            gate, up = (tensors[str(find(role, layer))] for role in ("gate", "up"))
        return {"gate": gate, "up": up, "down": tensors[str(find("down", layer))]}

    def _attention(self, draft: Draft, layer: int, source: Source) -> None:
        """Queries, keys and values that were one tensor."""
        first = 0
        for role, axis in (("q", "q"), ("k", "kv"), ("v", "kv")):
            count = self.dense.sizes[axis]
            draft.copy(self.twin.arch.name(role, layer), cuts.rows(source, first, count))
            first += count

    def _mixture(self, draft: Draft, layer: int) -> None:
        """A layer's router and experts."""
        arch, e, hidden = self.twin.arch, self.config.num_experts, self.dense.sizes["hidden"]
        mlp = self._mlp(layer)
        prefix = f"{arch.layers}.{layer}."
        fused = self.config.fused and self.twin.target != "granitemoe"
        router = prefix + FUSED[2] if fused else arch.name("router", layer)
        self._router(draft, router, mlp["gate"].dtype)
        if self.twin.router == "sigmoid":
            draft.copy(arch.name("router_bias", layer), Constant(0.0, F32, (e,)))
        wide = None
        if fused:
            wide = prefix + FUSED[0], prefix + FUSED[1]
        elif self.twin.target == "granitemoe":
            wide = arch.name("gate_up", layer), arch.name("down", layer)
        if wide:
            draft.tensor(wide[0], mlp["gate"].dtype, (e, 2 * self.width, hidden))
            draft.tensor(wide[1], mlp["down"].dtype, (e, hidden, self.width))
        for role, factor in zip(ROLES, self.factors, strict=False):
            self._experts(draft, layer, role, factor, mlp[role], wide)
        if self.shared != "none":
            self._shared(draft, layer, mlp)

    def _router(self, draft: Draft, name: str, dtype: DType) -> None:
        """Rows of random numbers; the parts of one copy share a row, so that they are chosen together."""
        config, hidden = self.config, self.dense.sizes["hidden"]
        shape, key = (self.copies, hidden), tensor_key(config.seed, name)
        made: Source
        if config.router_init == "zero":
            draft.copy(name, Constant(0.0, dtype, (config.num_experts, hidden)))
            return
        if config.router_init == "normal":
            made = Noise(key, 0, config.router_init_std, F32, shape)
        else:
            made = Uniform(key, 1 / math.sqrt(hidden) if config.router_scale is None else config.router_scale, shape)
        if config.granularity > 1:
            made = Rows((made,), np.repeat(np.arange(self.copies), config.granularity))
        draft.make(name, made, dtype)

    def _experts(
        self, draft: Draft, layer: int, role: str, factor: float, source: Source, wide: tuple[str, str] | None
    ) -> None:
        """One matrix of all experts."""
        config, g = self.config, self.config.granularity
        key = f"{self.twin.arch.layers}.{layer}.{role}"
        for part in range(g):
            mine = cuts.columns(source, part, g) if role == "down" else cuts.rows(source, part * self.width, self.width)
            numbers = [copy * g + part for copy in range(self.copies)]
            slots = [self._slot(layer, role, e, math.prod(mine.shape), wide) for e in numbers]
            if role == "down" and not SHARES[self.shared][0]:
                draft.add(slots, COPY, [Constant(0.0, source.dtype, mine.shape)], source.dtype, mine.shape)
                continue
            copied = len(numbers) if config.copy_all_ffn_weights else 1
            self._copies(draft, key, layer, role, _scaled(mine, factor), source.dtype, numbers[:copied], slots[:copied])
            for e, slot in zip(numbers[copied:], slots[copied:], strict=True):
                std = float(draft.config["initializer_range"])
                noise = Noise(tensor_key(config.seed, key), e, std, F32, mine.shape)
                draft.make(slot, noise, source.dtype)

    def _slot(self, layer: int, role: str, expert: int, size: int, wide: tuple[str, str] | None) -> str | Slot:
        if wide is None:
            return self.twin.arch.name(role, layer, expert)
        if role == "down":
            return Slot(wide[1], expert * size)
        return Slot(wide[0], (2 * expert + (role == "up")) * size)

    def _copies(
        self,
        draft: Draft,
        key: str,
        layer: int,
        role: str,
        source: Source,
        dtype: DType,
        numbers: Sequence[int],
        slots: Sequence[str | Slot],
    ) -> None:
        """Copies, with noise and new units; the first of them without, if that is wanted."""
        config = self.config
        clean = [config.first_clean and e < config.granularity for e in numbers]
        sigma = tuple([0.0 if c else float(config.expert_init_noise) for c in clean])
        relative = config.noise_mode == "relative" and any(sigma)
        method: Replicate
        if config.drop_ratio and not all(clean):
            choice = key if config.independent else f"{self.twin.arch.layers}.{layer}"
            units = Units(
                tensor_key(config.seed, choice),
                role != "down",
                tuple([0.0 if c else float(config.drop_ratio) for c in clean]),
            )
            method = Redraw(experts=tuple(numbers), sigma=sigma, relative=relative, units=units)
        elif any(sigma) or source.dtype is not dtype:
            method = Replicate(experts=tuple(numbers), sigma=sigma, relative=relative)
        else:
            draft.add(slots, COPY, [source], dtype, source.shape)
            return
        draft.add(slots, method, [source], dtype, source.shape, key=key)

    def _shared(self, draft: Draft, layer: int, mlp: Mapping[str, Source]) -> None:
        """The expert that every token passes: as wide as the MLP."""
        arch, down = self.twin.arch, mlp["down"]
        for role in ("gate", "up"):
            draft.copy(arch.name(f"shared_{role}", layer), mlp[role])
        share = SHARES[self.shared][1] * (2 if self.twin.shared == "switched" else 1)  # sigmoid(0) is a half
        name = arch.name("shared_down", layer)
        if share in (0.0, 1.0):
            draft.copy(name, down if share else Constant(0.0, down.dtype, down.shape))
        else:
            draft.add([name], Passthrough(scale=(share,)), [down], down.dtype, down.shape)
        if self.twin.shared == "switched":
            draft.copy(arch.name("shared_switch", layer), Constant(0.0, down.dtype, (1, down.shape[0])))


def _scaled(source: Source, factor: float) -> Source:
    """A source times a factor, in fp32 (fp64 stays), so that what is made of it is rounded once."""
    if factor == 1:
        return source
    wide = source.dtype if source.dtype.size == 8 else F32
    spec = Spec(Passthrough(scale=(factor,)), source.shape, (source.dtype,), wide)
    return Result(Op("scaled", spec, inputs=(source,)))
