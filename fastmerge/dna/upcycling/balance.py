"""The loss that keeps a mixture's experts evenly used, as a method of the module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastmerge.errors import ShapeError

if TYPE_CHECKING:
    import torch


def attach_moe_aux_loss(model: Any, weight: float | None = None) -> Any:
    """Gives a mixture of experts a method ``get_moe_aux_loss()``.

    The loss is that of the last forward pass, with its graph, over the tokens that the attention mask leaves:
    ``weight E sum_e f_e p_e`` with f_e the choices of expert e per token and p_e its mean probability (softmax of the
    router; of a sigmoid router its values divided by their sum), both over all layers. It is ``weight k`` where all
    experts are used alike. ``output_router_logits`` stays False: transformers would add the same loss to
    ``outputs.loss``, and then it would count twice.

    ``from_pretrained`` gives a module of transformers without the method: call this again; ``config.json`` has the
    coefficient (``router_aux_loss_coef``).

    Args:
        model: a module of transformers.
        weight: coefficient; that of the configuration where absent. A model that has the method gets this one.

    Returns:
        The model.

    Raises:
        ShapeError: the model has no routers.
    """
    if weight is None:
        weight = float(getattr(model.config, "router_aux_loss_coef", 0.0))
    before = getattr(model, "get_moe_aux_loss", None)
    if isinstance(before, _Balance):
        before.weight = weight
        return model
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith("topkrouter")]
    if not routers:
        raise ShapeError(f"{type(model).__name__}: expected a mixture of experts, got a model without routers")
    model.get_moe_aux_loss = _Balance(model, routers, weight)
    return model


class _Balance:
    """What the routers said in the last forward pass."""

    def __init__(self, model: Any, routers: list[Any], weight: float) -> None:
        self.weight = weight
        self.routers = routers
        self.said: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.mask: torch.Tensor | None = None
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for router in routers:
            router.register_forward_hook(self._heard)

    def _begin(self, _: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.said.clear()
        self.mask = named.get("attention_mask", args[1] if len(args) > 1 else None)

    def _heard(self, router: Any, _: Any, output: tuple[Any, ...]) -> None:
        self.said[self.routers.index(router)] = output[0], output[2]

    def __call__(self) -> torch.Tensor:
        """The loss of the last forward pass: a scalar with its graph."""
        import torch

        if not self.said:
            raise ShapeError("get_moe_aux_loss: expected a forward pass before it")
        chosen, probability, tokens = [], [], []
        for i, (logits, experts) in self.said.items():
            wide = logits.float()
            sigmoid = hasattr(self.routers[i], "e_score_correction_bias")
            shares = wide.sigmoid() / wide.sigmoid().sum(-1, keepdim=True) if sigmoid else wide.softmax(-1)
            counts = torch.zeros_like(shares).scatter_add(1, experts, torch.ones_like(shares[:, : experts.shape[1]]))
            keep = torch.ones_like(shares[:, 0])
            if self.mask is not None and self.mask.dim() == 2:
                keep = self.mask.reshape(-1).to(keep)
            chosen.append((counts * keep[:, None]).sum(0))
            probability.append((shares * keep[:, None]).sum(0))
            tokens.append(keep.sum())
        total = torch.stack(tokens).sum()
        f, p = (torch.stack([t.to(total.device) for t in x]).sum(0) / total for x in (chosen, probability))
        return self.weight * len(f) * (f * p).sum()

    def __getstate__(self) -> dict[str, Any]:
        """Without tensors of a graph, which cannot be copied."""
        return {**self.__dict__, "said": {}, "mask": None}
