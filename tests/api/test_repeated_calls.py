"""Calls that repeat are resolved once; whatever differs is resolved anew."""

import pytest
import torch

import fastmerge as fm
from fastmerge.api import call

X = [torch.arange(6.0), torch.arange(6.0) * 3]


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    made = []
    inner = call.Call

    def count(*args):
        made.append(args)
        return inner(*args)

    monkeypatch.setattr(call, "_CALLS", {})
    monkeypatch.setattr(call, "Call", count)
    return made


def merge(parameters, **more):
    return fm.merge_tensors(X, "linear", parameters=parameters, **more)


def test_equal_calls_are_resolved_once(counted):
    for shape in ((6,), (2, 3)):
        for _ in range(3):
            got = fm.merge_tensors([x.reshape(shape) for x in X], "linear", parameters={"weight": [0.25, 0.75]})
            assert torch.equal(got, X[0].reshape(shape) * 2.5)
    assert len(counted) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"weight": [0.75, 0.25]},
        {"weight": [1, 0.75]},
        {"weight": {0: 0.5, 1: 0.25}},
        {"weight": [0.25, 0.5], "normalize": False},
        {"weight": [{"filter": "q", "value": 1.0}, {"value": 0.25}]},
    ],
)
def test_other_parameters_are_not_taken_for_equal_ones(other, counted):
    first = merge({"weight": [0.25, 0.5]})
    assert not torch.equal(merge(other, name="a"), first)
    assert torch.equal(merge({"weight": [0.25, 0.5]}), first)
    assert len(counted) == 2


def test_types_that_compare_equal_are_told_apart(counted):
    merge({"weight": [1, 1]})
    merge({"weight": [1.0, 1]})
    assert len(counted) == 2
    with pytest.raises(fm.RecipeError, match="expected a number; got True"):
        merge({"weight": [True, 1]})


def test_values_that_change_are_read_each_time(counted):
    weight = torch.tensor([0.5, 0.5])
    first = merge({"weight": weight})
    weight[0] = 0.0
    assert not torch.equal(merge({"weight": weight}), first)
    assert len(counted) == 2


def test_only_so_many_are_kept(counted, monkeypatch):
    monkeypatch.setattr(call, "MOST_CALLS", 3)
    for i in range(10):
        merge({"weight": [1.0, float(i + 1)]})
        assert len(call._CALLS) <= 3
    assert len(counted) == 10
