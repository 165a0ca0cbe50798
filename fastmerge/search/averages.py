"""Averages of a few models out of many, one after the other, each by one pass over what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fastmerge.api.call import dtype_of
from fastmerge.dtypes import F32, F64, DType
from fastmerge.errors import RecipeError, ShapeError
from fastmerge.methods.base import Contract
from fastmerge.methods.linear import Average
from fastmerge.ops.sources import Memory
from fastmerge.ops.spec import Op, Source, Spec

if TYPE_CHECKING:
    import torch

    from fastmerge.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class _Share(Average):
    """``(sum w_i x_i) / divisor``: what ``linear`` does, with a divisor that is told.

    With it a sum of many models can come as one input, and the last bit is still that of ``linear``.
    """

    summary = "Weighted sum with a divisor of its own."
    formula = "out = sum_i w_i x_i / divisor"
    paper = "https://arxiv.org/abs/2203.05482"
    contract = Contract("ignored")

    weight: tuple[float, ...]
    divisor: float

    def table(self, spec: Spec) -> tuple[Sequence[float], float]:
        return self.weight, self.divisor


class _Input(NamedTuple):
    """One tensor of all models.

    Attributes:
        sources: of each model.
        out: type of each by itself, and of their average.
    """

    sources: tuple[Source, ...]
    out: DType


class _Tensor(NamedTuple):
    """One tensor of all models, and where it goes.

    Attributes:
        sources: of each model.
        wide: type of its running sum.
        shape: of each.
        target: that of the live model.
        out: what the average is written to: ``target``, or a buffer where kernels cannot write that.
    """

    sources: tuple[Source, ...]
    wide: torch.dtype
    shape: tuple[int, ...]
    target: torch.Tensor
    out: torch.Tensor


class Averages:
    """Renders averages of models into one live model, and keeps a running sum of some of them.

    Args:
        models: directories or hub ids, or modules, or state dictionaries: all of one kind.
        names: of the models.
        make: gives what is rendered into, a module or a dictionary of tensors, once the models are known to be good.

    Attributes:
        model: what it gave.
        count: models in the running sum.

    Raises:
        RecipeError, CheckpointError, ShapeError: the models, or ``model``, do not go together; all problems are listed.
    """

    def __init__(self, models: Sequence[Any], names: Sequence[str], make: Callable[[], Any]) -> None:
        self.count = 0
        self._checkpoints: tuple[Checkpoint, ...] = ()
        self._kept: list[Any] = []  # whose addresses are in use
        self._home = "cpu"
        found = self._on_disk(models) if isinstance(models[0], str) else self._in_memory(models, names)
        self.model = make()
        self._tensors = _placed(found, _state("into", self.model), self._home)
        self._sums: dict[str, torch.Tensor] = {}

    def show(self, weights: Sequence[float]) -> None:
        """Renders ``sum w_i x_i / sum w_i``, in the order of the models; of weight 0 a model is not read."""
        used = [i for i, w in enumerate(weights) if w]
        share = _Share(weight=tuple(weights[i] for i in used), divisor=sum(weights[i] for i in used))
        self._render({name: [t.sources[i] for i in used] for name, t in self._tensors.items()}, share)

    def try_with(self, model: int) -> None:
        """Renders the mean of the sum's models and another one."""
        share = _Share(weight=(1.0, 1.0), divisor=self.count + 1.0)
        self._render({name: [self._sum(name), t.sources[model]] for name, t in self._tensors.items()}, share)

    def show_sum(self) -> None:
        """Renders the mean of the sum's models."""
        share = _Share(weight=(1.0,), divisor=float(self.count))
        self._render({name: [self._sum(name)] for name in self._tensors}, share)

    def add(self, model: int) -> None:
        """Adds a model to the running sum, in place."""
        import torch

        share = _Share(weight=(1.0,) * (2 if self.count else 1), divisor=1.0)
        inputs = {}
        for name, tensor in self._tensors.items():
            if not self.count:
                self._sums[name] = torch.empty(tensor.shape, dtype=tensor.wide, device=tensor.out.device)
            before = [self._sum(name)] if self.count else []
            inputs[name] = [*before, tensor.sources[model]]
        self._run(inputs, share, self._sums)
        self.count += 1

    def _sum(self, name: str) -> Memory:
        return _memory(self._sums[name])

    def _render(self, inputs: Mapping[str, Sequence[Source]], share: _Share) -> None:
        import torch

        self._run(inputs, share, {name: t.out for name, t in self._tensors.items()})
        with torch.no_grad():
            for tensor in self._tensors.values():
                if tensor.out is tensor.target:
                    torch.autograd.graph.increment_version(tensor.target)  # kernels write past torch
                else:
                    tensor.target.copy_(tensor.out)

    def _run(self, inputs: Mapping[str, Sequence[Source]], share: _Share, outs: Mapping[str, torch.Tensor]) -> None:
        from fastmerge.api.tensors import run

        specs: dict[tuple[object, ...], Spec] = {}
        ops = []
        for name, sources in inputs.items():
            target = _memory(outs[name])
            kind = (target.shape, target.dtype, *[s.dtype for s in sources])
            if kind not in specs:
                specs[kind] = Spec(share, target.shape, tuple([s.dtype for s in sources]), target.dtype)
            ops.append(Op(name, specs[kind], 0, tuple(sources), (target,)))
        if ops:
            run(ops, next(iter(outs.values())).device, checkpoints=self._checkpoints)

    def _on_disk(self, models: Sequence[str]) -> dict[str, _Input]:
        """Sources as the planner finds them: adapters, tied heads and layouts are its matter."""
        from fastmerge import planning
        from fastmerge.recipe import Recipe

        def planned(some: Sequence[str]) -> planning.Plan:
            rows = [{"model": m, "parameters": {"weight": 1.0}} for m in some]
            return planning.plan(Recipe.load({"merge_method": "linear", "models": rows}), models=opened)

        opened: dict[str, Checkpoint] = {}
        plan = planned(models)
        self._checkpoints = plan.checkpoints
        self._kept.append(plan)
        found = {op.name: _Input(op.inputs, op.spec.out_dtype) for op in plan.ops if op.spec.dtypes[0].mergeable}
        if all(s.dtype is out for sources, out in found.values() for s in sources):
            return found
        # Adapters make their tensors in fp32: what type a model has by itself is then the planner's to say.
        opened |= dict(zip(map(str, plan.recipe.refs), plan.checkpoints, strict=False))
        problems = {}
        for model in models:
            for op in planned([model]).ops:
                if op.name in found and op.spec.out_dtype is not found[op.name].out:
                    text = (
                        f"expected {found[op.name].out.name} in all models, got {op.spec.out_dtype.name} in {model!r}"
                    )
                    problems[op.name] = f"{op.name}: {text}"
        if problems:
            raise ShapeError(list(problems.values()))
        return found

    def _in_memory(self, models: Sequence[Any], names: Sequence[str]) -> dict[str, _Input]:
        import torch

        states = [_state(f"model {name!r}", m) for name, m in zip(names, models, strict=True)]
        first = states[0]
        self._home = str(next(iter(first.values())).device) if first else "cpu"
        problems = [
            f"{n}: expected on {self._home}, got {t.device}" for n, t in first.items() if str(t.device) != self._home
        ]
        for name, state in zip(names[1:], states[1:], strict=True):
            problems += [f"{n}: not in model {name!r}" for n in first if n not in state]
            problems += [f"{n}: not in model {names[0]!r}" for n in state if n not in first]
            for n in first:
                if n not in state:
                    continue
                a, b = first[n], state[n]
                if a.shape != b.shape or a.device != b.device:
                    shown = f"{tuple(b.shape)} on {b.device} in model {name!r}"
                    problems.append(f"{n}: expected {tuple(a.shape)} on {a.device}, got {shown}")
                elif a.dtype != b.dtype:
                    problems.append(f"{n}: expected {a.dtype}, got {b.dtype} in model {name!r}")
                elif not a.is_floating_point() and not torch.equal(a, b):
                    problems.append(f"{n}: {a.dtype} tensors are copied, not merged, and model {name!r} differs")
        if problems:
            raise ShapeError(problems)
        found: dict[str, _Input] = {}
        made: dict[object, torch.Tensor] = {}  # so that tied tensors stay one
        self._kept.append(made)
        for n, tensor in first.items():
            if tensor.is_floating_point():
                group = [state[n].detach() for state in states]
                keys = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in group]
                dense = [made.setdefault(k, t.contiguous()) for k, t in zip(keys, group, strict=True)]
                found[n] = _Input(tuple(map(_memory, dense)), dtype_of(tensor.dtype))
        return found


