"""Merging tensors that the caller owns: mergekit 0.1.5's calls, through the workers of a merge on disk."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastmerge.backends.choose import choose
from fastmerge.checkpoint import Checkpoint, Files, without_gc
from fastmerge.dtypes import BY_NAME, DType
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.methods import get
from fastmerge.methods.base import Method
from fastmerge.methods.parameters import Resolver, called
from fastmerge.ops.spec import Op, Spec
from fastmerge.planning.from_tensors import TensorPlanner
from fastmerge.planning.structure import structure
from fastmerge.runtime.budget import UNIT_ELEMENTS, need
from fastmerge.runtime.devices import CpuDevice, cores
from fastmerge.runtime.resident import resident
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.workers import Runner
from fastmerge.tensors import check, check_inputs, extent

if TYPE_CHECKING:
    import torch

    from fastmerge.planning.structure import Structure


log = logging.getLogger("fastmerge")

MOST_CALLS = 64
"""Calls of :func:`merge_tensors` whose parameters are kept."""


def merge_tensors(
    tensors: Sequence[torch.Tensor],
    method: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    ids: Sequence[Hashable] | None = None,
    base_index: int | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    preset: str | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """Merges the inputs of one output tensor.

    Args:
        tensors: inputs of one shape, ``[*S]`` each, on the CPU or on one GPU; they are not changed. On a GPU,
            kernels run on the current stream and the result may still be under way: nothing waits, but for methods
            that can fail on their data (slerp, model_stock, a rescale by sums), which end by asking whether they did.
        method: a name of ``fastmerge methods``.
        parameters: scalars for all inputs, sequences in input order (without the base for parameters of
            non-base models), or mappings keyed by ``ids``; filters as in recipes
            (:func:`fastmerge.methods.parameters.called`).
        ids: names of the inputs; 0, 1, ... where absent.
        base_index: which input is the base.
        name: of the tensor; with the seed it keys the random numbers.
        dtype: type of the result where ``out_dtype`` is absent. Inputs are never rounded to it.
        out_dtype: type of the result; the promoted input type where both are absent.
        out: contiguous tensor that receives the result; it may be one of the inputs, but overlap none otherwise.
        preset: a published variant of the method.
        seed: of the random methods.
        backend: ``native``, ``reference``, ``triton`` or None for the best one on the tensors' device.

    Returns:
        The merged tensor ``[*S]``, on the device of the inputs: ``out`` where that was given.

    Raises:
        RecipeError: for an unknown method, a wrong parameter or a wrong number of inputs.
        ShapeError: where shapes or devices differ, or ``out`` does not fit or overlaps an input.
        BackendUnavailable: if the backend cannot work on the tensors' device.
    """
    if not len(tensors):
        raise RecipeError("tensors: expected at least one, got none")
    keys = list(ids) if ids is not None else list(range(len(tensors)))
    if len(keys) != len(tensors) or len(set(keys)) != len(keys):
        raise RecipeError(f"ids: expected {len(tensors)} different ids, got {keys!r}")
    at = None if base_index is None else _index(base_index, len(keys))
    call = _call(method, keys, at, parameters, preset, seed)
    if call.resolver.gradient:
        shown = ", ".join(map(repr, call.resolver.gradients))
        raise RecipeError(f"parameters: {shown}: a gradient needs the layers of a model, and this is one tensor")
    target = out_dtype or dtype
    _one_device(name or "", call.ids, [tensors[i] for i in call.order])
    group, spec = call.spec(
        name or "", [tensors[i] for i in call.order], _dtype(target) if target is not None else None
    )
    result = _result(spec, group[0], out, dict(zip(keys, tensors, strict=True)))
    run([call.op(name or "", spec, group, result)], result.device, backend)
    return result


def merge_state_dicts(
    models: Mapping[Hashable, Any] | Sequence[Any],
    method: str,
    *,
    parameters: Mapping[str, Any] | None = None,
    base: Hashable | None = None,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    preset: str | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> dict[str, torch.Tensor]:
    """Merges state dictionaries (or modules) in memory, all tensors in one schedule.

    Args:
        models: state dictionaries or modules, by id or in order, all on the CPU or all on one GPU.
        method: a name of ``fastmerge methods``.
        parameters: as in :func:`merge_tensors`; filters ``[{"filter": "mlp", "value": 0.3}, {"value": 0.5}]`` and
            gradients over the layers tell tensors apart.
        base: id of the base model.
        strict: whether all models must have the same tensors; else only common ones are merged.
        dtype: as in :func:`merge_tensors`.
        out_dtype: as in :func:`merge_tensors`.
        preset: a published variant of the method.
        seed: of the random methods.
        backend: ``native``, ``reference``, ``triton`` or None for the best one.

    Returns:
        Merged tensors by name, in the order of the first model. Integer and bool tensors are copied
        where all models agree. Names that are one tensor in every model (tied weights) are merged once,
        under the first of them, and are one tensor in the result.

    Raises:
        RecipeError: for an unknown method, a wrong parameter or a wrong number of models.
        ShapeError: where names, shapes, devices or non-float tensors disagree.
        BackendUnavailable: if the backend cannot work on the tensors' device.
    """
    items = list(models.items()) if isinstance(models, Mapping) else list(enumerate(models))
    states = {key: m.state_dict() if hasattr(m, "state_dict") else m for key, m in items}
    if not states:
        raise RecipeError("models: expected at least one, got none")
    for key, state in states.items():
        if not isinstance(state, Mapping):
            raise RecipeError(f"models: expected state dictionaries or modules, got {type(state).__name__} for {key!r}")
    if base is not None and base not in states:
        raise RecipeError(f"base {base!r} is not one of the models {list(states)!r}")
    keys = list(states)
    names = _common(states, strict=strict)
    call = _Call(get(method), keys, None if base is None else keys.index(base), parameters, preset, seed)
    layers = structure(names, {}) if call.resolver.gradient else None
    if layers is not None and not layers.stacks:
        raise RecipeError("a gradient needs layers, and the tensor names show none")
    wanted = out_dtype or dtype
    target = _dtype(wanted) if wanted is not None else None
    merged, ops, kept = _ops_of([states[keys[i]] for i in call.order], names, call, target, layers)
    for pattern in call.resolver.unmatched():
        log.warning("the filter %r matches no tensor name", pattern)
    if ops:
        run(ops, kept[0][0].device, backend)
    return merged


@without_gc()
def _ops_of(
    states: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    call: _Call,
    target: DType | None,
    layers: Structure | None,
) -> tuple[dict[str, torch.Tensor], list[Op], list[list[torch.Tensor]]]:
    """The results, the ops that fill them, and the tensors that must live until then; the loop that must stay cheap."""
    import torch

    merged: dict[str, torch.Tensor] = {}
    owners: dict[Hashable, str] = {}
    # A mapping may make tensors when it is asked: kept, no two of them share an address by chance.
    kept: list[list[torch.Tensor]] = []
    ops: list[Op] = []
    for name in names:
        group = [s[name] for s in states]
        kept.append(group)
        _one_device(name, call.ids, group)
        owner = owners.setdefault(_identity(group) or name, name)
        if owner != name:
            merged[name] = merged[owner]
            continue
        first = group[0]
        if not first.is_floating_point():
            if not all(torch.equal(first, t) for t in group[1:]):
                raise ShapeError(f"{name}: {first.dtype} tensors are copied, not merged, and the models differ")
            merged[name] = first.clone()
            continue
        tensors, spec = call.spec(name, group, target, layers.gradient(name) if layers is not None else 0.0)
        kept.append(tensors)
        if tensors[0].device != kept[0][0].device:
            raise ShapeError(f"{name} is on {tensors[0].device} and the first tensor on {kept[0][0].device}")
        result = merged[name] = _result(spec, tensors[0], None, {})
        ops.append(call.op(name, spec, tensors, result))
    return merged, ops, kept


def _common(states: Mapping[Hashable, Mapping[str, Any]], *, strict: bool) -> list[str]:
    """Names of the first model that all models have.

    Raises:
        ShapeError: with ``strict``, where the models differ.
    """
    first = next(iter(states.values()))
    names = first.keys()
    if all(s.keys() == names for s in states.values()):
        return list(first)
    if strict:
        missing = [f"{n}: not in model {k!r}" for k, s in states.items() for n in {**first, **s} if n not in s]
        missing += [f"{n}: not in the first model" for s in states.values() for n in s if n not in first]
        raise ShapeError(sorted(set(missing)))
    return [n for n in first if all(n in s for s in states.values())]


class _Call:
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
        dtypes = tuple([_dtype(x.dtype) for x in tensors])
        spec = self._planner.spec(name, shape, dtypes, self._models, target, t=t)
        return [x if x.is_contiguous() else x.detach().contiguous() for x in tensors], spec

    def op(self, name: str, spec: Spec, tensors: Sequence[torch.Tensor], result: torch.Tensor) -> Op:
        """The op that merges them into ``result``."""
        return self._planner.op(name, spec, [x.data_ptr() for x in tensors], result.data_ptr())


_CALLS: dict[tuple[type[Method], str], _Call] = {}


def _call(method: str, keys: Sequence[Hashable], base: int | None, given: Any, preset: str | None, seed: int) -> _Call:
    """A call, resolved and checked once for equal arguments: tools that merge tensor by tensor repeat them."""
    found, rest = get(method), [keys, base, given, preset, seed]
    known = (found, repr(rest)) if _written(rest) else None
    call = _CALLS.get(known) if known is not None else None
    if call is None:
        call = _Call(found, keys, base, given, preset, seed)
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


def _index(base_index: Any, n: int) -> int:
    """Position of the base; as everywhere in Python, -1 is the last."""
    if not isinstance(base_index, bool):
        with contextlib.suppress(TypeError, IndexError):
            return range(n)[operator.index(base_index)]
    raise RecipeError(f"base_index: expected a whole number from {-n} to {n - 1}, got {base_index!r}")


def _identity(tensors: Sequence[torch.Tensor]) -> Hashable:
    """Equal for two names that are the same memory, read the same way, in every model; None for no memory."""
    out = tuple([(t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors])
    return out if all(x[0] for x in out) else None


def _one_device(name: str, ids: Sequence[Hashable], tensors: Sequence[torch.Tensor]) -> None:
    """All inputs of a call are dense tensors on the CPU, or on one GPU."""
    check_inputs(name, ids, tensors)
    home = tensors[0].device
    for key, t in zip(ids, tensors, strict=True):
        if t.device.type not in ("cpu", "cuda"):
            raise ShapeError(f"{name or 'tensor'}: input {key!r} is on {t.device}; expected the CPU or a GPU")
        if t.device != home:
            raise ShapeError(
                f"{name or 'tensor'}: input {key!r} is on {t.device} and {ids[0]!r} on {home}; expected one device"
            )


_DTYPES: dict[Any, DType] = {}


def _dtype(t: Any) -> DType:
    found = _DTYPES.get(t)
    if found is None:
        name = str(t).removeprefix("torch.")
        if name not in BY_NAME or not BY_NAME[name].mergeable:
            raise ShapeError(f"expected float64, float32, float16 or bfloat16; got {name}")
        found = _DTYPES[t] = BY_NAME[name]
    return found


def _result(
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


def run(
    ops: Sequence[Op],
    home: torch.device,
    backend: str | None = None,
    checkpoints: Sequence[Checkpoint] = (),
    *,
    elements: int = UNIT_ELEMENTS,
) -> None:
    """Runs ops whose targets are in memory.

    Args:
        ops: contiguous tensors, all on one device, that the caller keeps alive; on the CPU sources may be in files.
        home: that device.
        backend: as in :func:`merge_tensors`.
        checkpoints: of the sources in files.
        elements: per unit of work on the CPU.

    Raises:
        BackendUnavailable: if the backend cannot work on that device.
    """
    chosen = replace(choose(str(home), backend, said=f"tensors on {home}"), home=str(home))
    chosen.check(ops)
    if chosen.gpus:
        if checkpoints:
            raise ShapeError(f"tensors on {home} beside a checkpoint on disk: expected tensors on the CPU")
        resident(ops, chosen.program)
        return
    workers = [CpuDevice() for _ in range(cores())]
    if not checkpoints:
        jobs = schedule(ops, elements=elements, whole=chosen.whole)
        Runner(ops, jobs, OpStore(ops), workers, chosen.program).run()
        return
    slot = need(ops, whole=chosen.whole).best
    jobs = schedule(ops, slot=slot, elements=elements, whole=chosen.whole)
    with Files(checkpoints) as files:
        Runner(ops, jobs, OpStore(ops, files), workers, chosen.program, slot=slot).run()
    for checkpoint in checkpoints:
        checkpoint.recheck()
