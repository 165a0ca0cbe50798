"""Runs of AdaMerging: the same as by hand, the same every time, saved and taken up again, and as a recipe on disk."""

import itertools

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import fastmerge as fm
from fastmerge.adamerging import AdaMerging, AdaMergingConfig, Task, learned_soup
from fastmerge.errors import CheckpointError, OutputError, RecipeError
from tests import tiny
from tests.adamerging.near import unlike

NAMES = ("l.weight", "fc.l.weight", "fc.l.bias")


class Net(nn.Module):
    """Two layers, of which the name of one is part of the other's."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, 8, bias=False)
        self.fc = nn.ModuleDict({"l": nn.Linear(8, 4)})

    def forward(self, x):
        return self.fc["l"](self.l(x).tanh())


def models(n=3, dtype=torch.float32):
    torch.manual_seed(1)
    base = Net().to(dtype)
    experts = []
    for _ in range(n):
        expert = Net().to(dtype)
        expert.load_state_dict({k: x + 0.3 * torch.randn(x.shape).to(dtype) for k, x in base.state_dict().items()})
        experts.append(expert)
    return base, experts


def tasks(n=3, labels=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)

    def batch():
        x = torch.randn(16, 6, generator=g).to(dtype)
        return (x, torch.randint(4, (16,), generator=g)) if labels else x

    return [Task(f"t{i}", [batch() for _ in range(3)]) for i in range(n)]


def table(coefficients):
    return torch.tensor(list(coefficients.values()), dtype=torch.float64)


def by_hand(base, experts, tasks, steps, rate, loss, parametrisation=lambda r: r.clamp(0, 1), start=0.3):
    """Layer-wise AdaMerging in plain torch, all by autograd, in fp64."""
    base = {n: x.double() for n, x in base.state_dict().items()}
    deltas = [{n: x.double() - base[n] for n, x in e.state_dict().items()} for e in experts]
    raw = torch.full((len(base), len(experts)), start, dtype=torch.float64, requires_grad=True)
    optimizer, net = torch.optim.Adam([raw], rate), Net().double()
    feeds = [itertools.cycle(t.data) for t in tasks]
    for _ in range(steps):
        lam = parametrisation(raw)
        theta = {n: x + sum(lam[p, i] * d[n] for i, d in enumerate(deltas)) for p, (n, x) in enumerate(base.items())}
        optimizer.zero_grad()
        total = 0
        for i, feed in enumerate(feeds):
            batch = next(feed)
            x = batch[0] if isinstance(batch, tuple) else batch
            total = total + loss(torch.func.functional_call(net, theta, (x.double(),)), batch, i)
        total.backward()
        optimizer.step()
    return parametrisation(raw).detach()


def entropy(logits, batch, i):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


def nll(logits, batch, i):
    return functional.cross_entropy(logits, batch[1])


@pytest.mark.parametrize("together", [True, False])
def test_the_papers_algorithm(together):
    base, experts = models()
    config = AdaMergingConfig(steps=12, learning_rate=0.05, together=together)
    result = AdaMerging(base, experts, tasks(), config).run()
    want = by_hand(base, experts, tasks(), 12, 0.05, entropy)
    assert unlike(table(result.coefficients), want, rtol=1e-4, atol=1e-5) == []
    assert list(result.coefficients) == list(NAMES)
    assert [len(losses) for losses in result.losses] == [3] * 12


@pytest.mark.parametrize(
    ("objective", "loss"),
    [("nll", nll), (lambda seen: functional.cross_entropy(seen.logits, seen.labels), nll)],
    ids=["nll", "custom"],
)
def test_objectives_with_labels(objective, loss):
    base, experts = models()
    config = AdaMergingConfig(steps=5, learning_rate=0.05, objective=objective, parametrisation="softmax")
    result = AdaMerging(base, experts, tasks(labels=True), config).run()
    soft = by_hand(base, experts, tasks(labels=True), 5, 0.05, loss, lambda r: r.softmax(1), 0.0)
    assert unlike(table(result.coefficients), soft, rtol=1e-4, atol=1e-5) == []


def test_distillation_from_each_tasks_expert():
    base, experts = models()

    def divergence(logits, batch, i):
        teacher = experts[(2, 1, 2)[i]](batch).double().log_softmax(1).detach()
        return (teacher.exp() * (teacher - logits.log_softmax(1))).sum(1).mean()

    given = [Task(t.name, t.data, expert=e) for t, e in zip(tasks(), (2, None, None))]
    config = AdaMergingConfig(steps=5, learning_rate=0.05, objective="distill", parametrisation="free", prior=0.1)
    result = AdaMerging(base, experts, given, config).run()
    want = by_hand(base, experts, tasks(), 5, 0.05, divergence, lambda r: r + 0, 0.1)
    assert unlike(table(result.coefficients), want, rtol=1e-3, atol=1e-5) == []


def test_a_head_per_task():
    base, experts = models()
    heads = [torch.randn(4, 5, dtype=torch.float64) for _ in range(3)]
    given = [Task(t.name, t.data, head=lambda z, h=h: z.double() @ h) for t, h in zip(tasks(), heads)]
    result = AdaMerging(base, experts, given, AdaMergingConfig(steps=4, learning_rate=0.05)).run()
    want = by_hand(base, experts, tasks(), 4, 0.05, lambda z, b, i: entropy(z @ heads[i], b, i))
    assert unlike(table(result.coefficients), want, rtol=1e-4, atol=1e-5) == []


class Shuffled:
    """Batches in an order that torch's random numbers decide anew in every round."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter([self.batches[i] for i in torch.randperm(len(self.batches)).tolist()])


