"""What each method makes of input without an answer: weights that cancel, vectors of length zero or opposite ones."""

import pytest
import torch

import fastmerge as fm
from fastmerge.methods import get
from tests import oracle

G = torch.Generator().manual_seed(3)
BASE, X, Y = (torch.randn(6, 40, generator=G) for _ in range(3))
ZERO = torch.zeros_like(X)


def merge(name, *inputs, base=None, backend=None, **parameters):
    found = [fm.merge_tensors(list(inputs), name, parameters=parameters, base_index=base, backend=b)
             for b in {backend, "reference"}]  # fmt: skip
    assert all(torch.equal(x, found[0]) for x in found), "the backends differ"
    return found[0]


def said(name, case):
    spec = oracle.op_of(get(name), case, (6, 40), "fp32").spec
    return spec.method.warn(spec)


# ---- nuslerp ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [True, False])
def test_nuslerp(flatten):
    def nuslerp(*inputs, weight=(1.0, 1.0), base=None):
        return merge("nuslerp", *inputs, base=base, weight=list(weight), nuslerp_flatten=flatten)

    assert torch.equal(nuslerp(X, -X), ZERO)  # opposite: linear
    assert torch.allclose(nuslerp(X, 3 * X, weight=(0.75, 0.25)), 1.5 * X)  # parallel: linear
    assert torch.allclose(nuslerp(ZERO, X), 0.5**0.5 * X)  # nothing is orthogonal to everything
    assert torch.equal(nuslerp(ZERO, ZERO), ZERO)
    assert torch.equal(nuslerp(BASE, BASE, BASE, base=0), BASE)
    for cancel in ((0.0, 0.0), (1.0, -1.0)):
        assert torch.equal(nuslerp(X, Y, weight=cancel), nuslerp(X, Y))


def test_nuslerp_says_so():
    assert said("nuslerp", {"weight": [1.0, -1.0]}) == ["nuslerp: weights 1 and -1 sum to zero and count as equal"]
    assert said("nuslerp", {"weight": [1.5, -0.5]}) == ["nuslerp: t = -0.5 is outside 0 .. 1 and extrapolates"]
    assert said("nuslerp", {"weight": [1.5, 0.5]}) == []


# ---- sce -------------------------------------------------------------------------------------------------


def test_sce():
    a, b = BASE + 0.1 * X, BASE + 0.1 * Y
    for topk in (0.0, 0.5, 1.0):
        assert torch.equal(merge("sce", BASE, BASE, BASE, base=0, select_topk=topk), BASE)
    assert torch.equal(merge("sce", BASE, a, a, base=0, select_topk=0.99), BASE)  # equal models vary nowhere
    assert torch.equal(merge("sce", BASE, a, a, a, base=0, select_topk=0.99), BASE)
    assert torch.equal(merge("sce", BASE, a, base=0, select_topk=0.99), BASE)
    assert torch.equal(merge("sce", BASE, a, b, base=0, select_topk=1e-6), BASE)  # less than one element
    assert torch.allclose(merge("sce", BASE, a, a, base=0), a)
    assert torch.allclose(merge("sce", BASE, a, BASE, base=0), a)  # of size 0, and so of weight 0
    assert torch.equal(merge("sce", ZERO, X, -X, base=0), X.abs())  # a tied vote is positive


def test_sce_says_so():
    assert said("sce", {"models": 1, "select_topk": 0.5}) == [
        "sce: one model varies nowhere, so select_topk below 1 selects nothing: the result is the base"
    ]
    assert said("sce", {"select_topk": 0.0}) == ["sce: select_topk: 0 selects nothing: the result is the base"]
    assert said("sce", {"models": 1}) == said("sce", {"select_topk": 0.5}) == []
    with pytest.raises(fm.OutputError, match="the weights of its models are unknown: an input holds NaN or Inf"):
        merge("sce", BASE, X.where(X < 1, torch.inf), Y, base=0)


def test_sce_of_tiny_task_vectors_weighs_them_alike():
    """As in mergekit: mean squares that add up to less than 1e-6."""
    a, b = BASE + 1e-4 * X.abs(), BASE + 5e-4 * Y.abs()
    got = merge("sce", BASE, a, b, base=0)
    assert torch.allclose(got, (a + b) / 2)
