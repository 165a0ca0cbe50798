"""Where renders go: the tensors of a module or a mapping, each checked against the op that fills it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.checkpoint import TensorInfo
from fastmerge.dtypes import BY_NAME, DType
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op
from fastmerge.planning.missing import buffer
from fastmerge.planning.names import align, shown
from fastmerge.runtime.devices import Buffer
from fastmerge.tensors import check, extent

if TYPE_CHECKING:
    import torch

    from fastmerge.session.homes import Homes

log = logging.getLogger("fastmerge")

LINE = 64
"""Bytes of a cache line, at whose multiples new tensors start: what is written past the caches is written by lines."""


def tensors_of(into: Any) -> dict[str, torch.Tensor]:
    """The tensors of a module (parameters and persistent buffers) or of a mapping, by name.

    Raises:
        RecipeError: for anything else.
        ShapeError: for a mapping of anything but tensors.
    """
    if hasattr(into, "state_dict"):
        return dict(into.state_dict(keep_vars=True))
    if not isinstance(into, Mapping):
        raise RecipeError(f"into: expected a module or a mapping of names to tensors, got {type(into).__name__}")
    for name, tensor in into.items():
        check(f"into: {name}", tensor)
    return dict(into)


def allocate(ops: Sequence[Op], homes: Homes | None) -> dict[str, torch.Tensor]:
    """New tensors for the results of ops: each on the GPU that makes it, or all in memory of huge pages.

    That is written faster, and stays as long as one of them does.
    """
    import torch

    kinds = {op.name: getattr(torch, op.spec.out_dtype.name, None) for op in ops}
    lost = [f"{op.name}: torch has no tensors of {op.spec.out_dtype.name}" for op in ops if kinds[op.name] is None]
    if lost:
        raise ShapeError(lost)
    if homes is not None:
        return {op.name: homes.all[homes.of(op)].new(op.spec.shape, dtype=kinds[op.name]) for op in ops}
    sizes = [op.spec.out_dtype.nbytes(op.spec.numel) for op in ops]
    starts = [0, *itertools.accumulate(-(-size // LINE) * LINE for size in sizes)]
    memory = Buffer.allocate(starts[-1])
    data = memory.data[memory.address - memory.data.ctypes.data :] if starts[-1] else memory.data
    out = {}
    for op, start in zip(ops, starts, strict=False):
        kind, count = kinds[op.name], op.spec.numel
        flat = torch.frombuffer(data, dtype=kind, count=count, offset=start) if count else torch.empty(0, dtype=kind)
        out[op.name] = flat.view(op.spec.shape)
    return out


def placed(
    ops: Sequence[Op], tensors: Mapping[str, torch.Tensor], lent: Callable[[int, int], bool], *, gpus: bool
) -> tuple[list[Op], list[torch.Tensor]]:
    """Ops whose results go to these tensors, and for each op its tensor.

    Names are those of the ops, or others that a prefix explains (:func:`fastmerge.planning.names.align`). Buffers that
    models make for themselves are left out where a target has none. Tied tensors are written once.

    Args:
        ops: of a plan, with inputs in memory.
        tensors: of the target.
        lent: whether a range of addresses is part of a model of the session.
        gpus: whether targets may be on GPUs.

    Raises:
        ShapeError: with every tensor that does not fit: names, shapes, types, places.
    """
    names = _names(ops, tensors)
    problems: list[str] = []
    out: list[Op] = []
    homes: list[torch.Tensor] = []
    filled: dict[int, Op] = {}
    covered: set[int] = set()
    for op in ops:
        tensor = tensors.get(names[op.name])
        if tensor is None:
            continue
        covered.add(tensor.data_ptr())
        if problem := _problem(op, tensor, gpus=gpus):
            problems.append(f"{names[op.name]}: {problem}")
            continue
        if lent(*extent(tensor)):
            problems.append(f"{names[op.name]}: is a tensor of one of the session's models; expected memory of its own")
            continue
        address = tensor.data_ptr()
        first = filled.get(address) if tensor.numel() else None
        if first is not None:
            if (first.spec, first.key, first.inputs) != (op.spec, op.key, op.inputs):
                problems.append(
                    f"{names[op.name]}: is the same memory as {first.name}, and the recipe makes two tensors"
                )
            continue
        filled[address] = op
        out.append(op._replace(targets=(Memory(address, op.spec.out_dtype, op.spec.shape),)))
        homes.append(tensor)
    found = {names[op.name] for op in ops}
    lost = [
        op.name for op in ops if names[op.name] not in tensors and not buffer(op.name, _info(op.name, op.spec.shape))
    ]
    rest = [n for n, t in tensors.items() if n not in found and t.data_ptr() not in covered and not _own(n, t)]
    if lost:
        problems.append(f"into: has no place for {shown(lost)}")
    if rest:
        problems.append(f"into: {shown(rest)}: the recipe makes no such tensor")
    if (lost or rest) and any(".experts." in n for n in (*lost, *rest)):
        problems.append(
            "into: experts that a module holds as one tensor are several in its files: render into a mapping"
        )
    problems += _overlaps(homes, out)
    if problems:
        raise ShapeError(problems)
    return out, homes


def _names(ops: Sequence[Op], tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The target's name of each op's result."""
    if all(op.name in tensors for op in ops):
        return {op.name: op.name for op in ops}
    there = {n: _info(n, tuple(t.shape)) for n, t in tensors.items()}
    found = align(there, {op.name: _info(op.name, op.spec.shape) for op in ops})
    for rule in found.rules:
        log.info("names are written as the target has them: %s", rule)
    return dict(found.names)


def _info(name: str, shape: Sequence[int]) -> TensorInfo:
    """As much of a tensor as names are matched by."""
    return TensorInfo(name, BY_NAME["float32"], tuple(shape), 0, 0, 0)


def _own(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of a target is one that models make for themselves."""
    return buffer(name, _info(name, tuple(tensor.shape)))


def _problem(op: Op, tensor: torch.Tensor, *, gpus: bool) -> str | None:
    """Why a result cannot go to a tensor."""
    wanted: DType = op.spec.out_dtype
    if tuple(tensor.shape) != op.spec.shape:
        return f"expected the shape {list(op.spec.shape)}, got {list(tensor.shape)}"
    if str(tensor.dtype) != f"torch.{wanted.name}":
        kind = str(tensor.dtype).removeprefix("torch.")
        return (
            f"the recipe makes {wanted.name}, got a tensor of {kind} ('out_dtype: {kind}' in the recipe rounds to that)"
        )
    if tensor.device.type not in ("cpu", *(["cuda"] if gpus else [])):
        where = "on the CPU or a GPU" if gpus else "on the CPU, as the models are"
        return f"expected a tensor {where}, got one on {tensor.device}"
    return None if tensor.is_contiguous() else f"expected a contiguous tensor, got strides {list(tensor.stride())}"


def _overlaps(homes: Sequence[torch.Tensor], ops: Sequence[Op]) -> list[str]:
    """Targets that share some bytes but not all."""
    some = sorted((*extent(t), op.name) for t, op in zip(homes, ops, strict=True) if t.numel())
    return [
        f"into: {a[2]} and {b[2]} overlap; expected memory of their own"
        for a, b in itertools.pairwise(some)
        if b[0] < a[1]
    ]