def test_saved_at_any_step_and_taken_up_again_it_is_the_same_run(tmp_path):
    base, experts = models()

    def start():
        given = [Task(t.name, Shuffled(t.data)) for t in tasks()]
        return AdaMerging(base, experts, given, AdaMergingConfig(steps=9, learning_rate=0.05, seed=3))

    whole = start().run()
    assert start().run().coefficients == whole.coefficients
    torch.manual_seed(99)
    for at in (0, 1, 4, 9):
        first, second = start(), start()
        first.run(at)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert len(second.losses) == at
        again = second.run()
        assert again.coefficients == whole.coefficients
        assert again.losses == whole.losses
    other = AdaMergingConfig(granularity="task")
    with pytest.raises(CheckpointError, match=r"coefficients \(3, 3\); expected coefficients \(1, 3\)"):
        AdaMerging(base, experts, tasks(), other).load_state_dict(first.state_dict())
    with pytest.raises(CheckpointError, match="without"):
        start().load_state_dict({})
    with pytest.raises(CheckpointError, match="other tasks"):
        AdaMerging(base, experts, tasks(2)).load_state_dict(first.state_dict())


def on_disk(root, base, experts):
    paths = [root / n for n in ("base", *"abc"[: len(experts)])]
    for path, model in zip(paths, (base, *experts)):
        tiny.write(path, {n: x.clone() for n, x in model.state_dict().items()})
    return paths


