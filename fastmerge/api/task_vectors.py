"""Task vectors, SLERP, TIES and DARE as plain functions over state dictionaries in fp32.

The names, signatures and results are those of the short torch programs that circulate for these methods;
the arithmetic is that of :mod:`fastmerge.methods` and runs on the same kernels, so it is exact about
selection, reproducible on every machine, and needs no temporary per step. What those programs do that one may
not expect is kept where results depend on it, and documented; where they crash, these do not.

Every function returns new fp32 tensors, on the device of its inputs (the CPU, or one GPU); inputs are not changed.
Tensors of other types than fp16, bf16 and fp32 are converted to fp32 first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from fastmerge.api.tensors import run
from fastmerge.checkpoint import Checkpoint
from fastmerge.dtypes import BF16, F16, F32
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.methods import METHODS
from fastmerge.methods.called import called
from fastmerge.methods.parameters import is_list, number
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Op
from fastmerge.planning.from_tensors import TensorPlanner
from fastmerge.tensors import check, python_values

if TYPE_CHECKING:
    import os

    import torch

    from fastmerge.checkpoint import TensorInfo

    State = Mapping[str, "torch.Tensor"]
    Input: TypeAlias = torch.Tensor | FileRange
    Job = tuple[str, Sequence[Input], Mapping[str, Any], tuple[int, ...] | None]

_KINDS = {"torch.bfloat16": BF16, "torch.float16": F16, "torch.float32": F32}


def _plain(t: Input) -> Input:
    """A contiguous tensor of a type that widens to fp32."""
    if isinstance(t, FileRange):
        return t
    t = t.detach()
    return (t if str(t.dtype) in _KINDS else t.float()).contiguous()


def _open(ref: str | os.PathLike[str], model: int) -> tuple[Checkpoint, dict[str, Input]]:
    """A safetensors file, a model directory or a hub id, and its tensors: in the file, where their type allows it."""
    checkpoint = Checkpoint.open(ref)
    tensors = checkpoint.tensors
    return checkpoint, {
        n: FileRange(i, model) if i.dtype in _KINDS.values() else _load(checkpoint, i) for n, i in tensors.items()
    }


def _load(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    import numpy as np
    import torch

    raw = np.fromfile(checkpoint.files[info.file].path, np.uint8, info.nbytes, offset=info.offset)
    return torch.from_numpy(raw).view(getattr(torch, info.dtype.name)).reshape(info.shape)


def _same_shape(name: str, tensors: Sequence[Input]) -> None:
    devices = [t.device for t in tensors if not isinstance(t, FileRange)]
    for t in tensors:
        if not isinstance(t, FileRange):
            check(name, t)
            if t.device != devices[0]:
                raise ShapeError(f"{name}: expected all tensors on {devices[0]}, got one on {t.device}")
        if tuple(t.shape) != tuple(tensors[0].shape):
            raise ShapeError(f"{name}: expected shape {tuple(tensors[0].shape)}, got {tuple(t.shape)}")


def _run(
    method: str,
    jobs: Sequence[Job],
    *,
    preset: str | None = None,
    seed: int = 0,
    checkpoints: Sequence[Checkpoint] = (),
) -> dict[str, torch.Tensor]:
    """Runs a method over (name, inputs, parameters, indices) and returns fp32 results by name, in order."""
    import torch

    kind = METHODS[method]
    has_base = kind.contract.base == "required"
    results: dict[str, torch.Tensor] = {}
    by_device: dict[torch.device, list[Op]] = {}
    planners: dict[tuple[object, ...], TensorPlanner] = {}
    kept = []
    for name, tensors, given, indices in jobs:
        _same_shape(name, tensors)
        inputs = [_plain(t) for t in tensors]
        kept.append(inputs)
        models = tuple(range(len(inputs) - has_base))
        # Ops of one spec have the same inputs in memory.
        where = tuple([isinstance(t, FileRange) for t in inputs])
        key = (where, *((k, tuple(v) if isinstance(v, list) else v) for k, v in given.items()))
        if key not in planners:
            if problem := kind.contract.problem(kind.name, len(models), has_base=has_base):
                raise RecipeError(problem)
            planners[key] = TensorPlanner(called(kind, given, models, preset), has_base=has_base, seed=seed)
        dtypes = tuple([t.dtype if isinstance(t, FileRange) else _KINDS[str(t.dtype)] for t in inputs])
        spec = planners[key].spec(name, tuple(inputs[0].shape), dtypes, models, F32, indices=indices)
        home = next((t.device for t in inputs if not isinstance(t, FileRange)), torch.device("cpu"))
        out = results[name] = torch.empty(spec.shape, dtype=torch.float32, device=home)
        sources = [t if isinstance(t, FileRange) else t.data_ptr() for t in inputs]
        by_device.setdefault(home, []).append(planners[key].op(name, spec, sources, out.data_ptr()))
    for device, ops in by_device.items():
        run(ops, device, checkpoints=checkpoints)
    return results


def _sum(
    jobs: Sequence[tuple[str, Sequence[Input], Sequence[float]]], *checkpoints: Checkpoint
) -> dict[str, torch.Tensor]:
    """``sum c_i x_i`` in order, per name."""
    every: list[Job] = [(n, x, {"weight": list(c), "normalize": False}, None) for n, x, c in jobs]
    return _run("linear", every, checkpoints=checkpoints)


def compute_task_vector(
    base_path: str | os.PathLike[str], finetuned_path: str | os.PathLike[str]
) -> dict[str, torch.Tensor]:
    """What a fine-tune learned: ``fine-tuned - base``.

    Args:
        base_path: a ``.safetensors`` file, a model directory or a hub id.
        finetuned_path: likewise.

    Returns:
        fp32 differences ``[*S]`` of the tensors that both models have, in the base's order.

    Raises:
        CheckpointError: for a model that cannot be read.
        ShapeError: for tensors of different shapes.
    """
    (first, base), (second, tuned) = _open(base_path, 0), _open(finetuned_path, 1)
    return _sum([(name, [tuned[name], base[name]], [1.0, -1.0]) for name in base if name in tuned], first, second)


def apply_task_vectors(
    base_path: str | os.PathLike[str], task_vectors: Sequence[State], lambdas: Sequence[float]
) -> dict[str, torch.Tensor]:
    """``base + sum lambda_i tau_i``, added in order; a vector that lacks a tensor adds nothing to it.

    Args:
        base_path: a ``.safetensors`` file, a model directory or a hub id.
        task_vectors: differences by name, ``[*S]`` each.
        lambdas: one factor per vector; negative ones remove what was learned.

    Returns:
        fp32 tensors of all names of the base, on the device of the vectors.

    Raises:
        RecipeError: where there are not as many factors as vectors.
        ShapeError: for tensors of different shapes.
    """
    factors = _numbers("lambdas", lambdas, task_vectors)
    checkpoint, tensors = _open(base_path, 0)
    jobs = []
    for name, base in tensors.items():
        there = [(tau[name], lam) for tau, lam in zip(task_vectors, factors, strict=True) if name in tau]
        first = base
        if there and there[0][0].is_cuda:
            given = _load(checkpoint, base.info) if isinstance(base, FileRange) else base
            first = given.to(there[0][0].device)
        jobs.append((name, [first, *(t for t, _ in there)], [1.0, *(c for _, c in there)]))
    return _sum(jobs, checkpoint)


def slerp_models(model_a: State, model_b: State, t: float = 0.5) -> dict[str, torch.Tensor]:
    """Spherical interpolation of two models, row by row of the last dimension (preset ``task_vectors`` of ``slerp``).

    A tensor is blended linearly only where *all* its rows are nearly parallel (|cos| > 0.9995); a 1-D tensor is
    one row. Rows that are zero or exactly parallel, which give NaN in the usual program, are blended by the
    sines of a right angle and linearly. Tensors of other types than fp32, fp16 and bf16 are those of ``model_a``.

    Args:
        model_a: state dictionary, ``[*S]`` each.
        model_b: likewise, with at least the names of ``model_a``.
        t: position between ``model_a`` (0) and ``model_b`` (1).

    Returns:
        fp32 tensors by the names of ``model_a`` (those that are copied keep their type).

    Raises:
        ShapeError: for tensors that ``model_b`` lacks or has in another shape.
    """
    jobs: list[Job] = []
    parameters = {"t": number("t", t)}
    for name, a in model_a.items():
        if name not in model_b:
            raise ShapeError(f"{name}: model_b has no such tensor")
        check(name, a)
        if str(a.dtype) in _KINDS:
            jobs.append((name, [a, model_b[name]], parameters, None))
    blended = _run("slerp", jobs, preset="task_vectors")
    return {name: blended.get(name, a) for name, a in model_a.items()}


def ties_merge(
    base_weights: State,
    task_vectors: Sequence[State],
    density: float = 0.2,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    """TIES: trim, elect a sign, merge what agrees (preset ``task_vectors`` of ``ties``).

    Keeps all magnitudes from the ``int(n (1 - density))``-th smallest on (so one more than the density, and all
    ties); elects the sign of the weighted sum, where a sum of 0 leaves the base; divides the sum of weighted
    agreeing deltas by their *number*. With the default weights 1/N that shrinks the result by N compared to the
    paper's mean: pass ``weights=[1.0] * N`` for that one. A density of 1 keeps everything, and so do tensors too
    small for the density to drop an element (the usual program crashes on both). A model of weight 0 or less
    neither counts nor agrees. Where a task vector lacks a tensor, the weights stay with their models.

    Args:
        base_weights: state dictionary, ``[*S]`` each.
        task_vectors: differences by name.
        density: share of each task vector that is kept, 0 .. 1.
        weights: one per task vector; None is 1/N.

    Returns:
        fp32 tensors by the names of the base.

    Raises:
        RecipeError: for a density out of range, or not as many weights as vectors.
        ShapeError: for tensors of different shapes.
    """
    every = _weights(weights, task_vectors)
    return _elect("ties", base_weights, task_vectors, every, {"density": number("density", density, 0, 1)})


def dare_sparsify(
    task_vector: State, p: float = 0.9, seed: int = 42, *, model_index: int = 0
) -> dict[str, torch.Tensor]:
    """DARE: drop each element with probability ``p`` and divide what stays by ``1 - p``.

    Masks are a function of (seed, name, model_index, element), not of a generator's state: they are the same on
    every machine and in any order, but they are not torch's. The probability is a multiple of 1/65536, and the
    rescale is by exactly that one. ``p = 1`` gives zeros.

    Args:
        task_vector: differences by name, ``[*S]`` each.
        p: share that is dropped, 0 .. 1.
        seed: of the masks.
        model_index: which of several models this is; equal ones drop the same elements.

    Returns:
        fp32 tensors by the same names.

    Raises:
        RecipeError: for a ``p`` out of range.
    """
    parameters = {"density": 1.0 - number("p", p, 0, 1)}
    jobs: list[Job] = [(name, [_zeros(name, v), v], parameters, (model_index,)) for name, v in task_vector.items()]
    return _run("dare_linear", jobs, preset="paper", seed=seed)


def dare_ties_merge(
    base_weights: State,
    task_vectors: Sequence[State],
    drop_rate: float = 0.9,
    density: float = 0.2,
    *,
    seed: int = 42,
    shared_mask: bool = False,
) -> dict[str, torch.Tensor]:
    """DARE, then TIES with its own trim (preset ``task_vectors`` of ``dare_ties``).

    See :func:`ties_merge` for what the weights 1/N do.

    The trim has an effect only where ``density < 1 - drop_rate``: with the defaults the threshold is 0.

    Args:
        base_weights: state dictionary, ``[*S]`` each.
        task_vectors: differences by name.
        drop_rate: share of each task vector that is dropped at random.
        density: share of each that the trim may keep after that.
        seed: of the masks.
        shared_mask: drop the same elements of every model, as programs do that seed the generator anew for each;
            by default the masks are independent, which is what the method is for.

    Returns:
        fp32 tensors by the names of the base.

    Raises:
        RecipeError: for a rate or density out of range.
        ShapeError: for tensors of different shapes.
    """
    kept = 1.0 - number("drop_rate", drop_rate, 0, 1)
    parameters = {"density": kept, "trim_density": number("density", density, 0, 1), "shared_mask": shared_mask}
    return _elect("dare_ties", base_weights, task_vectors, _weights(None, task_vectors), parameters, seed=seed)


def _elect(
    method: str,
    base_weights: State,
    task_vectors: Sequence[State],
    weights: Sequence[float],
    parameters: Mapping[str, Any],
    *,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Merges task vectors by an election, as deltas from a base of zeros, and adds the base."""
    jobs: list[Job] = []
    for name, base in base_weights.items():
        here = [i for i, tau in enumerate(task_vectors) if name in tau]
        if here:
            tensors = [_zeros(name, base), *(task_vectors[i][name] for i in here)]
            jobs.append((name, tensors, {**parameters, "weight": [weights[i] for i in here]}, tuple(here)))
    mixed = _run(method, jobs, preset="task_vectors", seed=seed)
    added = _sum([(name, [base_weights[name], mix], [1.0, 1.0]) for name, mix in mixed.items()])
    rest = _sum([(name, [base], [1.0]) for name, base in base_weights.items() if name not in mixed])
    return {name: added[name] if name in added else rest[name] for name in base_weights}


def _zeros(name: str, like: torch.Tensor) -> torch.Tensor:
    """A base that makes task vectors of models: small, and exact to subtract."""
    import torch

    check(name, like)
    return torch.zeros(like.shape, dtype=torch.bfloat16, device=like.device)


def _weights(weights: Sequence[float] | None, task_vectors: Sequence[State]) -> list[float]:
    if weights is None:
        return [1.0 / len(task_vectors)] * len(task_vectors)
    return _numbers("weights", weights, task_vectors)


def _numbers(what: str, values: Any, task_vectors: Sequence[State]) -> list[float]:
    """One number per task vector."""
    every = python_values(values)
    if not is_list(every) or len(every) != len(task_vectors):
        got = len(every) if is_list(every) else repr(values)
        raise RecipeError(f"{what}: expected {len(task_vectors)} values, one per task vector, got {got}")
    return [number(f"{what}[{i}]", value) for i, value in enumerate(every)]
