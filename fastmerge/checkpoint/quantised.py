"""Which tensors of a checkpoint are codes and scales of weights, by their types and names; no data is computed.

=========================  =====================================================================================
``X``, ``X_scale_inv``     float8 and scales of blocks, or one (DeepSeek, ``fp8`` of transformers)
``X``, ``X_scale``         float8 or int8 and scales of rows, blocks, groups, or one (compressed-tensors, FBGEMM)
``X_packed``, ``X_scale``  int4 in int32 words, or float4 in bytes: NVFP4 and MXFP4 (compressed-tensors)
``X_blocks``, ``X_scales`` MXFP4 of GPT-OSS, whose weights are stored the other way round
=========================  =====================================================================================

Scales are multiplied with, whatever their names say.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmerge.checkpoint.header import TensorInfo, listing
from fastmerge.dtypes import BF16, F16, DType

FLOAT8 = frozenset({"float8_e4m3fn", "float8_e5m2"})
_SCALES = frozenset({"F32", "BF16", "F16", "F8_E8M0", "U8"})
_BLOCK = (128, 128)
"""Blocks of DeepSeek's, where a configuration says nothing."""

_OF_ACTIVATIONS = re.compile(r"(^|\.)(\w+_)?(input_scale|input_global_scale|activation_scale|[kvq]_scale)$")
_COMPANION = re.compile(r"(_scale_inv|weight_scale)$", re.MULTILINE)


class Quantised(NamedTuple):
    """A weight that is stored as codes and scales.

    Attributes:
        name: of the weight.
        code: what its codes are, in the words of :class:`fastmerge.ops.quantised.Dequantised`.
        shape: of the weight.
        dtype: that its model computes with.
        stored: shape of the weight as it is stored: ``[L, R, C]``.
        block: rows and columns that share a scale.
        codes: the tensor of the codes.
        scale: that of the scales.
        zero: that of the codes of zero, where there is one.
        divisor: that of what scales are divided by, where there is one.
        layout: ``fp8`` (``_scale_inv``), ``mxfp4`` (``_blocks``) or ``compressed-tensors``.
        rest: further tensors about it, which say nothing of its values.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    dtype: DType
    stored: tuple[int, int, int]
    block: tuple[int, int]
    codes: TensorInfo
    scale: TensorInfo
    zero: TensorInfo | None = None
    divisor: TensorInfo | None = None
    layout: str = "fp8"
    rest: tuple[TensorInfo, ...] = ()

    @property
    def transposed(self) -> bool:
        """Whether its matrices are stored the other way round."""
        return self.layout == "mxfp4"

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Every tensor that its values come from."""
        return tuple(i for i in (self.codes, self.scale, self.zero, self.divisor) if i is not None)


class Found(NamedTuple):
    """What was found.

    Attributes:
        weights: by their names.
        activations: scales of activations, and of keys and values, which are no weights.
        problems: codes whose scales do not fit, scales without codes: a line for each kind.
    """

    weights: Mapping[str, Quantised]
    activations: tuple[TensorInfo, ...]
    problems: tuple[str, ...]


