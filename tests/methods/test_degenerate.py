"""What each method makes of input without an answer: weights that cancel, vectors of length zero or opposite ones."""

import numpy as np
import pytest
import torch

import fastmerge as fm
from fastmerge.methods import arcee_fusion, get
from fastmerge.ops import blocks
from fastmerge.philox import u16
from tests import oracle
from tests.compare import differences

G = torch.Generator().manual_seed(3)
BASE, X, Y = (torch.randn(6, 40, generator=G) for _ in range(3))
ZERO, ONE = torch.zeros_like(X), torch.ones(1)


def merge(method, *inputs, base=None, name="", **parameters):
    """By the default backend and by the definition, which must agree."""
    call = dict(parameters=parameters, base_index=base, name=name)
    got, want = (fm.merge_tensors(list(inputs), method, backend=b, **call) for b in (None, "reference"))
    assert differences([got], [want]) == []
    return got


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


# ---- multislerp, karcher, slerp_tree ---------------------------------------------------------------------


def test_multislerp():
    def multislerp(*inputs, weight=1.0, **more):
        return merge("multislerp", *inputs, weight=weight, **more)

    assert torch.equal(multislerp(X, weight=0.3), X)  # one model is itself
    assert torch.equal(multislerp(X, -X), ZERO)  # cancelling: linear
    assert torch.allclose(multislerp(X, -X, weight=[3.0, 1.0]), 1.0 * X)  # not cancelling
    assert torch.equal(multislerp(BASE, BASE, BASE, base=0), BASE)
    assert torch.equal(multislerp(BASE, BASE, BASE, BASE, base=0), BASE)  # mergekit refuses to merge such a tensor
    assert torch.allclose(multislerp(ZERO, X), 0.5 * X)
    with pytest.raises(fm.OutputError, match="w: the weighted directions of its inputs cancel"):
        merge("multislerp", X, -X, ZERO, weight=1.0, name="w")
    for cancel in ([0.0, 0.0], [1.0, -1.0], [0.1, 0.2, -0.3]):
        with pytest.raises(fm.RecipeError, match="sum to zero with normalize_weights: true"):
            multislerp(*[X, Y, BASE][: len(cancel)], weight=cancel)
    assert torch.isfinite(multislerp(X, Y, weight=[1.0, -1.0], normalize_weights=False)).all()


def test_karcher():
    assert torch.equal(merge("karcher", X), X)
    assert torch.allclose(merge("karcher", X, -3 * X), 2 * X)  # opposite: the first one's direction
    assert torch.allclose(merge("karcher", ZERO, X), 0.5 * X)  # without a direction, but with a length
    assert torch.equal(merge("karcher", ZERO, ZERO), ZERO)
    assert torch.equal(merge("karcher", 1e-8 * X, 1e-8 * Y), ZERO)
    assert torch.allclose(merge("karcher", X, X, X), X)
    assert torch.allclose(merge("karcher", X, Y, max_iter=20000, tol=0.0), merge("karcher", X, Y, max_iter=60))


