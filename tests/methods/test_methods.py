"""Every method by itself, collected from its class: programs against the reference bit for bit, and algebra."""

import itertools
import re
import tracemalloc

import pytest
import torch

from fastmerge.backends.reference import ReferenceProgram
from fastmerge.dtypes import BF16, F16, F32, F64
from fastmerge.errors import OutputError, RecipeError
from fastmerge.methods import METHODS, get
from fastmerge.methods.base import REQUIRED
from fastmerge.methods.matrices import Matrices
from tests import oracle
from tests.compare import differences

EVERY = [(m, case) for m in METHODS.values() for case in m.cases]
CASES = [(m, case) for m, case in EVERY if oracle.op_of(m, case, (4, 4), "bf16").spec.method.gap() is None]
"""Those that have a program."""


def ids(cases):
    return [f"{m.name}-{m.cases.index(case)}" for m, case in cases]


CASE_IDS = ids(CASES)
BIG = (251, 601)  # two tiles and a part; larger than what is selected without a sample
LONG = (2, 65539)  # rows longer than a tile

every_case = pytest.mark.parametrize(("method", "case"), CASES, ids=CASE_IDS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
with_program = pytest.mark.parametrize("method", [m for m, c in CASES if c is m.cases[0]], ids=lambda m: m.name)


def unlike_reference(ops, inputs, *backends, **how):
    """What differs between programs on backends and the method's reference, which may refuse the inputs."""
    return unlike_in_any_way(ops, inputs, backends, [how])


def unlike_in_any_way(ops, inputs, backends, ways):
    """The same of several ways to drive them: the reference, which takes longest, is computed once."""
    try:
        want = reference(ops, inputs)
    except OutputError as refused:
        for backend, how in itertools.product(backends, ways):
            with pytest.raises(OutputError, match=re.escape(str(refused))):
                oracle.drive(ops, inputs, backend, **how)
        return []
    return [
        f"{type(backend).__name__} {how}: {line}"
        for backend, how in itertools.product(backends, ways)
        for line in differences(oracle.drive(ops, inputs, backend, **how), want)
    ]


def reference(ops, inputs):
    return type(ops[0].spec.method).reference_all(inputs, ops)


NUMPY_TOO = ("bf16", "mixed64")
"""Types at which programs run on numpy's kernels as well, which tell a fault of a program from one of a kernel."""


def backends(types):
    """What runs a case on every type: the kernels that are shipped, and at some types numpy's beside them."""
    return oracle.KERNELS.values() if types in NUMPY_TOO else [oracle.FAST]


def batch(method, case, types, shapes, out=None, **data):
    ops = [oracle.op_of(method, case, s, types, name=f"t{i}.weight", out=out) for i, s in enumerate(shapes)]
    return ops, [oracle.inputs_of(op, seed=i, **data) for i, op in enumerate(ops)]


@pytest.mark.parametrize("types", oracle.TYPES)
@every_case
def test_small_shapes_in_one_batch(method, case, types):
    ops, inputs = batch(method, case, types, oracle.SHAPES)
    assert unlike_reference(ops, inputs, *backends(types)) == []


@pytest.mark.parametrize("types", ["bf16", "fp32", "mixed64"])
@every_case
def test_special_values(method, case, types):
    for special in (True, "finite"):
        ops, inputs = batch(method, case, types, ((), (1,), (13, 77)), special=special)
        assert unlike_reference(ops, inputs, *backends(types)) == [], special


def big(method):
    """A shape of several tiles; of a method that decomposes matrices, which are never cut, a small one."""
    return (60, 40) if issubclass(method, Matrices) else BIG


@every_case
def test_several_tiles_in_any_pieces(method, case):
    types = ("bf16", "fp32")[CASES.index((method, case)) % 2]
    ops, inputs = batch(method, case, types, (big(method), (5, 9), LONG))
    assert unlike_in_any_way(ops, inputs, [oracle.FAST], [{}, {"step": 1 << 16, "shuffle": 7}]) == []


@every_case
def test_several_tiles_against_numpy(method, case):
    ops, inputs = batch(method, case, "bf16", (big(method),))
    assert unlike_reference(ops, inputs, oracle.KERNELS["numpy"], step=1 << 17, shuffle=3) == []


@pytest.mark.parametrize("out", [BF16, F16, F32, F64], ids=lambda d: d.name)
@with_program
def test_output_types(method, out):
    for types, special in itertools.product(("bf16", "fp64"), (True, "finite")):
        ops, inputs = batch(method, method.cases[0], types, ((17, 31),), out=out, special=special)
        assert unlike_reference(ops, inputs, oracle.FAST) == [], (types, special)


TENSORWISE = [(m, c) for m, c in CASES if oracle.op_of(m, c, (4, 4), "bf16").spec.grain != "model"]
"""Cases whose tensors do not depend on each other."""


@pytest.mark.parametrize(("method", "case"), TENSORWISE, ids=ids(TENSORWISE))
def test_batched_is_one_by_one(method, case):
    ops, inputs = batch(method, case, "bf16", oracle.SHAPES)
    together = oracle.drive(ops, inputs, oracle.FAST)
    alone = [oracle.drive([g], [i], oracle.FAST)[0] for g, i in zip(ops, inputs, strict=True)]
    assert differences(together, alone) == []


@pytest.mark.parametrize(("method", "case"), EVERY, ids=ids(EVERY))
def test_whole_tensors_through_the_reference_backend(method, case):
    ops, inputs = batch(method, case, "bf16", ((9, 11), (7,)))
    got = oracle.drive(ops, inputs, None, program=ReferenceProgram(ops))
    assert differences(got, reference(ops, inputs)) == []


@every_method
def test_inputs_may_be_strided_in_the_reference(method):
    op = oracle.op_of(method, method.cases[0], (12, 8), "fp32")
    inputs = oracle.inputs_of(op)
    strided = [x.T.contiguous().T for x in inputs]
    assert not strided[0].is_contiguous()
    assert differences(reference([op], [strided]), reference([op], [inputs])) == []


@pytest.mark.parametrize("types", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties", "della", "della_linear"])
def test_masks_take_what_they_say(name, types):
    """Keys, copies and masks beside the slot: what the budget is charged with for a tensor that is never cut."""
    op = oracle.op_of(get(name), get(name).cases[0], (600, 700), types)
    inputs = [oracle.inputs_of(op)]
    out = torch.empty(op.spec.shape, dtype=inputs[0][0].dtype)
    (s,) = oracle.segments([op], inputs, [out], oracle.cut([op], 1 << 62))
    program = get(name).program([op], oracle.FAST)
    tracemalloc.start()
    program.apply(s)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.4 * op.spec.workspace <= peak <= op.spec.workspace + 100_000


def mixtures():
    """Each such case with the next one of its method that can have as many inputs, and says something else."""

    def said(m, case):
        return oracle.op_of(m, case, (70,), "fp32").spec.method

    found = []
    for i, (m, case) in enumerate(TENSORWISE):
        _, _, inputs, has_base = oracle.case_parts(m, case)
        others = [{**c, "models": inputs - has_base} for n, c in TENSORWISE[i + 1 :] + TENSORWISE[:i] if n is m]
        alike = [c for c in others if oracle.case_parts(m, c)[2:] == (inputs, has_base)]
        fitting = [c for c in alike if said(m, c) != said(m, case)]
        found += [pytest.param(m, case, c, id=f"{m.name}-{m.cases.index(case)}") for c in fitting[:1]]
    return found


@pytest.mark.parametrize(("method", "case", "other"), mixtures())
def test_parameters_of_one_batch_may_differ(method, case, other):
    """Tensors of one call with other numbers and words: gradients and filters in a recipe make such batches."""
    ops, inputs = batch(method, case, "fp32", ((8, 9), (70,), (40, 3)))
    ops[1] = oracle.op_of(method, other, (70,), "fp32", name="t1.weight")
    assert unlike_reference(ops, inputs, oracle.FAST) == []


@every_method
def test_declarations(method):
    assert method.name in METHODS
    assert get(method.name) is method
    for text in (method.summary, method.formula, method.paper):
        assert isinstance(text, str)
        assert text
    doc = method.__doc__ or ""
    for word in (".. math::", "Shapes:", "Numerics:", "Paper:"):
        assert word in doc
    names = [p.name for p in method.params]
    assert len(names) == len(set(names))
    for preset in ("mergekit", *method.presets):
        assert set(method.defaults(preset)) == set(names)
    for p in method.params:
        if p.default is not REQUIRED and p.default is not None and isinstance(p.type, tuple):
            assert p.default in p.type
    used = {case.get("preset", "mergekit") for case in method.cases}
    assert set(method.presets) - {"mergekit", "paper", "fusionbench"} <= used


def test_unknown_names():
    with pytest.raises(RecipeError, match="did you mean 'linear'"):
        get("linaer")
    with pytest.raises(RecipeError, match="did you mean 'density'"):
        oracle.make_op(get("ties"), "w", (2,), [F32] * 2, {"weight": 1.0, "densty": 0.5})
    with pytest.raises(RecipeError, match="unknown preset 'papr'"):
        oracle.make_op(get("ties"), "w", (2,), [F32] * 2, preset="papr")


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("ties", {}, "ties needs the parameter 'weight'"),
        ("ties", {"weight": 1.0, "density": -1.5}, r"expected a number in 0 .. 1; got -1.5"),
        ("ties", {"weight": "much"}, "expected a number; got 'much'"),
        ("ties", {"weight": float("nan")}, "expected a finite number; got nan"),
        ("ties", {"weight": 1.0, "ties": "some"}, "expected one of index, all, spread; got 'some'"),
        ("ties", {"weight": 1.0, "normalize": 2}, "expected true or false; got 2"),
        ("ties", {"weight": [1.0, 2.0, 3.0]}, "expected 2 values, got 3"),
        ("ties", {"weight": 1.0, "density": None}, "expected a value, got None"),
        ("linear", {"weight": [1.0, -1.0, 0.0]}, "sum to zero"),
    ],
)
def test_bad_parameters(name, parameters, message):
    with pytest.raises(RecipeError, match=message):
        oracle.make_op(get(name), "w", (2, 2), [F32] * 3, parameters)


