"""peft's merges of LoRA adapters, faster: ``install()``, and ``add_weighted_adapter`` works as before.

======================  =============================================================================================
what peft does          what is done in its place
======================  =============================================================================================
``task_arithmetic``,    one pass over the tensors, in fp32 with one rounding; magnitudes are selected without a sort.
``magnitude_prune``,    Where magnitudes tie at the threshold, the first elements stay (torch leaves open which).
``ties``,               Random masks are drawn by a counter, from a seed that comes of torch's generator: the same
``dare_linear``,        after ``torch.manual_seed``, but others than peft's.
``dare_ties``
``svd``                 QR of the stacked factors and the SVD of a small core, in fp64; no matrix of the weight's size
                        is formed. Factors may have other signs than peft's; their product is the same.
other ``*_svd``         without the columns of a full U and V that nothing uses
======================  =============================================================================================

What peft computes is kept, its own rules with it: ``linear``, ``ties`` and the like work on A and on B each, and an
adapter made of rank-stabilised ones is scaled by sqrt(r) too much (``fastmerge lora merge`` does not do that). Calls
that these functions do not cover (autograd, meta and quantised tensors, weights that an election may not have) go to
peft's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from fastmerge.api.mixed import mixed
from fastmerge.errors import BackendUnavailable

VERSION = "0.21.2"
"""The version whose functions these stand in for."""

_SIGN = {"total": "mass", "frequency": "count"}

_HOOK = "_svd_generalized_task_arithmetic_weighted_adapter"
_theirs: dict[str, Callable[..., Any]] = {}
"""What was replaced, by name, while this is installed."""


def task_arithmetic(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """``sum_i w_i t_i``, as ``peft.utils.merge_utils.task_arithmetic``.

    Args:
        task_tensors: ``[*S]`` each, floating-point, on one device.
        weights: ``[N]``.

    Returns:
        ``[*S]``, of the promoted type of tensors and weights.
    """
    if not _covered(task_tensors, weights):
        return _call("task_arithmetic", task_tensors, weights)
    return _merged("linear", task_tensors, weights)


def magnitude_prune(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """``sum_i w_i t_i`` of the ``int(density n)`` largest magnitudes of each, as peft's function of this name.

    Args:
        task_tensors: ``[*S]`` each, floating-point, on one device.
        weights: ``[N]``.
        density: share that stays; 1 or more keeps all, with peft's warning.

    Raises:
        ValueError: the density is negative.
    """
    if not (_covered(task_tensors, weights) and 0 <= density < 1):
        return _call("magnitude_prune", task_tensors, weights, density)
    return _merged("magnitude_prune", task_tensors, weights, density=density)


def ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """Trim, elect a sign by the unweighted tensors, average what agrees by its number, as peft's function of this name.

    Args:
        task_tensors: ``[*S]`` each, floating-point, on one device.
        weights: ``[N]``; those of 0 or less go to peft's code.
        density: share of each tensor that stays, ``int(density n)`` elements.
        majority_sign_method: sign of the sum, or of the number of signs.

    Raises:
        ValueError: the density is negative.
    """
    if not (_covered(task_tensors, weights, elect=majority_sign_method) and 0 <= density < 1):
        return _call("ties", task_tensors, weights, density, majority_sign_method)
    return _merged("ties", task_tensors, weights, density=density, elect=_SIGN[majority_sign_method])


def dare_linear(task_tensors: Sequence[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Keep elements with probability ``density``, divide by it, and add up weighted, as peft's function of this name.

    Args:
        task_tensors: ``[*S]`` each, floating-point, on one device.
        weights: ``[N]``.
        density: the probability, a multiple of 1/65536 in effect.

    Raises:
        ValueError: the density is negative.
    """
    if not (_covered(task_tensors, weights) and 0 < density < 1):
        return _call("dare_linear", task_tensors, weights, density)
    return _merged("dare_linear", task_tensors, weights, density=density)


