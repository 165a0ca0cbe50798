"""fastmerge's calls take every argument of mergekit 0.1.5's, with the same meaning: each call is made to both."""

import inspect

import pytest
import torch
from mergekit import merge_methods as mm

import fastmerge as fm

NAMES = ("model.layers.0.w", "model.layers.1.w", "norm", "count")


def models(dtype=torch.float32, count=3):
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(6, 5, generator=g) for n in NAMES[:3]}
    found = {}
    for key in ("base", "a", "b")[:count]:
        noise = {n: 0.1 * torch.randn(6, 5, generator=g) for n in base}
        found[key] = {n: (t + noise[n]).to(dtype) for n, t in base.items()} | {"count": torch.tensor(7)}
    return found


def per_group(*values):
    return mm.PerGroupValues(values)


TENSORS = {
    "broadcast scalar": ("linear", dict(parameters={"weight": 0.5})),
    "sequence in input order": ("linear", dict(parameters={"weight": [0.1, 0.2, 0.7]})),
    "mapping by id": ("linear", dict(parameters={"weight": {"x": 0.1, "y": 0.2, "z": 0.7}}, ids=["x", "y", "z"])),
    "mapping by position": ("ties", dict(parameters={"weight": {1: 0.2, 2: 0.7}, "density": 0.4}, base_index=0)),
    "base in the middle": ("ties", dict(parameters={"weight": [0.2, 0.7], "density": [0.4, 1.0]}, base_index=1)),
    "base among the weights": (
        "task_arithmetic",
        dict(parameters={"weight": {"x": 9.0, "y": 0.2, "z": 0.7}}, ids=["x", "y", "z"], base_index=0),
    ),
    "more ids than inputs": ("linear", dict(parameters={"weight": {0: 0.1, 1: 0.2, 2: 0.7, 3: 5.0}})),
    "base that the method ignores": ("linear", dict(parameters={"weight": [0.1, 0.2, 0.7]}, base_index=1)),
    "defaults": ("karcher", {}),
    "text of a number, number of a flag": ("linear", dict(parameters={"weight": "0.5", "normalize": 0})),
    "one value per tensor": ("linear", dict(parameters={"weight": per_group([0.1, 0.2, 0.7])})),
    "method object": (mm.get("multislerp"), dict(parameters={"weight": 1.0}, name="w")),
    "out_dtype": ("linear", dict(parameters={"weight": 1.0}, out_dtype=torch.float64)),
    "dtype": ("linear", dict(parameters={"weight": 1.0}, dtype=torch.float64)),
    "int8_mask": ("ties", dict(parameters={"weight": 1.0, "int8_mask": True}, base_index=0)),
}


@pytest.mark.parametrize("case", TENSORS)
def test_merge_tensors(case):
    method, call = TENSORS[case]
    given = [m["norm"] for m in models().values()]
    got, want = fm.merge_tensors(given, method, **call), mm.merge_tensors(given, method, **call)
    torch.testing.assert_close(got, want)
    if case == "dtype":  # the arithmetic is in it
        assert (got - want).abs().max() <= 1e-15


WEIGHTS = {"weight": {"a": 0.2, "b": 0.7}}
STATES = {
    "by id": ("ties", dict(parameters=WEIGHTS | {"density": 0.4}, base="base")),
    "values per tensor": (
        "task_arithmetic",
        dict(parameters=WEIGHTS | {"lambda": per_group(0.1, 0.5, 1.0, 9.0)}, base="base"),
    ),
    "weights per tensor": (
        "linear",
        dict(
            parameters={
                "weight": per_group([0.1, 0.2, 0.7], {"base": 1.0, "a": 2.0, "b": 3.0}, 0.5, 1),
                "normalize": per_group(True, False, True, True),
            }
        ),
    ),
    "packing limits": ("linear", dict(parameters={"weight": 0.5}, batch_options=mm.BatchOptions(max_groups=1))),
    "method object": (mm.get("model_stock"), dict(base="base")),
    "dtype": ("linear", dict(parameters={"weight": 0.3}, dtype=torch.float64)),
    "out_dtype": ("linear", dict(parameters={"weight": 0.3}, out_dtype=torch.float64)),
    "lax": ("linear", dict(parameters={"weight": 0.3}, strict=False)),
}


@pytest.mark.parametrize("case", STATES)
def test_merge_state_dicts(case):
    method, call = STATES[case]
    given = models()
    if case == "lax":
        del given["b"]["norm"]
        given["a"]["more"] = torch.zeros(3)
    got, want = fm.merge_state_dicts(given, method, **call), mm.merge_state_dicts(given, method, **call)
    assert list(got) == list(want)
    torch.testing.assert_close(got, want)


def test_models_may_be_a_sequence_and_modules():
    modules = [torch.nn.BatchNorm1d(3) for _ in range(3)]
    for i, module in enumerate(modules):
        module.running_mean.fill_(i)
    call = dict(parameters={"weight": [0.25, 0.75]}, base=0)
    got = fm.merge_state_dicts(modules, "task_arithmetic", **call)
    with torch.no_grad():
        want = mm.merge_state_dicts(modules, "task_arithmetic", **call)
    assert list(got) == list(want)
    torch.testing.assert_close(got, {n: t.detach() for n, t in want.items()})
    assert not any(t.requires_grad for t in got.values())


def test_tied_tensors_with_values_of_their_own_are_apart():
    tied = [{"x": t, "y": t} for t in (torch.ones(3), torch.full((3,), 2.0))]
    got = fm.merge_state_dicts(tied, "linear", parameters={"weight": per_group([1, 0], [0, 1])})
    assert got["x"].tolist() == [1.0] * 3
    assert got["y"].tolist() == [2.0] * 3
    wide = fm.merge_state_dicts(tied, "linear", parameters={"weight": 1}, dtype=torch.float64)
    assert wide["x"] is wide["y"]


def test_wrong_calls_are_refused_by_both():
    given = models()
    for call in (
        dict(parameters={"weight": per_group(0.1, 0.2)}),
        dict(parameters={"weight": {"a": 1.0}}),
        dict(parameters={"weight": [1.0]}),
        dict(parameters={"weight": 0.5}, base="nobody"),
        dict(parameters={"weight": 0.5}, dtype=torch.int64),
    ):
        with pytest.raises(fm.FastMergeError):
            fm.merge_state_dicts(given, "linear", **call)
        with pytest.raises((ValueError, TypeError)):
            mm.merge_state_dicts(given, "linear", **call)


def test_another_programs_method_is_refused():
    @mm.merge_method(name="linear")
    def mine(group: mm.TensorGroup, weight: mm.PerInput[float]) -> torch.Tensor:
        return group.tensors[0]

    with pytest.raises(fm.RecipeError, match="expected the name of a method, or a method of mergekit's own"):
        fm.merge_tensors([torch.ones(2)], mine, parameters={"weight": 1.0})


@pytest.mark.parametrize("name", ["merge_tensors", "merge_state_dicts"])
def test_every_argument_of_mergekits_is_there(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (fm, mm))
    assert list(theirs)[:2] == list(ours)[:2]
    assert [(p.name, p.kind, p.default) for p in theirs.values() if p.name not in ours] == []
    assert all((p.kind, p.default) == (ours[n].kind, ours[n].default) for n, p in theirs.items())
