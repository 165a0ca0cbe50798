"""What a model's activations say, from calibration data: which channels and layers count, and how they vary together.

Everything is summed batch by batch in fp64; nothing is kept of a batch. The model is left as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastmerge.dna.anatomy import Anatomy
from fastmerge.dna.importance import ACTIVATION, Scores, mlps, read
from fastmerge.dna.reading import Reader
from fastmerge.errors import RecipeError

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    Batch = Mapping[str, torch.Tensor]
    Look = Callable[[torch.Tensor], None]

Array: TypeAlias = "npt.NDArray[np.float64]"

GRAM_BYTES = 2 << 30
"""Gram matrices that are summed up at a time; a larger one is alone."""


def batches(data: object) -> list[Batch]:
    """Calibration data as batches.

    Args:
        data: token ids ``[T]`` or ``[B, T]``, a mapping with ``input_ids`` and perhaps ``attention_mask``, or any
            number of those.

    Raises:
        RecipeError: it is something else, or nothing.
    """
    import torch

    if isinstance(data, torch.Tensor | Mapping) or not hasattr(data, "__iter__"):
        data = [data]
    found: list[Batch] = []
    for i, one in enumerate(data):
        given = one if isinstance(one, Mapping) or hasattr(one, "keys") else {"input_ids": one}
        batch = {key: given[key] for key in ("input_ids", "attention_mask") if key in given and given[key] is not None}
        ids = batch.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim not in (1, 2) or not ids.numel():
            shown = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(one).__name__
            raise RecipeError(f"calibration_data: batch {i}: expected token ids [B, T], got {shown}")
        found.append({key: t if t.ndim == 2 else t[None] for key, t in batch.items()})
    if not found:
        raise RecipeError("calibration_data: expected at least one batch, got none")
    return found


def in_vocabulary(ids: torch.Tensor, model: Any) -> None:
    """Holds that tokens are of the vocabulary of a model; an embedding reads past its end on some devices.

    Raises:
        RecipeError: they are not.
    """
    words = model.get_input_embeddings().weight.shape[0]
    least, most = int(ids.min()), int(ids.max())
    if least < 0 or most >= words:
        raise RecipeError(
            f"calibration_data: expected tokens from 0 to {words - 1}, got {least if least < 0 else most}"
        )


def moved(data: Sequence[Batch], model: Any) -> Iterator[Batch]:
    """Batches on the device of a model.

    Raises:
        RecipeError: tokens that are not of its vocabulary.
    """
    device = next(model.parameters()).device
    for batch in data:
        in_vocabulary(batch["input_ids"], model)
        yield {key: t.to(device) for key, t in batch.items()}


@contextlib.contextmanager
def measuring(model: Any) -> Iterator[None]:
    """A model in evaluation mode, for a while."""
    was = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in was:
            m.training = True


class _Tokens:
    """The batch at hand: its shape, and which of its tokens count (all but padding)."""

    shape: tuple[int, ...] = ()
    mask: torch.Tensor | None = None

    def of(self, batch: Batch) -> None:
        """Takes a batch."""
        mask = batch.get("attention_mask")
        self.shape = tuple(batch["input_ids"].shape)
        self.mask = None if mask is None else mask.bool()

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, T, n]`` in fp32; some modules get all tokens in a row."""
        return x.detach().float().reshape(*self.shape, -1)

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens that count, ``[tokens, n]``."""
        x = self._whole(x)
        return x.flatten(0, 1) if self.mask is None else x[self.mask]

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """Mean magnitude over the tokens of each sequence, ``[B, n]``."""
        x = self._whole(x).abs()
        if self.mask is None:
            return x.mean(dim=1)
        weight = self.mask[..., None].float()
        return (x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)


def _run(model: Any, data: Sequence[Batch], tokens: _Tokens, looks: Mapping[str, list[Look]]) -> None:
    """Runs all batches; before each module its input is looked at. The empty name stands for nothing."""
    import torch

    def hook(look: Look) -> Callable[..., None]:
        return lambda _module, args, kwargs: look(args[0] if args else kwargs["hidden_states"])

    handles = []
    try:
        for name, functions in looks.items():
            module = model.get_submodule(name)
            handles += [module.register_forward_pre_hook(hook(f), with_kwargs=True) for f in functions]
        with measuring(model), torch.no_grad():
            for batch in moved(data, model):
                tokens.of(batch)
                model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _module(name: str | None) -> str:
    assert name is not None
    return name.removesuffix(".weight")


def _mlp_of(anatomy: Anatomy, model: Any, layer: int) -> str:
    """The module that is the MLP of a layer, dense or sparse; in memory Mixtral's has another name."""
    name = anatomy.find("router", layer) or anatomy.find("gate", layer) or anatomy.find("gate_up", layer)
    assert name is not None
    prefix = f"{anatomy.arch.layers}.{layer}."
    found = name.removeprefix(prefix).partition(".")[0]
    return prefix + (found if hasattr(model.get_submodule(prefix[:-1]), found) else "mlp")


