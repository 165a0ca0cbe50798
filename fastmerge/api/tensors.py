"""Merging tensors that the caller owns: mergekit 0.1.5's calls, through the workers of a merge on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmerge.backends.choose import choose, devices, program_factory
from fastmerge.dtypes import BY_NAME, DType, promote
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.methods import get
from fastmerge.methods.base import REQUIRED, Group, Method, Param
from fastmerge.philox import checked_seed
from fastmerge.planning import Output
from fastmerge.recipe.problems import hint
from fastmerge.recipe.settings import convert
from fastmerge.runtime.devices import Device
from fastmerge.runtime.devices.cuda import MEMORY_ELEMENTS, InPlace
from fastmerge.runtime.schedule import schedule
from fastmerge.runtime.stores import MemoryStore
from fastmerge.runtime.stream import Runner
from fastmerge.tensors import check, extent, plain

if TYPE_CHECKING:
    import torch


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
            kernels run on the current stream and the result may still be under way; no weights are copied to the host,
            but a method with statistics waits for its sums, or for the few keys that its thresholds depend on.
        method: a name of ``fastmerge methods``.
        parameters: scalars for all inputs, sequences in input order (without the base for parameters of
            non-base models), or mappings keyed by ``ids``.
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
    base = None if base_index is None else keys[_index(base_index, len(keys))]
    kind = get(method)
    binding = _bind(kind, keys, base, parameters, preset)
    target = out_dtype or dtype
    named = dict(zip(keys, tensors, strict=True))
    output, inputs = _output(kind, binding, name or "", named, base, target, seed)
    result = _result(output, inputs[0], out, named)
    run([output], [inputs], [result], backend)
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
        parameters: as in :func:`merge_tensors`, the same for all tensors.
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
    import torch

    items = list(models.items()) if isinstance(models, Mapping) else list(enumerate(models))
    states = {key: m.state_dict() if hasattr(m, "state_dict") else m for key, m in items}
    if not states:
        raise RecipeError("models: expected at least one, got none")
    for key, state in states.items():
        if not isinstance(state, Mapping):
            raise RecipeError(f"models: expected state dictionaries or modules, got {type(state).__name__} for {key!r}")
    if base is not None and base not in states:
        raise RecipeError(f"base {base!r} is not one of the models {list(states)!r}")
    first = next(iter(states.values()))
    missing = [f"{n}: not in model {k!r}" for k, s in states.items() for n in {**first, **s} if n not in s]
    missing += [f"{n}: not in the first model" for s in states.values() for n in s if n not in first]
    if strict and missing:
        raise ShapeError(sorted(set(missing)))
    kind = get(method)
    binding = _bind(kind, list(states), base, parameters, preset)
    merged: dict[str, torch.Tensor] = {}
    owners: dict[Hashable, str] = {}
    kept = []  # A mapping may make its tensors on access: while all are kept, no two names share an address by chance.
    outputs, inputs, results = [], [], []
    for name in first:
        group = {k: s[name] for k, s in states.items() if name in s}
        if len(group) < len(states):
            continue
        kept.append(group)
        _one_device(name, {"the first tensor": next(iter(kept[0].values())), **group})
        owner = owners.setdefault(_identity(group.values()) or name, name)
        if owner != name:
            merged[name] = merged[owner]
            continue
        if not first[name].is_floating_point():
            if not all(torch.equal(first[name], t) for t in group.values()):
                raise ShapeError(f"{name}: {first[name].dtype} tensors are copied, not merged, and the models differ")
            merged[name] = first[name].clone()
            continue
        output, tensors = _output(kind, binding, name, group, base, out_dtype or dtype, seed)
        merged[name] = _result(output, tensors[0], None, {})
        outputs.append(output)
        inputs.append(tensors)
        results.append(merged[name])
    run(outputs, inputs, results, backend)
    return merged


@dataclasses.dataclass(frozen=True)
class _Binding:
    """Parameters bound to input ids."""

    shared: Mapping[str, Any]
    by_input: Mapping[Hashable, Mapping[str, Any]]


def _index(base_index: Any, n: int) -> int:
    """Position of the base; as everywhere in Python, -1 is the last."""
    if not isinstance(base_index, bool):
        with contextlib.suppress(TypeError, IndexError):
            return range(n)[operator.index(base_index)]
    raise RecipeError(f"base_index: expected a whole number from {-n} to {n - 1}, got {base_index!r}")


def _identity(tensors: Iterable[torch.Tensor]) -> Hashable:
    """Equal for two names that are the same memory, read the same way, in every model; None for no memory."""
    parts = tuple((t.data_ptr(), tuple(t.shape), t.stride(), t.dtype, t.device) for t in tensors)
    return parts if all(p[0] for p in parts) else None


def _bind(
    method: type[Method],
    keys: Sequence[Hashable],
    base: Hashable | None,
    parameters: Mapping[str, Any] | None,
    preset: str | None,
) -> _Binding:
    """Checks and spreads parameters over the inputs, in mergekit's way."""
    given: Any = {} if parameters is None else parameters
    if not isinstance(given, Mapping):
        raise RecipeError(f"parameters: expected a mapping of names to values, got {type(given).__name__}")
    problems: list[str] = []
    known = {p.name: p for p in method.params}
    problems += [f"parameter {n!r}: unknown{hint(n, known)}" for n in given if n not in known]
    name = preset or ("mergekit" if "mergekit" in method.presets else None)
    if name is not None and name not in method.presets:
        problems.append(f"preset {name!r}: unknown; {method.name} has {', '.join(method.presets) or 'none'}")
    defaults = method.presets.get(name or "", {})
    rule = method.contract
    lead = base if rule.base != "ignored" else None
    if rule.base == "required" and lead is None:
        problems.append(f"{method.name} needs a base (base_index, or base)")
    others = [k for k in keys if lead is None or k != lead]
    if len(others) < rule.least or (rule.most is not None and len(others) > rule.most):
        most = "or more" if rule.most is None else f"to {rule.most}"
        problems.append(f"{method.name}: expected {rule.least} {most} models besides the base, got {len(others)}")
    shared: dict[str, Any] = {}
    by_input: dict[Hashable, dict[str, Any]] = {k: {} for k in keys}
    for p in method.params:
        value = given.get(p.name, defaults.get(p.name, p.default))
        if value is REQUIRED:
            problems.append(f"parameter {p.name!r} is required by {method.name}: {p.doc}")
        elif p.scope == "shared":
            shared[p.name] = _convert(p, value, problems)
        else:
            over = others if p.scope == "model" else list(keys)
            for key, item in zip(over, _spread(p, value, over, problems), strict=False):
                by_input[key][p.name] = _convert(p, item, problems)
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return _Binding(shared, by_input)


