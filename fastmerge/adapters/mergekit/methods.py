"""mergekit's methods, computed by this engine wherever that gives what mergekit's own code promises."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastmerge.api.call import Call, call_of, dtype_of, method_of
from fastmerge.api.tensors import run
from fastmerge.errors import BackendUnavailable, FastMergeError, RecipeError
from fastmerge.methods import METHODS
from fastmerge.ops.spec import Op

log = logging.getLogger("fastmerge")

TYPES = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

WIDE = frozenset({"arcee_fusion", "ramplus_tl"})
"""Methods whose results mergekit leaves in fp32 where inputs are of 16 bits."""

SKIPPED = frozenset({"passthrough"})
"""Methods that hand their input on without reading it."""


def install() -> Callable[[], None]:
    """Gives every method of mergekit's registry that this engine has a new ``_execute``; returns what takes it back.

    The objects stay the same, so it does not matter where they were imported, and their own attributes still count.
    """
    from mergekit.merge_methods import registry

    ours = [method for name, method in registry._METHODS.items() if name not in SKIPPED and known(method)]  # noqa: SLF001
    for method in ours:
        vars(method)["_execute"] = _executor(method)

    def undo() -> None:
        for method in ours:
            vars(method).pop("_execute", None)

    return undo


def known(method: Any) -> bool:
    """Whether this is a method of mergekit's own that this engine has, with no parameter that it lacks."""
    try:
        return bool(method_of(method))
    except RecipeError:
        return False


def _executor(method: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """``_execute`` of one method."""
    own = method._execute  # noqa: SLF001
    name = method.spec.name
    before = dict(vars(method))

    def execute(
        groups: Sequence[Any],
        parameters: Sequence[Mapping[str, Any]],
        options: Any,
        *,
        input_dtypes: Sequence[torch.dtype],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        now = vars(method)
        replaced = len(now) != len(before) + 1 or any(now.get(k) is not v for k, v in before.items())
        ours = (
            [] if replaced or _watched() else [i for i, g in enumerate(groups) if _takes(g, input_dtypes[i], out_dtype)]
        )
        results: dict[int, torch.Tensor] = {}
        if ours:
            some, values, dtypes = _of(ours, groups, parameters, input_dtypes)
            try:
                merged = _merged(name, some, values, dtypes, out_dtype, options.max_bytes)
                results = dict(zip(ours, merged, strict=True))
            except FastMergeError as refused:
                log.info("mergekit merges %s itself: %s", name, refused)
        theirs = [i for i in range(len(groups)) if i not in results]
        if theirs or not groups:
            some, values, dtypes = _of(theirs, groups, parameters, input_dtypes)
            merged = own(some, values, options, input_dtypes=dtypes, out_dtype=out_dtype)
            results.update(zip(theirs, merged, strict=True))
        return tuple([results[i] for i in range(len(groups))])

    return execute


def _of(indices: Sequence[int], *lists: Sequence[Any]) -> list[list[Any]]:
    return [[given[i] for i in indices] for given in lists]


def _watched() -> bool:
    """Whether calls of torch are traced, transformed or looked at: what does not call torch would be missed."""
    return _get_current_dispatch_mode() is not None or torch._C._functorch.maybe_current_level() is not None  # noqa: SLF001


def _takes(group: Any, dtype: torch.dtype | None, out_dtype: torch.dtype | None) -> bool:
    """Whether all tensors are plain ones of the four types, whose history nobody records."""
    if not group.entries or dtype not in TYPES or (out_dtype is not None and out_dtype not in TYPES):
        return False
    recorded = torch.is_grad_enabled()
    return all(
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.dtype in TYPES
        and t.layout is torch.strided
        and t.device.type in ("cpu", "cuda")
        and not t.is_neg()
        and not (recorded and t.requires_grad)
        for t in group.tensors
    )


def _merged(
    name: str,
    groups: Sequence[Any],
    parameters: Sequence[Mapping[str, Any]],
    dtypes: Sequence[torch.dtype],
    out_dtype: torch.dtype | None,
    room: int,
) -> list[torch.Tensor]:
    """All groups, one result each: as few runs as the room for copies of inputs allows, and one per device."""
    results: list[torch.Tensor] = []
    waiting: list[Op] = []
    kept: list[torch.Tensor] = []
    copies, home, draw = 0, None, None
    for group, bound, dtype in zip(groups, parameters, dtypes, strict=True):
        call = _call(name, group, bound)
        tensors = [group.entries[i].tensor for i in call.order]
        if waiting and (copies > room or tensors[0].device != home):
            run(waiting, tensors[0].device if home is None else home)
            waiting, kept, copies = [], [], 0
        home = tensors[0].device
        cast = [t.to(dtype) if _rounds(t.dtype, dtype) else t for t in tensors]
        out = out_dtype or (torch.promote_types(dtype, torch.float32) if name in WIDE else dtype)
        inputs, spec = call.spec("", cast, dtype_of(out))
        lacking = spec.method.wants() if home.type != "cpu" else ()
        if why := spec.method.gap() or (lacking and f"{name} lacks kernels on {home}"):
            raise BackendUnavailable(why)  # a definition is no quicker than mergekit's code
        if spec.method.random and draw is None:
            # From torch's generator, so that seeds of a caller count and masks differ from call to call.
            draw = int(torch.empty((), dtype=torch.int64).random_())
        result = torch.empty(spec.shape, dtype=out, device=home)
        results.append(result)
        label = f"{draw} {len(results)}"
        waiting.append(call.op(label, spec, [t.data_ptr() for t in inputs], result.data_ptr()))
        kept += inputs
        copies += sum(t.nbytes for t, given in zip(inputs, tensors, strict=True) if t is not given)
    if home is not None:
        run(waiting, home)
    return results


def _call(name: str, group: Any, bound: Mapping[str, Any]) -> Call:
    """The call of one group; equal ones are the same object."""
    entries = group.entries
    base = next((i for i, e in enumerate(entries) if e.is_base), None)
    values = {}
    for param in METHODS[name].params:
        value = bound.get(param.name)
        if isinstance(value, Mapping):
            value = [value[e.id] for e in entries if param.scope == "input" or not e.is_base]
        if value is not None and param.name in bound:
            values[param.name] = value
    return call_of(name, list(range(len(entries))), base, values, None, 0)


def _rounds(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether inputs are to be converted first: to one that cannot hold them all, as asked, or to compute in fp64."""
    return bool(given != wanted and (wanted == torch.float64 or torch.promote_types(given, wanted) != wanted))