def test_all_problems_at_once():
    with pytest.raises(RecipeError) as e:
        oracle.make_op(get("ties"), "w", (2,), [F32] * 2, {"x": 1, "density": -2.0})
    assert len(e.value.problems) == 3


def test_numbers_of_inputs():
    def problem(name, count, *, has_base):
        return get(name).contract.problem(name, count, has_base=has_base)

    assert problem("slerp", 2, has_base=True) == "slerp: expected 1 models besides the base, got 2"
    assert problem("model_stock", 1, has_base=True) == "model_stock: expected 2 or more models besides the base, got 1"
    assert problem("passthrough", 2, has_base=False) == "passthrough: expected 1 inputs, got 2"
    assert problem("ties", 1, has_base=False) == "ties needs a base model; none was given"
    assert problem("ties", 5, has_base=True) is None
    assert problem("linear", 1, has_base=False) is None


@pytest.mark.parametrize(("method", "case"), EVERY, ids=ids(EVERY))
def test_parameters_are_typed_and_frozen(method, case):
    made = oracle.op_of(method, case, (4,), "fp32").spec.method
    assert type(made) is method
    defaults = method.defaults(case.get("preset"))
    for p in method.params:
        value = getattr(made, p.field)
        every = (value,) if p.scope == "shared" else value
        assert isinstance(every, tuple)
        words = p.type if isinstance(p.type, tuple) else ()
        assert all(x in words or type(x) is p.type or x is defaults[p.name] for x in every)
        with pytest.raises(AttributeError):
            setattr(made, p.field, value)