def _attention_of(anatomy: Anatomy, layer: int) -> str:
    return _module(anatomy.find("q", layer) or anatomy.find("qkv", layer))


def measure(anatomy: Anatomy, model: Any, data: Sequence[Batch]) -> Scores:
    r"""Scores by activations (Minitron's): mean magnitude over a sequence, Euclidean length over sequences.

    Channels are looked at where attention and MLP read them, behind the norms, and their squares are summed over all
    these places; neurons at the input of ``down_proj``, heads at that of ``o_proj``. A layer has its block influence,
    ``1 - mean cos(x, layer(x))``, an expert the share of tokens that are routed to it. Neurons of experts are not seen,
    and have no scores.

    Args:
        anatomy: of the model.
        model: a transformers module.
        data: see :func:`batches`.
    """
    import torch

    tokens = _Tokens()
    means: dict[str, Array] = {}
    energy: dict[str, Array] = {}
    looks: dict[str, list[Look]] = {}
    count: dict[str, int] = {}
    influence, turns = np.zeros(anatomy.layers), 0.0
    before: list[torch.Tensor] = []

    def mean(key: str) -> Look:
        def look(x: torch.Tensor) -> None:
            found = tokens.means(x).double().square().sum(dim=0).cpu().numpy()
            means[key] = means.get(key, 0.0) + found

        return look

    def square(key: str) -> Look:
        def look(x: torch.Tensor) -> None:
            flat = tokens.flat(x)
            energy[key] = energy.get(key, 0.0) + flat.double().square().sum(dim=0).cpu().numpy()
            count[key] = count.get(key, 0) + len(flat)

        return look

    def turn(layer: int) -> Look:
        """What goes into a layer is what came out of the one before."""

        def look(x: torch.Tensor) -> None:
            nonlocal turns
            flat = tokens.flat(x)
            if layer:
                cosines = torch.nn.functional.cosine_similarity(before.pop(), flat, dim=-1)
                influence[layer - 1] += (1 - cosines.double()).sum().item()
            else:
                turns += len(flat)
            if layer < anatomy.layers:
                before.append(flat)

        return look

    for layer in range(anatomy.layers):
        looks.setdefault(f"{anatomy.arch.layers}.{layer}", []).append(turn(layer))
        looks.setdefault(_attention_of(anatomy, layer), []).append(mean("hidden"))
        looks.setdefault(_mlp_of(anatomy, model, layer), []).append(mean("hidden"))
        looks.setdefault(_module(anatomy.find("o", layer)), []).append(mean(f"heads {layer}"))
    routed = _routed(anatomy, tokens)
    for layer, (look, _) in routed.items():
        looks[_mlp_of(anatomy, model, layer)].append(look)
    looks.setdefault(_module(anatomy.find("final_norm")), []).append(turn(anatomy.layers))
    dense = {mlp.key: f"{mlp.prefix}down" for mlp in mlps(anatomy) if mlp.key[2] is None}
    for (axis, layer, _), role in dense.items():
        looks.setdefault(_module(anatomy.find(role, layer)), []).append(mean(f"{axis} {layer}"))
    for name, (part, _, _) in anatomy.places.items():
        if part.role.endswith("_norm") and part.axes[0] in ("hidden", "q", "kv"):
            looks.setdefault(_module(name), []).append(square(name))
    _run(model, data, tokens, looks)
    heads, groups = anatomy.sizes["heads"], anatomy.sizes["kv_heads"]
    each = {i: means[f"heads {i}"].reshape(heads, -1).sum(axis=1) for i in range(anatomy.layers)}
    return Scores(
        ACTIVATION,
        layers=influence / max(turns, 1),
        hidden=np.sqrt(means["hidden"]),
        inner={key: np.sqrt(means[f"{key[0]} {key[1]}"]) for key in dense},
        heads={i: np.sqrt(x) for i, x in each.items()},
        groups={i: np.sqrt(x.reshape(groups, -1).sum(axis=1)) for i, x in each.items()},
        experts={i: counts / max(turns, 1) for i, (_, counts) in routed.items()},
        energy={name: x / max(count[name], 1) for name, x in energy.items()},
    )


