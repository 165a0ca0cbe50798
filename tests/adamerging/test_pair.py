"""The fused pair beside plain torch: merged tensors to the bit, gradients to 1e-5 of autograd's in fp64."""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fastmerge.adamerging import merged_parameters, merged_tensor
from fastmerge.adamerging.states import states
from fastmerge.adamerging.streams import Streams
from fastmerge.api.tensors import merge_tensors
from fastmerge.errors import BackendUnavailable, RecipeError, ShapeError
from tests.adamerging.near import unlike

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["native", "reference"]
INTERPRETED = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []


def family(shape, dtype, n, seed=0, spread=1e-2):
    """A base, experts and a gradient-making tensor."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g, dtype=torch.float64) * 0.1
    experts = [base + spread * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(n)]
    return base.to(dtype), [x.to(dtype) for x in experts], torch.randn(shape, generator=g, dtype=torch.float64)


def eager(base, experts, lam):
    """The definition, in fp64 and differentiable: every task vector is made."""
    base = base.double()
    return base + sum(w * (x.double() - base) for w, x in zip(lam, experts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "n"), [((3, 5), 1), ((300, 401), 4), ((70_001,), 9), ((), 2), ((0, 4), 2)])
def test_gradients_are_those_of_autograd_in_fp64(shape, n, dtype, backend):
    base, experts, c = family(shape, dtype, n)
    lam = torch.linspace(-0.2, 0.9, n, dtype=torch.float64, requires_grad=True)
    mine = merged_tensor(base, experts, lam, backend=backend)
    assert mine.dtype == dtype
    (mine * c.to(dtype)).sum().backward()
    want = lam.detach().clone().requires_grad_()
    (eager(base, experts, want) * c.to(dtype).double()).sum().backward()
    assert lam.grad.dtype == torch.float64
    scale = 1 + want.grad.abs().max()
    assert unlike(lam.grad / scale, want.grad / scale, rtol=0, atol=1e-5) == []
    near = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert unlike(mine.double(), eager(base, experts, lam.detach()), rtol=near, atol=near / 10) == []


def test_a_cancelling_sum_is_exact_where_products_of_whole_weights_are_not():
    """<g, x - x0> of weights that are large beside what they differ by."""
    base = torch.full((100_000,), 1000.0)
    expert = base + 2.0**-10
    g = torch.where(torch.arange(100_000) % 2 == 0, 3.0, -1.0)
    lam = torch.zeros(1, requires_grad=True)
    merged_tensor(base, [expert], lam).backward(g)
    assert lam.grad.item() == 100_000 * 2.0**-10
    naive = (g * expert).sum() - (g * base).sum()
    assert naive != lam.grad.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 6])
def test_merged_tensors_are_those_of_task_arithmetic_to_the_bit(dtype, n):
    base, experts, _ = family((123, 77), dtype, n)
    for weights in (np.linspace(-1, 1, n), np.full(n, 1e-30), np.zeros(n), np.full(n, 1e30)):
        want = merge_tensors([base, *experts], "task_arithmetic", parameters={"weight": weights.tolist()}, base_index=0)
        got = merged_tensor(base, experts, torch.tensor(weights))
        assert torch.equal(got, want), weights


def test_backends_give_the_same_bits():
    base, experts, c = family((257, 300), torch.bfloat16, 3)
    found = []
    for backend in (*BACKENDS, *INTERPRETED):
        bound = Streams([[base, *experts]], backend)
        out = bound.outputs()
        bound.render(np.array([[0.3, -0.2, 0.9]]), out)
        found.append((out[0], bound.slopes({0: c.bfloat16()})))
    for out, slopes in found[1:]:
        assert torch.equal(found[0][0], out)
        assert np.array_equal(found[0][1], slopes)


def test_work_in_parts_gives_the_same_bits(monkeypatch):
    """Pieces, threads and kinds of tensors: many ways, one result."""
    from fastmerge.adamerging import streams

    shapes = [(300_000,), (7,), (70_000, 3), (0,), (65_536,)]
    some = [family(s, d, 2, seed) for seed, (s, d) in enumerate(zip(shapes, [*DTYPES, torch.float32]))]
    coefficients = np.linspace(0.1, 1.0, 10).reshape(5, 2)
    gradients = {p: c.to(b.dtype) for p, (b, _, c) in enumerate(some) if p != 3}
    found = []
    for pieces, few in ((streams.WRITTEN, streams.FEW), (65_536, 1)):
        monkeypatch.setattr(streams, "WRITTEN", pieces)
        monkeypatch.setattr(streams, "READ", pieces)
        monkeypatch.setattr(streams, "FEW", few)
        bound = Streams([[b, *xs] for b, xs, _ in some])
        out = bound.outputs()
        bound.render(coefficients, out)
        found.append((out, bound.slopes(gradients)))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0]))
    assert np.array_equal(found[0][1], found[1][1])
    alone = np.concatenate([bound.slopes({p: g}) for p, g in gradients.items()])
    assert np.array_equal(alone, found[0][1])
    turned = bound.slopes(dict(reversed(gradients.items())))
    assert np.array_equal(turned[::-1], found[0][1])


def test_types_may_differ_between_models():
    base, experts, c = family((40, 30), torch.float32, 2)
    mixed = [experts[0].bfloat16(), experts[1].double()]
    lam = torch.tensor([0.3, 0.6], requires_grad=True)
    mine = merged_tensor(base, mixed, lam)
    assert mine.dtype == torch.float32
    (mine * c.float()).sum().backward()
    want = lam.detach().double().requires_grad_()
    (eager(base, mixed, want) * c.float().double()).sum().backward()
    assert unlike(lam.grad.double(), want.grad, rtol=1e-5, atol=1e-5) == []


def test_a_model_at_once_runs_in_functional_call():
    """A training loop of one's own: one row of coefficients per tensor, several uses, one gradient."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 6)).eval()
    experts = [{n: x + 0.1 * torch.randn(x.shape) if x.is_floating_point() else x for n, x in net.state_dict().items()}]
    before = {n: x.clone() for n, x in net.state_dict().items()}
    names = [n for n, x in before.items() if x.is_floating_point()]
    x = torch.randn(9, 5)
    grads = []
    for make in (merged_parameters, plain):
        lam = torch.full((len(names), 1), 0.4, requires_grad=True)
        theta = make(net, experts, lam)
        assert sorted(theta) == sorted(before)
        loss = sum(torch.func.functional_call(net, theta, (v,)).square().sum() for v in (x, 2 * x))
        loss.backward()
        grads.append(lam.grad)
    assert unlike(*grads, rtol=1e-4, atol=1e-4) == []
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in before.items())
    assert theta["1.num_batches_tracked"] is not net.state_dict()["1.num_batches_tracked"]


