"""The functions that stand in for peft's, beside peft's own."""

import pytest
import torch

peft = pytest.importorskip("peft")
from peft.tuners.lora import model as lora
from peft.utils import merge_utils

from fastmerge.adapters import peft as ours
from fastmerge.errors import BackendUnavailable

THEIRS = {f.__name__: getattr(merge_utils, f.__name__) for f in ours.FUNCTIONS}
WEIGHTS = torch.tensor([0.7, 1.2, 0.4])
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def installed():
    ours.install()
    yield
    ours.uninstall()


def drawn(*shape, n=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(n)]


CALLS = [
    ("task_arithmetic", ()),
    ("magnitude_prune", (0.3,)),
    ("magnitude_prune", (0.0001,)),
    ("ties", (0.3,)),
    ("ties", (0.6, "frequency")),
    ("ties", (0.001,)),
]


@pytest.mark.parametrize(("name", "args"), CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_values_of_peft(name, args, dtype):
    tensors = drawn(50, 31, dtype=dtype)
    copies = [t.clone() for t in tensors]
    got, want = getattr(ours, name)(tensors, WEIGHTS, *args), THEIRS[name](tensors, WEIGHTS, *args)
    assert got.dtype == want.dtype
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)
    assert all(map(torch.equal, tensors, copies))


@pytest.mark.parametrize(("name", "args"), CALLS)
def test_no_further_from_the_truth_in_bf16(name, args):
    tensors = [t + 0.001 * torch.arange(900).view(30, 30).bfloat16() for t in drawn(30, 30, dtype=torch.bfloat16)]
    distinct = [
        t * (t.abs().view(-1).unsqueeze(0) == t.abs().view(-1).unsqueeze(1)).sum(0).eq(1).view(30, 30) for t in tensors
    ]
    weights = WEIGHTS.bfloat16()
    truth = THEIRS[name]([t.double() for t in distinct], weights.double(), *args)
    got, want = (f(distinct, weights, *args) for f in (getattr(ours, name), THEIRS[name]))
    assert got.dtype == want.dtype
    assert (got - truth).square().mean() <= (want - truth).square().mean() * 1.001


def test_weights_of_a_wider_type_widen_the_result():
    tensors = drawn(8, 8, dtype=torch.float16)
    assert ours.ties(tensors, WEIGHTS, 0.5).dtype == THEIRS["ties"](tensors, WEIGHTS, 0.5).dtype == torch.float32


def masked(tensors, density, seed):
    """The thinned tensors of a call, each drawn out by weights that leave out the others."""
    found = []
    for i in range(len(tensors)):
        torch.manual_seed(seed)
        found.append(ours.dare_linear(tensors, torch.eye(len(tensors))[i], density))
    return found


def test_masks_follow_the_seed_and_the_probability():
    tensors = drawn(200, 300)
    first, again, other = (masked(tensors, 0.4, s) for s in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))
    for thin, t in zip(first, tensors, strict=True):
        kept = thin != 0
        assert abs(kept.float().mean() - 0.4) < 0.01
        assert torch.allclose(thin[kept], t[kept] / 0.4, rtol=2e-5)
    assert (first[0].ne(0) & first[1].ne(0)).float().mean() - 0.16 < 0.01