def dare_ties(
    task_tensors: Sequence[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> torch.Tensor:
    """Drop and rescale as :func:`dare_linear`, elect and average as :func:`ties`, as peft's function of this name.

    Args:
        task_tensors: ``[*S]`` each, floating-point, on one device.
        weights: ``[N]``; those of 0 or less go to peft's code.
        density: probability that an element stays.
        majority_sign_method: sign of the sum, or of the number of signs.

    Raises:
        ValueError: the density is negative.
    """
    if not (_covered(task_tensors, weights, elect=majority_sign_method) and 0 < density < 1):
        return _call("dare_ties", task_tensors, weights, density, majority_sign_method)
    return _merged("dare_ties", task_tensors, weights, density=density, elect=_SIGN[majority_sign_method])


FUNCTIONS = (task_arithmetic, magnitude_prune, ties, dare_linear, dare_ties)
"""Functions that have peft's names and arguments."""


def install() -> None:
    """Puts these functions in the place of peft's, for ``add_weighted_adapter`` and for callers of ``merge_utils``.

    Raises:
        BackendUnavailable: peft is not there, or of another version.
    """
    try:
        import peft
        from peft.tuners.lora import model as lora
        from peft.utils import merge_utils
    except ImportError as error:
        raise BackendUnavailable(f"peft cannot be imported: {error}") from None
    if peft.__version__ != VERSION:
        raise BackendUnavailable(f"written for peft {VERSION}, and this is {peft.__version__}: nothing was replaced")
    if _theirs:
        return
    _theirs[_HOOK] = getattr(lora.LoraModel, _HOOK)
    for function in FUNCTIONS:
        name = function.__name__
        _theirs[name] = getattr(merge_utils, name)
        for module in (merge_utils, lora):
            setattr(module, name, function)
    setattr(lora.LoraModel, _HOOK, _svd)


def uninstall() -> None:
    """Gives peft its own functions back."""
    if not _theirs:
        return
    from peft.tuners.lora import model as lora
    from peft.utils import merge_utils

    setattr(lora.LoraModel, _HOOK, _theirs.pop(_HOOK))
    for name, function in _theirs.items():
        for module in (merge_utils, lora):
            setattr(module, name, function)
    _theirs.clear()


def _call(name: str, *args: Any) -> Any:
    """The function of peft itself."""
    from peft.utils import merge_utils

    function = _theirs.get(name) or getattr(merge_utils, name)
    return function(list(args[0]), *args[1:])


def _covered(tensors: Any, weights: Any, *, elect: str | None = None) -> bool:
    """Whether the engine takes these, and means the same by them."""
    if not isinstance(weights, torch.Tensor) or weights.shape != (len(tensors),) or not tensors:
        return False
    graph = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, weights))
    fine = all(
        type(t) in (torch.Tensor, torch.nn.Parameter)
        and t.layout is torch.strided
        and t.device.type in ("cpu", "cuda")
        and t.device == tensors[0].device
        and t.shape == tensors[0].shape
        and t.dtype == tensors[0].dtype
        and t.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and t.numel()
        for t in tensors
    )
    finite = fine and not graph and weights.device.type != "meta" and bool(weights.isfinite().all())
    # Agreement is that of weighted tensors here, of unweighted ones in peft.
    return finite and (elect is None or (elect in _SIGN and bool((weights > 0).all())))


def _merged(kind: str, tensors: Sequence[torch.Tensor], weights: torch.Tensor, **how: Any) -> torch.Tensor:
    """The engine's result, of the type that peft's function has."""
    target = torch.promote_types(tensors[0].dtype, weights.dtype)
    if "elect" in how:  # peft divides by a number of models, which is fp32 then
        target = torch.promote_types(target, torch.float32)
    seed = int(torch.randint(1 << 62, ())) if kind.startswith("dare") else 0
    return mixed(kind, [t.detach() for t in tensors], weights.tolist(), out_dtype=target, seed=seed, **how)


def _svd(
    model: Any,
    combination_type: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    new_rank: int,
    target: Any,
    target_lora_A: torch.Tensor,  # noqa: N803  peft's names
    target_lora_B: torch.Tensor,  # noqa: N803
    density: float | None,
    majority_sign_method: str,
    clamp: float | None = None,
    full_matrices: bool = True,  # noqa: ARG001  columns of U and V that it adds are cut off again
    driver: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of one layer; stands in for the method of ``LoraModel`` that has these arguments."""
    # A clamp is a quantile of factors whose signs are arbitrary: peft's own are kept.
    if combination_type == "svd" and clamp is None:
        made = _factored(target, adapters, weights, new_rank)
        if made is not None:
            return made
    result: tuple[torch.Tensor, torch.Tensor] = _theirs[_HOOK](
        *(model, combination_type, adapters, weights, new_rank, target, target_lora_A, target_lora_B),
        *(density, majority_sign_method, clamp),
        full_matrices=False,
        driver=driver,
    )
    return result


def _factored(
    target: Any, adapters: Sequence[str], weights: Sequence[float], rank: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The best approximation of the weighted sum, of layers whose update is ``scaling (B A)``; None for others."""
    from peft.tuners.lora.layer import Embedding, Linear

    from fastmerge.ops.factored import truncated

    if type(target) is Linear:
        sides = {n: (target.lora_A[n].weight, target.lora_B[n].weight) for n in adapters if n in target.lora_A}
    elif type(target) is Embedding:
        found = target.lora_embedding_A
        sides = {n: (found[n], target.lora_embedding_B[n]) for n in adapters if n in found}
    else:
        return None
    chosen = [(*sides[n], w * target.scaling[n]) for n, w in zip(adapters, weights, strict=True) if n in sides]
    tensors = [t for *pair, _ in chosen for t in pair]
    if not tensors or any(t.dim() != 2 or not t.is_floating_point() or t.device.type == "meta" for t in tensors):
        return None
    parts = [(a.detach().double().cpu().numpy(), b.detach().double().cpu().numpy()) for a, b, _ in chosen]
    try:
        made = truncated(parts, [w for *_, w in chosen], rank)
    except ValueError:  # peft has its own words for that
        return None
    a, b = (torch.from_numpy(x).to(tensors[0].device, tensors[0].dtype) for x in made)
    return a, b