def plain(net, experts, lam):
    state = net.state_dict()
    names = [n for n, x in state.items() if x.is_floating_point()]
    rows, learned = dict(zip(names, lam)), dict(net.named_parameters())
    made = {n: x + rows[n] * (experts[0][n] - x) if n in rows else x for n, x in state.items()}
    return {n: x if n in learned else x.detach() for n, x in made.items()}


def test_gradients_in_any_layout():
    base, experts, _ = family((30, 20), torch.float32, 2)
    lam = torch.tensor([0.5, 0.5], requires_grad=True)
    weight = merged_tensor(base, experts, lam)
    x = torch.randn(7, 20)
    (x @ weight.T).square().sum().backward()
    want = lam.detach().clone().requires_grad_()
    (x.double() @ eager(base, experts, want).T).square().sum().backward()
    assert unlike(lam.grad, want.grad, rtol=1e-4, atol=1e-4) == []
    lam.grad = None
    rows = torch.nn.functional.embedding(torch.tensor([1, 1, 4]), merged_tensor(base, experts, lam), sparse=True)
    rows.sum().backward()
    want.grad = None
    eager(base, experts, want)[[1, 1, 4]].sum().backward()
    assert unlike(lam.grad, want.grad, rtol=1e-4, atol=1e-5) == []


def test_a_second_derivative_is_refused():
    base, experts, c = family((9,), torch.float32, 2)
    lam = torch.ones(2, requires_grad=True)
    merged = merged_tensor(base, experts, lam)
    slope = torch.autograd.grad((merged.square() * c.float()).sum(), lam, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_non_contiguous_and_ordinary_inputs_stay_as_they_are():
    base, experts, _ = family((30, 20), torch.float32, 2)
    turned = [x.T for x in (base, *experts)]
    copies = [x.clone() for x in turned]
    got = merged_tensor(turned[0], turned[1:], torch.tensor([0.25, 0.5]))
    assert unlike(got, merged_tensor(base, experts, torch.tensor([0.25, 0.5])).T, rtol=0, atol=0) == []
    assert all(torch.equal(x, y) for x, y in zip(turned, copies))


@pytest.mark.parametrize("lam", [torch.ones(3), torch.ones(2, 2), torch.ones(2, dtype=torch.int64), [0.1, 0.2], 0.3])
def test_coefficients_that_do_not_fit_are_refused(lam):
    base, experts, _ = family((4,), torch.float32, 2)
    with pytest.raises(RecipeError, match=r"lam: expected a floating-point tensor of shape \(2,\) or \(1, 2\)"):
        merged_tensor(base, experts, lam)


def test_models_that_do_not_fit_are_refused_all_at_once():
    base = {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4)}
    expert = {"a": torch.ones(3), "c": torch.ones(4, dtype=torch.int32), "d": torch.ones(1)}
    with pytest.raises(ShapeError) as refused:
        states(base, [base, expert])
    assert [p.split(":")[1].strip() for p in refused.value.problems] == ["d", "a", "b", "c"]
    for wrong, match in [
        ([], "at least one"),
        (base, "sequence of at least one"),
        ([1], "experts.0.: expected a module"),
    ]:
        with pytest.raises(RecipeError, match=match):
            states(base, wrong)
    with pytest.raises(ShapeError, match="expected a dense tensor"):
        states({"a": torch.eye(2).to_sparse()}, [{"a": torch.eye(2)}])
    with pytest.raises(RecipeError, match="at least one floating-point tensor"):
        states({"n": torch.tensor(1)}, [{"n": torch.tensor(1)}])
    with pytest.raises(ShapeError, match="float8_e4m3fn tensors cannot be merged"):
        states({"a": torch.ones(2).to(torch.float8_e4m3fn)}, [{"a": torch.ones(2)}])
    with pytest.raises(BackendUnavailable):
        merged_tensor(torch.ones(2), [torch.ones(2)], torch.ones(1), backend="triton2")


def test_bound_tensors_are_not_copied():
    import copy
    import pickle

    bound = Streams([[torch.ones(2), torch.ones(2)]])
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="bind anew"):
            attempt(bound)