def test_elections_over_the_same_masks():
    tensors = drawn(60, 70)
    thin = masked(tensors, 0.5, 3)
    for method in ("total", "frequency"):
        stack = torch.stack(thin)
        mask = merge_utils.calculate_majority_sign_mask(stack, method=method)
        want = merge_utils.disjoint_merge(stack * WEIGHTS.view(-1, 1, 1), mask)
        torch.manual_seed(3)
        assert torch.allclose(ours.dare_ties(tensors, WEIGHTS, 0.5, method), want, rtol=1e-6, atol=1e-6)
    torch.manual_seed(3)
    want = (torch.stack(thin) * WEIGHTS.view(-1, 1, 1)).sum(0)
    assert torch.allclose(ours.dare_linear(tensors, WEIGHTS, 0.5), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ties", "magnitude_prune"])
def test_what_is_not_covered_is_pefts_own(name, installed):
    function, theirs = getattr(merge_utils, name), THEIRS[name]
    grown = [t.requires_grad_() for t in drawn(6, 7)]
    function(grown, WEIGHTS, 0.5).sum().backward()
    assert all(t.grad is not None for t in grown)
    tensors = drawn(6, 7)
    signed = torch.tensor([1.0, -0.5, 0.0])
    assert torch.allclose(function(tensors, signed, 0.5), theirs(tensors, signed, 0.5))
    with pytest.warns(UserWarning, match="no pruning"):
        assert torch.equal(function(tensors, WEIGHTS, 1.0), theirs(tensors, WEIGHTS, 1.0))
    with pytest.raises(ValueError, match="Density should be >= 0"):
        function(tensors, WEIGHTS, -0.1)
    assert function([t.to("meta") for t in tensors], WEIGHTS.to("meta"), 0.5).device.type == "meta"
    turned = [t.T for t in tensors]
    assert torch.allclose(function(turned, WEIGHTS, 0.5), theirs(turned, WEIGHTS, 0.5))


def test_an_unknown_election_is_refused_as_ever(installed):
    with pytest.raises(RuntimeError, match="Unimplemented mask method"):
        merge_utils.ties(drawn(3, 3), WEIGHTS, 0.5, "loud")


def state():
    return [getattr(m, n) for n in THEIRS for m in (merge_utils, lora)] + [lora.LoraModel.__dict__[ours._HOOK]]


def test_uninstall_restores():
    before = state()
    ours.install()
    ours.install()
    inside = state()
    ours.uninstall()
    ours.uninstall()
    assert not any(a is b for a, b in zip(before, inside, strict=True))
    assert all(a is b for a, b in zip(before, state(), strict=True))


def test_another_version_is_left_alone(monkeypatch):
    before = state()
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    with pytest.raises(BackendUnavailable, match=r"written for peft 0.21.2, and this is 0.22.0"):
        ours.install()
    assert all(a is b for a, b in zip(before, state(), strict=True))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = torch.nn.Embedding(29, 12)
        self.q = torch.nn.Linear(12, 20)
        self.only_a = torch.nn.Linear(20, 20)
        self.turned = Conv1D(12, 20)

    def forward(self, x):
        return self.turned(self.only_a(self.q(self.embed(x))))


def network(rank=5, **more):
    """A model with two adapters of different scalings, one of which is alone in a layer."""
    torch.manual_seed(0)
    names = ["embed", "q", "turned"]
    config = {"init_lora_weights": False, **more}
    model = peft.get_peft_model(
        Net(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=[*names, "only_a"], **config), adapter_name="one"
    )
    model.add_adapter("two", peft.LoraConfig(r=rank, lora_alpha=2, target_modules=names, **config))
    return model


def deltas(model, name):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}
    return {n: m.get_delta_weight(name).detach() for n, m in layers.items() if name in {*m.lora_A, *m.lora_embedding_A}}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["svd", "cat", "linear", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"])
def test_adapters_as_peft_adds_them(kind):
    model = network(5 if kind.endswith("svd") or kind == "cat" else 3)
    more = {"density": 0.4} if "ties" in kind or "prune" in kind else {}
    weights = [0.7, 0.4] if "ties" in kind else [0.7, -0.4]
    model.add_weighted_adapter(["one", "two"], weights, "theirs", kind, **more)
    ours.install()
    try:
        model.add_weighted_adapter(["one", "two"], weights, "ours", kind, **more)
    finally:
        ours.uninstall()
    want, got = deltas(model, "theirs"), deltas(model, "ours")
    assert got.keys() == want.keys()
    assert len(got) == 4
    assert all(d.norm() > 0 for d in got.values())
    assert [n for n in want if (got[n] - want[n]).norm() > 1e-6 * want[n].norm()] == []


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_the_best_of_a_rank_and_more_than_there_is(installed):
    model = network(5)
    model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "few", "svd", svd_rank=4)
    model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "many", "svd", svd_rank=11)
    a, b = deltas(model, "one"), deltas(model, "two")
    for name, many in deltas(model, "many").items():
        whole = a[name] - 0.5 * b.get(name, torch.zeros(()))
        assert torch.allclose(many, whole, atol=1e-6)
        u, s, v = torch.linalg.svd(whole.double())
        want = (u[:, :4] * s[:4]) @ v[:4]
        assert torch.allclose(deltas(model, "few")[name].double(), want, atol=1e-6)