# ---- algebra -------------------------------------------------------------------------------------------


def merge(name, inputs, **parameters):
    method = get(name)
    preset = parameters.pop("preset", None)
    dtypes = [{torch.bfloat16: BF16, torch.float32: F32, torch.float64: F64}[x.dtype] for x in inputs]
    ops = [oracle.make_op(method, "w", inputs[0].shape, dtypes, parameters, preset=preset)]
    (got,) = oracle.drive(ops, [inputs], oracle.FAST)
    assert differences([got], reference(ops, [inputs])) == [], "the program is not the reference"
    return got


def models(n, shape=(40, 50), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64) * 0.02
    out = [base] + [base + torch.randn(shape, generator=g, dtype=torch.float64) * 1e-3 for _ in range(n)]
    return [x.to(dtype) for x in out]


DELTA_METHODS = {
    "task_arithmetic": {"weight": 0.7},
    "ties": {"weight": 0.7, "density": 0.3},
    "dare_linear": {"weight": 0.7, "density": 0.3},
    "dare_ties": {"weight": 0.7, "density": 0.3},
    "model_stock": {},
    "slerp": {"t": 0.37},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", DELTA_METHODS)
def test_copies_of_the_base_are_the_base(name, dtype):
    base = models(0, dtype=dtype)[0]
    n = 1 if name == "slerp" else 3
    out = merge(name, [base] + [base.clone() for _ in range(n)], **DELTA_METHODS[name])
    if name == "slerp":
        assert torch.allclose(out.float(), base.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    else:
        assert differences([out], [base]) == []


def test_copies_of_one_model_are_that_model():
    base, x = models(1)
    three = [x, x.clone(), x.clone()]
    for out in (
        merge("linear", three, preset="soup"),
        merge("task_arithmetic", [base, *three], weight=1.0, normalize=True),
        merge("ties", [base, *three], weight=1.0),
        merge("model_stock", [base, *three]),
    ):
        assert torch.allclose(out, x, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
def test_one_whole_model_of_weight_one_is_that_model(name):
    base, x = models(1, dtype=torch.bfloat16)
    assert differences([merge(name, [base, x], weight=1.0)], [x]) == []


@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "model_stock"])
def test_the_order_of_models_hardly_matters(name):
    base, *xs = models(3)
    head = [] if name == "linear" else [base]
    w = {} if name == "model_stock" else {"weight": [0.2, 0.5, 0.9]}
    turned = {} if name == "model_stock" else {"weight": [0.9, 0.2, 0.5]}
    a = merge(name, [*head, *xs], **w)
    b = merge(name, [*head, xs[2], xs[0], xs[1]], **turned)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_task_vectors_add_negate_and_make_analogies():
    base, a, b, c = models(3, dtype=torch.float64)
    for weights, want in (
        ([1.0, 1.0, 0.0], a + b - base),
        ([-1.0, 0.0, 0.0], 2 * base - a),
        ([1.0, 1.0, -1.0], a + b - c),
        ([0.5, 0.0, 0.0], (a + base) / 2),
    ):
        assert torch.allclose(merge("task_arithmetic", [base, a, b, c], weight=weights), want, atol=1e-15)


def test_slerp_keeps_the_norm_on_the_sphere():
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(64, 64, generator=g, dtype=torch.float64) for _ in range(2))
    a, b = a / a.norm(), b / b.norm()
    for t in (0.0, 0.25, 0.5, 1.0):
        assert merge("slerp", [a, b], t=t).norm().item() == pytest.approx(1, abs=1e-14)
    rows = merge("slerp", [a, b], t=0.5, scope="row", threshold=1.0)
    single = [merge("slerp", [x, y], t=0.5, threshold=1.0) for x, y in zip(a, b, strict=True)]
    assert torch.allclose(rows, torch.stack(single))


