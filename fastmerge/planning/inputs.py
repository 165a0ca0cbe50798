"""From the tensors of models to the sources of ops: adapters are applied, 8-bit floats widened."""

from __future__ import annotations

from fastmerge.checkpoint import Checkpoint, TensorInfo
from fastmerge.checkpoint.adapter import Adapter
from fastmerge.checkpoint.header import listing
from fastmerge.dtypes import BF16, DType
from fastmerge.ops.sources import FileRange, LowRank, Wide
from fastmerge.ops.spec import Source

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
"""Types whose values bfloat16 holds exactly."""


class Inputs:
    """The sources of one model of a plan.

    Args:
        checkpoint: the model.
        model: its position among the plan's checkpoints.
        adapter: what is applied to it; None for nothing.
        at: the adapter's position among them.
    """

    def __init__(self, checkpoint: Checkpoint, model: int, adapter: Adapter | None = None, at: int = -1) -> None:
        self._checkpoint = checkpoint
        self._model = model
        self._adapter = adapter
        self._at = at
        dtypes = {info.dtype.name for info in checkpoint.tensors.values()}
        self.plain = adapter is None and not dtypes & FLOAT8

    def problems(self) -> list[str]:
        """What of the adapter fits nothing in the model: applied in part, it would be wrong without a word."""
        if self._adapter is None:
            return []
        tensors, ref = self._checkpoint.tensors, self._adapter.checkpoint.ref
        names = [*self._adapter.updates, *self._adapter.replaced]
        out = []
        if absent := [n for n in names if n not in tensors]:
            out.append(f"{ref}: {self._checkpoint.ref!r} has no such tensors: {listing(absent)}")
        for name in names:
            info = tensors.get(name)
            if info is None:
                continue
            if name in self._adapter.updates:
                fits = info.dtype.mergeable and self._transposed(name, info) is not None
                given = "lora_B {} x lora_A {}".format(
                    *(list(i.shape) for i in (self._adapter.updates[name].b, self._adapter.updates[name].a))
                )
            else:
                fits, given = (
                    self._adapter.replaced[name].shape == info.shape,
                    str(list(self._adapter.replaced[name].shape)),
                )
            if not fits:
                out.append(f"{ref}: {name}: {given} does not fit {info.dtype.name} {list(info.shape)}")
        return out

    def _transposed(self, name: str, info: TensorInfo) -> bool | None:
        assert self._adapter is not None
        return self._adapter.transposes(name, info.shape, self._checkpoint.config.get("model_type"))

    def source(self, info: TensorInfo, *, copied: bool = False) -> tuple[Source, DType]:
        """Where a tensor comes from, and the type that counts for the type of the result.

        Args:
            info: the tensor in the model.
            copied: nothing is computed from it, so its bytes are wanted as they are.
        """
        if self._adapter is not None:
            if info.name in self._adapter.replaced:
                own = self._adapter.replaced[info.name]
                return FileRange(own, self._at), own.dtype
            update = self._adapter.updates.get(info.name)
            if update is not None:
                b, a = FileRange(update.b, self._at), FileRange(update.a, self._at)
                base = FileRange(info, self._model)
                return LowRank(base, b, a, update.scale, bool(self._transposed(info.name, info))), info.dtype
        if info.dtype.name in FLOAT8 and not copied:
            return Wide(FileRange(info, self._model)), BF16
        return FileRange(info, self._model), info.dtype
