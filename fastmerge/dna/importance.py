r"""How much each layer, channel, neuron, head and expert counts: from the weights, or from gradients of the loss.

Both reduce every matrix to sums over its rows and over its columns, of squares or of magnitudes, which are then put
together. With weights (``\lVert\cdot\rVert`` is the Euclidean length):

================  ===============================================================================================
a neuron          ``|gate_i| |up_i| |down_i|``
a channel         squared rows of what writes it, and squared columns, times the squared gain, of what reads it
a query head      ``|o_h| |v_g|`` with the values of its group; a group of heads has the sum of its heads
an expert         ``|router_e|``
a layer           the length of all of its matrices
================  ===============================================================================================

With gradients each of them has the sum over all of its weights, of ``|dL/dw|`` or of ``|w dL/dw|``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from fastmerge.checkpoint.header import listing
from fastmerge.dna.anatomy import Anatomy, Axis
from fastmerge.dna.reading import Reader
from fastmerge.dtypes import FLOATS
from fastmerge.errors import CheckpointError
from fastmerge.keys import tensor_key
from fastmerge.ops.made import BLOCK, load
from fastmerge.ops.sources import Bring
from fastmerge.ops.spec import Source

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from fastmerge.dna.activations import Batch

Array: TypeAlias = "npt.NDArray[np.float64]"

Inner = tuple[str, int, int | None]
"""An inner dimension of an MLP: its axis, the layer, and the expert."""

WEIGHT_NORM, ACTIVATION, TAYLOR, RANDOM = "weight_norm", "activation", "taylor", "random"


@dataclass
class Scores:
    """What counts how much; more is better.

    Attributes:
        metric: how it was found.
        layers: ``[L]``.
        hidden: ``[D]``.
        inner: of each MLP, ``[I]``.
        heads: of query heads by layer, ``[H]``.
        groups: of groups of heads with their keys and values by layer, ``[G]``.
        experts: by layer, ``[E]``.
        energy: mean square of each channel of what goes into a norm, by the name of the norm's weight.
    """

    metric: str
    layers: Array | None = None
    hidden: Array | None = None
    inner: dict[Inner, Array] = field(default_factory=dict)
    heads: dict[int, Array] = field(default_factory=dict)
    groups: dict[int, Array] = field(default_factory=dict)
    experts: dict[int, Array] = field(default_factory=dict)
    energy: dict[str, Array] = field(default_factory=dict)

    def check(self, ref: str) -> None:
        """Refuses scores that rank nothing.

        Raises:
            CheckpointError: one is NaN or infinite.
        """
        inside = (self.inner, self.heads, self.groups, self.experts)
        every = [x for x in (self.layers, self.hidden) if x is not None] + [x for by in inside for x in by.values()]
        if not all(np.isfinite(x).all() for x in every):
            raise CheckpointError(f"{ref}: {self.metric}: expected finite scores, got NaN or infinity")


class Mlp(NamedTuple):
    """One MLP of a model: a dense one, an expert or a shared one.

    Attributes:
        key: its inner dimension.
        prefix: of its roles: empty or ``shared_``.
        expert: in the tensors' names; None also where a tensor holds all experts.
        slot: place of the expert in tensors that hold all.
    """

    key: Inner
    prefix: str
    expert: int | None
    slot: int


def mlps(anatomy: Anatomy) -> Iterator[Mlp]:
    """Every MLP of a model."""
    for part, layer, expert in anatomy.places.values():
        if part.role not in ("down", "shared_down") or layer is None:
            continue
        assert part.reads is not None
        axis = part.axes[part.reads]
        assert isinstance(axis, str)
        prefix = part.role.removesuffix("down")
        if part.axes[0] == "experts":
            for e in range(anatomy.sizes["experts"]):
                yield Mlp((axis, layer, e), prefix, None, e)
        else:
            yield Mlp((axis, layer, expert), prefix, expert, 0)


class Sums(NamedTuple):
    """Sums of something over a tensor ``[E, A, B]`` (or ``[A, B]``, with E = 1).

    Attributes:
        rows: ``[E, A]``.
        columns: ``[E, B]``.
    """

    rows: Array
    columns: Array


def read(bring: Bring, source: Source) -> Array:
    """A small tensor as fp64."""
    size = int(np.prod(source.shape, dtype=np.int64))
    return load(bring, source, 0, size).astype(np.float64).reshape(source.shape)


def squared(bring: Bring, source: Source) -> Sums:
    """Sums of squares in fp64; a panel of rows is in memory at a time, the same ones always."""
    *lead, height, width = source.shape
    experts = int(np.prod(lead, dtype=np.int64))
    rows, columns = np.zeros((experts, height)), np.zeros((experts, width))
    step = max(1, BLOCK // width)
    for e in range(experts):
        for row in range(0, height, step):
            count = min(step, height - row)
            panel = load(bring, source, (e * height + row) * width, count * width).astype(np.float64)
            np.multiply(panel, panel, panel)
            panel = panel.reshape(count, width)
            rows[e, row : row + count] = np.add.reduce(panel, axis=1)
            columns[e] += np.add.reduce(panel, axis=0)
    return Sums(rows, columns)


def weight_scores(anatomy: Anatomy) -> Scores:
    """Scores by the lengths of weights; reads every tensor once."""
    sums: dict[str, Sums] = {}
    gains: dict[str, Array] = {}
    with Reader([anatomy.parent]) as reader:
        bring = reader.bring
        for name, (part, _, _) in anatomy.places.items():
            source = anatomy.parent.tensors[name]
            if source.dtype not in FLOATS:
                found = source.dtype.name
                raise CheckpointError(f"{anatomy.parent.ref}: {name}: expected floating-point numbers, got {found}")
            if part.role.endswith("_norm"):
                gains[name] = read(bring, source) + float(anatomy.arch.plus_one)
            elif _counts(anatomy, name):
                sums[name] = squared(bring, source)
    for name, (r, c) in sums.items():
        if not (np.isfinite(r).all() and np.isfinite(c).all()):
            raise CheckpointError(f"{anatomy.parent.ref}: {name}: NaN or infinity among its weights")
    return combined(anatomy, sums, gains, WEIGHT_NORM)


def combined(anatomy: Anatomy, sums: Mapping[str, Sums], gains: Mapping[str, Array], metric: str) -> Scores:
    """Puts the sums of matrices together; gains are used, and lengths multiplied, where the metric is of weights."""
    lengths = metric == WEIGHT_NORM
    scores = Scores(metric, layers=np.zeros(anatomy.layers), hidden=np.zeros(anatomy.sizes["hidden"]))
    assert scores.layers is not None
    assert scores.hidden is not None
    view = _View(anatomy, sums, root=lengths)
    for name, (rows, _) in sums.items():
        part, layer, _ = anatomy.places[name]
        if layer is not None:
            scores.layers[layer] += rows.sum()
        if "hidden" not in part.axes:
            continue
        channel = part.axes.index("hidden")
        found = view.along(name, channel).sum(axis=0)
        norm = norm_before(anatomy, part.role, layer) if lengths else None
        gain = gains[norm] ** 2 if norm is not None else 1.0
        scores.hidden += found * gain if part.side(channel) == "reads" else found
        if part.role == "embed" and anatomy.tied and lengths:
            scores.hidden += found * gain
    if lengths:
        scores.layers = np.sqrt(scores.layers)
    for mlp in mlps(anatomy):
        gate, up, down = view.mlp(mlp)
        scores.inner[mlp.key] = gate * up * down if lengths else gate + up + down
    for layer in range(anatomy.layers):
        scores.heads[layer], scores.groups[layer] = _heads(anatomy, view, layer)
        router = anatomy.find("router", layer)
        if router is not None:
            found = view.length(sums[router].rows[0])
            scores.experts[layer] = found if lengths else found + _of_experts(anatomy, sums, layer)
    return scores


def _counts(anatomy: Anatomy, name: str) -> bool:
    """Whether a tensor is a matrix, or several, and no bias."""
    part = anatomy.places[name].part
    return len(part.axes) > 1 and not part.role.endswith("_bias")


def norm_before(anatomy: Anatomy, role: str, layer: int | None) -> str | None:
    """The norm whose gains scale what a matrix reads; None where it reads the residual stream as it is."""
    if layer is None:
        return anatomy.find("final_norm")
    return anatomy.find("input_norm" if role in ("q", "k", "v", "qkv") else "mlp_norm", layer)


def _heads(anatomy: Anatomy, view: _View, layer: int) -> tuple[Array, Array]:
    """Scores of query heads, and of groups."""
    heads, groups = anatomy.sizes["heads"], anatomy.sizes["kv_heads"]
    o = view.length(view.of("o", layer, axis="q").reshape(heads, -1).sum(axis=1))
    q, k, v = (view.length(x.reshape(n, -1).sum(axis=1)) for x, n in zip(view.qkv(layer), (heads, groups, groups)))  # noqa: B905
    share = heads // groups
    each = o * v.repeat(share) if view.root else o + q + (k + v).repeat(share) / share
    return each, each.reshape(groups, share).sum(axis=1)


def _of_experts(anatomy: Anatomy, sums: Mapping[str, Sums], layer: int) -> Array:
    """Sums over all weights of each expert."""
    found = np.zeros(anatomy.sizes["experts"])
    for name, (part, _, expert) in anatomy.of_layer(layer):
        if name in sums and expert is not None:
            found[expert] += sums[name].rows.sum()
        elif name in sums and part.axes[0] == "experts" and part.role != "router":
            found += sums[name].rows.sum(axis=1)
    return found


@dataclass
class _View:
    """Sums along the axes of tensors, by their roles.

    Attributes:
        anatomy: of the model.
        sums: of its matrices.
        root: whether the sums are of squares, so that roots are lengths.
    """

    anatomy: Anatomy
    sums: Mapping[str, Sums]
    root: bool

    def length(self, sums: Array) -> Array:
        """The root, where sums are of squares."""
        return np.sqrt(sums) if self.root else sums

    def along(self, name: str, dimension: int) -> Array:
        """The sums of a tensor along a dimension: ``[E, n]``, or ``[1, E]`` along that of the experts."""
        rows, columns = self.sums[name]
        rank = len(self.anatomy.places[name].part.axes)
        if rank - dimension == 3:
            each: Array = rows.sum(axis=1)[None]
            return each
        return rows if rank - dimension == 2 else columns

    def of(self, role: str, layer: int, expert: int | None = None, *, slot: int = 0, axis: Axis) -> Array:
        """The sums of the tensor with a role along an axis."""
        name = self.anatomy.find(role, layer, expert)
        assert name is not None
        found: Array = self.along(name, self.anatomy.places[name].part.axes.index(axis))[slot]
        return found

    def qkv(self, layer: int) -> tuple[Array, Array, Array]:
        """Along the outputs of queries, keys and values."""
        if self.anatomy.find("qkv", layer) is None:
            return self.of("q", layer, axis="q"), self.of("k", layer, axis="kv"), self.of("v", layer, axis="kv")
        q, kv = self.anatomy.sizes["q"], self.anatomy.sizes["kv"]
        found = self.of("qkv", layer, axis=("q", "kv", "kv"))
        return found[:q], found[q : q + kv], found[q + kv :]

    def mlp(self, mlp: Mlp) -> tuple[Array, Array, Array]:
        """Along the neurons of gate, up and down."""
        (axis, layer, _), prefix, expert, slot = mlp
        down = self.length(self.of(f"{prefix}down", layer, expert, slot=slot, axis=axis))
        if self.anatomy.find(f"{prefix}gate", layer, expert) is not None:
            gate, up = (self.of(prefix + role, layer, expert, axis=axis) for role in ("gate", "up"))
        else:
            both = self.of("gate_up", layer, expert, slot=slot, axis=(axis, axis))
            half = len(both) // 2
            gate, up = (both[::2], both[1::2]) if self.anatomy.arch.interleaved else (both[:half], both[half:])
        return self.length(gate), self.length(up), down


def random_scores(anatomy: Anatomy, seed: int) -> Scores:
    """Random numbers for everything, a function of the seed."""
    from fastmerge.philox import NOISE, normal

    def draw(what: str, n: int) -> Array:
        drawn: Array = normal(tensor_key(seed, what), 0, NOISE, 0, n).astype(np.float64)
        return drawn

    layers, sizes = range(anatomy.layers), anatomy.sizes
    scores = Scores(RANDOM, draw("layers", anatomy.layers), draw("hidden", sizes["hidden"]))
    for mlp in mlps(anatomy):
        scores.inner[mlp.key] = draw(str(mlp.key), sizes[mlp.key[0]])
    for layer in layers:
        scores.heads[layer] = draw(f"heads {layer}", sizes["heads"])
        scores.groups[layer] = draw(f"groups {layer}", sizes["kv_heads"])
        if anatomy.is_sparse(layer):
            scores.experts[layer] = draw(f"experts {layer}", sizes["experts"])
    return scores


def gradient_scores(anatomy: Anatomy, model: Any, data: Sequence[Batch], metric: str) -> Scores:
    """Scores by the gradient of the language model's loss, summed over calibration batches.

    Args:
        anatomy: of the model.
        model: a transformers module, whose own gradients are left as they are.
        data: calibration batches, as :func:`fastmerge.dna.activations.batches` gives them.
        metric: ``gradient`` or ``taylor``.
    """
    import torch

    from fastmerge.dna.activations import measuring, moved
    from fastmerge.dna.parent import on_disk

    named = dict(model.named_parameters())
    wanted = [p.requires_grad for p in named.values()]
    totals: dict[str, torch.Tensor] = {}
    with measuring(model):
        try:
            for p in named.values():
                p.requires_grad_(True)
            for batch in moved(data, model):
                ids, mask = batch["input_ids"], batch.get("attention_mask")
                labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
                loss = model(**batch, labels=labels, use_cache=False).loss
                for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)):  # noqa: B905
                    if g is not None:
                        totals[name] = totals[name] + g.float() if name in totals else g.float()
        finally:
            for p, was in zip(named.values(), wanted, strict=True):
                p.requires_grad_(was)
        for name, total in totals.items():
            if metric == TAYLOR:
                total.mul_(named[name].detach().float())
            total.abs_()
    sums = {}
    for name, total in on_disk(model, totals).items():
        if name in anatomy.places and _counts(anatomy, name):
            value = total.detach().cpu().numpy().astype(np.float64)
            value = value.reshape(-1, *value.shape[-2:])
            sums[name] = Sums(value.sum(axis=2), value.sum(axis=1))
    absent = [name for name in anatomy.places if _counts(anatomy, name) and name not in sums]
    if absent:
        raise CheckpointError(f"{anatomy.parent.ref}: no gradient reaches {listing(absent)}")
    return combined(anatomy, sums, {}, metric)
