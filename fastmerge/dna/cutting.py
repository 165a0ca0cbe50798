"""The draft of a smaller model: what is kept of each tensor of a larger one, and the configuration that fits."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.dna.anatomy import Anatomy, Part
from fastmerge.dna.draft import Draft, Request, Slot
from fastmerge.dna.importance import norm_before
from fastmerge.dna.kept import Index, Kept, Sizes
from fastmerge.dna.layers import restacked
from fastmerge.dna.refit import Rotation
from fastmerge.dtypes import BF16, F16, DType
from fastmerge.errors import RecipeError
from fastmerge.methods.passthrough import Passthrough
from fastmerge.ops.made import Constant
from fastmerge.ops.picked import Gain, Held, Picked
from fastmerge.ops.rotated import TurnedColumns, TurnedRows
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"


@dataclass(frozen=True)
class Mended:
    """What makes up for what is left out.

    Attributes:
        energy: mean square of each channel of what goes into a norm, by the name of its weight; gains are corrected
            where it is there.
        down: weights of ``down_proj`` of dense layers that were fitted to the neurons kept, ``[D, I']``; all rows.
        rotation: coordinates of the residual stream of which the first are kept, in place of channels.
    """

    energy: Mapping[str, Array] = field(default_factory=dict)
    down: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    rotation: Rotation | None = None


def plan_slicing(anatomy: Anatomy, kept: Kept, request: Request, mended: Mended = Mended()) -> Draft:
    """A model of what is kept of another one.

    Every tensor is gathered by the indices of its axes, and copied where all of it stays. Norms over channels of which
    some are left out have their gains times ``sqrt(f D / D')``, f the share of the energy that the others have, where
    that is known. Where the architecture multiplies embeddings by the root of the hidden size, they are scaled back,
    and the last norm too if the head is the embedding.

    Args:
        anatomy: of the model.
        kept: what stays.
        request: for the report.
        mended: corrections.

    Raises:
        RecipeError: a rotation of an architecture, or a configuration, that cannot have it.
    """
    if mended.rotation is not None:
        check_rotation(anatomy)
    config, warnings = _config(anatomy, kept)
    draft = Draft(request, (anatomy.parent,), config, warnings=warnings)
    cut = _Cut(draft, anatomy, kept, mended)
    position = {layer: i for i, layer in enumerate(kept.layers)}
    for name, (part, layer, expert) in anatomy.places.items():
        if layer is not None and layer not in position:
            continue
        order = kept.experts.get(layer) if layer is not None and expert is not None else None
        if order is not None and expert not in order:
            continue
        to = name
        if layer is not None:
            number = expert if order is None else int(np.flatnonzero(order == expert)[0])
            to = _renamed(anatomy, name, layer, position[layer], expert, number)
        cut.tensor(name, to, part, layer, expert)
    draft.facts = {"matched": cut.matched(), "kept": kept.facts(), **cut.facts()}
    return draft


def check_rotation(anatomy: Anatomy) -> None:
    """Refuses what cannot be rotated.

    Raises:
        RecipeError: with every reason.
    """
    roles = {place.part.role for place in anatomy.places.values()}
    problems = []
    if anatomy.tied:
        problems.append("the head is the embedding, and only the head can take the gains of the last norm")
    if anatomy.arch.post_norm or roles & {"attention_norm", "output_norm"}:
        problems.append("norms stand between what writes the residual stream and the stream")
    if any(len(place.part.axes) == 3 for place in anatomy.places.values()):
        problems.append("tensors that hold all experts are not rotated")
    if problems:
        raise RecipeError([f"rotate: {anatomy.arch.model_type}: {p}" for p in problems])


def _renamed(anatomy: Anatomy, name: str, layer: int, new: int, expert: int | None, number: int | None) -> str:
    prefix = f"{anatomy.arch.layers}.{layer}."
    rest = name[len(prefix) :]
    if expert is not None:
        head, _, tail = rest.partition(f".{expert}.")
        rest = f"{head}.{number}.{tail}"
    return f"{anatomy.arch.layers}.{new}.{rest}"


@dataclass
class _Cut:
    """Tensors of the result, one by one.

    Attributes:
        draft: that they go to.
        anatomy: of the model.
        kept: what stays.
        mended: corrections.
        copied: tensors of which all stays.
        gains: factors of norms that are not 1, by the name in the result.
    """

    draft: Draft
    anatomy: Anatomy
    kept: Kept
    mended: Mended
    copied: int = 0
    gains: dict[str, float] = field(default_factory=dict)

    def matched(self) -> dict[str, int]:
        """Numbers of tensors by what became of them."""
        made = len(self.draft.tensors)
        left = len(self.anatomy.places) - made
        return {"copied": self.copied, "cut": made - self.copied, "left_out": left}

    def facts(self) -> dict[str, Any]:
        """What was computed."""
        found: dict[str, Any] = {}
        if self.gains:
            found["norm_gains"] = self.gains
        if self.mended.down:
            found["refit"] = {str(layer): _digest(w) for layer, w in self.mended.down.items()}
        if self.mended.rotation is not None:
            found["rotation"] = _digest(self.mended.rotation.basis)
        return found

    def tensor(self, name: str, to: str, part: Part, layer: int | None, expert: int | None) -> None:
        """One tensor of the model."""
        source = self.anatomy.parent.tensors[name]
        if "experts" in part.axes[:1] and part.axes[1:] != ("hidden",) and len(part.axes) > 1:
            self._experts(to, source, part, layer)
            return
        index = [self.kept.index(self.anatomy, axis, layer, expert) for axis in part.axes]
        fitted = self.mended.down.get(-1 if layer is None else layer)
        if part.role == "down" and expert is None and fitted is not None:
            self._put(to, source.dtype, self._turned(part, layer, _picked(Held(fitted), [index[0], None])), made=True)
        elif part.role.endswith("_norm"):
            self._norm(name, to, source, part, index[0])
        else:
            made = self._turned(part, layer, _picked(source, index))
            scale = self._embed_scale(source.dtype) if part.role == "embed" else 1.0
            if scale != 1:
                self.draft.add([to], Passthrough(scale=(scale,)), [made], source.dtype, made.shape)
            else:
                self._put(to, source.dtype, made, made=made.dtype is not source.dtype)
            self.copied += made is source and scale == 1

    def _put(self, to: str, dtype: DType, source: Source, *, made: bool) -> None:
        if made:
            self.draft.make(to, source, dtype)
        else:
            self.draft.copy(to, source)

    def _turned(self, part: Part, layer: int | None, source: Source) -> Source:
        """A tensor in other coordinates of the residual stream, if there are some."""
        if self.mended.rotation is None or "hidden" not in part.axes:
            return source
        channel = part.axes.index("hidden")
        if part.side(channel) == "reads":
            norm = norm_before(self.anatomy, part.role, layer)
            assert norm is not None
            gain = self.anatomy.parent.tensors[norm]
            return TurnedColumns(source, self._basis, gain, self.anatomy.arch.plus_one)
        return TurnedColumns(source, self._basis) if part.role == "embed" else TurnedRows(source, self._basis_rows)

    @functools.cached_property
    def _basis(self) -> Array:
        """The coordinates that are kept, ``[D, D']``; all tensors share it."""
        assert self.mended.rotation is not None
        return np.ascontiguousarray(self.mended.rotation.basis[:, : self.kept.sizes.hidden])

    @functools.cached_property
    def _basis_rows(self) -> Array:
        return np.ascontiguousarray(self._basis.T)

    def _norm(self, name: str, to: str, source: Source, part: Part, index: Index | None) -> None:
        """A norm: its gains cut, and corrected for what does not go into it any more."""
        rotation, plus_one = self.mended.rotation, self.anatomy.arch.plus_one
        if rotation is not None and part.axes == ("hidden",):
            factor = _correction(rotation.energy.get(name), np.arange(self.kept.sizes.hidden))
        else:
            factor = _correction(self.mended.energy.get(name), index)
        if part.role == "final_norm" and self.anatomy.tied:
            factor /= self._embed_scale(self.anatomy.parent.tensors[self.anatomy.arch.name("embed")].dtype)
        if factor != 1:
            self.gains[to] = factor
        if rotation is not None and part.axes == ("hidden",):
            self.draft.copy(to, Constant(factor - plus_one, source.dtype, (self.kept.sizes.hidden,)))
            return
        made = _picked(source, [index])
        if factor == 1:
            self.draft.copy(to, made)
            self.copied += made is source
        else:
            self.draft.make(to, Gain(made, factor, plus_one), source.dtype)

    def _embed_scale(self, dtype: DType) -> float:
        """What undoes the smaller scale of embeddings; both scales are rounded to their type, as transformers does."""
        before, after = self.anatomy.sizes["hidden"], self.kept.sizes.hidden
        if not self.anatomy.arch.embed_scale or before == after:
            return 1.0
        return _rounded(math.sqrt(before), dtype) / _rounded(math.sqrt(after), dtype)

    def _experts(self, to: str, source: Source, part: Part, layer: int | None) -> None:
        """A tensor that holds all experts: each has neurons of its own."""
        assert layer is not None
        order = self.kept.experts.get(layer)
        axes, lead = part.axes[1:], source.shape[1] if len(part.axes) == 3 else 1
        each = [
            [self.kept.index(self.anatomy, axis, layer, int(e)) for axis in axes]
            for e in (range(source.shape[0]) if order is None else order)
        ]
        shape = tuple([n if i is None else len(i) for n, i in zip(source.shape[1:], each[0], strict=True)])
        if order is None and all(i is None for index in each for i in index):
            self.draft.copy(to, source)
            self.copied += 1
            return
        self.draft.tensor(to, source.dtype, (len(each), *shape))
        for position, index in enumerate(each):
            e = position if order is None else int(order[position])
            rows = np.arange(lead) if len(axes) == 1 or index[0] is None else index[0]
            taken = Picked(source, rows + e * lead, index[-1], shape)
            self.draft.copy(Slot(to, position * math.prod(shape)), taken)


def _picked(source: Source, index: list[Index | None]) -> Source:
    """A tensor by the indices of its dimensions; itself where all of it stays."""
    if all(i is None for i in index):
        return source
    shape = tuple([n if i is None else len(i) for n, i in zip(source.shape, index, strict=True)])
    return Picked(source, index[0] if len(index) == 2 else None, index[-1], shape)


def _correction(energy: Array | None, index: Index | None) -> float:
    """``sqrt(f D / D')``: 1 where nothing is left out, or nothing is known."""
    if energy is None or index is None or len(index) == len(energy):
        return 1.0
    total, left = float(energy.sum()), float(energy[index].sum())
    return math.sqrt(left / total * len(energy) / len(index)) if left > 0 else 1.0


def _rounded(value: float, dtype: DType) -> float:
    """The nearest number of a type."""
    if dtype is BF16:
        bits = int(np.float32(value).view(np.uint32))
        return float(np.uint32((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32))
    return float(np.float16(value)) if dtype is F16 else float(np.float32(value))


def _digest(values: npt.NDArray[Any]) -> str:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()


def _config(anatomy: Anatomy, kept: Kept) -> tuple[dict[str, Any], list[str]]:
    """The configuration of the result, and warnings."""
    config, warnings = restacked(anatomy, kept.layers)
    config["architectures"] = config.get("architectures") or [anatomy.arch.head]
    sizes, changed = kept.sizes, kept.sizes.changed(Sizes.of(anatomy))
    if "hidden" in changed:
        config["hidden_size"] = sizes.hidden
    if changed & {"hidden", "heads", "kv_heads"}:
        config |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
        config["head_dim"] = anatomy.sizes["head_dim"]
    keys = {"ffn": "intermediate_size", **anatomy.arch.sizes}
    for axis in changed & sizes.inner.keys():
        if keys[axis] != "n_shared_experts":
            config[keys[axis]] = sizes.inner[axis]
    if "experts" in changed:
        for key in {"num_experts", "num_local_experts", "n_routed_experts"} & ({keys["experts"]} | config.keys()):
            config[key] = sizes.experts
    return config, warnings