def _placed(found: Mapping[str, _Input], targets: Mapping[str, torch.Tensor], home: str) -> dict[str, _Tensor]:
    """The tensors with their places in the live model; ``home`` is where the sources are.

    Raises:
        ShapeError: names, shapes or types do not go together.
    """
    import torch

    problems, out = [], {}
    filled: dict[tuple[torch.device, int], str] = {}
    for name, (sources, kind) in found.items():
        shape = sources[0].shape
        if name not in targets:
            problems.append(f"{name}: the live model has no such tensor")
            continue
        target = targets[name]
        if tuple(target.shape) != shape or not target.is_floating_point():
            problems.append(f"{name}: expected {shape}, the live model has {tuple(target.shape)} {target.dtype}")
            continue
        owner = filled.setdefault((target.device, target.data_ptr()), name)
        if owner != name and target.numel():
            if sources != found[owner].sources:
                text = f"{name}: is one tensor with {owner} in the live model, and two in the models: give into="
                problems.append(text)
            continue
        dtype = getattr(torch, kind.name)
        wide = torch.float64 if kind in (F64, F32) else torch.float32
        direct = target.dtype == dtype and target.is_contiguous() and str(target.device) == home
        made = target if direct else torch.empty(shape, dtype=dtype, device=home)
        out[name] = _Tensor(sources, wide, shape, target, made)
    for name, target in targets.items():
        known = name in found or (target.device, target.data_ptr()) in filled
        if not known and target.is_floating_point() and target.numel():
            problems.append(f"{name}: is in the live model, and not in the models")
    if problems:
        raise ShapeError(problems)
    if not out:
        raise ShapeError("models: expected tensors of floating-point numbers, got none")
    return out


def _state(name: str, model: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict() if hasattr(model, "state_dict") else model
    if not isinstance(state, Mapping):
        raise RecipeError(f"{name}: expected a module or a state dictionary, got {type(model).__name__}")
    return dict(state)


def _memory(tensor: torch.Tensor) -> Memory:
    return Memory(tensor.data_ptr(), dtype_of(tensor.dtype), tuple(tensor.shape))
