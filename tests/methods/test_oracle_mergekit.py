"""Against mergekit 0.1.5 and peft, through their functions in memory, and against the papers' rules written out.

fp64 agrees to 1e-12 and fp32 to 1e-5 of the tensor's largest value on data without equal magnitudes; DARE with the
same mask; TIES as a set where magnitudes are equal; and in bf16 and fp32 the error against fp64 is no larger than
mergekit's.
"""

import importlib.util
import warnings

import pytest
import torch

from fastmerge.methods import get
from fastmerge.philox import DROP, u16
from tests import oracle

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mergekit")
    from mergekit import sparsify
    from mergekit.merge_methods import merge_tensors

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
SHAPES = ((), (1,), (64,), (33, 65), (7, 3, 5), (128, 256))

CASES = [
    ("linear", {"weight": [0.3, 0.5, 0.9]}),
    ("linear", {"weight": [0.3, -0.5, 0.9], "normalize": False}),
    ("linear", {"weight": [2.0]}),
    ("passthrough", {"scale": [-0.7]}),
    ("task_arithmetic", {"weight": [0.3, 0.5, -0.9]}),
    ("task_arithmetic", {"weight": [0.3, 0.5], "normalize": True, "lambda": 0.7}),
    ("task_arithmetic", {"weight": [0.5, -0.5], "normalize": True}),
    ("slerp", {"t": 0.3}),
    ("slerp", {"t": 1.4}),
    ("nuslerp", {"weight": [0.7, 0.4]}),
    ("nuslerp", {"weight": [0.7, 0.4], "base": True}),
    ("nuslerp", {"weight": [1.3, -0.4], "nuslerp_flatten": False, "base": True}),
    ("nuslerp", {"weight": [0.7, 0.4], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", {"weight": [0.5, -0.5], "nuslerp_row_wise": True, "base": True}),
    ("karcher", {}),
    ("karcher", {"models": 6, "max_iter": 40, "tol": 1e-9}),
    ("karcher", {"models": 2, "max_iter": 1}),
    ("karcher", {"models": 1}),
    ("multislerp", {"weight": [0.7, 0.4, 0.2]}),
    ("multislerp", {"weight": [0.7, -0.4, 0.2], "normalize_weights": False, "base": True}),
    ("multislerp", {"weight": [0.7, 0.4], "eps": 1e-3, "base": True}),
    ("model_stock", {"models": 2}),
    ("model_stock", {"models": 4}),
    ("model_stock", {"models": 3, "filter_wise": True}),
    ("ties", {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8]}),
    ("ties", {"weight": [1.0, 0.5], "density": 0.3, "normalize": False, "lambda": 0.6}),
    ("ties", {"weight": [1.0, 0.5, 0.8], "density": 0.4, "rescale": True}),
    ("ties", {"weight": [1.0, -0.5, 0.8], "density": [0.0, 1.0, 0.4]}),
    ("nearswap", {"t": 0.3}),
    ("nearswap", {"t": 1e-4}),
    ("ram", {"epsilon": 0.3}),
    ("ram", {"models": 1}),
    ("ramplus_tl", {"models": 4, "epsilon": 0.6}),
    ("ramplus_tl", {"epsilon": 0.4, "r": 0.7, "alpha": 5.0}),
    ("arcee_fusion", {}),
    ("sce", {}),
    ("sce", {"models": 1}),
    ("sce", {"models": 4, "select_topk": 0.4, "int8_mask": True}),
    ("sce", {"models": 2, "select_topk": 0.05}),
    ("dare_linear", {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8]}),
    ("dare_linear", {"weight": [1.0, 0.5], "density": [1.0, 0.7], "rescale": False, "normalize": True}),
    ("della_linear", {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.0, 1.0], "epsilon": 0.1}),
    ("della_linear", {"weight": [1.0, 0.5], "density": 0.5, "rescale": False, "normalize": True, "lambda": 0.7}),
    ("della", {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8], "epsilon": [0.1, 0.4, 0.0]}),
    ("della", {"weight": [1.0, 0.5], "density": 0.7, "normalize": False, "int8_mask": True}),
    ("breadcrumbs", {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 1.0]}),
    ("breadcrumbs", {"weight": [1.0, 0.5], "density": [0.9, 0.0], "gamma": [0.2, 0.1], "rescale": True}),
    ("breadcrumbs", {"weight": [1.0, 0.5], "density": 0.3, "gamma": 0.05, "normalize": True, "lambda": 1.3}),
    ("breadcrumbs_ties", {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8], "gamma": [0.01, 0.1, 0.3]}),
    ("breadcrumbs_ties", {"weight": [1.0, -0.5], "density": 0.6, "normalize": True, "int8_mask": True}),
    ("dare_ties", {"weight": [1.0, 0.5, 0.8], "density": [0.2, 0.5, 0.8]}),
    ("dare_ties", {"weight": [1.0, 0.5], "density": 0.66, "normalize": True, "lambda": 1.2}),
]
NAMES = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
every_case = pytest.mark.parametrize(("name", "case"), CASES, ids=NAMES)


