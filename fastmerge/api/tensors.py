"""Merging tensors that the caller owns: mergekit 0.1.5's calls, through the workers of a merge on disk."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastmerge.api.call import Call, call_of, dtype_of, method_of, one_device, per_tensor, position, result_of, widened
from fastmerge.backends.choose import choose
from fastmerge.checkpoint import Checkpoint, Files, without_gc
from fastmerge.dtypes import DType
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Spec
from fastmerge.planning.structure import structure
from fastmerge.runtime.budget import UNIT_ELEMENTS, need
from fastmerge.runtime.devices import CpuDevice, cores
from fastmerge.runtime.resident import resident
from fastmerge.runtime.results import Results
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import OpStore
from fastmerge.runtime.workers import Runner

if TYPE_CHECKING:
    import torch

    from fastmerge.backends.choose import Backend
    from fastmerge.methods.base import Method
    from fastmerge.planning.structure import Structure


log = logging.getLogger("fastmerge")


def merge_tensors(
    tensors: Sequence[torch.Tensor],
    method: Any,
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
    """Merges the inputs of one output tensor; gradients are not recorded.

    Args:
        tensors: inputs of one shape, ``[*S]`` each, on the CPU or on one GPU; they are not changed. On a GPU,
            kernels run on the current stream and the result may still be under way: nothing waits, but for methods
            that can fail on their data (slerp, model_stock, a rescale by sums), which end by asking whether they did,
            those whose solve is on the host (nuslerp, multislerp, mean_direction, karcher, slerp_tree, sce), and
            definitions.
        method: a name of ``fastmerge methods``, or mergekit's object for one of its methods.
        parameters: scalars for all inputs, sequences in input order (without the base for parameters of
            non-base models), or mappings keyed by ``ids``; filters as in recipes
            (:func:`fastmerge.methods.called.called`).
        ids: names of the inputs; 0, 1, ... where absent.
        base_index: which input is the base.
        name: of the tensor; with the seed it keys the random numbers.
        dtype: type of the result where ``out_dtype`` is absent. Inputs are never rounded to it; fp64 computes in fp64.
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
    at = None if base_index is None else position(base_index, len(keys))
    single = per_tensor(parameters, 1)
    call = call_of(method, keys, at, single[0] if single else parameters, preset, seed)
    if call.resolver.gradient:
        shown = ", ".join(map(repr, call.resolver.gradients))
        raise RecipeError(f"parameters: {shown}: a gradient needs the layers of a model, and this is one tensor")
    target = out_dtype or dtype
    ordered = [tensors[i] for i in call.order]
    one_device(name or "", call.ids, ordered)
    group, spec = call.spec(name or "", widened(ordered, dtype), dtype_of(target) if target is not None else None)
    result = result_of(spec, group[0], out, dict(zip(keys, tensors, strict=True)))
    addresses = [x.data_ptr() for x in group]
    run([call.op(name or "", spec, addresses, result.data_ptr())], result.device, backend)
    return result