def merged_on_disk(recipe, root, capsys):
    (root / "recipe.yml").write_text(recipe.to_yaml())
    assert not fm.merge(root / "recipe.yml", root / "out").warnings
    return load_file(root / "out" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trimmed", [False, True])
def test_the_recipe_on_disk_gives_the_same_bytes(tmp_path, capsys, dtype, trimmed):
    base, experts = models(dtype=dtype)
    config = AdaMergingConfig(steps=6, learning_rate=0.1, trimmed=trimmed, density=0.4)
    run = AdaMerging(base, experts, tasks(dtype=dtype), config)
    result = run.run()
    assert len({tuple(row) for row in result.coefficients.values()}) == 3
    paths = on_disk(tmp_path, base, experts)
    recipe = result.recipe(paths[0], paths[1:])
    assert recipe.merge_method == ("ties" if trimmed else "task_arithmetic")
    got = merged_on_disk(recipe, tmp_path, capsys)
    state = result.state_dict()
    assert all(torch.equal(got[n], state[n]) for n in NAMES)
    live = run.merged.merged_state_dict()
    if trimmed:  # the same sums in another order
        near = 1e-5 if dtype == torch.float32 else 1e-2
        assert all(torch.allclose(live[n], state[n], rtol=near, atol=near) for n in NAMES)
    else:
        assert all(torch.equal(live[n], state[n]) for n in NAMES)
    with pytest.raises(RecipeError, match="models: expected 3, one per expert, got 1"):
        result.recipe("base", ["a"])


def test_one_coefficient_per_expert_is_one_number_in_the_recipe(tmp_path, capsys):
    base, experts = models(2)
    result = AdaMerging(base, experts, tasks(), AdaMergingConfig(steps=3, granularity="task")).run()
    paths = on_disk(tmp_path, base, experts)
    recipe = result.recipe(paths[0], paths[1:])
    assert "filter" not in recipe.to_yaml()
    got = merged_on_disk(recipe, tmp_path, capsys)
    assert all(torch.equal(got[n], x) for n, x in result.state_dict().items())


def test_experts_of_other_types(tmp_path, capsys):
    base, experts = models(2)
    base = base.bfloat16()
    result = AdaMerging(base, experts, tasks(dtype=torch.bfloat16), AdaMergingConfig(steps=2)).run()
    paths = on_disk(tmp_path, base, experts)
    got = merged_on_disk(result.recipe(paths[0], paths[1:]), tmp_path, capsys)
    assert {x.dtype for x in got.values()} == {torch.bfloat16}
    assert all(torch.equal(got[n], x) for n, x in result.state_dict().items())
    base.l.float()
    with pytest.raises(RecipeError, match="bfloat16, float32 and experts have others"):
        AdaMerging(base, [e.double() for e in experts], tasks())


def selected(base, experts, density):
    """The entries that the authors' code selects, in numpy's words: trim, elect by the sum, keep what agrees."""
    flat = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in base]) for e in experts])
    n = flat.shape[1]
    kth = flat.abs().kthvalue(n - int(density * n), dim=1, keepdim=True).values
    kept = flat * (flat.abs() >= kth)
    sign = kept.sum(dim=0).sign()
    sign[sign == 0] = sign.sum().sign()
    return kept * torch.where(sign > 0, kept > 0, kept < 0)


def test_plus_plus_learns_on_the_entries_that_ties_selects():
    base, experts = models()
    config = AdaMergingConfig(steps=0, trimmed=True, density=0.2)
    run = AdaMerging(base, experts, tasks(), config)
    state = {n: x.detach() for n, x in base.state_dict().items()}
    want = selected(state, [e.state_dict() for e in experts], 0.2)
    for i in range(3):
        with torch.no_grad():
            run.merged.raw.zero_()
            run.merged.raw[:, i] = 1
        merged = run.merged.merged_state_dict()
        got = torch.cat([(merged[n] - state[n]).flatten() for n in state])
        assert torch.equal(got != 0, want[i] != 0)
        assert unlike(got, want[i], rtol=1e-4, atol=1e-6) == []


def test_what_is_wrong_is_said_all_at_once():
    base, experts = models()
    config = AdaMergingConfig(
        granularity="x", parametrisation="free", trimmed=True, objective="y", steps=-1, learning_rate=0, density=0
    )
    once = Task("t", iter([torch.ones(1, 6)]))
    with pytest.raises(RecipeError) as refused:
        AdaMerging(base, experts, [once, once], config)
    said = str(refused.value)
    for part in (
        "granularity",
        "objective",
        "trimmed",
        "density",
        "steps",
        "learning_rate",
        "more than once",
        "read once",
    ):
        assert part in said
    with pytest.raises(RecipeError, match="tasks: expected at least one"):
        AdaMerging(base, experts, [])
    with pytest.raises(RecipeError, match=r"expert: expected a number in 0 .. 2; got 3"):
        AdaMerging(base, experts, [Task("t", [], expert=3)], AdaMergingConfig(objective="distill"))
    with pytest.raises(RecipeError, match="task 't': no batch"):
        AdaMerging(base, experts, [Task("t", [])]).step()
    with pytest.raises(RecipeError, match="needs labels"):
        AdaMerging(base, experts, tasks(), AdaMergingConfig(objective="nll")).step()
    for wrong in (lambda seen: 1.0, lambda seen: seen.logits, lambda seen: torch.ones(())):
        with pytest.raises(RecipeError, match="expected a loss of one number"):
            AdaMerging(base, experts, tasks(), AdaMergingConfig(objective=wrong)).step()
    with pytest.raises(RecipeError, match="expected logits"):
        AdaMerging(base, experts, [Task("t", tasks()[0].data, head=lambda z: "x")]).step()


