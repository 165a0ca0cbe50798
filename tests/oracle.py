"""What the tests of methods share: tensors that look like checkpoints, backends, and a driver that cuts the work."""

from __future__ import annotations

import random

import numpy as np
import torch

from fastmerge.backends.reference import ReferenceProgram
from fastmerge.dtypes import BF16, F16, F32, F64
from fastmerge.keys import tensor_key
from fastmerge.methods.called import called
from fastmerge.ops.blocks import torch_dtype
from fastmerge.ops.segments import HEADER, TILE, Segments, segment_row
from fastmerge.ops.spec import Op
from fastmerge.planning.from_tensors import TensorPlanner
from tests.kernels_numpy import NumpyKernels

torch.set_num_threads(1)

TYPES = {
    "bf16": lambda n: [BF16] * n,
    "fp16": lambda n: [F16] * n,
    "fp32": lambda n: [F32] * n,
    "fp64": lambda n: [F64] * n,
    "mixed": lambda n: [(BF16, F32, F16)[i % 3] for i in range(n)],
    "mixed64": lambda n: [(BF16, F32, F64)[i % 3] for i in range(n)],
}

PASS_BY_PASS = ("karcher", "mean_direction", "multislerp", "nuslerp", "sce", "slerp_tree")
"""Methods with programs whose solve no device has: their calls on resident tensors are no single sequence."""

SHAPES = ((), (0,), (3, 0), (1,), (7,), (33, 65), (3, 5, 7), (1, 2049))


def kernels():
    """Every backend of the kernel interface that is here."""
    found = {"numpy": NumpyKernels()}
    try:
        from fastmerge.backends.native import NativeKernels

        found["native"] = NativeKernels()
    except ImportError:
        pass
    return found


KERNELS = kernels()
FAST = KERNELS.get("native", KERNELS["numpy"])


def case_parts(method, case):
    """(parameters, preset, number of inputs, whether the first is the base) of one of a method's cases."""
    parameters = {k: v for k, v in case.items() if k not in {"preset", "models", "base"}}
    models = case.get("models", method.contract.most or 3)
    lists = [len(v) for v in parameters.values() if isinstance(v, list)]
    models = lists[0] if lists else models
    has_base = case.get("base", method.contract.base == "required")
    return parameters, case.get("preset"), models + has_base, has_base


def op_of(method, case, shape, types, name="model.layers.0.w", out=None, seed=0):
    """The op of one tensor of a case."""
    parameters, preset, count, based = case_parts(method, case)
    return make_op(method, name, shape, TYPES[types](count), parameters, preset=preset, out=out, seed=seed, based=based)


def make_op(method, name, shape, dtypes, parameters=None, *, preset=None, out=None, seed=0, based=None):
    """The op of one tensor, without sources and targets; ``based`` None has a base where the method needs one."""
    has_base = method.contract.base == "required" if based is None else based
    models = tuple(range(len(dtypes) - has_base))
    planner = TensorPlanner(called(method, parameters, models, preset), has_base=has_base, seed=seed)
    spec = planner.spec(name, tuple(shape), tuple(dtypes), models, out)
    return Op(name, spec, tensor_key(seed, name) if spec.method.random else 0)


