"""The method, parameters and inputs of a call on tensors, resolved and checked once."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.dtypes import BY_NAME, DType
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.methods import METHODS, get
from fastmerge.methods.base import Method
from fastmerge.methods.called import called
from fastmerge.methods.parameters import Resolver
from fastmerge.ops.spec import Op, Spec
from fastmerge.planning.from_tensors import TensorPlanner
from fastmerge.tensors import check, check_inputs, extent

if TYPE_CHECKING:
    import torch

MOST_CALLS = 64
"""Calls of :func:`merge_tensors` whose parameters are kept."""


class Call:
    """The method, parameters and inputs of one call.

    Attributes:
        resolver: of the parameters.
        order: positions of the inputs in the order of the method: base first where it has one.
        ids: names of the inputs, in that order.
    """

    def __init__(
        self,
        method: type[Method],
        keys: Sequence[Hashable],
        base: int | None,
        parameters: Mapping[str, Any] | None,
        preset: str | None,
        seed: int,
    ) -> None:
        lead = base if method.contract.base != "ignored" else None
        others = [i for i in range(len(keys)) if i != lead]
        self.order = others if lead is None else [lead, *others]
        self.ids = [keys[i] for i in self.order]
        if problem := method.contract.problem(method.name, len(others), has_base=lead is not None):
            raise RecipeError(problem)
        chosen = preset or ("mergekit" if "mergekit" in method.presets else None)
        if lead is not None and isinstance(parameters, Mapping):
            parameters = {name: _without(value, keys[lead]) for name, value in parameters.items()}
        self.resolver: Resolver = called(method, parameters, [keys[i] for i in others], chosen)
        self._planner = TensorPlanner(self.resolver, has_base=lead is not None, seed=seed)
        self._models = tuple(range(len(others)))

    def spec(
        self, name: str, tensors: Sequence[Any], target: DType | None, t: float = 0.0
    ) -> tuple[list[torch.Tensor], Spec]:
        """The inputs of one tensor, on one device, contiguous, and what is computed from them."""
        shape = tuple(tensors[0].shape)
        for key, tensor in zip(self.ids, tensors, strict=True):
            if tuple(tensor.shape) != shape:
                raise ShapeError(f"{name or 'tensor'}: input {key!r} has shape {tuple(tensor.shape)}, expected {shape}")
        dtypes = tuple([dtype_of(x.dtype) for x in tensors])
        spec = self._planner.spec(name, shape, dtypes, self._models, target, t=t)
        return [x if x.is_contiguous() else x.detach().contiguous() for x in tensors], spec

    def op(self, name: str, spec: Spec, inputs: Sequence[int], result: int) -> Op:
        """The op that merges the tensors at these addresses into the one at another."""
        return self._planner.op(name, spec, inputs, result)


def _without(values: Any, base: Hashable) -> Any:
    """Values by id without that of the base, which nothing reads."""
    if not isinstance(values, Mapping) or base not in values:
        return values
    return {key: value for key, value in values.items() if key != base}


def method_of(given: Any) -> type[Method]:
    """The method of a name, or of the object that mergekit has for one of its own methods.

    Raises:
        RecipeError: for an unknown name, and for methods that are another program's.
    """
    spec = getattr(given, "spec", None)
    if isinstance(given, str) or spec is None:
        return get(given)
    home = getattr(getattr(given, "implementation", None), "__module__", type(given).__module__)
    found = METHODS.get(spec.name)
    if (
        found is None
        or not home.startswith("mergekit.")
        or {p.name for p in spec.parameters} - {p.name for p in found.params}
    ):
        raise RecipeError(f"{spec.name!r} of {home}: expected the name of a method, or a method of mergekit's own")
    return found


def per_tensor(parameters: Any, count: int) -> list[dict[str, Any]] | None:
    """The parameters of each of ``count`` tensors, from mergekit's ``PerGroupValues``; None where there are none.

    Raises:
        RecipeError: for another number of values.
    """
    items = parameters.items() if isinstance(parameters, Mapping) else ()
    apart = {name: value.values for name, value in items if type(value).__name__ == "PerGroupValues"}
    if not apart:
        return None
    wrong = [f"parameter {n!r}: expected {count} values, got {len(v)}" for n, v in apart.items() if len(v) != count]
    if wrong:
        raise RecipeError(wrong)
    return [{**parameters, **{name: values[i] for name, values in apart.items()}} for i in range(count)]


_CALLS: dict[tuple[type[Method], str], Call] = {}


def call_of(method: Any, keys: Sequence[Hashable], base: int | None, given: Any, preset: str | None, seed: int) -> Call:
    """A call, resolved and checked once for equal arguments: tools that merge tensor by tensor repeat them."""
    found, rest = method_of(method), [keys, base, given, preset, seed]
    known = (found, repr(rest)) if _written(rest) else None
    call = _CALLS.get(known) if known is not None else None
    if call is None:
        call = Call(found, keys, base, given, preset, seed)
        if known is not None:
            if len(_CALLS) >= MOST_CALLS:
                _CALLS.clear()
            _CALLS[known] = call
    return call


def _written(value: Any) -> bool:
    """Whether equal values, and only those, are written alike."""
    if type(value) in (list, tuple):
        return all(map(_written, value))
    if type(value) is dict:
        return all(map(_written, value)) and all(map(_written, value.values()))
    return value is None or type(value) in (float, int, bool, str)


def position(base_index: Any, n: int) -> int:
    """Position of the base; as everywhere in Python, -1 is the last."""
    if not isinstance(base_index, bool):
        with contextlib.suppress(TypeError, IndexError):
            return range(n)[operator.index(base_index)]
    raise RecipeError(f"base_index: expected a whole number from {-n} to {n - 1}, got {base_index!r}")


def widened(tensors: Sequence[Any], dtype: Any) -> list[Any]:
    """Inputs in fp64 where ``dtype`` asks for arithmetic in it; else, and where they are no floats, as they are."""
    import torch

    if dtype is not torch.float64:
        return list(tensors)
    # Tied tensors stay one tensor.
    wide = {id(t): t.to(dtype) for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return [wide.get(id(t), t) for t in tensors]


def one_device(name: str, ids: Sequence[Hashable], tensors: Sequence[torch.Tensor]) -> torch.device:
    """All inputs of a call are dense tensors on the CPU, or on one GPU: which that is."""
    check_inputs(name, ids, tensors)
    home = tensors[0].device
    for key, t in zip(ids, tensors, strict=True):
        if t.device.type not in ("cpu", "cuda"):
            raise ShapeError(f"{name or 'tensor'}: input {key!r} is on {t.device}; expected the CPU or a GPU")
        if t.device != home:
            raise ShapeError(
                f"{name or 'tensor'}: input {key!r} is on {t.device} and {ids[0]!r} on {home}; expected one device"
            )
    return home


_DTYPES: dict[Any, DType] = {}


def dtype_of(t: Any) -> DType:
    """The type of ours that a torch type is.

    Raises:
        ShapeError: for one that is not merged.
    """
    found = _DTYPES.get(t)
    if found is None:
        name = str(t).removeprefix("torch.")
        if name not in BY_NAME or not BY_NAME[name].mergeable:
            raise ShapeError(f"expected float64, float32, float16 or bfloat16; got {name}")
        found = _DTYPES[t] = BY_NAME[name]
    return found


def result_of(
    spec: Spec, like: torch.Tensor, out: torch.Tensor | None, inputs: Mapping[Hashable, torch.Tensor]
) -> torch.Tensor:
    """A new tensor, or the caller's ``out`` where it fits and overlaps none of the inputs except as one of them."""
    import torch

    dtype = getattr(torch, spec.out_dtype.name)
    if out is None:
        return torch.empty(spec.shape, dtype=dtype, device=like.device)
    check("out", out)
    if tuple(out.shape) != spec.shape or out.dtype != dtype or not out.is_contiguous() or out.device != like.device:
        layout = "" if out.is_contiguous() else f", not contiguous (strides {tuple(out.stride())})"
        raise ShapeError(
            f"out: expected a contiguous tensor {spec.shape} of {dtype} on {like.device}, "
            f"got {tuple(out.shape)} of {out.dtype} on {out.device}{layout}"
        )
    start, end = extent(out)
    for key, t in inputs.items():
        low, high = extent(t)
        if max(start, low) < min(end, high) and (low != start or t.dtype != out.dtype):
            raise ShapeError(f"out overlaps input {key!r}: expected that input itself, or memory of its own")
    return out
