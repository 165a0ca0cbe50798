"""Sessions on GPUs without one: logical GPUs have the bytes of the CPU and of the merge on disk."""

import pytest
import torch
import triton.language as tl

import fastmerge as fm
from fastmerge.errors import BackendUnavailable, OutputError, ShapeError
from fastmerge.kernels import _call, kth, selection
from tests import tiny
from tests.session import logical
from tests.session.family import different, merged, recipe
from tests.session.series import SERIES, documents

if not _call.INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


SHAPES = {"norm": (40,), "model.layers.0.w": (3, 30), "model.layers.1.w": (3, 30), "wide": (2, 300)}
"""Few tensors, and few rows: the interpreter pays per program."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    rng = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=rng) * 0.02 for n, s in SHAPES.items()}
    found, root = {}, tmp_path_factory.mktemp("models")
    for name in ("base", "a", "b", "c"):
        tuned = {n: t + torch.randn(t.shape, generator=rng) * 0.02 * (name != "base") for n, t in base.items()}
        found[name] = tiny.write(root / name, {n: t.to(torch.bfloat16) for n, t in tuned.items()})
    return found


@pytest.fixture(autouse=True)
def ways(monkeypatch):
    """Thresholds of the wide one are found in another way than those of the rest, so it is laid out before them."""
    monkeypatch.setattr(kth, "MOST", 500)


@pytest.fixture
def opened(paths, monkeypatch):
    """A session on two logical GPUs, and one on the CPU."""
    logical.pretend(monkeypatch, 2)
    with fm.Session(list(paths.values()), device="cuda:0,cuda:1") as gpus, fm.Session(list(paths.values())) as cpu:
        yield gpus, cpu


@pytest.mark.parametrize("name", SERIES)
def test_a_series_of_renders_has_the_bytes_of_the_cpu(paths, name, tmp_path, monkeypatch):
    logical.pretend(monkeypatch, 1)
    target, expected = None, None
    with fm.Session(list(paths.values()), device="cuda") as gpu, fm.Session(list(paths.values())) as cpu:
        for turn, document in enumerate(documents(paths, name)):
            target = gpu.render(document, target)
            expected = cpu.render(document, expected)
            assert different(target, expected) == []
            if turn == 0:
                assert different(target, merged(document, tmp_path)) == []


@pytest.mark.parametrize("name", ["linear", "slerp"])
def test_two_gpus_have_the_bytes_of_the_cpu(opened, paths, name):
    gpus, cpu = opened
    target = None
    for document in documents(paths, name):
        target = gpus.render(document, target)
        assert different(target, cpu.render(document)) == []


def test_launches_that_run_again_are_one_graph(monkeypatch):
    """Captured once, in the second run, and replayed with other numbers; whether a graph is right a GPU has to show."""
    logical.pretend(monkeypatch, 1)
    seen = []

    def graph(gpu, launches):
        def replay():
            seen.append("replayed")
            for launch in launches:
                launch()

        seen.append("captured")
        return replay

    monkeypatch.setattr(_call.Gpu, "graph", graph)
    states = {n: {"x": torch.arange(9.0) * (i + 1)} for i, n in enumerate(("base", "a"))}
    target, expected = None, None
    with fm.Session(states, device="cuda") as gpu, fm.Session(states) as cpu:
        for weight in (0.1, 0.2, 0.3, 0.4):  # the first selects, and is a sequence of its own
            document = recipe(
                {n: n for n in states}, "ties", base="base", names="a", dtype=None, weight=weight, density=0.5
            )
            target, expected = gpu.render(document, target), cpu.render(document, expected)
            assert different(target, expected) == []
    assert seen == ["captured", "replayed", "replayed"]


def test_known_statistics_cost_no_pass(paths, monkeypatch):
    """What one GPU is asked for, render by render: tables, passes the first time only, the merge; bound once."""
    logical.pretend(monkeypatch, 1)
    seen = logical.log(monkeypatch)

    def asked(session, document, target):
        seen.clear()
        session.render(document, target, everything=True)
        return seen.copy()

    merge = {"send", "cuts", "ties", "consensus"}
    with fm.Session(list(paths.values()), device="cuda") as session:
        first, second, denser, last = documents(paths, "ties")
        target = session.render(first)
        assert {"kth", "settle"} < set(seen)
        assert set(asked(session, second, target)) <= {"bind", *merge}  # other weights
        selects = asked(session, denser, target)  # another density is selected, in one sequence with the merge
        assert {"kth", "settle"} < set(selects)
        assert selects.index("bring") == len(selects) - 1  # and nobody waits in between
        for document in (last, denser):
            assert set(asked(session, document, target)) <= merge
        for name, merge in (("linear", {"send", "combine"}), ("model_stock", {"send", "combine"})):
            first, second = documents(paths, name)
            target = session.render(first)
            assert set(asked(session, second, target)) <= {"bind", *merge}
            assert set(asked(session, first, target)) == merge
        first, second = documents(paths, "dare_ties")  # sums of magnitudes depend on random numbers
        target = session.render(first)
        assert "bind" not in asked(session, second, target)


def test_only_what_changes_is_launched(opened, paths):
    gpus, cpu = opened

    def document(value):
        weight = [{"filter": "layers.1.", "value": value}, {"value": 0.5}]
        return recipe(paths, "linear", weight=[weight, 0.3, 0.2])

    target, expected = gpus.render(document(0.1)), cpu.render(document(0.1))
    for tensor in target.values():
        tensor.data.fill_(7)  # which torch does not count
    gpus.render(document(0.9), target)
    assert [n for n, t in target.items() if not bool((t == 7).all())] == ["model.layers.1.w"]
    gpus.render(document(0.9), target, everything=True)
    assert different(target, cpu.render(document(0.9), expected)) == []
    target["norm"].zero_()
    gpus.render(document(0.9), target)
    assert different(target, expected) == []


def test_tensors_are_spread_by_bytes_and_results_land_where_the_target_is(paths, monkeypatch):
    made = logical.pretend(monkeypatch, 2)
    document = recipe(paths, "linear", weight=0.5)
    with fm.Session(list(paths.values())) as cpu:
        expected = cpu.render(document)
    with fm.Session(list(paths.values()), device="cuda:0,cuda:1") as session:
        held = [len(home.made) for home in made[0]]
        assert held == [8, 8]  # of four models two tensors each
        target = session.render(document)
        assert [len(home.made) for home in made[0]] == [h + h // 4 for h in held]
        assert different(target, expected) == []
        elsewhere = {n: torch.zeros_like(t) for n, t in expected.items()}  # on no GPU of the session
        for _ in range(2):
            session.render(document, elsewhere, everything=True)
            assert different(elsewhere, expected) == []
        swapped = dict(target)  # on GPUs of the session, but not those that have the inputs
        for name, tensor in target.items():
            (other,) = (home for home in made[0] if not home.has(tensor))
            swapped[name] = other.new(tensor.shape, tensor.dtype)
        session.render(document, swapped)
        assert different(swapped, expected) == []


def test_inputs_of_two_gpus_are_brought_together_once(paths, monkeypatch, tmp_path):
    made = logical.pretend(monkeypatch, 2)
    sources = [{"model": str(paths[n]), "layer_range": [i, i + 1]} for i, n in ((0, "a"), (1, "b"))]
    for source in sources:
        source["parameters"] = {"weight": 0.5}
    document = {"merge_method": "linear", "slices": [{"sources": sources}], "dtype": "bfloat16"}
    expected = merged(document, tmp_path)
    with fm.Session([paths["a"], paths["b"]], device="cuda:0,cuda:1") as session:
        homes = session._models.homes
        homes._names.clear()
        target = session.render(document)
        assert different(target, expected) == []
        count = [len(home.made) for home in made[0]]
        session.render({**document, "tokenizer_source": None}, target, everything=True)
        assert [len(home.made) for home in made[0]] == count


def test_a_batch_is_its_recipes_one_by_one(opened, paths):
    gpus, cpu = opened
    first, second, *_ = documents(paths, "ties")
    some = [first, documents(paths, "linear")[0], second]
    for got, document in zip(gpus.render_batch(some), some, strict=True):
        assert different(got, cpu.render(document)) == []


def test_tensors_of_a_caller_are_used_where_they_are(paths, monkeypatch):
    made = logical.pretend(monkeypatch, 2)
    rng = torch.Generator().manual_seed(1)
    states = {n: {"x": torch.randn(300, generator=rng), "y": torch.randn(9, 10, generator=rng).T} for n in "ab"}
    for state in states.values():
        state["tied"] = state["x"]
    document = recipe({n: n for n in "ab"}, "linear", names=("a", "b"), dtype="float32", weight=0.5)
    with fm.Session(states) as cpu:
        expected = cpu.render(document)
    with fm.Session(states, device="cuda:0,cuda:1") as session:
        assert sum(len(home.made) for home in made[-1]) == 4  # tied ones once
        assert different(session.render(document), expected) == []
        with pytest.raises(ShapeError, match="x: is a tensor of one of the session's models"):
            session.render(document, states["a"])
    whole = logical.Logical.has
    monkeypatch.setattr(logical.Logical, "has", lambda home, t: home.name == "cuda:1" or whole(home, t))
    with fm.Session(states, device="cuda:0,cuda:1") as session:  # all of them are on the second one
        assert not any(home.made for home in made[-1])
        assert different(session.render(document), expected) == []


def test_adapters_are_applied_and_eight_bits_widened(paths, tmp_path, monkeypatch):
    logical.pretend(monkeypatch, 2)
    state = tiny.state(0, layers=1, hidden=8, vocab=9)
    path = tiny.write(tmp_path / "m", state, layers=1)
    adapter = tiny.adapter(tmp_path / "adapter", "model.layers.0.self_attn.q_proj", 8, 8)
    ref = f"{path}+{adapter}"
    document = recipe({"a": ref, "b": path}, "linear", names=("a", "b"), weight=[0.2, 0.3])
    expected = merged(document, tmp_path)
    with fm.Session([ref, path], device="cuda:0,cuda:1") as session:
        assert different(session.render(document), expected) == []
    named = recipe({"a": f"x+{adapter}", "b": "y"}, "linear", names=("a", "b"), weight=[0.2, 0.3])
    with fm.Session({"x": state, "y": path}, device="cuda:0,cuda:1") as session:
        assert different(session.render(named), expected) == []


def stages(paths, weight):
    return f"""