def theirs(name, op, inputs, case, monkeypatch, dtype=None):
    """mergekit's result; its random masks are replaced by ours."""
    parameters = {}
    for key, value in case.items():
        if key not in ("models", "base"):
            # per-model values may not name the base where the method has one
            each = dict(enumerate(value, start=op.spec.has_base)) if isinstance(value, list) else value
            parameters[key] = each
    density = getattr(op.spec.method, "density", (1.0,) * len(op.spec.models))
    least = 0.0 if name.startswith("della") else -1.0  # mergekit asks for no mask where nothing stays
    asked = [i for i, d in zip(op.spec.models, density, strict=True) if least < d < 1]
    noise = [u16(op.key, i, DROP, 0, op.spec.numel) for i in asked]
    limits = iter([t for t, d in zip(dropped(op), density, strict=True) if d < 1])
    supply = iter(noise)

    def bernoulli(p):
        below = (p.double() * 65536 + 0.5).floor() if name.startswith("della") else next(limits)
        return (torch.from_numpy(next(supply).astype("int64")).reshape(p.shape) < below).to(p.dtype)

    monkeypatch.setattr(sparsify.torch, "bernoulli", bernoulli)
    return merge_tensors(inputs, name, parameters=parameters, base_index=0 if op.spec.has_base else None, dtype=dtype)


def dropped(op):
    method = op.spec.method
    return method.rules(op.spec).bernoulli if method.name.startswith("dare") else [65536] * len(op.spec.models)


def ours(op, inputs):
    return oracle.drive([op], [inputs], oracle.FAST)[0]


@pytest.mark.parametrize("types", TOLERANCE)
@every_case
def test_against_mergekit(name, case, types, monkeypatch):
    # numbers as vectors: mergekit's probabilities are 0 / 0, and it divides by the sine of fp32's pi
    numbers = name.startswith("della") or (name, types) == ("karcher", "fp32")
    for i, shape in enumerate(s for s in SHAPES if not numbers or s not in ((), (1,))):
        op = oracle.op_of(get(name), case, shape, types)
        inputs = oracle.inputs_of(op, seed=i, tie_free=True)
        want = theirs(name, op, inputs, case, monkeypatch)
        got = ours(op, inputs)
        assert got.shape == want.shape
        assert got.dtype == inputs[0].dtype
        # mergekit computes random masks, and with them the delta, in fp32 even for fp64 tensors on the CPU; so are
        # ramplus_tl's factors
        tolerance = 1e-6 if name.startswith(("dare", "della", "ramplus")) and types == "fp64" else TOLERANCE[types]
        assert (got - want).abs().max() <= tolerance * want.abs().max(), shape


def test_dare_in_fp64_written_out():
    case = {"weight": [1.0, 0.5], "density": [0.3, 0.6], "lambda": 1.3}
    op = oracle.op_of(get("dare_linear"), case, (90, 70), "fp64")
    base, *others = oracle.inputs_of(op)
    want = base.clone()
    for i, (x, weight, density) in enumerate(zip(others, [1.0, 0.5], [0.3, 0.6], strict=True)):
        d = x - base
        random = torch.from_numpy(u16(op.key, i, DROP, 0, op.spec.numel).astype("int64")).reshape(d.shape)
        kept = d * (random < int(density * 65536 + 0.5))
        want += 1.3 * weight * kept * (d.abs().sum() / kept.abs().sum())
    assert (ours(op, [base, *others]) - want).abs().max() <= 1e-12