def test_karcher_of_nearly_equal_models_stops():
    """Rounding in the sums must not keep the iteration from ending, nor turn the mean."""
    near = [BASE + 1e-4 * torch.randn(BASE.shape, generator=G) for _ in range(8)]
    got = merge("karcher", *near, max_iter=20000, tol=1e-9)
    assert torch.allclose(got, sum(near) / 8, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("order", ["left", "balanced"])
def test_slerp_tree_is_slerp_of_slerps(order):
    def slerp(a, b, t):
        return merge("slerp", a, b, base=0, t=t)

    w = [0.5, 0.3, 0.2, 0.4]
    doubles = [torch.randn(9, 30, generator=G, dtype=torch.float64) for _ in w]
    if order == "left":
        want = doubles[0]
        for k in (1, 2, 3):
            want = slerp(want, doubles[k], w[k] / sum(w[: k + 1]))
    else:
        want = slerp(slerp(*doubles[:2], 3 / 8), slerp(*doubles[2:], 2 / 3), 0.6 / 1.4)
    assert torch.allclose(merge("slerp_tree", *doubles, weight=w, order=order), want, atol=1e-14)


def test_slerp_tree():
    def tree(*inputs, **more):
        return merge("slerp_tree", *inputs, **more)

    assert torch.equal(tree(X, Y, weight=[1.0, 0.0]), X)
    assert torch.equal(tree(X, -X), ZERO)
    assert torch.allclose(tree(X, X, X, X, order="balanced"), X)
    assert torch.allclose(tree(ZERO, X), 0.5**0.5 * X)
    assert torch.allclose(tree(X, Y, threshold=1.0), merge("nuslerp", X, Y, weight=1.0))
    assert torch.equal(tree(BASE, BASE, BASE, BASE, base=0), BASE)
    with pytest.raises(fm.RecipeError, match="all weights are 0"):
        tree(X, Y, weight=0.0)


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


# ---- della, breadcrumbs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(50, 400), (8, 50, 40), (400,)])
def test_della_keeps_by_rank(shape):
    """Probabilities linear in the rank along the second dimension, and as many elements kept as they say."""
    op = oracle.op_of(get("della_linear"), {"weight": [1.0], "density": 0.4, "epsilon": 0.3}, shape, "fp32")
    d = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    method, rows = op.spec.method, d if len(shape) > 1 else d[None]
    rank = rows.abs().argsort(dim=1).argsort(dim=1)
    want = 0.1 + 0.6 * rank / (rows.shape[1] - 1)
    got = torch.from_numpy(method.thresholds(blocks.keys(rows), 0)).reshape(want.shape) / 65536
    assert (got - want).abs().max() <= 2**-16
    kept = torch.from_numpy(method.keep(blocks.keys(d.reshape(-1)), op, 0, u16)).reshape(want.shape)
    for part in (rank < rows.shape[1] // 2, rank >= rows.shape[1] // 2):
        p, n = want[part].mean().item(), int(part.sum())
        assert abs(kept[part].double().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_della():
    def della(x, **more):
        return merge("della", BASE, x, base=0, weight=1.0, **more)

    assert torch.equal(della(BASE, density=0.5), BASE)
    assert torch.equal(della(X, density=0.0), BASE)
    assert torch.allclose(della(X, density=1.0, epsilon=0.9), X)
    for p in (0.2, 0.8):  # a row of one element has the probability density, not 0 / 0
        assert merge("della", 0 * ONE, ONE, base=0, weight=1.0, density=p, epsilon=0.1).item() in (0.0, 1.0)
    for p, e in ((0.9, 0.1), (0.95, 0.1), (0.1, 0.1), (0.5, 0.6)):
        with pytest.raises(fm.RecipeError, match=f"density {p} and epsilon {e} make probabilities"):
            della(X, density=p, epsilon=e)


BANDS = [(0.5, 0.1), (0.9, 0.2), (1.0, 0.1), (0.5, 0.5), (0.05, 0.0), (0.0, 0.1)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("density", "gamma"), BANDS)
def test_breadcrumbs_against_numpy(density, gamma, tied):
    d = np.round(X.numpy() * 3) if tied else X.numpy()
    n = d.size
    stay, gone = int(density * n), int(gamma * n)
    order = np.argsort(-np.abs(d).reshape(-1), kind="stable")
    gone = min(gone, n - stay)
    keep = np.zeros(n, bool)
    keep[order[gone : gone + stay]] = True
    got = merge("breadcrumbs", ZERO, torch.from_numpy(d), base=0, weight=1.0, density=density, gamma=gamma)
    assert np.array_equal(got.numpy(), d if density == 1 else np.where(keep.reshape(d.shape), d, 0))


def test_breadcrumbs():
    few = merge("breadcrumbs", torch.zeros(8), torch.ones(8), base=0, weight=1.0, density=0.1)
    assert torch.equal(few, torch.zeros(8))  # less than one element: none, where ties keeps one
    assert torch.equal(merge("breadcrumbs", BASE, BASE, base=0, weight=1.0, density=0.5, rescale=True), BASE)
    odd = X.index_fill(1, torch.tensor([3]), torch.nan)
    found = merge("breadcrumbs", BASE, odd, base=0, weight=1.0, density=0.5, gamma=0.2)
    assert torch.equal(found.isnan(), odd.isnan())
    assert said("breadcrumbs", {"weight": [1.0], "density": 0.9, "gamma": 0.2}) == [
        "breadcrumbs: density 0.9 leaves room to take out 0.1 of the elements, not gamma 0.2"
    ]
    assert said("breadcrumbs", {"weight": [1.0], "density": 0.9}) == []
    assert said("breadcrumbs_ties", {"weight": [-1.0], "normalize": True})


# ---- nearswap, ram, arcee_fusion -------------------------------------------------------------------------


def test_nearswap():
    assert torch.equal(merge("nearswap", X, X, base=0, t=0.1), X)
    assert torch.equal(merge("nearswap", X, Y, base=0, t=0.0), X)
    assert torch.equal(merge("nearswap", X, Y, base=0, t=100.0), Y)
    got = merge("nearswap", X, Y, base=0, t=0.1)
    assert (got - X).abs().max() <= 0.1 + 1e-6
    assert said("nearswap", {"t": 0.0}) == ["nearswap: t = 0 moves nothing: the result is the base"]
    with pytest.raises(fm.RecipeError, match="expected a number in 0 .. inf; got -1"):
        merge("nearswap", X, Y, base=0, t=-1)


@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
def test_ram(name):
    assert torch.equal(merge(name, BASE, BASE, BASE, base=0, epsilon=0.0), BASE)
    assert torch.equal(merge(name, BASE, BASE + 1e-6, base=0), BASE)  # less than epsilon
    assert torch.allclose(merge(name, ZERO, X, ZERO, base=0), X)  # nothing shared
    assert torch.allclose(merge(name, ZERO, X, X, base=0), X)  # everything shared: 0 / 0 of nobody's elements
    odd = X.clone()
    odd[0, 0] = torch.nan
    assert torch.isnan(merge(name, ZERO, odd, Y, base=0)[0, 0])  # a NaN is never dropped


def test_arcee_fusion():
    assert torch.equal(merge("arcee_fusion", BASE, BASE, base=0), BASE)
    assert torch.equal(merge("arcee_fusion", ONE, 3 * ONE, base=0), 3 * ONE)
    assert torch.equal(merge("arcee_fusion", X[:0], Y[:0], base=0), X[:0])
    large = torch.zeros(5, 40)
    large[2, 7] = 30.0  # a probability of 1 beside 0: none is divided by
    got = merge("arcee_fusion", large, large.roll(1, 1), base=0)
    assert torch.isfinite(got).all()


def test_arcee_fusion_in_blocks_of_rows(monkeypatch):
    want = merge("arcee_fusion", X, Y, base=0)
    monkeypatch.setattr(arcee_fusion, "ROWS", 80)
    assert torch.equal(merge("arcee_fusion", X, Y, base=0), want)