name: first
merge_method: linear
models: [{{model: {paths["a"]}, parameters: {{weight: {weight}}}}}, {{model: {paths["b"]}, parameters: {{weight: 1}}}}]
---
merge_method: slerp
base_model: {paths["c"]}
models: [{{model: first}}]
parameters: {{t: 0.4}}
"""


def test_stages_are_made_on_the_way(opened, paths, tmp_path):
    gpus, _ = opened
    target = None
    for weight in (0.3, 0.9):  # inner products of what a stage makes are not those of what it made before
        target = gpus.render(stages(paths, weight), target)
        assert different(target, merged(stages(paths, weight), tmp_path)) == []
    assert not gpus._statistics._found


def test_what_has_no_way_on_gpus_is_named(paths, monkeypatch):
    logical.pretend(monkeypatch, 2)
    whole = recipe(paths, "ties", base="base", weight=0.5, density=0.3, extra={"parameters": {"trim_scope": "model"}})
    with fm.Session(list(paths.values()), device="cuda:0,cuda:1") as session:
        with pytest.raises(BackendUnavailable, match="ranks all tensors together.*expected a session on one"):
            session.render(whole)
        target = {n: torch.zeros(s, dtype=torch.bfloat16, device="meta") for n, s in SHAPES.items()}
        with pytest.raises(ShapeError, match="on the CPU or a GPU, got one on meta"):
            session.render(recipe(paths, "linear", weight=0.5), target)


def test_ranks_of_all_tensors_together(monkeypatch):
    logical.pretend(monkeypatch, 1)
    monkeypatch.setattr(selection, "RANKED", tl.constexpr(512))
    rng = torch.Generator().manual_seed(1)
    states = {n: {k: torch.randn(size, generator=rng) for k, size in (("y", 9), ("x", 20))} for n in ("base", "a")}
    extra = {"parameters": {"trim_scope": "model"}}
    document = recipe({n: n for n in states}, "ties", base="base", names="a", weight=0.5, density=0.3, extra=extra)
    with fm.Session(states, device="cuda") as session, fm.Session(states) as cpu:
        assert different(session.render(document), cpu.render(document)) == []


def test_a_failed_render_is_not_remembered(monkeypatch):
    logical.pretend(monkeypatch, 1)
    states = {n: {"x": torch.ones(3) * (i + 1), "y": torch.ones(7)} for i, n in enumerate("ab")}
    document = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.5}}
    states["b"]["y"][3] = float("nan")
    with fm.Session(states, device="cuda") as session:
        for _ in range(2):
            with pytest.raises(OutputError, match="y: the angle"):
                session.render(document)


def test_integers_are_copied_where_all_agree(monkeypatch):
    logical.pretend(monkeypatch, 2)
    held = {n: {"x": torch.full((5,), i, dtype=torch.bfloat16), "n": torch.tensor([1, 2])} for i, n in enumerate("ab")}
    document = recipe({n: n for n in "ab"}, "linear", names=("a", "b"), dtype=None, weight=0.5)
    with fm.Session(held, device="cuda:0,cuda:1") as session:
        assert session.render(document)["n"].tolist() == [1, 2]
    held["b"]["n"] = torch.tensor([1, 3])
    with (
        fm.Session(held, device="cuda:0,cuda:1") as session,
        pytest.raises(fm.CheckpointError, match="n: int64 tensors are copied"),
    ):
        session.render(document)