def test_slerp_of_siblings_is_linear(monkeypatch):
    op = oracle.op_of(get("slerp"), {"t": 0.3}, (40, 50), "fp64")
    inputs = oracle.inputs_of(op)  # updates of 10 %: |cos| is above the threshold
    inputs[1] = inputs[0] + 0.1 * (inputs[1] - inputs[0])
    want = theirs("slerp", op, inputs, {"t": 0.3}, monkeypatch)
    assert torch.allclose(want, 0.7 * inputs[0] + 0.3 * inputs[1], atol=1e-16)
    assert torch.allclose(ours(op, inputs), want, atol=1e-16)


FLIPS = {"bf16": 0, "fp32": 4}
"""Largest errors that are left out, of both: fp32 may not tell sums that are nearly equal, or task vectors at a
threshold, and then an element falls to the other side."""


@pytest.mark.parametrize(("types", "apart"), [("bf16", True), ("fp32", True), ("fp32", False)])
@every_case
def test_at_least_as_accurate(name, case, types, apart, monkeypatch):
    op = oracle.op_of(get(name), case, (64, 512), types)
    exact = oracle.op_of(get(name), case, (64, 512), "fp64")
    inputs = oracle.inputs_of(op, seed=5, tie_free=apart)
    truth = exact.spec.method.reference([x.double() for x in inputs], exact)

    def error(x):
        found = (x.double() - truth).abs().flatten()
        return found.topk(found.numel() - FLIPS[types], largest=False).values.square().mean().sqrt().item()

    want = theirs(name, op, inputs, case, monkeypatch)
    assert error(ours(op, inputs)) <= 1.001 * error(want)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_ties_on_equal_magnitudes_is_the_same_set(density, monkeypatch):
    """bf16 weights: many magnitudes are equal; mergekit keeps an arbitrary subset of those at the threshold."""
    case = {"weight": [1.0], "density": density, "normalize": False}
    op = oracle.op_of(get("ties"), case, (64, 1024), "bf16", out=oracle.F32)
    inputs = oracle.inputs_of(op, seed=1)
    wide = [x.float() for x in inputs]
    delta = wide[1] - wide[0]
    got = ours(op, inputs) - wide[0]
    want = theirs("ties", op, wide, case, monkeypatch) - wide[0]
    k = max(1, int(density * delta.numel()))
    at = delta.abs().flatten().sort(descending=True).values[k - 1]
    assert at > 0
    for kept in (got != 0, want != 0):
        assert int(kept.sum()) == k
        assert bool(kept[delta.abs() > at].all())
        assert not bool(kept[delta.abs() < at].any())
    first = torch.nonzero((delta.abs() == at).flatten()).flatten()
    mine = (got != 0).flatten()[first]
    assert bool(mine[: int(mine.sum())].all()), "the lowest indices are kept"


# ---- peft --------------------------------------------------------------------------------------------------


def peft_functions():
    """peft's merge functions without the rest of peft, which imports transformers."""
    spec = importlib.util.find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("peft is not installed")
    path = f"{spec.submodule_search_locations[0]}/utils/merge_utils.py"
    found = importlib.util.spec_from_file_location("peft_merge_utils", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("elect", "theirs_elect"), [("mass", "total"), ("count", "frequency")])
@pytest.mark.parametrize("types", TOLERANCE)
def test_ties_preset_peft(types, elect, theirs_elect):
    case = {"preset": "peft", "weight": [0.9, 1.1, 0.4], "density": 0.35, "elect": elect}
    op = oracle.op_of(get("ties"), case, (33, 65), types)
    inputs = oracle.inputs_of(op, tie_free=True)
    inputs[0] = torch.zeros_like(inputs[0])
    weights = torch.tensor(case["weight"], dtype=inputs[0].dtype)
    want = peft_functions().ties(inputs[1:], weights, 0.35, theirs_elect)
    assert (ours(op, inputs) - want).abs().max() <= TOLERANCE[types] * want.abs().max()


# ---- the papers' rules, written out ------------------------------------------------------------------------


