"""The comparison of two models finds what differs, and says what it did not look at."""

import math

import pytest
import torch

from fastmerge.dna import DepthUpscaleConfig, ModelGrowthConfig, compare, depth_upscale, grow_model_depth
from fastmerge.errors import CheckpointError, RecipeError
from tests.dna import zoo


def test_models_are_compared_on_disk_and_in_memory(tmp_path):
    model = zoo.saved("qwen2", tmp_path / "model")
    grow_model_depth(tmp_path / "model", ModelGrowthConfig(num_new_layers=1), out=tmp_path / "grown")
    same = compare(tmp_path / "model", tmp_path / "grown", length=24)
    assert same.difference == 0
    assert same.same()
    assert same.agreement == 1
    assert same.tokens == 96
    assert same.losses[0] == same.losses[1]
    other = depth_upscale(model, DepthUpscaleConfig()).train()
    differs = compare(model, other, length=24)
    assert other.training
    assert not differs.same()
    assert differs.agreement < 1
    assert "same most likely token" in str(differs)
    assert compare(tmp_path / "model", tmp_path / "grown", dtype="bfloat16", count=1).difference == 0


def test_figures_are_those_of_torch():
    model, other, ids = zoo.model("llama"), zoo.model("llama", seed=1), zoo.tokens()
    found = compare(model, other, [ids[:1], ids[1:].tolist()])
    a, b = (m(ids).logits.detach() for m in (model, other))
    assert found.largest == pytest.approx(a.abs().max().item(), rel=1e-5)
    assert found.difference == pytest.approx(zoo.difference(model, other), rel=1e-5)
    assert found.agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).float().mean().item())
    for loss, m in zip(found.losses, (model, other), strict=True):
        assert loss == pytest.approx(m(ids, labels=ids).loss.item(), rel=1e-5)


def test_what_is_not_finite_is_not_the_same():
    model, other = zoo.model("llama"), zoo.model("llama")
    with torch.no_grad():
        other.model.norm.weight[0] = math.nan
    found = compare(model, other)
    assert math.isnan(found.difference)
    assert not found.same()


def test_windows_that_no_sequence_leaves_are_noted():
    model = zoo.model("gemma2")
    assert compare(model, model, length=24).notes == ()
    assert "sliding window of 16" in compare(model, model, length=16).notes[0]


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = zoo.saved("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match="expected a vocabulary of 97"):
        compare(model, zoo.model("llama", vocab_size=99))
    with pytest.raises(CheckpointError, match="expected a path or a module"):
        compare(model, 3)
    for wrong in ([], torch.zeros(1, 2), torch.zeros(0, 3, dtype=torch.int64), torch.full((1, 4), 97), ["abc"]):
        with pytest.raises(RecipeError, match="batches: expected"):
            compare(model, model, wrong)
    with pytest.raises(RecipeError, match="above 0"):
        compare(model, model, length=0)


def test_both_models_are_looked_for_before_one_is_loaded(tmp_path, monkeypatch):
    zoo.saved("llama", tmp_path / "model")
    monkeypatch.setattr("fastmerge.dna.comparison._read", lambda *_: pytest.fail("a model was loaded"))
    for pair in (("model", "mode"), ("mode", "model")):
        with pytest.raises(CheckpointError, match=r"mode: no such file or directory \(did you mean 'model'\?\)"):
            compare(*[tmp_path / name for name in pair])
