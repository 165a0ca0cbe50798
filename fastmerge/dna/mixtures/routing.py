"""What routers do with text: which experts tokens are sent to, and how much these then add. Needs torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.dna.activations import in_vocabulary
from fastmerge.errors import CheckpointError, RecipeError, ShapeError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

F64: TypeAlias = "npt.NDArray[np.float64]"

_ROUTERS = ("mlp.gate", "mlp.router", "block_sparse_moe.gate", "block_sparse_moe.router")


@dataclass(frozen=True)
class Statistics:
    """Of each layer with experts, by its number, ``[E]`` fp64 each.

    Attributes:
        counts: tokens that an expert got.
        weights: the sum of their router weights.
        outputs: the sum of router weight times norm of the expert's output; None where they were not asked for.
    """

    counts: dict[int, F64]
    weights: dict[int, F64]
    outputs: dict[int, F64] | None

    def scores(self, what: str) -> dict[int, F64]:
        """``counts``, ``weights`` or ``saliency``, the mean of ``outputs`` over an expert's tokens.

        Raises:
            RecipeError: there are no outputs of experts.
        """
        if what != "saliency":
            return self.counts if what == "counts" else self.weights
        if self.outputs is None:
            raise RecipeError("saliency: expected statistics with the experts' outputs")
        return {i: row / np.maximum(self.counts[i], 1) for i, row in self.outputs.items()}


def router_statistics(model: Any, batches: Iterable[Any], *, outputs: bool = True) -> Statistics:
    """Runs a mixture on text and counts.

    Args:
        model: a transformers module, which stays as it is, or a path, which is loaded in its own type.
        batches: token ids ``[B, T]``, or mappings of arguments of the model; tokens that ``attention_mask`` leaves
            out do not count.
        outputs: whether each expert is also run on its tokens, which costs as much again.

    Raises:
        CheckpointError: no layer of the model has a router.
        RecipeError: there are no batches, or tokens that are not of the vocabulary.
    """
    import torch

    if isinstance(model, str | os.PathLike):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    if not isinstance(model, torch.nn.Module):
        raise ShapeError(f"model: expected a module or a path, got {type(model).__qualname__}")
    counting = {i: _Counting(*found, outputs=outputs) for i, found in _routers(model)}
    if not counting:
        raise CheckpointError(f"{type(model).__name__}: no layer has a router named one of {', '.join(_ROUTERS)}")
    was, handles = model.training, [c.router.register_forward_hook(c) for c in counting.values()]
    device, runs = next(model.parameters()).device, 0
    try:
        model.eval()
        for batch in batches:
            given = dict(batch) if hasattr(batch, "keys") else {"input_ids": torch.as_tensor(batch)}
            given = {k: v.to(device) for k, v in given.items()}
            if "input_ids" in given:
                in_vocabulary(given["input_ids"], model)
            mask = given.get("attention_mask")
            for one in counting.values():
                one.mask = None if mask is None else mask.reshape(-1).bool()
            with torch.no_grad():
                model(**given, use_cache=False)
            runs += 1
    finally:
        for handle in handles:
            handle.remove()
        model.train(was)
    if not runs:
        raise RecipeError("calibration: expected batches of token ids, got none")
    each = counting.items()
    return Statistics(
        {i: c.counts for i, c in each},
        {i: c.weights for i, c in each},
        {i: c.outputs for i, c in each} if outputs else None,
    )


def _routers(model: torch.nn.Module) -> Iterable[tuple[int, tuple[torch.nn.Module, torch.nn.Module]]]:
    """The router of each layer, and its experts, which take tokens, choices and weights."""
    layers: Any = model.get_submodule("model.layers")
    for i, layer in enumerate(layers):
        for name in _ROUTERS:
            block = getattr(layer, name.partition(".")[0], None)
            router, experts = getattr(block, name.partition(".")[2], None), getattr(block, "experts", None)
            if router is not None and experts is not None:
                yield i, (router, experts)
                break


class _Counting:
    """A forward hook of one router."""

    def __init__(self, router: torch.nn.Module, experts: torch.nn.Module, *, outputs: bool) -> None:
        self.router, self.experts = router, experts
        self._outputs = outputs
        self.mask: torch.Tensor | None = None
        self.counts = self.weights = self.outputs = np.zeros(0)

    def __call__(self, _: Any, inputs: tuple[torch.Tensor, ...], said: tuple[torch.Tensor, ...]) -> None:
        import torch

        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        logits, weight, index = said[:3]
        experts = logits.shape[-1]
        if self.mask is not None:
            x, weight, index = x[self.mask], weight[self.mask], index[self.mask]
        if not len(self.counts):
            self.counts, self.weights, self.outputs = np.zeros(experts), np.zeros(experts), np.zeros(experts)
        flat = index.reshape(-1)
        mass = torch.zeros(experts, dtype=torch.float64, device=flat.device)
        self.counts += torch.bincount(flat, minlength=experts).double().cpu().numpy()
        self.weights += mass.index_add(0, flat, weight.reshape(-1).double()).cpu().numpy()
        for e in range(experts if self._outputs else 0):
            token, place = (index == e).nonzero(as_tuple=True)
            if len(token):
                alone = torch.full((len(token), 1), e, dtype=index.dtype, device=index.device)
                y = self.experts(x[token], alone, torch.ones_like(alone, dtype=weight.dtype))
                self.outputs[e] += float((y.double().norm(dim=-1) * weight[token, place].double()).sum())
