"""A base and experts as state dictionaries that fit together: which tensors are merged, and under which names."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmerge.errors import RecipeError, ShapeError
from fastmerge.tensors import check

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types that are merged."""


@dataclass(frozen=True)
class States:
    """Tensors of a base and experts by name.

    Attributes:
        names: of the merged tensors, in the order of the base.
        inputs: base and experts of each, contiguous, ``[*S]`` each.
        others: tensors that are not floating-point, the base's own.
        tied: further names of merged tensors, each with the first one.
    """

    names: tuple[str, ...]
    inputs: list[list[torch.Tensor]]
    others: dict[str, torch.Tensor]
    tied: dict[str, str]

    @property
    def models(self) -> int:
        """N, the experts."""
        return len(self.inputs[0]) - 1

    @property
    def dicts(self) -> list[dict[str, torch.Tensor]]:
        """The merged tensors by name: of the base, then of each expert."""
        return [dict(zip(self.names, tensors, strict=True)) for tensors in zip(*self.inputs, strict=True)]


def state_of(model: Any, who: str) -> Mapping[str, torch.Tensor]:
    """The state dictionary of a module, or one that is given as it is.

    Raises:
        RecipeError: for anything else.
        ShapeError: for a tensor that is not dense.
    """
    state = model.state_dict() if isinstance(model, torch.nn.Module) else model
    if not isinstance(state, Mapping):
        raise RecipeError(f"{who}: expected a module or a mapping of names to tensors, got {type(model).__name__}")
    for name, tensor in state.items():
        check(f"{who}: {name}", tensor)
    return state


def states(base: Any, experts: Sequence[Any], like: Mapping[str, torch.Tensor] | None = None) -> States:
    """Checks that models fit together, and lays their tensors out.

    Names that are one tensor in the base (tied weights) are merged once, under the first of them; an expert may lack
    the others, and must not differ where it has them.

    Args:
        base: a module or a state dictionary.
        experts: at least one, likewise, of the base's names, shapes and device.
        like: the state dictionary of a module whose tied weights are to be one, too.

    Raises:
        RecipeError: for no expert, and for a base without anything to merge.
        ShapeError: with every name, shape, type or device that does not fit.
    """
    if isinstance(experts, Mapping | torch.nn.Module) or not len(experts):
        raise RecipeError(f"experts: expected a sequence of at least one model, got {type(experts).__name__}")
    first = state_of(base, "base")
    rest = [state_of(expert, f"experts[{i}]") for i, expert in enumerate(experts)]
    tied, problems = _tied(first), []
    for name, owner in _tied(like or {}).items():
        if name not in tied and owner in first:
            tied[name] = tied.get(owner, owner)
            if name in first and not _same(first[name], first[owner]):
                problems.append(f"base: {name} differs from {owner}, and in the module they are one")
    for i, state in enumerate(rest):
        problems += [f"experts[{i}]: {n}: not in the base" for n in state if n not in first and n not in tied]
        problems += [
            f"experts[{i}]: {n} differs from {owner}, and in the base they are one"
            for n, owner in tied.items()
            if n in state and owner in state and not _same(state[n], state[owner])
        ]
    names, inputs, others = [], [], {}
    home = next((t.device for t in first.values() if t.dtype in KINDS), None)
    for name, tensor in first.items():
        if tensor.dtype not in KINDS:
            others[name] = tensor
            if tensor.is_floating_point() or tensor.is_complex():
                problems.append(f"{name}: {tensor.dtype} tensors cannot be merged")
            continue
        group = [tensor]
        for i, state in enumerate(rest):
            if found := _misfit(f"experts[{i}]: {name}", tensor, state.get(name), home, tied=name in tied):
                problems.append(found)
            elif name in state:
                group.append(state[name])
        if name not in tied:
            names.append(name)
            inputs.append([x.detach().contiguous() for x in group])
    if problems:
        raise ShapeError(problems)
    if not names:
        raise RecipeError("base: expected at least one floating-point tensor, got none")
    return States(tuple(names), inputs, others, tied)


def _tied(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names that are the memory of an earlier one, read the same way, each with that one."""
    first: dict[Hashable, str] = {}
    tied = {}
    for name, t in state.items():
        if t.dtype in KINDS and t.numel():
            owner = first.setdefault((t.data_ptr(), t.shape, t.stride(), t.dtype), name)
            if owner != name:
                tied[name] = owner
    return tied


def _misfit(
    who: str, base: torch.Tensor, tensor: torch.Tensor | None, home: torch.device | None, *, tied: bool
) -> str | None:
    """What keeps an expert's tensor from being merged into the base's; None where nothing does."""
    if tensor is None:
        return None if tied else f"{who}: missing"
    if tensor.shape != base.shape:
        return f"{who}: expected shape {tuple(base.shape)}, got {tuple(tensor.shape)}"
    if tensor.dtype not in KINDS:
        return f"{who}: expected a floating-point tensor, got {tensor.dtype}"
    if tensor.device != home or base.device != home:
        return f"{who}: on {tensor.device}, the base's on {base.device}, its first tensor on {home}"
    return None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and ((a.data_ptr() == b.data_ptr() and a.stride() == b.stride()) or bool(torch.equal(a, b)))
