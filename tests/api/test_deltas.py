"""Thinning a task vector, and votes: held to plain torch."""

import pytest
import torch

from fastmerge.api.deltas import ConsensusMethod, SparsificationMethod, get_consensus_mask, sparsify_delta
from fastmerge.errors import RecipeError, ShapeError


@pytest.fixture
def delta():
    return torch.randn(40, 50, generator=torch.Generator().manual_seed(0))


def test_magnitude_keeps_exactly_the_largest(delta):
    kept = sparsify_delta(delta, 0.3, rescale=False)
    want = torch.zeros(2000)
    at = delta.abs().reshape(-1).topk(600).indices
    want[at] = delta.reshape(-1)[at]
    assert torch.equal(kept, want.reshape(delta.shape))
    scaled = sparsify_delta(delta, 0.3, "magnitude")
    factor = delta.abs().double().sum() / kept.abs().double().sum()
    assert torch.allclose(scaled.double(), kept.double() * factor, rtol=1e-6)


def test_random_masks_depend_on_the_seed_and_the_name_alone(delta):
    one = sparsify_delta(delta, 0.5, SparsificationMethod.RANDOM, seed=3, name="w")
    assert torch.equal(one, sparsify_delta(delta, 0.5, "random", seed=3, name="w"))
    assert not torch.equal(one, sparsify_delta(delta, 0.5, "random", seed=4, name="w"))
    assert abs((one != 0).float().mean() - 0.5) < 0.05
    assert torch.isclose(one.abs().sum(), delta.abs().sum(), rtol=1e-5)


def test_outliers_go_first(delta):
    kept = sparsify_delta(delta, 0.5, "magnitude_outliers", rescale=False, gamma=0.1)
    order = delta.abs().reshape(-1).argsort(descending=True)
    want = torch.zeros(2000, dtype=torch.bool)
    want[order[200:1200]] = True
    assert torch.equal((kept != 0).reshape(-1), want)


def test_large_elements_stay_more_often(delta):
    rows = torch.arange(1.0, 2001).expand(200, 2000).contiguous()
    kept = sparsify_delta(rows, 0.5, "della_magprune", rescale=False, epsilon=0.4) != 0
    low, high = kept[:, :200].float().mean(), kept[:, -200:].float().mean()
    assert low < 0.2
    assert high > 0.8
    assert sparsify_delta(delta, 0.9, "della_magprune").shape == delta.shape  # epsilon gives way to density


def test_everything_and_nothing(delta):
    for method in SparsificationMethod:
        whole = sparsify_delta(delta, 1.0, method)
        assert torch.equal(whole, delta)
        assert whole.data_ptr() != delta.data_ptr()
    assert torch.equal(sparsify_delta(delta, 0.2, "none"), delta)
    assert not any(sparsify_delta(delta, 0.0, m).any() for m in list(SparsificationMethod)[1:])


def test_votes():
    deltas = torch.tensor([[3.0, -1.0, 0.0, 1.0], [-1.0, -1.0, 2.0, -1.0], [-1.0, 1.0, -1.0, 0.0]])
    total = get_consensus_mask(deltas)
    assert total.dtype == torch.bool
    assert total.int().tolist() == [[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]
    count = get_consensus_mask(list(deltas), ConsensusMethod.COUNT, torch.float32)
    assert count.dtype == torch.float32
    assert count.int().tolist() == [[0, 1, 0, 1], [1, 1, 1, 0], [1, 0, 0, 0]]


def test_what_is_wrong_is_said(delta):
    with pytest.raises(RecipeError, match=r"method: expected one of .*got 'magnitud' \(did you mean 'magnitude'"):
        sparsify_delta(delta, 0.5, "magnitud")
    with pytest.raises(RecipeError, match="density: expected a number from 0 to 1, got 1.5"):
        sparsify_delta(delta, 1.5)
    with pytest.raises(ShapeError, match=r"deltas\[1\]: expected shape \(2,\), got \(3,\)"):
        get_consensus_mask([torch.ones(2), torch.ones(3)])