def _routed(anatomy: Anatomy, tokens: _Tokens) -> dict[int, tuple[Look, Array]]:
    """For each sparse layer what looks at the input of its router, and how many tokens went to each expert."""
    import torch

    found = {}
    sources = anatomy.parent.tensors
    with Reader([anatomy.parent]) as reader:
        bring = reader.bring
        for layer in filter(anatomy.is_sparse, range(anatomy.layers)):
            weight, bias = (
                None if name is None else torch.from_numpy(read(bring, sources[name])).float()
                for name in (anatomy.find("router", layer), anatomy.find("router_bias", layer))
            )
            assert weight is not None
            counts = np.zeros(len(weight))
            selects = anatomy.arch.sizes["experts"] == "n_routed_experts"  # the bias only selects, behind a sigmoid
            found[layer] = _count(tokens, counts, weight, bias, selects, anatomy.config["num_experts_per_tok"]), counts
    return found


def _count(
    tokens: _Tokens, counts: Array, weight: torch.Tensor, bias: torch.Tensor | None, selects: bool, top: int
) -> Look:
    def look(x: torch.Tensor) -> None:
        flat = tokens.flat(x)
        logits = flat @ weight.to(flat.device).T
        if selects:
            logits = logits.sigmoid()
        if bias is not None:
            logits = logits + bias.to(flat.device)
        chosen = logits.topk(top, dim=-1).indices.flatten()
        counts[:] += chosen.bincount(minlength=len(counts)).cpu().numpy()

    return look


def grams(anatomy: Anatomy, model: Any, data: Sequence[Batch], layers: Sequence[int]) -> Iterator[tuple[int, Array]]:
    """For each of some dense layers the sum of ``h h^T`` over tokens, ``[I, I]``, of what ``down_proj`` reads.

    As many layers at a time as :data:`GRAM_BYTES` holds; each time all batches run.
    """
    each = 8 * anatomy.sizes.get("ffn", 0) ** 2
    at_once = max(1, GRAM_BYTES // max(each, 1))
    for first in range(0, len(layers), at_once):
        found: dict[int, torch.Tensor] = {}
        tokens = _Tokens()
        looks = {
            _module(anatomy.find("down", layer)): [_outer(found, layer, tokens.flat)]
            for layer in layers[first : first + at_once]
        }
        _run(model, data, tokens, looks)
        for layer in layers[first : first + at_once]:
            yield layer, found.pop(layer).cpu().numpy()


def covariance(anatomy: Anatomy, model: Any, data: Sequence[Batch]) -> Array:
    """Sum of ``x x^T`` over tokens and norms, ``[D, D]``, of the residual stream divided by its root mean square."""
    tokens = _Tokens()
    found: dict[int, torch.Tensor] = {}

    def normed(x: torch.Tensor) -> torch.Tensor:
        flat = tokens.flat(x)
        return flat / flat.square().mean(dim=-1, keepdim=True).clamp(min=1e-30).sqrt()

    _run(model, data, tokens, {name: [_outer(found, 0, normed)] for name in _norms(anatomy).values()})
    total: Array = found[0].cpu().numpy()
    return total


def energies(anatomy: Anatomy, model: Any, data: Sequence[Batch], basis: Array) -> dict[str, Array]:
    """Mean square of the residual stream along each column of a basis, ``[D]`` by the name of a norm's weight."""
    import torch

    tokens = _Tokens()
    found: dict[str, Array] = {}
    turned = torch.from_numpy(basis).float()

    def look(key: str) -> Look:
        def add(x: torch.Tensor) -> None:
            flat = tokens.flat(x)
            along = (flat @ turned.to(flat.device)).double().square().sum(dim=0)
            found[key] = found.get(key, 0.0) + along.cpu().numpy()

        return add

    _run(model, data, tokens, {module: [look(name)] for name, module in _norms(anatomy).items()})
    return found


def _norms(anatomy: Anatomy) -> dict[str, str]:
    """Weights of norms in front of what reads the residual stream, and their modules."""
    roles = ("input_norm", "mlp_norm", "final_norm")
    return {name: _module(name) for name, (part, _, _) in anatomy.places.items() if part.role in roles}


def _outer(found: dict[int, torch.Tensor], key: int, of: Callable[[torch.Tensor], torch.Tensor]) -> Look:
    """Sums outer products; each batch's in fp32, their sum in fp64."""

    def look(x: torch.Tensor) -> None:
        flat = of(x)
        product = (flat.T @ flat).double()
        found[key] = found[key] + product if key in found else product

    return look