def _spread(p: Param, value: Any, keys: Sequence[Hashable], problems: list[str]) -> list[Any]:
    if isinstance(value, Mapping):
        problems += [f"parameter {p.name!r}: missing for input {k!r}" for k in keys if k not in value]
        return [value.get(k, p.default) for k in keys]
    value = plain(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(keys):
            problems.append(f"parameter {p.name!r}: expected {len(keys)} values, got {len(value)}")
        return list(value)
    return [value] * len(keys)


def _convert(p: Param, value: Any, problems: list[str]) -> Any:
    if value is None or value is REQUIRED:
        return value
    try:
        return convert(plain(value), p)
    except ValueError as error:
        problems.append(f"parameter {p.name!r}: {error}")
        return value


def _one_device(name: str, tensors: Mapping[Hashable, torch.Tensor]) -> None:
    """All inputs of a call are dense tensors on the CPU, or on one GPU."""
    for key, t in tensors.items():
        check(f"{name or 'tensor'}: input {key!r}", t)
    first, home = next((k, t.device) for k, t in tensors.items())
    for key, t in tensors.items():
        if t.device.type not in ("cpu", "cuda"):
            raise ShapeError(f"{name or 'tensor'}: input {key!r} is on {t.device}; expected the CPU or a GPU")
        if t.device != home:
            raise ShapeError(
                f"{name or 'tensor'}: input {key!r} is on {t.device} and {first!r} on {home}; expected one device"
            )


def _dtype(t: Any) -> DType:
    name = str(t).removeprefix("torch.")
    if name not in BY_NAME or not BY_NAME[name].mergeable:
        raise ShapeError(f"expected float64, float32, float16 or bfloat16; got {name}")
    return BY_NAME[name]


def _output(
    method: type[Method],
    binding: _Binding,
    name: str,
    tensors: Mapping[Hashable, torch.Tensor],
    base: Hashable | None,
    target: torch.dtype | None,
    seed: int,
) -> tuple[Output, list[torch.Tensor]]:
    """The output of one group, and its inputs in the method's order: base first, contiguous."""
    lead = base if method.contract.base != "ignored" else None
    others = [k for k in tensors if lead is None or k != lead]
    order = others if lead is None else [lead, *others]
    _one_device(name, tensors)
    shape = tuple(next(iter(tensors.values())).shape)
    for key, t in tensors.items():
        if tuple(t.shape) != shape:
            raise ShapeError(f"{name or 'tensor'}: input {key!r} has shape {tuple(t.shape)}, expected {shape}")
    dtypes = tuple(_dtype(tensors[k].dtype) for k in order)
    kind = dtypes[0]
    for d in dtypes[1:]:
        kind = promote(kind, d)
    group = Group(
        name=name,
        shape=shape,
        dtypes=dtypes,
        out_dtype=_dtype(target) if target is not None else kind,
        params=binding.shared,
        models=tuple(binding.by_input[k] for k in others),
        has_base=lead is not None,
        indices=tuple(range(len(others))),
        seed=checked_seed(seed),
    )
    problems = method.check(group)
    if problems:
        raise RecipeError(problems)
    output = Output(name=name, dtype=group.out_dtype, shape=shape, models=(), inputs=(), method=method, group=group)
    return output, [tensors[k].detach().contiguous() for k in order]


def _result(
    output: Output, like: torch.Tensor, out: torch.Tensor | None, inputs: Mapping[Hashable, torch.Tensor]
) -> torch.Tensor:
    """A new tensor, or the caller's ``out`` where it fits and overlaps none of the inputs except as one of them."""
    import torch

    dtype = getattr(torch, output.dtype.name)
    if out is None:
        return torch.empty(output.shape, dtype=dtype, device=like.device)
    check("out", out)
    if tuple(out.shape) != output.shape or out.dtype != dtype or not out.is_contiguous() or out.device != like.device:
        layout = "" if out.is_contiguous() else f", not contiguous (strides {tuple(out.stride())})"
        raise ShapeError(
            f"out: expected a contiguous tensor {output.shape} of {dtype} on {like.device}, "
            f"got {tuple(out.shape)} of {out.dtype} on {out.device}{layout}"
        )
    start, end = extent(out)
    for key, t in inputs.items():
        low, high = extent(t)
        if max(start, low) < min(end, high) and (low != start or t.dtype != out.dtype):
            raise ShapeError(f"out overlaps input {key!r}: expected that input itself, or memory of its own")
    return out


def run(
    outputs: Sequence[Output],
    inputs: Sequence[Sequence[torch.Tensor]],
    results: Sequence[torch.Tensor],
    backend: str | None = None,
) -> None:
    """Merges outputs into tensors that are there.

    Args:
        outputs: what is merged, of one method; each has a group.
        inputs: per output, contiguous tensors of its group's types and shape, base first, all on one device.
        results: per output, a contiguous tensor of its type and shape, on that device.
        backend: as in :func:`merge_tensors`.

    Raises:
        BackendUnavailable: if the backend cannot work on that device.
    """
    if not results:
        return
    home = results[0].device
    chosen = choose(str(home), backend, said=f"tensors on {home}")
    workers: list[Device] = [InPlace(chosen.kernels, home)] if chosen.gpus else devices(chosen)
    elements = MEMORY_ELEMENTS if chosen.gpus else None
    work = schedule(outputs, workers=len(workers), memory=None, whole=chosen.whole, elements=elements)
    store = MemoryStore(outputs, [[t.data_ptr() for t in row] for row in inputs], [t.data_ptr() for t in results])
    in_place = dataclasses.replace(work, slot_bytes=0)
    Runner(outputs, in_place, store, workers, program_factory(chosen)).run()
