"""A module with merged weights: gradients in any loop, one gradient tensor at a time, nothing stale."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

from fastmerge.adamerging import MergedModule
from fastmerge.adamerging.coefficients import Coefficients, rows_of
from fastmerge.errors import RecipeError, ShapeError
from tests.adamerging.near import unlike


class Tied(nn.Module):
    """An embedding that is the head as well, and a counter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.BatchNorm1d(6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.norm(self.embed(x))
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


@pytest.fixture
def models():
    torch.manual_seed(0)
    base = Tied().eval()
    experts = []
    for _ in range(2):
        expert = Tied().eval()
        expert.load_state_dict(base.state_dict())
        with torch.no_grad():
            for p in expert.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        experts.append(expert)
    return base, experts


X = torch.arange(8)


def eager(base, experts, raw, row, how):
    """The loss of the same model, every step in fp64 by autograd."""
    lam = how(raw)
    names = [n for n, _ in base.named_parameters()]
    every = [n for n, x in base.state_dict().items() if x.is_floating_point() and n != "head.weight"]
    theta = {
        n: dict(base.named_parameters())[n].detach().double()
        + sum(
            lam[row[every.index(n)], i]
            * (dict(e.named_parameters())[n] - dict(base.named_parameters())[n]).detach().double()
            for i, e in enumerate(experts)
        )
        for n in names
    }
    wide = Tied().eval().double()
    wide.load_state_dict(base.double().state_dict())
    base.float()
    return torch.func.functional_call(wide, theta, (X,)).square().mean()


HOW = {"clamp": lambda r: r.clamp(0, 1), "free": lambda r: r, "softmax": lambda r: r.softmax(dim=1)}


@pytest.mark.parametrize("parametrisation", HOW)
@pytest.mark.parametrize("granularity", ["task", "layer", "module"])
def test_gradients_are_those_of_autograd(models, granularity, parametrisation):
    base, experts = models
    merged = MergedModule(base, experts, granularity=granularity, parametrisation=parametrisation)
    with torch.no_grad():
        merged.raw.copy_(torch.linspace(-0.3, 0.9, merged.raw.numel()).view_as(merged.raw))
    merged(X).square().mean().backward()
    raw = merged.raw.detach().clone().requires_grad_()
    eager(base, experts, raw, rows_of(merged.names, granularity), HOW[parametrisation]).backward()
    assert unlike(merged.raw.grad, raw.grad, rtol=1e-5, atol=1e-6) == []
    assert raw.grad.abs().max() > 1e-4


def test_one_gradient_tensor_at_a_time(models, monkeypatch):
    base, experts = models
    merged = MergedModule(base, experts)
    held, calls = [], []
    slopes = merged._streams.slopes

    def seen(gradients):
        held.append(sum(t.grad is not None for t in merged._thetas) + len(gradients))
        calls.append(list(gradients))
        return slopes(gradients)

    monkeypatch.setattr(merged._streams, "slopes", seen)
    merged(X).square().mean().backward()
    learned = len(list(base.parameters()))
    assert held == [1] * learned
    assert sorted(p for c in calls for p in c) == sorted({p for c in calls for p in c})
    alone = merged.raw.grad.clone()
    merged.raw.grad = None
    held.clear()
    with merged.together():
        for part in (X[:4], X[4:]):
            (merged(part).square().mean() / 2).backward()
    assert held == [2 * learned], "all at once, in one call"
    assert unlike(merged.raw.grad, alone, rtol=1e-4, atol=1e-7) == []
    assert all(t.grad is None for t in merged._thetas)


def test_gradients_of_several_backwards_add_up(models):
    base, experts = models
    merged = MergedModule(base, experts)
    for _ in range(3):
        merged(X).square().mean().backward()
    thrice = merged.raw.grad.clone()
    merged.zero_grad()
    merged(X).square().mean().backward()
    assert unlike(thrice, 3 * merged.raw.grad) == []


def test_weights_follow_the_coefficients_however_they_are_changed(models):
    base, experts = models
    merged = MergedModule(base, experts, granularity="task")
    rendered = []
    render = merged._streams.render
    merged._streams.render = lambda *args: (rendered.append(1), render(*args))
    before = merged(X)
    merged(X)
    assert len(rendered) == 1, "as long as nothing changes"
    merged.raw.data.fill_(0.5)
    changed = merged(X)
    assert len(rendered) == 2
    assert not torch.equal(before, changed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.sum().backward()
    merged.raw.data = torch.zeros(1, 2, dtype=torch.float64)
    assert torch.equal(merged(X), base(X)), "no task vector, the base"


def test_nothing_of_the_inputs_changes(models):
    base, experts = models
    every = [base, *experts]
    before = [{n: x.clone() for n, x in m.state_dict().items()} for m in every]
    merged = MergedModule(base, experts).train()
    optimizer = torch.optim.SGD(merged.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        merged(X).square().mean().backward()
        optimizer.step()
    assert base.training
    for model, old in zip(every, before):
        assert all(torch.equal(x, old[n]) for n, x in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert [n for n, _ in merged.named_parameters()] == ["raw"]
    assert list(merged.state_dict()) == ["raw"]


def test_tied_weights_are_one_and_counters_are_copied(models):
    base, experts = models
    base.norm.num_batches_tracked.fill_(7)
    merged = MergedModule(base, experts)
    assert "head.weight" not in merged.names
    state = merged.merged_state_dict()
    assert state["head.weight"] is state["embed.weight"]
    assert int(state["norm.num_batches_tracked"]) == 7
    assert set(state) == set(base.state_dict())
    without = [{n: x for n, x in e.state_dict().items() if n != "head.weight"} for e in experts]
    lacking = MergedModule(base, without)
    assert torch.equal(lacking(X), merged(X))
    apart = {n: x.clone() for n, x in experts[0].state_dict().items()}
    assert MergedModule(base, [apart]) is not None
    apart["head.weight"] += 1
    with pytest.raises(ShapeError, match=r"experts.0.: head.weight differs from embed.weight"):
        MergedModule(base, [apart])
    with pytest.raises(ShapeError, match=r"base: head.weight differs from embed.weight, and in the module"):
        MergedModule(base, experts, base=apart)


def test_another_base_than_the_module(models):
    base, experts = models
    shell = Tied().eval()
    assert torch.equal(MergedModule(shell, experts, base=base)(X), MergedModule(base, experts)(X))
    other = {"a": torch.ones(2)}
    with pytest.raises(RecipeError, match="embed.weight: not in the base"):
        MergedModule(shell, [other], base=other)


def test_settings_are_checked(models):
    base, experts = models
    for settings, match in [
        ({"granularity": "lay"}, "granularity: expected one of .*did you mean 'layer'"),
        ({"parametrisation": "sigmoid"}, "parametrisation: expected one of"),
        ({"parametrisation": "softmax", "prior": 0.2}, "equal shares"),
        ({"prior": float("nan")}, "prior: expected a finite number"),
        ({"soup": True}, "soup: expected parametrisation softmax"),
    ]:
        with pytest.raises(RecipeError, match=match):
            MergedModule(base, experts, **settings)
    merged = MergedModule(base, experts)
    with merged.together(), pytest.raises(RecipeError, match="no other one"), merged.together():
        pass


def test_what_granularity_shares():
    names = ("model.layers.0.q.weight", "model.layers.11.q.weight", "model.layers.0.k.weight", "0.weight", "1.weight")
    assert rows_of(names, "module") == (0, 0, 1, 2, 2)
    assert rows_of(names, "layer") == rows_of(names, "tensor") == (0, 1, 2, 3, 4)
    assert rows_of(names, "task") == rows_of(names, "model") == (0,) * 5


def test_a_soup_has_shares_that_add_up_to_one():
    raw = nn.Parameter(torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64))
    soup = Coefficients(raw, (0, 0), "softmax", based=True)
    want = raw.detach().softmax(dim=1)[0, 1:].numpy()
    assert np.allclose(soup.values(), [want, want], atol=0)
    soup.absorb([0, 1], np.array([[1.0, 2.0], [3.0, -1.0]]))
    lam = raw.detach().clone().requires_grad_()
    (lam.softmax(dim=1)[0, 1:] * torch.tensor([4.0, 1.0])).sum().backward()
    assert unlike(raw.grad, lam.grad) == []


def test_fp16_and_bf16_modules_learn(models):
    base, experts = models
    for dtype in (torch.bfloat16, torch.float64):
        merged = MergedModule(base.to(dtype), [e.to(dtype) for e in experts])
        merged(X).square().mean().backward()
        assert merged.raw.grad.dtype == torch.float64
        assert merged.raw.grad.abs().sum() > 0