def paper(deltas, density, merge):
    """TIES on one flat vector per model: keep from the kth magnitude on, elect, merge the entries that agree."""
    d = torch.stack(deltas)
    kth = d.abs().kthvalue(d.shape[1] - int(d.shape[1] * density), dim=1, keepdim=True).values
    d = d * (d.abs() >= kth)
    sign = torch.sign(d.sum(dim=0))
    sign[sign == 0] = torch.sign(sign.sum())
    agree = torch.where(sign > 0, d > 0, d < 0)
    total = (d * agree).sum(dim=0)
    return total if merge == "sum" else total / agree.sum(dim=0).clamp(min=1)


@pytest.mark.parametrize(("preset", "merge", "lam"), [("paper", "mean", 1.0), ("fusionbench", "sum", 0.3)])
@pytest.mark.parametrize("types", ["fp64", "bf16"])
def test_ties_presets_of_the_authors(types, preset, merge, lam):
    method = get("ties")
    case = {"preset": preset, "models": 3}
    shapes = {"b.weight": (200, 300), "a.weight": (100, 301), "c.bias": (77,)}
    ops = [oracle.op_of(method, case, s, types, name=n, out=oracle.F64) for n, s in shapes.items()]
    inputs = [oracle.inputs_of(g, seed=i) for i, g in enumerate(ops)]
    outs = oracle.drive(ops, inputs, oracle.FAST)
    order = sorted(range(3), key=lambda g: ops[g].name)
    bases = torch.cat([inputs[g][0].double().flatten() for g in order])
    deltas = [torch.cat([(inputs[g][i].double() - inputs[g][0].double()).flatten() for g in order]) for i in (1, 2, 3)]
    want = bases + lam * paper(deltas, 0.2, merge)
    got = torch.cat([outs[g].flatten() for g in order])
    assert (got - want).abs().max() <= (1e-12 if types == "fp64" else 1e-6) * want.abs().max()
    touched = (got != bases).double().mean()
    assert 0.2 < touched <= 0.95


def test_ties_preset_sdmecha():
    """Per tensor, all ties, the more frequent sign, the base where none is, the mean of what agrees."""
    case = {"preset": "sdmecha", "models": 4}
    op = oracle.op_of(get("ties"), case, (50, 60), "fp64")
    inputs = oracle.inputs_of(op)
    d = torch.stack([(x - inputs[0]).flatten() for x in inputs[1:]])
    kth = d.abs().kthvalue(max(int(0.8 * d.shape[1]), 1), dim=1, keepdim=True).values
    d = d * (d.abs() >= kth)
    sign = torch.sign(torch.sign(d).sum(dim=0))
    agree = (torch.sign(d) == sign) & (sign != 0)
    want = inputs[0].flatten() + (d * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)
    assert (ours(op, inputs).flatten() - want).abs().max() <= 1e-12


def test_dare_ties_of_the_paper_trims_after_the_drop():
    case = {"preset": "paper", "density": 0.5, "trim_density": 0.3, "trim_scope": "tensor", "models": 2}
    op = oracle.op_of(get("dare_ties"), case, (90, 80), "fp64")
    inputs = oracle.inputs_of(op)
    deltas = []
    for i, x in enumerate(inputs[1:]):
        mask = torch.from_numpy(u16(op.key, i, DROP, 0, op.spec.numel).astype("int64") < 32768)
        deltas.append((x - inputs[0]).flatten() * mask * 2)
    want = inputs[0].flatten() + paper(deltas, 0.3, "mean")
    assert (ours(op, inputs).flatten() - want).abs().max() <= 1e-12


@pytest.mark.parametrize("models", [2, 3, 5])
def test_model_stock_of_fusionbench_averages_angles(models):
    op = oracle.op_of(get("model_stock"), {"preset": "fusionbench", "models": models}, (30, 40), "fp64")
    inputs = oracle.inputs_of(op)
    d = [(x - inputs[0]).flatten() for x in inputs[1:]]
    pairs = [(a, b) for i, a in enumerate(d) for b in d[i + 1 :]]
    angle = torch.stack([torch.acos(a @ b / (a.norm() * b.norm())) for a, b in pairs]).mean()
    t = models * angle.cos() / (1 + (models - 1) * angle.cos())
    want = t * sum(inputs[1:]) / models + (1 - t) * inputs[0]
    assert (ours(op, inputs) - want).abs().max() <= 1e-12