def test_slerp_angle_of_nearly_parallel_vectors():
    """The angle comes from the difference: products of fp32 sums would lose it."""
    g = torch.Generator().manual_seed(2)
    a = torch.randn(256, 300, generator=g, dtype=torch.float64)
    b = a + 3e-4 * torch.randn(256, 300, generator=g, dtype=torch.float64)
    exact = merge("slerp", [a, b], t=2000.5, threshold=1.0)
    rough = merge("slerp", [a.float(), b.float()], t=2000.5, threshold=1.0)
    assert (rough.double() - exact).norm() < 2e-3 * exact.norm()


def test_model_stock_stays_between():
    base, *xs = models(3, dtype=torch.float64)
    same = merge("model_stock", [base, xs[0], xs[0].clone()], preset="paper")
    assert torch.allclose(same, xs[0], atol=1e-12)
    opposite = merge("model_stock", [base, xs[0], 2 * base - xs[0]], preset="paper")
    assert torch.allclose(opposite, base, atol=1e-9)


def test_dare_keeps_the_expected_share_and_the_sum_of_magnitudes():
    base = torch.zeros(300, 700)
    x = torch.randn(300, 700, generator=torch.Generator().manual_seed(0))
    out = merge("dare_linear", [base, x], weight=1.0, density=0.25)
    share = (out != 0).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert out.abs().sum().item() == pytest.approx(x.abs().sum().item(), rel=1e-5)
    unbiased = merge("dare_linear", [base, x], preset="paper", density=0.25)
    kept = unbiased != 0
    assert torch.equal(unbiased[kept], (x * 4)[kept])