def inputs_of(op, seed=0, *, special=False, tie_free=False):
    """Fine-tunes of one base: weights of sd 0.02, updates of sd 0.002, rounded to their types.

    Args:
        op: shape and types.
        seed: of the numbers.
        special: sprinkle NaN, infinities, signed zeros, subnormals and the largest numbers; ``finite``: only those
            whose squares add up.
        tie_free: magnitudes that no two elements share, large enough to survive the types.
    """
    g = torch.Generator().manual_seed(seed)
    spec = op.spec
    n = spec.numel
    base = torch.randn(n, generator=g, dtype=torch.float64) * 0.02
    out = []
    for i, d in enumerate(spec.dtypes):
        x = base.clone()
        if i or not spec.has_base:
            x += torch.randn(n, generator=g, dtype=torch.float64) * (0.5 if tie_free else 0.002)
        if special and n:
            odd = torch.tensor([0.0, -0.0, 1e-41, -1e-7, 6e4, float("nan"), float("inf"), -float("inf"), -3e38])
            odd = odd[:5] if special == "finite" else odd
            where = torch.randint(0, n, (1 + n // 40,), generator=g)
            x[where] = odd[torch.randint(0, len(odd), where.shape, generator=g)].double()
        if spec.method.contract.pairs and i % 2:
            x = x.abs()
        out.append(x.to(torch_dtype(d)).reshape(spec.shape))
    return out


def bits(t):
    """A tensor's bytes."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def segments(ops, inputs, outputs, pieces):
    """Segment tables of pieces (group, e0, length) of tensors in memory, one table per combination of types."""
    rows = {}
    for g, e0, length in pieces.tolist():
        spec = ops[g].spec
        assert [(t.dtype, t.shape) for t in inputs[g]] == [(torch_dtype(d), spec.shape) for d in spec.dtypes]
        assert all(t.is_contiguous() for t in inputs[g])
        out = outputs[g].data_ptr() + e0 * spec.out_dtype.size if outputs is not None else 0
        places = [t.data_ptr() + e0 * d.size for t, d in zip(inputs[g], spec.dtypes, strict=True)]
        rows.setdefault((spec.dtypes, spec.out_dtype), []).append(segment_row(ops[g], g, e0, length, out, places))
    out_segments = []
    for (dtypes, out_dtype), table in rows.items():
        data = np.array(table, np.int64).reshape(len(table), HEADER + len(dtypes))
        out_segments.append(Segments(data, dtypes, out_dtype, np.zeros(len(table), np.int64)))
    return out_segments


def cut(ops, step):
    """Pieces of at most about ``step`` elements, as the stream cuts them."""
    out = []
    for g, op in enumerate(ops):
        n, s = op.spec.numel, max(TILE, step // TILE * TILE)
        if op.spec.grain == "row" and n:
            s = max(1, step // op.spec.row) * op.spec.row
        if op.spec.grain == "matrix":
            s = max(n, 1)
        out += [(g, e0, min(s, n - e0)) for e0 in range(0, max(n, 1), s)]
    return np.array(out, np.int64).reshape(-1, 3)


def drive(ops, inputs, backend, *, program=None, step=None, shuffle=None, most=200, bound=False):
    """Runs a program as the stream would: poisoned outputs between guards, pieces in any order, one call each.

    ``program`` is the one that the method makes of the kernels of ``backend``, or else its definition, unless another
    one is given. ``bound``:
    all tensors at once, as in a device's memory.
    """
    method = ops[0].spec.method
    program = program or (type(method).program(ops, backend) if method.gap() is None else ReferenceProgram(ops))
    rng = random.Random(shuffle)
    guard = 64
    specs = [op.spec for op in ops]
    held = [torch.full((s.numel * s.out_dtype.size + 2 * guard,), 0xDD, dtype=torch.uint8) for s in specs]
    outputs = [
        h[guard : guard + s.numel * s.out_dtype.size].view(torch_dtype(s.out_dtype)).reshape(s.shape)
        for h, s in zip(held, specs, strict=True)
    ]
    before = [[bits(t) for t in tensors] for tensors in inputs]
    every = cut(ops, step or 1 << 62)
    if bound:
        (s,) = segments(ops, inputs, outputs, every)
        s.nonfinite = torch.zeros(len(ops), dtype=torch.int64)
        made = program.bind(s)
        made.run()
        made.check()
    if not bound and step is None and not program.ready and hasattr(backend, "kth"):
        for s in segments(ops, inputs, None, every):
            program.resident(s)
    passes = 0
    while not bound and not program.ready:
        passes += 1
        assert passes <= most, "the passes do not end"
        due = program.pieces()
        pieces = every if due is None else smaller(due, step)
        if shuffle is not None:
            pieces = pieces[rng.sample(range(len(pieces)), len(pieces))]
        chunks = [pieces] if step is None else [pieces[i : i + 1] for i in range(len(pieces))]
        program.advance([program.statistics(s) for c in chunks for s in segments(ops, inputs, None, c)])
    nonfinite = int(s.nonfinite.sum()) if bound else 0
    for s in [] if bound else segments(ops, inputs, outputs, every):
        program.apply(s)
        nonfinite += int(s.nonfinite.sum())
    for h in held:
        assert bool((h[:guard] == 0xDD).all()), "written before the output"
        assert bool((h[len(h) - guard :] == 0xDD).all()), "written past the output"
    assert before == [[bits(t) for t in tensors] for tensors in inputs], "an input was written to"
    assert nonfinite == sum(int((~torch.isfinite(o)).sum()) for o in outputs)
    return outputs


def smaller(pieces, step):
    """Pieces longer than a tile, cut at tiles."""
    if step is None:
        return pieces
    s = max(TILE, step // TILE * TILE)
    out = [(g, e0 + a, min(s, n - a)) for g, e0, n in pieces.tolist() for a in range(0, max(n, 1), s)]
    return np.array(out, np.int64).reshape(-1, 3)
