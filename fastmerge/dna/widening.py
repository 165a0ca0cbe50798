"""The tensors of a wider model, each as a source over those of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING

import numpy as np

from fastmerge.dna.anatomy import Anatomy, Axis, Located, Part
from fastmerge.dna.axes import I64, Growth
from fastmerge.dna.draft import Draft, Slot
from fastmerge.dtypes import BF16, F32, F64, DType
from fastmerge.keys import tensor_key
from fastmerge.ops import gathered
from fastmerge.ops.gathered import Columns, Scaled
from fastmerge.ops.made import Noise, Rows, rounded
from fastmerge.ops.replicas import Split
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt

BEFORE = ("input_norm", "mlp_norm", "final_norm")
"""Norms in front of what reads the residual stream; the others of its size are behind what writes it."""


@dataclass(frozen=True, eq=False)
class Along:
    """What becomes of a dimension.

    Attributes:
        index: the old entry of each new one; -1 for none.
        split: replicas share what was one; else each has all of it.
        fresh: entries that are of none are noise; else 0.
        factors: fp64, of the new entries.
    """

    index: I64
    split: bool = False
    fresh: bool = False
    factors: npt.NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Widening:
    """How a model grows.

    Attributes:
        model: what grows.
        growths: by axis; what is not there stays.
        mode: of the residual stream: ``duplicate``, ``zero`` or ``scaled``.
        sigma: standard deviation of fresh weights, in units of ``rms`` where there is one; 0: none, and even splits.
        rms: root mean square of each tensor.
        knowledge: replicas of what a layer writes are from the next layer (AKI).
        seed: of splits and noise.
    """

    model: Anatomy
    growths: Mapping[str, Growth]
    mode: str
    sigma: float = 0.0
    rms: Mapping[str, float] | None = None
    knowledge: bool = False
    seed: int = 0

    @property
    def ratio(self) -> float:
        """Channels of the residual stream after, over those before."""
        hidden = self.growths.get("hidden")
        return hidden.new / hidden.old if hidden else 1.0

    def index(self, axis: Axis, role: str) -> I64 | None:
        """What each entry of an axis is of; None where it stays."""
        parts = axis if isinstance(axis, tuple) else (axis,)
        found: list[I64] = []
        above = 0
        for name in parts:
            growth = self.growths.get({"q": "heads", "kv": "kv_heads"}.get(name, name))
            size = self.model.sizes[name]
            index = np.arange(size) if growth is None else growth.index
            if growth is not None and name in ("q", "kv"):
                width = self.model.sizes["head_dim"]
                index = np.where(index[:, None] < 0, -1, index[:, None] * width + np.arange(width)).reshape(-1)
            if self.model.arch.interleaved and len(parts) == 2 and role.startswith("gate_up"):
                found.append(np.where(index < 0, -1, 2 * index + len(found)))
            else:
                found.append(np.where(index < 0, -1, index + above))
            above += size
        if self.model.arch.interleaved and len(parts) == 2:
            whole = np.stack(found, axis=1).reshape(-1)
        else:
            whole = np.concatenate(found)
        return None if len(whole) == above and (whole == np.arange(above)).all() else whole

    def along(self, part: Part, dimension: int) -> Along | None:
        """What becomes of a dimension of a tensor; None where it stays."""
        axis, side = part.axes[dimension], part.side(dimension)
        index = self.index(axis, part.role)
        if side == "scales" and axis == "hidden":
            return self._norm(part.role, index)
        if axis != "hidden" or index is None:
            if index is None:
                return None
            shared = side == "reads" and (index >= 0).all() and len(index) > self.model.size(axis)
            return Along(
                index, split=bool(shared), fresh=side == "writes" and len(part.axes) > 1 and part.reads is not None
            )
        hidden = self.growths["hidden"]
        if side == "writes":
            factors = hidden.scale
            if part.role == "embed" and self.model.arch.embed_scale:
                factors = (1.0 if factors is None else factors) * np.full(hidden.new, self.embed_ratio)
            return Along(index, factors=factors)
        if self.mode == "zero":
            return Along(index, fresh=part.role != "head")
        if hidden.scale is not None and self.model.arch.post_norm and part.role != "head":
            return Along(index, factors=hidden.scale / self.ratio)
        return Along(index, split=True)

    def _norm(self, role: str, index: I64 | None) -> Along | None:
        """Gains of the residual stream; those of new channels in ``zero`` repeat the old ones."""
        if index is None:
            return None
        hidden = self.growths["hidden"]
        factors = np.ones(hidden.new)
        if self.mode == "zero":
            index, factors = np.arange(hidden.new) % hidden.old, factors * sqrt(1 / self.ratio)
        elif role in BEFORE and hidden.scale is not None:
            factors = 1 / hidden.scale
        if role == "final_norm" and self.model.tied:
            if self.mode != "zero":  # the embedding is not split, so the gain is
                factors = factors / ((1.0 if hidden.scale is None else hidden.scale) * hidden.replicas[index])
            factors = factors / (self.embed_ratio if self.model.arch.embed_scale else 1.0)
        return Along(index, factors=None if (factors == 1).all() else factors)

    @property
    def embed_ratio(self) -> float:
        """By what the embedding is multiplied where the model multiplies it by sqrt(D), in the embedding's type."""
        name = self.model.find("embed")
        assert name is not None
        dtype = self.model.parent.tensors[name].dtype
        old = self.model.sizes["hidden"]
        return _in(sqrt(old), dtype) / _in(sqrt(old * self.ratio), dtype)

    @property
    def fresh(self) -> list[str]:
        """Tensors with fresh weights."""
        found = []
        for name, (part, _, _) in self.model.places.items():
            along = [self.along(part, d) for d in range(len(part.axes))]
            if self.sigma and any(a is not None and a.fresh and (a.index < 0).any() for a in along):
                found.append(name)
        return found

    def add(self, draft: Draft, name: str, place: Located) -> bool:
        """Puts a tensor of the wider model into a draft; whether anything of it changes."""
        source, part = self.model.parent.tensors[name], place.part
        along = [self.along(part, d) for d in range(len(part.axes))]
        if not any(a is not None for a in along):
            draft.copy(name, source)
            return False
        shape = tuple([n if a is None else len(a.index) for n, a in zip(source.shape, along, strict=True)])
        if len(shape) < 3:
            made = self._made(name, name, place, along, None)
            self._put(draft, name, made, source.dtype)
            return True
        draft.tensor(name, source.dtype, shape)
        for i in range(shape[0]):
            made = self._made(name, f"{name}[{i}]", place, along[1:], i)
            self._put(draft, Slot(name, i * prod(shape[1:])), made, source.dtype)
        return True

    @staticmethod
    def _put(draft: Draft, to: str | Slot, made: Source, dtype: DType) -> None:
        if made.dtype is dtype:
            draft.copy(to, made)
        else:
            draft.make(to, made, dtype)

    def _made(self, name: str, key: str, place: Located, along: list[Along | None], i: int | None) -> Source:
        """A vector or a matrix (the i-th of a tensor of several): first what it writes grows, then what it reads."""
        sources = [self._matrix(name, i)]
        following = self._following(name, place) if self.knowledge else None
        if following is not None:
            sources.append(self._matrix(following, i))
        last = len(along) - 1
        reads = None if place.part.reads is None else place.part.reads - (i is not None)
        for d in sorted(range(len(along)), key=lambda d: d == reads):
            step = along[d]
            if step is None:
                continue
            if step.split:
                drawn = tensor_key(self.seed, key)
                sources = [Split(sources[0], step.index, drawn, axis=d, even=self.sigma == 0)]
                continue
            index, parts = step.index, list(sources[:1])
            if d != reads and len(sources) > 1:
                again = np.ones(len(index), bool)
                again[np.unique(index, return_index=True)[1]] = False
                index, parts = np.where(again & (index >= 0), index + sources[0].shape[d], index), sources
            new = np.flatnonzero(index < 0)
            if step.fresh and len(new) and self.sigma:
                index = index.copy()
                index[new] = sum(s.shape[d] for s in parts) + np.arange(len(new))
                parts = [*parts, self._noise(name, f"{key} {d}", parts[0], d, len(new))]
            sources = [Columns(tuple(parts), index) if d and d == last else Rows(tuple(parts), index)]
        made = sources[0]
        for d, step in enumerate(along):
            if step is not None and step.factors is not None:
                one = self.model.arch.plus_one and place.part.side(d + (i is not None)) == "scales"
                made = Scaled(made, step.factors, axis=d, plus_one=one)
        return made

    def _matrix(self, name: str, i: int | None) -> Source:
        source = self.model.parent.tensors[name]
        if i is None:
            return source
        return gathered.Part(source, i * prod(source.shape[1:]), source.shape[1:])

    def _noise(self, name: str, key: str, beside: Source, d: int, n: int) -> Noise:
        """Fresh rows or columns."""
        shape = (n, *beside.shape[1:]) if d == 0 else (beside.shape[0], n)
        sigma = self.sigma * (1.0 if self.rms is None else self.rms[name])
        return Noise(tensor_key(self.seed, key), 0, sigma, F64 if beside.dtype is F64 else F32, shape)

    def _following(self, name: str, place: Located) -> str | None:
        """The same tensor of the next layer."""
        if place.layer is None:
            return None
        prefix = f"{self.model.arch.layers}."
        found = f"{prefix}{place.layer + 1}.{name[len(prefix) + len(str(place.layer)) + 1 :]}"
        return found if found in self.model.places else None


def _in(value: float, dtype: DType) -> float:
    """A number rounded to a type."""
    bits = rounded(value, dtype)
    if dtype is BF16:
        return float((bits.astype(np.uint32) << np.uint32(16)).view(np.float32)[0])
    return float(bits[0])