def test_dare_masks_depend_on_model_and_name_only():
    base, x = torch.zeros(50, 60), torch.ones(50, 60)
    inputs, drop = [base, x, x.clone()], {"weight": [1.0, 10.0], "density": 0.5, "rescale": False}
    both = merge("dare_linear", inputs, **drop)
    assert set(both.unique().tolist()) == {0.0, 1.0, 10.0, 11.0}
    shared = merge("dare_linear", inputs, **drop, shared_mask=True)
    assert set(shared.unique().tolist()) == {0.0, 11.0}


def test_whole_model_threshold_ranks_across_tensors():
    """Two layers whose deltas differ 10 times: a common threshold keeps nothing of the small one."""
    method = get("ties")
    parameters = {"weight": 1.0, "density": 0.3, "trim_scope": "model"}
    ops = [oracle.make_op(method, n, (300, 400), [F32] * 2, parameters) for n in ("b", "a")]
    g = torch.Generator().manual_seed(0)
    xs = [torch.rand(300, 400, generator=g) + 1, (torch.rand(300, 400, generator=g) + 1) * 10]
    inputs = [[torch.zeros_like(x), x] for x in xs]
    outs = oracle.drive(ops, inputs, oracle.FAST, step=1 << 16, shuffle=1)
    assert differences(outs, reference(ops, inputs)) == []
    assert int((outs[0] != 0).sum()) == 0
    assert int((outs[1] != 0).sum()) == int(0.3 * 240000)


def test_whole_model_refuses_mixed_precision_and_parameters():
    method = get("ties")
    a = oracle.op_of(method, {"preset": "paper"}, (4,), "fp32", name="a")
    b = oracle.op_of(method, {"preset": "paper"}, (4,), "fp64", name="b")
    with pytest.raises(RecipeError, match="precision"):
        method.program([a, b], oracle.FAST)
    c = oracle.op_of(method, {"preset": "paper", "density": 0.3}, (4,), "fp32", name="c")
    with pytest.raises(RecipeError, match="the same parameters; c differs"):
        method.program([a, c], oracle.FAST)


def test_whole_model_over_types_and_bundles():
    method = get("ties")
    case = {"weight": [1.0, 0.4], "density": [0.2, 0.6], "trim_scope": "model"}
    tensors = (("z", (300, 301), "bf16"), ("m", (90,), "fp32"), ("a", (200, 777), "bf16"), ("é", (3, 0), "bf16"))
    ops = [oracle.op_of(method, case, s, t, name=n) for n, s, t in tensors]
    inputs = [oracle.inputs_of(op, seed=i) for i, op in enumerate(ops)]
    assert unlike_reference(ops, inputs, oracle.FAST) == []
    assert unlike_reference(ops, inputs, oracle.KERNELS["numpy"], step=1 << 16, shuffle=5) == []


def warned(name, case):
    spec = oracle.op_of(get(name), case, (2,), "fp32").spec
    return spec.method.warn(spec)


def test_warnings():
    assert warned("ties", {"weight": [1.0, -1.0]})
    assert warned("ties", {"preset": "task_vectors"})
    for name in ("task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"):
        cancel = [f"{name}: weights sum to zero, so normalize is left out"]
        assert warned(name, {"weight": [1.0, -1.0], "normalize": True}) == cancel
        assert warned(name, {"weight": [1.0, -1.0]}) == []
    assert not warned("ties", {"weight": 1.0, "density": 0.2})
    assert warned("slerp", {"t": 2.0})
    assert warned("linear", {"weight": [1.0, -0.999]})
    assert not warned("linear", {"weight": 0.5})