def test_a_loss_that_is_not_finite_stops_and_changes_nothing():
    base, experts = models()
    bad = Task("bad", [torch.full((2, 6), float("nan"))])
    run = AdaMerging(base, experts, [*tasks(1), bad])
    before = run.merged.raw.detach().clone()
    with pytest.raises(OutputError, match="step 1, task 'bad': expected a finite loss, got nan"):
        run.step()
    assert torch.equal(run.merged.raw, before)
    assert run.losses == []
    assert all(t.grad is None for t in run.merged._thetas)
    assert base.training, "as it was"


def by_hand_soup(models, data, steps, rate, rows):
    """Learned soup in plain torch, in fp64."""
    states = [{n: x.double() for n, x in m.state_dict().items()} for m in models]
    raw = torch.zeros(rows, len(models), dtype=torch.float64, requires_grad=True)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer, net, feed = torch.optim.Adam([raw, beta], rate), Net().double(), itertools.cycle(data)
    for _ in range(steps):
        x, y = next(feed)
        share = raw.softmax(1).expand(3, -1)
        theta = {n: sum(share[p, i] * s[n] for i, s in enumerate(states)) for p, n in enumerate(states[0])}
        optimizer.zero_grad()
        functional.cross_entropy(beta * torch.func.functional_call(net, theta, (x.double(),)), y).backward()
        optimizer.step()
    return raw.softmax(1).expand(3, -1).detach(), beta.item()


@pytest.mark.parametrize("granularity", ["tensor", "model"])
def test_learned_soup(tmp_path, capsys, granularity):
    base, experts = models(2)
    data = tasks(1, labels=True)[0].data
    every = [base, *experts]
    soup = learned_soup(Net(), every, data, granularity=granularity, steps=10)
    weights, temperature = by_hand_soup(every, data, 10, 0.05, 3 if granularity == "tensor" else 1)
    assert unlike(table(soup.weights), weights, rtol=1e-4, atol=1e-5) == []
    assert soup.temperature == pytest.approx(temperature, rel=1e-4)
    assert soup.losses[-1] < soup.losses[0]
    paths = on_disk(tmp_path, base, experts)
    got = merged_on_disk(soup.recipe(paths), tmp_path, capsys)
    assert all(torch.equal(got[n], x) for n, x in soup.state_dict().items())
    with pytest.raises(RecipeError, match="models: expected 3"):
        soup.recipe(paths[:2])
    with pytest.raises(RecipeError, match="3 problems"):
        learned_soup(Net(), [base], iter([]), granularity="layer")


def test_a_recipe_of_tied_weights_names_both():
    from tests.adamerging.test_module import Tied, X

    torch.manual_seed(0)
    base, expert = Tied(), Tied()
    config = AdaMergingConfig(steps=1, learning_rate=0.05)
    result = AdaMerging(base, [expert], [Task("t", [X])], config).run()
    rules = {r["filter"]: r["value"] for r in result.recipe("b", ["e"]).plain()["models"][0]["parameters"]["weight"]}
    assert rules["head.weight"] == rules["embed.weight"]
    assert set(rules) == {n for n, x in base.state_dict().items() if x.is_floating_point()}
