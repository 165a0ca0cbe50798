"""The fused pair as functions of autograd: for one tensor, and for all tensors of a model.

Gradients flow to the coefficients alone; base and experts are constants. What autograd adds up for a merged tensor,
over however many uses, reaches the backward kernel once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastmerge.adamerging.states import states
from fastmerge.adamerging.streams import Streams
from fastmerge.errors import RecipeError


class _Merge(torch.autograd.Function):  # type: ignore[misc]
    """Forward: the family combine. Backward: the family dot. Nothing is saved but the addresses of the inputs."""

    @staticmethod
    def forward(ctx: Any, lam: torch.Tensor, streams: Streams, fixed: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """One row of ``lam`` per tensor, or one for all; nothing flows back from ``fixed`` tensors."""
        ctx.set_materialize_grads(False)
        ctx.streams, ctx.like = streams, (lam.dim(), lam.device, lam.dtype)
        outs = streams.outputs()
        rows = lam.detach().cpu().double().expand(len(outs), streams.models).contiguous()
        streams.render(rows.numpy(), outs)
        ctx.mark_non_differentiable(*[outs[p] for p in fixed])
        return tuple(outs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor, None, None]:
        """The gradient of ``lam``, in its shape and type."""
        given = {p: g for p, g in enumerate(gradients) if g is not None}
        dim, device, dtype = ctx.like
        slopes = torch.zeros(len(gradients), ctx.streams.models, dtype=torch.float64)
        slopes[list(given)] = torch.from_numpy(ctx.streams.slopes(given))
        return (slopes if dim == 2 else slopes.sum(dim=0)).to(device, dtype), None, None


def _checked(lam: torch.Tensor, tensors: int, models: int) -> torch.Tensor:
    shapes = [(models,), (tensors, models)]
    if not isinstance(lam, torch.Tensor) or tuple(lam.shape) not in shapes or not lam.is_floating_point():
        got = f"{lam.dtype} {tuple(lam.shape)}" if isinstance(lam, torch.Tensor) else type(lam).__name__
        raise RecipeError(f"lam: expected a floating-point tensor of shape {shapes[0]} or {shapes[1]}, got {got}")
    return lam


def merged_parameters(
    base: Any, experts: Sequence[Any], lam: torch.Tensor, *, backend: str | None = None
) -> dict[str, torch.Tensor]:
    r"""``theta = x_0 + sum_i lam_i (x_i - x_0)`` of every tensor, differentiable with respect to ``lam``.

    For :func:`torch.func.functional_call`, in any training loop. The backward holds the gradients of all tensors at
    once; :class:`~fastmerge.adamerging.MergedModule` need not, and keeps what it can from step to step.

    .. math:: \theta_p = x_{0,p} + \sum_i \lambda_{p,i} (x_{i,p} - x_{0,p}), \qquad
              \frac{\partial L}{\partial\lambda_{p,i}} = \langle \nabla_{\theta_p} L,\ x_{i,p} - x_{0,p} \rangle

    Args:
        base: a module, whose buffers are merged but have no gradient, or a state dictionary.
        experts: N of them, of the same names, shapes and device; no task vector is ever made.
        lam: ``[N]``, or ``[P, N]`` with a row for each merged tensor in the order of the base; tied weights are one.
        backend: ``native``, ``reference``, ``triton`` or None for the best one on the tensors' device.

    Returns:
        Tensors by the names of the base and of its types. Names that are one tensor in the base are one tensor;
        integer and bool tensors are copies of the base's.

    Raises:
        RecipeError: where ``lam`` does not fit, or there is nothing to merge.
        ShapeError: where models do not fit together.
        BackendUnavailable: if the backend cannot work on the tensors' device.
    """
    found = states(base, experts)
    _checked(lam, len(found.names), found.models)
    fixed: list[int] = []
    if isinstance(base, torch.nn.Module):
        learned = {name for name, _ in base.named_parameters()}
        fixed = [p for p, name in enumerate(found.names) if name not in learned]
    merged = dict(zip(found.names, _Merge.apply(lam, Streams(found.inputs, backend), fixed), strict=True))
    merged |= {name: merged[owner] for name, owner in found.tied.items()}
    merged |= {name: t.detach().clone() for name, t in found.others.items()}
    return merged


def merged_tensor(
    base: torch.Tensor, experts: Sequence[torch.Tensor], lam: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """The same of one tensor ``[*S]``: ``lam`` is ``[N]``; arguments and errors as for :func:`merged_parameters`."""
    return merged_parameters({"": base}, [{"": x} for x in experts], lam, backend=backend)[""]
