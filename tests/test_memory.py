"""The in-memory API: mergekit's call, the caller's tensors."""

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts as peer_state_dicts
from mergekit.merge_methods import merge_tensors as peer

import fastmerge as fm


def tensors(n=3, shape=(33, 65), dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(n)]


CALLS = [
    ("linear", dict(weight=[0.2, 0.3, 0.5]), None),
    ("slerp", dict(t=0.3), 0),
    ("task_arithmetic", dict(weight=[0.4, 0.6]), 0),
    ("ties", dict(weight=[0.5, 1.0], density=0.4), 0),
    ("model_stock", {}, 0),
    ("ties", dict(weight=0.5, density=[0.4, 0.5]), 2),
]


@pytest.mark.parametrize(("method", "parameters", "base"), CALLS)
def test_the_same_call_as_mergekit_gives_the_same_weights(method, parameters, base):
    inputs = tensors(2 if method == "slerp" else 3)
    before = [t.clone() for t in inputs]
    got = fm.merge_tensors(inputs, method, parameters=parameters, base_index=base)
    want = peer(inputs, method, parameters=parameters, base_index=base)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_out_is_filled_and_returned():
    inputs = tensors()
    out = torch.full((33, 65), float("nan"))
    got = fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}, out=out)
    assert got is out
    assert torch.equal(out, fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}))
    with pytest.raises(fm.ShapeError, match="out"):
        fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}, out=torch.empty(3))


def test_out_may_be_an_input():
    inputs = tensors()
    want = fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0})
    fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0}, out=inputs[1])
    assert torch.equal(inputs[1], want)


@pytest.mark.parametrize("view", [lambda t: t.T, lambda t: t[::2], lambda t: t.reshape(-1)[1:], lambda t: t[0, 0]])
def test_views_and_scalars(view):
    inputs = tensors()
    got = fm.merge_tensors([view(t) for t in inputs], "linear", parameters={"weight": 1.0})
    assert torch.equal(got, view(fm.merge_tensors(inputs, "linear", parameters={"weight": 1.0})))


def test_state_dicts_and_modules():
    models = {k: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16)) for k in "abc"}
    got = fm.merge_state_dicts(models, "ties", parameters={"weight": {"b": 0.5, "c": 1.0}, "density": 0.5}, base="a")
    want = peer_state_dicts(models, "ties", parameters={"weight": {"b": 0.5, "c": 1.0}, "density": 0.5}, base="a")
    assert list(got) == list(models["a"].state_dict())
    for name in ("0.weight", "0.bias"):
        assert (got[name] - want[name]).abs().max() <= 1e-5
    assert torch.equal(got["1.num_batches_tracked"], torch.tensor(0))


def test_differing_names_are_refused_or_left_out():
    a, b = {"x": torch.ones(3), "y": torch.ones(2)}, {"x": torch.zeros(3)}
    with pytest.raises(fm.ShapeError, match="y: not in"):
        fm.merge_state_dicts([a, b], "linear", parameters={"weight": 1.0})
    assert list(fm.merge_state_dicts([a, b], "linear", parameters={"weight": 1.0}, strict=False)) == ["x"]


@pytest.mark.parametrize(
    ("method", "parameters", "base", "words"),
    [
        ("tise", {}, None, ["tise", "ties"]),
        ("linear", {}, None, ["weight", "required"]),
        ("linear", {"wieght": 1}, None, ["wieght", "weight"]),
        ("ties", {"weight": 1.0}, None, ["base"]),
        ("ties", {"weight": [1.0], "density": 2.0}, 0, ["weight", "density", "2 problems"]),
        ("slerp", {"t": 0.5}, 0, ["slerp", "expected 1"]),
    ],
)
def test_wrong_calls_are_refused_with_every_problem(method, parameters, base, words):
    with pytest.raises(fm.RecipeError) as error:
        fm.merge_tensors(tensors(), method, parameters=parameters, base_index=base)
    assert all(w in str(error.value) for w in words), str(error.value)


def test_shapes_types_and_devices_are_checked():
    with pytest.raises(fm.ShapeError, match=r"\(2,\)"):
        fm.merge_tensors([torch.ones(3), torch.ones(2)], "linear", parameters={"weight": 1.0})
    with pytest.raises(fm.ShapeError, match="int64"):
        fm.merge_tensors([torch.ones(3).long()] * 2, "linear", parameters={"weight": 1.0}, ids=["a", "b"])
    with pytest.raises(fm.ShapeError, match="meta"):
        fm.merge_tensors([torch.ones(3, device="meta")] * 2, "linear", parameters={"weight": 1.0})


def test_dtypes_promote_and_out_dtype_rounds_once():
    a, b = tensors(2)
    mixed = fm.merge_tensors([a.bfloat16(), b], "linear", parameters={"weight": 1.0})
    assert mixed.dtype == torch.float32
    wide = fm.merge_tensors([a.double(), b], "linear", parameters={"weight": 1.0})
    assert wide.dtype == torch.float64
    half = fm.merge_tensors([a, b], "linear", parameters={"weight": 1.0}, out_dtype=torch.float16)
    assert torch.equal(half, ((a + b) / 2).half())


def test_the_seed_and_the_name_key_the_masks():
    inputs = tensors()
    call = dict(parameters={"weight": 1.0, "density": 0.5}, base_index=0)
    one = fm.merge_tensors(inputs, "dare_linear", **call, name="x")
    assert torch.equal(one, fm.merge_tensors(inputs, "dare_linear", **call, name="x"))
    assert not torch.equal(one, fm.merge_tensors(inputs, "dare_linear", **call, name="y"))
    assert not torch.equal(one, fm.merge_tensors(inputs, "dare_linear", **call, name="x", seed=1))


@pytest.mark.parametrize("backend", ["native", "reference", "triton"])
def test_named_backends_agree(backend):
    inputs = tensors(shape=(7, 30))
    got = fm.merge_tensors(inputs, "ties", parameters={"weight": 0.5, "density": 0.3}, base_index=0, backend=backend)
    assert torch.equal(got, fm.merge_tensors(inputs, "ties", parameters={"weight": 0.5, "density": 0.3}, base_index=0))


def test_unknown_backends_and_the_environment(monkeypatch):
    with pytest.raises(fm.BackendUnavailable, match="unknown backend"):
        fm.merge_tensors(tensors(), "linear", parameters={"weight": 1.0}, backend="abacus")
    monkeypatch.setenv("FASTMERGE_BACKEND", "abacus")
    with pytest.raises(fm.BackendUnavailable, match="abacus"):
        fm.merge_tensors(tensors(), "linear", parameters={"weight": 1.0})