def find(paths: Sequence[Path], settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Found:
    """Looks for weights that are stored as codes and scales.

    Args:
        paths: of the files.
        settings: the configuration's section on quantisation; empty where it has none.
        tensors: of the checkpoint, by name.
    """
    search = _Search(paths, settings, tensors)
    weights = {found.name: found for info in tensors.values() if (found := search.weight(info)) is not None}
    if not weights and not search.problems:
        return Found({}, (), ())
    parts = {i.name for w in weights.values() for i in (*w.parts, *w.rest)}
    about = tuple(i for n, i in tensors.items() if n not in parts and _OF_ACTIVATIONS.search(n))
    lost = [n for n in tensors if n not in parts and _COMPANION.search(n)]
    if lost:
        search.note("scales of weights that are not there, or not quantised", *lost)
    twice = [n for n in weights if n in tensors and tensors[n] != weights[n].codes]
    if twice:
        search.note("weights both as they are and quantised", *twice)
    problems = tuple(f"{what}: {listing(names)}" for what, names in search.problems.items())
    return Found(weights, about, problems)


class _Search:
    """The work of :func:`find`."""

    def __init__(self, paths: Sequence[Path], settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.paths = paths
        self.tensors = tensors
        self.problems: dict[str, list[str]] = {}
        self.known: dict[tuple[object, ...], tuple[tuple[int, int, int], tuple[int, int]]] = {}
        self.blocks, self.groups = [*blocks(settings)], [*groups(settings)]

    def note(self, what: str, *names: str) -> None:
        """A problem of tensors."""
        self.problems.setdefault(what, []).extend(names)

    def weight(self, info: TensorInfo) -> Quantised | None:
        """The weight whose codes a tensor holds."""
        name, kind = info.name, info.dtype.name
        if kind in FLOAT8 or kind == "int8":
            for tail, layout in (("_scale_inv", "fp8"), ("_scale", "compressed-tensors")):
                scale = self.tensors.get(name + tail)
                if scale is not None and (kind in FLOAT8 or tail == "_scale"):
                    return self._bytes(info, scale, layout)
        elif name.endswith("_packed") and kind in ("int32", "uint8"):
            scale = self.tensors.get(f"{name[:-7]}_scale")
            if scale is not None and len(info.shape) > 1:
                return self._words(info, scale) if kind == "int32" else self._pairs(info, scale)
        elif name.endswith("_blocks") and kind == "uint8":
            scale = self.tensors.get(f"{name[:-7]}_scales")
            if scale is not None:
                return self._blocked(info, scale)
        return None

    def _bytes(self, info: TensorInfo, scale: TensorInfo, layout: str) -> Quantised | None:
        found = self._grid(info, info.shape, scale)
        if found is None:
            return None
        stored, block = found
        zero = self.tensors.get(f"{info.name}_zero_point")
        if zero is not None and (zero.dtype.tag != "I8" or zero.shape != scale.shape):
            self.note("zero points that do not fit their scales", zero.name)
            return None
        return self._made(info.name, info.dtype.name, info, info.shape, stored, block, scale, layout=layout, zero=zero)

    def _words(self, info: TensorInfo, scale: TensorInfo) -> Quantised | None:
        """Integers of 4 or 8 bits in words of 32."""
        name, rows, words = info.name[:-7], info.shape[-2], info.shape[-1]
        if f"{name}_g_idx" in self.tensors:
            self.note("groups in the order of activations (g_idx) are not read", info.name)
            return None
        groups = scale.shape[-1] if scale.shape else 1
        # Where the size of a group fits, the shape need not be read.
        fits = [(b, groups * g) for b in (4, 8) for g in self.groups if groups * g * b == words * 32 and groups > 1]
        bits, columns = fits[0] if len(fits) == 1 else self._shape(name, rows, words)
        if not bits:
            self.note("packed integers of neither 4 nor 8 bits, or whose weight_shape does not fit", info.name)
            return None
        shape = (*info.shape[:-1], columns)
        found = self._grid(info, shape, scale)
        if found is None:
            return None
        stored, block = found
        zero = self.tensors.get(f"{name}_zero_point")
        lead, height = scale.shape[:-2], scale.shape[-2] if len(scale.shape) > 1 else 1
        packed = (*lead, -(-height // 8), *scale.shape[-1:])
        if zero is not None and (zero.dtype.tag != "I32" or zero.shape != packed or bits != 4):
            self.note("zero points that do not fit their scales", zero.name)
            return None
        code = "int4" if bits == 4 else "int8"
        return self._made(name, code, info, shape, stored, block, scale, layout="compressed-tensors", zero=zero)

    def _shape(self, name: str, rows: int, words: int) -> tuple[int, int]:
        """Bits of each integer, and columns, as ``weight_shape`` says; 0 where it does not fit."""
        info = self.tensors.get(f"{name}_shape")
        if info is None or info.dtype.tag not in ("I64", "I32") or info.nbytes > 64:
            return 0, 0
        size = info.dtype.size
        try:
            fd = os.open(self.paths[info.file], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                raw = os.pread(fd, info.nbytes, info.offset)
            finally:
                os.close(fd)
        except OSError:
            return 0, 0
        sizes = [int.from_bytes(raw[i : i + size], "little", signed=True) for i in range(0, len(raw), size)]
        if len(sizes) < 2 or sizes[-2] != rows or sizes[-1] < 1:
            return 0, 0
        bits = next((b for b in (4, 8) if -(-sizes[-1] * b // 32) == words), 0)
        return bits, sizes[-1]

    def _pairs(self, info: TensorInfo, scale: TensorInfo) -> Quantised | None:
        """Floats of 4 bits, two in a byte."""
        name, shape = info.name[:-7], (*info.shape[:-1], 2 * info.shape[-1])
        divisor = self.tensors.get(f"{name}_global_scale")
        nv = scale.dtype.tag == "F8_E4M3" and divisor is not None
        mx = scale.dtype.tag in ("U8", "F8_E8M0") and divisor is None
        if not (nv or mx) or (divisor is not None and (divisor.dtype.tag != "F32" or math.prod(divisor.shape) != 1)):
            self.note("packed bytes that are neither NVFP4 nor MXFP4", info.name)
            return None
        group = 16 if nv else 32
        if scale.shape != (*shape[:-1], -(-shape[-1] // group)) or f"{name}_zero_point" in self.tensors:
            self.note("scales that do not fit their weights", scale.name)
            return None
        stored = math.prod(shape[:-2]), shape[-2], shape[-1]
        e2m1, layout = "float4_e2m1fn", "compressed-tensors"
        return self._made(name, e2m1, info, shape, stored, (1, group), scale, layout=layout, divisor=divisor)

    def _blocked(self, info: TensorInfo, scale: TensorInfo) -> Quantised | None:
        """MXFP4 blocks of 16 bytes."""
        if len(info.shape) != 4 or info.shape[-1] != 16 or scale.shape != info.shape[:-1] or scale.dtype.tag != "U8":
            self.note("MXFP4 blocks and scales that do not fit each other", info.name)
            return None
        experts, rows, groups, _ = info.shape
        shape, stored = (experts, 32 * groups, rows), (experts, rows, 32 * groups)
        return self._made(
            info.name[:-7], "float4_e2m1fn", info, shape, stored, (1, 32), scale, layout="mxfp4"
        )._replace(dtype=BF16)

    def _grid(
        self, info: TensorInfo, shape: tuple[int, ...], scale: TensorInfo
    ) -> tuple[tuple[int, int, int], tuple[int, int]] | None:
        """The weight as matrices, and the block of which each scale is; None where scales do not fit."""
        key = (shape, scale.shape, scale.dtype)
        found = self.known.get(key) or self._fitted(info, shape, scale)
        if found is not None:
            self.known[key] = found
        return found

    def _fitted(
        self, info: TensorInfo, shape: tuple[int, ...], scale: TensorInfo
    ) -> tuple[tuple[int, int, int], tuple[int, int]] | None:
        lead, rows, columns = math.prod(shape[:-2]), *((1, *shape)[-2:] if shape else (1, 1))
        count, numel = math.prod(scale.shape), math.prod(shape)
        if scale.dtype.tag not in _SCALES or not numel:
            self.note(f"scales of type {scale.dtype.name}, or of no weights", scale.name)
            return None
        if count == 1:
            return (1, lead * rows, columns), (lead * rows, columns)
        grid = (1, 1, 1, *scale.shape)[-len(shape) :] if len(scale.shape) == len(shape) else (*scale.shape, 1)
        if len(grid) == len(shape) and grid[:-2] == shape[:-2]:
            for block in ((1, columns), *self.blocks, _BLOCK, *((1, g) for g in self.groups)):
                if grid[-2:] == (-(-rows // block[0]), -(-columns // block[1])):
                    return (lead, rows, columns), (min(block[0], rows), min(block[1], columns))
            if len(scale.shape) == len(shape) and rows % grid[-2] == 0 and columns % grid[-1] == 0:
                return (lead, rows, columns), (rows // grid[-2], columns // grid[-1])
        if count == lead and scale.shape in ((lead,), (lead, 1), (lead, 1, 1)):
            return (lead, rows, columns), (rows, columns)
        self.note(f"scales {list(scale.shape)} that do not fit weights {list(shape)}", info.name)
        return None

    def _made(
        self,
        name: str,
        code: str,
        info: TensorInfo,
        shape: tuple[int, ...],
        stored: tuple[int, int, int],
        block: tuple[int, int],
        scale: TensorInfo,
        *,
        layout: str,
        zero: TensorInfo | None = None,
        divisor: TensorInfo | None = None,
    ) -> Quantised:
        module = name.rpartition(".")[0]
        beside = (f"{name}_shape", *(f"{module}.{n}" if module else n for n in _BESIDE))
        rest = tuple(self.tensors[n] for n in beside if n in self.tensors)
        dtype = scale.dtype if scale.dtype is F16 else BF16
        return Quantised(name, code, shape, dtype, stored, block, info, scale, zero, divisor, layout, rest)


_BESIDE = ("input_scale", "input_global_scale", "activation_scale")


def blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The sizes of blocks that a configuration names."""
    for found in (settings.get("weight_block_size"), *(w.get("block_structure") for w in _weights(settings))):
        if isinstance(found, list) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found):
            yield found[0], found[1]


def groups(settings: Mapping[str, Any]) -> Iterator[int]:
    """The sizes of groups of columns that a configuration names."""
    sizes = [w.get("group_size") for w in _weights(settings)]
    yield from dict.fromkeys(n for n in sizes if isinstance(n, int) and n > 0)


def _weights(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the schemes of compressed-tensors say of weights."""
    groups = settings.get("config_groups")
    for scheme in groups.values() if isinstance(groups, Mapping) else ():
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights
