"""Merges as one would write them in torch, straight from their formulas; what torch.compile is given as well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DENSITY = 0.2
T = 0.4

Merge = Callable[[Sequence["torch.Tensor"]], "torch.Tensor"]


def linear(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """``sum x_i / N``."""
    total = tensors[0].float()
    for x in tensors[1:]:
        total = total + x.float()
    return (total / len(tensors)).to(tensors[0].dtype)


def slerp(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Along the great circle between two tensors, or the line where they are almost parallel."""
    import torch

    x, y = (t.float() for t in tensors)
    dot = (x * y).sum() / (x.norm() * y.norm())
    theta = torch.arccos(dot.clamp(-1, 1))
    near = dot.abs() > 0.9995
    sine = torch.where(near, 1.0, torch.sin(theta))
    a = torch.where(near, 1 - T, torch.sin((1 - T) * theta) / sine)
    b = torch.where(near, T, torch.sin(T * theta) / sine)
    return (a * x + b * y).to(tensors[0].dtype)


def ties(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Trim to the largest fifth, elect signs by mass, average what agrees; base first."""
    import torch

    base, *tuned = tensors
    trimmed = []
    for x in tuned:
        delta = x.float() - base.float()
        size = delta.abs()
        least = size.flatten().topk(max(1, int(DENSITY * delta.numel()))).values[-1]
        trimmed.append(torch.where(size >= least, delta, 0.0))
    deltas = torch.stack(trimmed)
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agree = deltas * sign > 0
    mean = (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return (base.float() + mean).to(base.dtype)


def thinned(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Deltas of which half are dropped at random; base first."""
    import torch

    base, *tuned = tensors
    return [(x.float() - base.float()) * (torch.rand(base.shape, device=base.device) < 0.5) for x in tuned]


def dare_linear(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Drop half of every delta at random, double the rest, average; base first."""
    import torch

    base, total = tensors[0], torch.zeros_like(tensors[0], dtype=torch.float32)
    for delta in thinned(tensors):
        total = total + delta * 2
    return (base.float() + total / (len(tensors) - 1)).to(base.dtype)


def dare_l1(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Drop half of every delta at random, restore its sum of magnitudes, average; base first."""
    import torch

    base, total = tensors[0], torch.zeros_like(tensors[0], dtype=torch.float32)
    for x, delta in zip(tensors[1:], thinned(tensors), strict=True):
        before = (x.float() - base.float()).abs().sum()
        total = total + delta * (before / delta.abs().sum().clamp(min=1e-12))
    return (base.float() + total / (len(tensors) - 1)).to(base.dtype)


def dare_ties(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Drop half of every delta at random, restore its sum of magnitudes, elect signs by mass, average what agrees."""
    import torch

    base = tensors[0]
    kept = []
    for x, delta in zip(tensors[1:], thinned(tensors), strict=True):
        before = (x.float() - base.float()).abs().sum()
        kept.append(delta * (before / delta.abs().sum().clamp(min=1e-12)) / (len(tensors) - 1))
    deltas = torch.stack(kept)
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    return (base.float() + (deltas * (deltas * sign > 0)).sum(0)).to(base.dtype)


MERGES: Mapping[str, Merge] = {
    "linear": linear,
    "slerp": slerp,
    "ties": ties,
    "dare_linear keep": dare_linear,
    "dare_linear l1": dare_l1,
    "dare_ties": dare_ties,
}
