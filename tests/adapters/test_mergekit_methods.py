"""mergekit's methods with the adapter installed, beside the same calls without it."""

import pytest
import torch
from mergekit import merge_methods as mm
from mergekit.merge_methods import registry
from torch.utils._python_dispatch import TorchDispatchMode

from fastmerge.adapters import mergekit as adapter
from fastmerge.adapters.mergekit import methods

WEIGHTS = [0.2, 0.3, 0.5]
CALLS = {
    "linear": (dict(weight=WEIGHTS), 3, None),
    "slerp": (dict(t=0.3), 1, 0),
    "nuslerp": (dict(weight=[0.3, 0.7]), 2, 0),
    "multislerp": (dict(weight=WEIGHTS), 3, 0),
    "karcher": (dict(max_iter=50, tol=1e-9), 3, None),
    "task_arithmetic": (dict(weight=WEIGHTS, **{"lambda": 0.8}), 3, 0),
    "ties": (dict(weight=WEIGHTS, density=0.4), 3, 0),
    "breadcrumbs": (dict(weight=WEIGHTS, density=0.9), 3, 0),
    "breadcrumbs_ties": (dict(weight=WEIGHTS, density=0.9, gamma=0.02), 3, 0),
    "sce": (dict(select_topk=0.3), 3, 0),
    "ram": ({}, 3, 0),
    "ramplus_tl": (dict(r=0.2), 3, 0),
    "model_stock": ({}, 3, 0),
    "nearswap": (dict(t=0.001), 1, 0),
    "arcee_fusion": ({}, 1, 0),
}
KERNELS = {"linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "model_stock"}
KERNELS |= {"dare_ties", "dare_linear", "sce", "arcee_fusion"}
"""Those that the engine has kernels for; for others mergekit's own code runs, until they have some."""
RANDOM = ("dare_ties", "dare_linear", "della", "della_linear")


@pytest.fixture
def installed():
    adapter.install(merges=False)
    yield adapter
    adapter.uninstall()


@pytest.fixture
def merged_here(installed, monkeypatch):
    """How many groups the engine merged, call by call."""
    counts, inner = [], methods._merged

    def counting(name, groups, *rest):
        done = inner(name, groups, *rest)
        counts.append(len(groups))
        return done

    monkeypatch.setattr(methods, "_merged", counting)
    return counts


def inputs(count, based, dtype=torch.bfloat16, shape=(12, 10), seed=0):
    """Fine-tunes whose updates have magnitudes that no two elements share, in any of the types."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g) * 0.02
    n = base.numel()
    steps = [
        (torch.randperm(n, generator=g) + 1) / 128 * (torch.rand(n, generator=g) - 0.5).sign() for _ in range(count)
    ]
    return [t.to(dtype) for t in ([base] if based else []) + [base + s.reshape(shape) for s in steps]]


def plainly(call):
    """The result of a call without the adapter."""
    adapter.uninstall()
    try:
        return call()
    finally:
        adapter.install(merges=False)


def rms(got, want):
    return (got.double() - want).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_no_method_is_less_exact_than_mergekits(name, dtype, merged_here):
    parameters, count, base = CALLS[name]
    given = inputs(count, base is not None, dtype)
    before = [t.clone() for t in given]
    call = dict(parameters=parameters, base_index=base)
    got = mm.merge_tensors(given, name, **call)
    assert merged_here == [1] or name not in KERNELS
    theirs = plainly(lambda: mm.merge_tensors(given, name, **call))
    want = plainly(lambda: mm.merge_tensors([t.double() for t in given], name, **call))
    assert (got.dtype, got.shape, got.device) == (theirs.dtype, theirs.shape, theirs.device)
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    assert rms(got, want) <= 1.001 * rms(theirs, want) + working * want.abs().max()  # its last place is noise
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_every_method_of_the_registry_is_taken_but_the_one_without_work(installed):
    taken = {name for name, m in registry._METHODS.items() if "_execute" in vars(m)}
    assert set(registry._METHODS) - taken == {"passthrough"}
    assert taken == {*CALLS, *RANDOM}


@pytest.mark.parametrize("name", RANDOM)
def test_masks_follow_torchs_seed(name, merged_here):
    given = inputs(3, based=True, dtype=torch.float32)
    call = dict(parameters=dict(weight=1.0, density=0.6), base_index=0)
    torch.manual_seed(7)
    one, two = (mm.merge_tensors(given, name, **call) for _ in range(2))
    torch.manual_seed(7)
    assert torch.equal(mm.merge_tensors(given, name, **call), one)
    assert not torch.equal(one, two)
    assert merged_here == [1, 1, 1] or name not in KERNELS
    states = [{"x": t, "y": t.clone()} for t in given]
    both = mm.merge_state_dicts(states, name, parameters=call["parameters"], base=0)
    assert not torch.equal(both["x"], both["y"])


def test_a_batch_with_values_per_group_is_one_call(merged_here):
    groups, weights = [], []
    for i, shape in enumerate([(3,), (2, 2), (), (0,), (3,)]):
        a, b = inputs(2, based=False, dtype=torch.float32, shape=shape, seed=i)
        entries = [mm.TensorEntry("a", a), mm.TensorEntry("b", b)]
        groups.append(mm.TensorGroup(entries[:: -1 if i % 2 else 1]))
        weights.append({"a": i + 1.0, "b": 0.5})
    got = mm.get("linear")(groups, parameters={"weight": mm.PerGroupValues(weights)})
    assert merged_here == [5]
    want = plainly(lambda: mm.get("linear")(groups, parameters={"weight": mm.PerGroupValues(weights)}))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_copies_of_inputs_stay_within_the_room_of_a_batch(installed, monkeypatch):
    runs, run = [], methods.run
    monkeypatch.setattr(methods, "run", lambda ops, *rest: (runs.append(len(ops)), run(ops, *rest))[1])
    states = [{f"w{i}": t[i] for i in range(10)} for t in inputs(2, based=False, dtype=torch.float32, shape=(10, 9, 7))]
    call = dict(parameters=dict(weight=0.5), batch_options=mm.BatchOptions(max_bytes=1000))
    straight = mm.merge_state_dicts(states, "linear", **call)
    turned = mm.merge_state_dicts([{n: t.T for n, t in s.items()} for s in states], "linear", **call)
    assert runs == [10, 2, 2, 2, 2, 2]
    assert all(torch.equal(turned[n], straight[n].T) for n in straight)


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[::2], lambda t: t[0, 0], lambda t: t.reshape(-1)[1:]])
def test_views_and_scalars(view, merged_here):
    given = inputs(2, based=True, dtype=torch.float32)
    call = dict(parameters=dict(weight=[0.5, 1.0], density=0.4), base_index=0)
    got = mm.merge_tensors([view(t) for t in given], "ties", **call)
    want = plainly(lambda: mm.merge_tensors([view(t) for t in given], "ties", **call))
    assert merged_here == [1]
    torch.testing.assert_close(got, want)


def test_types_are_those_that_were_asked_for(merged_here):
    given = [torch.tensor([1.003, 2.0]), torch.tensor([1.003, 4.0], dtype=torch.bfloat16)]
    for kwargs, atol in (
        (dict(), 1e-4),
        (dict(dtype=torch.bfloat16), 0),  # rounds the inputs, as mergekit does
        (dict(dtype=torch.float64), 1e-12),  # computes in fp64
        (dict(out_dtype=torch.float16), 0),
        (dict(dtype=torch.bfloat16, out_dtype=torch.float64), 4),  # mergekit rounds to bf16 on the way
    ):
        call = dict(parameters=dict(weight=[1000.0, 1.0], normalize=False), **kwargs)
        got = mm.merge_tensors(given, "linear", **call)
        want = plainly(lambda call=call: mm.merge_tensors(given, "linear", **call))
        torch.testing.assert_close(got, want, rtol=0, atol=atol)
    assert len(merged_here) == 5


class Looking(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        Looking.calls += 1
        return func(*args, **kwargs or {})


def test_mergekits_own_code_runs_where_the_engine_must_not(merged_here, monkeypatch):
    a, b = inputs(2, based=False, dtype=torch.float32)
    call = dict(parameters=dict(weight=0.5))
    grad = a.clone().requires_grad_()
    mm.merge_tensors([grad, b], "linear", **call).sum().backward()
    assert grad.grad is not None
    with Looking():
        mm.merge_tensors([a, b], "linear", **call)
    assert Looking.calls > 0
    torch.func.vmap(lambda x, y: mm.merge_tensors([x, y], "task_arithmetic", **call, base_index=0))(a, b)
    with pytest.raises(TypeError, match="floating-point"):
        mm.merge_tensors([a.int(), b.int()], "linear", **call)
    assert merged_here == []
    with torch.no_grad():
        assert not mm.merge_tensors([grad, b], "linear", **call).requires_grad
    assert merged_here == [1]
    dense = mm.merge_tensors([a, b], "ties", parameters=dict(weight=1.0, density=1.5), base_index=0)
    torch.testing.assert_close(dense, b)  # a density that the engine refuses
    method, seen = mm.get("linear"), []
    implementation = method.implementation
    monkeypatch.setattr(method, "implementation", lambda *x, **k: (seen.append(1), implementation(*x, **k))[1])
    mm.merge_tensors([a, b], "linear", **call)
    assert seen == [1]


def test_part_of_a_batch_may_record_gradients(merged_here):
    module = torch.nn.BatchNorm1d(3)
    got = mm.merge_state_dicts([module, torch.nn.BatchNorm1d(3)], "linear", parameters=dict(weight=0.5))
    assert merged_here == [2]
    assert got["weight"].requires_grad
    assert list(got) == list(module.state_dict())


def test_a_method_of_somebody_else_is_left_alone(monkeypatch):
    @mm.merge_method(name="linear")
    def other(group: mm.TensorGroup, weight: mm.PerInput[float]) -> torch.Tensor:
        return group.tensors[0] * 0

    monkeypatch.setattr(registry, "_METHODS", {"linear": other})
    adapter.install(merges=False)
    try:
        assert "_execute" not in vars(other)
        assert mm.merge_tensors([torch.ones(2)] * 2, "linear", parameters=dict(weight=1.0)).tolist() == [0.0, 0.0]
    finally:
        adapter.uninstall()
