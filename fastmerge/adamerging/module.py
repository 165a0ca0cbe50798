"""A module whose weights are a base plus weighted task vectors, and whose only parameters are the weights of these."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastmerge.adamerging.coefficients import Coefficients, Granularity, Parametrisation, rows_of, settings
from fastmerge.adamerging.states import states
from fastmerge.adamerging.streams import Streams
from fastmerge.errors import RecipeError
from fastmerge.ops.segments import F64

PRIOR = 0.3
"""The paper's."""


class MergedModule(torch.nn.Module):  # type: ignore[misc]
    r"""``theta = x_0 + sum_i lambda_i (x_i - x_0)``, run through the base's own code.

    An ordinary module for any training loop: its one parameter, ``raw``, gets its gradient from every ``backward``.
    The merged weights are made when the coefficients have changed since the last call, into the same memory. As soon
    as autograd has the gradient of a merged weight, it is turned into ``<g, x_i - x_0>`` and freed, so that no more
    than one is there at a time. A graph from before the coefficients changed has no backward: autograd refuses it.

    Integer and bool buffers (counters of batch normalisation) are copies of the base's; floating-point buffers are
    merged like parameters, but nothing is learned from them. Base and experts are read where they lie and never
    written: move them to a device before.

    Attributes:
        raw: fp64 ``[rows, N]``, see :class:`~fastmerge.adamerging.coefficients.Coefficients`.
        names: of the merged tensors.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        experts: Sequence[Any],
        *,
        base: Any = None,
        granularity: Granularity = "layer",
        parametrisation: Parametrisation = "clamp",
        prior: float | None = None,
        soup: bool = False,
        backend: str | None = None,
    ) -> None:
        """Binds the tensors and makes the first merged weights at the first call.

        Args:
            module: whose code runs; its weights are the base where ``base`` is absent.
            experts: modules or state dictionaries of the same names and shapes, on the module's device.
            base: another module or state dictionary in place of the module's own weights.
            granularity: which tensors share their coefficients.
            parametrisation: ``clamp``, ``softmax`` or ``free``.
            prior: the coefficients to start with; 0.3 where absent, with ``softmax`` equal shares (no other is taken).
            soup: the base takes part in the softmax, so that the result is a weighted mean of all models.
            backend: ``native``, ``reference``, ``triton`` or None for the best one.

        Raises:
            RecipeError: for an unknown setting, and where there is nothing to merge.
            ShapeError: where models do not fit together.
            BackendUnavailable: if the backend cannot work on the module's device.
        """
        super().__init__()
        problems = settings(granularity, parametrisation, prior)
        if soup and parametrisation != "softmax":
            problems.append(f"soup: expected parametrisation softmax, got {parametrisation!r}")
        if problems:
            raise RecipeError(problems)
        found = states(module if base is None else base, experts, module.state_dict())
        self.names = found.names
        row = rows_of(found.names, granularity)
        columns = found.models + int(soup)
        start = 0.0 if parametrisation == "softmax" else PRIOR if prior is None else float(prior)
        self.raw = torch.nn.Parameter(torch.full((max(row) + 1, columns), start, dtype=torch.float64))
        self._coefficients = Coefficients(self.raw, row, parametrisation, soup)
        self._streams = Streams(found.inputs, backend)
        self._module = [module]  # in a list, so that its parameters are not this one's
        self._thetas = self._streams.outputs()
        self._others = {name: t.detach().clone() for name, t in found.others.items()}
        self._tied = found.tied
        self._weights = _own(module, dict(zip(self.names, self._thetas, strict=True)), found.tied) | self._others
        self._rendered: F64 | None = None
        self._together = False
        learned = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        for p, name in enumerate(self.names):
            if name in learned:
                self._thetas[p].requires_grad_().register_post_accumulate_grad_hook(self._hook(p))

    # ---- forward ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward with the merged weights."""
        self.render()
        return torch.func.functional_call(self._module[0], self._weights, args, kwargs)

    def render(self) -> None:
        """Makes the merged weights, unless they are those of the present coefficients."""
        values = self._coefficients.values()
        if self._rendered is not None and np.array_equal(values, self._rendered, equal_nan=True):
            return
        self._streams.render(values, self._thetas)
        torch.autograd.graph.increment_version(self._thetas)
        self._rendered = values

    def train(self, mode: bool = True) -> MergedModule:
        """Of the module whose code runs, too."""
        self._module[0].train(mode)
        super().train(mode)
        return self

    # ---- backward -----------------------------------------------------------------------------------------

    def _hook(self, p: int) -> Callable[[torch.Tensor], None]:
        def take(theta: torch.Tensor) -> None:
            gradient = theta.grad
            if gradient is None or self._together:
                return
            theta.grad = None
            self._coefficients.absorb([p], self._streams.slopes({p: gradient}))

        return take

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Lets autograd add up the gradients of every ``backward`` within, for one backward kernel in the end.

        For the losses of several tasks: without it there is a kernel per tensor and task. It holds the gradients of
        all tensors at once.
        """
        if self._together:
            raise RecipeError("together: expected no other one around it")
        self._together = True
        try:
            yield
            found = {p: t.grad for p, t in enumerate(self._thetas) if t.grad is not None}
            if found:
                self._coefficients.absorb(list(found), self._streams.slopes(found))
        finally:
            self._together = False
            for theta in self._thetas:
                theta.grad = None

    # ---- results --------------------------------------------------------------------------------------------

    @property
    def coefficients(self) -> dict[str, list[float]]:
        """One per expert and merged tensor, as they are now."""
        return dict(zip(self.names, self._coefficients.values().tolist(), strict=True))

    def merged_state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the merged weights, by the names of the base; tied names are one tensor."""
        self.render()
        merged = {name: theta.detach().clone() for name, theta in zip(self.names, self._thetas, strict=True)}
        merged |= {name: merged[owner] for name, owner in self._tied.items()}
        return merged | {name: t.clone() for name, t in self._others.items()}


def _own(module: torch.nn.Module, merged: dict[str, torch.Tensor], tied: dict[str, str]) -> dict[str, torch.Tensor]:
    """What a call of the module is given: a tensor for every name that it has.

    Raises:
        RecipeError: where the base is another model than the module.
    """
    everything = merged | {name: merged[owner] for name, owner in tied.items()}
    state = module.state_dict()
    wrong = [f"{n}: not in the base" for n, t in state.items() if n not in everything and t.is_floating_point()]
    wrong += [f"{n}: not in the module" for n in everything if n not in state]
    wrong += [
        f"{n}: the module's has shape {tuple(state[n].shape)}, the base's {tuple(t.shape)}"
        for n, t in everything.items()
        if n in state and state[n].shape != t.shape
    ]
    if wrong:
        raise RecipeError(wrong)
    return everything