def merge_state_dicts(
    models: Mapping[Hashable, Any] | Sequence[Any],
    method: Any,
    *,
    parameters: Mapping[str, Any] | None = None,
    base: Hashable | None = None,
    strict: bool = True,
    dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    batch_options: Any = None,  # noqa: ARG001
    preset: str | None = None,
    seed: int = 0,
    backend: str | None = None,
) -> dict[str, torch.Tensor]:
    """Merges state dictionaries (or modules) in memory, all tensors in one schedule; gradients are not recorded.

    Args:
        models: state dictionaries or modules, by id or in order, all on the CPU or all on one GPU.
        method: as in :func:`merge_tensors`.
        parameters: as in :func:`merge_tensors`; filters ``[{"filter": "mlp", "value": 0.3}, {"value": 0.5}]``,
            gradients over the layers and mergekit's ``PerGroupValues`` tell tensors apart.
        base: id of the base model.
        strict: whether all models must have the same tensors; else only common ones are merged.
        dtype: as in :func:`merge_tensors`.
        out_dtype: as in :func:`merge_tensors`.
        batch_options: mergekit's limits for packing; nothing is packed here, so they have no effect.
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
    parts = _parts(method_of(method), keys, None if base is None else keys.index(base), parameters, names, preset, seed)
    call = parts[0][0]
    layers = structure(names, {}) if call.resolver.gradient else None
    if layers is not None and not layers.stacks:
        raise RecipeError("a gradient needs layers, and the tensor names show none")
    wanted = out_dtype or dtype
    target = dtype_of(wanted) if wanted is not None else None
    if dtype is not None:
        states = {k: dict(zip(names, widened([s[n] for n in names], dtype), strict=True)) for k, s in states.items()}
    with without_gc():
        merged: dict[str, torch.Tensor] = {}
        ops: list[Op] = []
        kept: list[list[torch.Tensor]] = []
        for call, some in parts:
            done = _ops_of([states[keys[i]] for i in call.order], some, call, target, layers)
            merged.update(done[0])
            ops += done[1]
            kept += done[2]
            for pattern in call.resolver.unmatched():
                log.warning("the filter %r matches no tensor name", pattern)
        if len(parts) > 1:
            merged = {name: merged[name] for name in names}
        if not ops:
            return merged
        chosen = _chosen(ops, kept[0][0].device, backend)
        if chosen.gpus:
            resident(ops, chosen)
            del ops, kept, done  # so that the first look for garbage finds nothing but results
            return merged
    _on_cpu(ops, chosen, None, UNIT_ELEMENTS)
    return merged


def _parts(
    method: type[Method],
    keys: Sequence[Hashable],
    base: int | None,
    parameters: Any,
    names: Sequence[str],
    preset: str | None,
    seed: int,
) -> list[tuple[Call, Sequence[str]]]:
    """The tensors that share their parameters, and the call that has these: one part, but for values per tensor."""
    apart = per_tensor(parameters, len(names))
    if apart is None or not names:
        return [(Call(method, keys, base, parameters, preset, seed), names)]
    parts: dict[str, tuple[Call, list[str]]] = {}
    for name, own in zip(names, apart, strict=True):
        key = repr(own)
        if key not in parts:
            parts[key] = Call(method, keys, base, own, preset, seed), []
        parts[key][1].append(name)
    return list(parts.values())


def _ops_of(
    states: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    call: Call,
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
    alike: dict[Hashable, tuple[Spec, torch.dtype]] = {}  # where names do not matter
    plain = layers is None and call.resolver.constant
    home = None
    for name in names:
        group = [s[name] for s in states]
        kept.append(group)
        if home is None:
            home = one_device(name, call.ids, group)
        kind = _kind(group, home)
        if kind is None:
            one_device(name, call.ids, group)
        addresses = [t.data_ptr() for t in group]
        owner = owners.setdefault(_identity(group, kind, addresses) or name, name)
        if owner != name:
            merged[name] = merged[owner]
            continue
        known = alike.get(kind) if plain and kind is not None else None
        if known is None:
            first = group[0]
            if not first.is_floating_point():
                if not all(torch.equal(first, t) for t in group[1:]):
                    raise ShapeError(f"{name}: {first.dtype} tensors are copied, not merged, and the models differ")
                merged[name] = first.clone()
                continue
            group, spec = call.spec(name, group, target, layers.gradient(name) if layers is not None else 0.0)
            kept.append(group)
            if group[0].device != home:
                raise ShapeError(f"{name} is on {group[0].device} and the first tensor on {home}")
            addresses = [t.data_ptr() for t in group]
            known = spec, getattr(torch, spec.out_dtype.name)
            if kind is not None:
                alike[kind] = known
        spec, dtype = known
        if kind is not None:  # a third of the time
            result = torch.empty_like(group[0], dtype=dtype, memory_format=torch.contiguous_format)
        else:
            result = torch.empty(spec.shape, dtype=dtype, device=home)
        merged[name] = result
        ops.append(call.op(name, spec, addresses, result.data_ptr()))
    return merged, ops, kept


def _kind(group: Sequence[torch.Tensor], home: torch.device) -> Hashable:
    """Equal for groups of dense, contiguous floating-point tensors on ``home`` that share a spec; None for others."""
    import torch

    shape = group[0].shape
    for t in group:
        if (
            type(t) not in (torch.Tensor, torch.nn.Parameter)
            or t.shape != shape
            or t.device != home
            or t.layout is not torch.strided
            or not t.is_contiguous()
            or not t.is_floating_point()
        ):
            return None
    return (shape, *[t.dtype for t in group])


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


def _identity(tensors: Sequence[torch.Tensor], kind: Hashable, addresses: Sequence[int]) -> Hashable:
    """Equal for two names that are the same memory, read the same way, in every model; None for no memory."""
    if not all(addresses):
        return None
    if kind is not None:
        return (kind, *addresses)
    return tuple([(a, t.shape, t.stride(), t.dtype, t.device) for a, t in zip(addresses, tensors, strict=True)])


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
    chosen = _chosen(ops, home, backend)
    there = all(type(source) is Memory for op in ops for source in op.inputs)
    if not chosen.gpus:
        _on_cpu(ops, chosen, None if there else checkpoints, elements)
    elif not there:
        raise ShapeError(f"tensors on {home} beside sources that are not: expected tensors on the CPU")
    else:
        resident(ops, chosen)


def _chosen(ops: Sequence[Op], home: torch.device, backend: str | None) -> Backend:
    chosen = replace(choose(str(home), backend, said=f"tensors on {home}"), home=str(home))
    chosen.check(ops)
    return chosen


def _on_cpu(ops: Sequence[Op], chosen: Backend, checkpoints: Sequence[Checkpoint] | None, elements: int) -> None:
    """``checkpoints`` None: every source is in memory as it is."""
    workers = [CpuDevice() for _ in range(cores())]
    if checkpoints is None:
        jobs = schedule(ops, elements=elements, whole=chosen.whole)
        Runner(ops, jobs, OpStore(ops), workers, chosen.program).run()
        return
    slot = need(ops, whole=chosen.whole).best
    jobs = schedule(ops, slot=slot, elements=elements, whole=chosen.whole)
    with Files(checkpoints) as files:
        store = OpStore(ops, files, results=Results(chosen, ops, "warn"), coded=chosen.coded)
        Runner(ops, jobs, store, workers, chosen.program, slot=slot).run()
    for checkpoint in checkpoints:
        checkpoint.recheck()
