"""Layers from names and configuration."""

import pytest

from fastmerge.planning.structure import structure


def t5(layers, decoder):
    out = {"shared.weight": (8, 8)}
    for side, n in (("encoder", layers), ("decoder", decoder)):
        for i in range(n):
            out |= {f"{side}.block.{i}.layer.{j}.w": (8,) for j in range(2)}
    return out


def test_experts_are_not_layers():
    moe = {f"model.layers.{i}.mlp.experts.{e}.w{k}": (2,) for i in range(4) for e in range(8) for k in range(2)}
    for config in ({"num_hidden_layers": 4}, {"num_hidden_layers": 4, "num_local_experts": 8}, {}):
        found = structure(moe, config)
        assert [(s.prefix, s.count) for s in found.stacks] == [("model.layers", 4)]
        assert found.gradient("model.layers.2.mlp.experts.7.w1") == pytest.approx(2 / 3)


def test_gpt2_bert_t5_and_unknown_prefixes():
    assert structure([f"h.{i}.attn.w" for i in range(6)], {"n_layer": 6}).main.prefix == "h"
    found = structure([f"bert.encoder.layer.{i}.output.w" for i in range(3)] + ["bert.pooler.dense.weight"], {})
    assert (found.main.prefix, found.main.count) == ("bert.encoder.layer", 3)
    found = structure(t5(3, 2), {"num_layers": 3, "num_decoder_layers": 2, "is_encoder_decoder": True})
    assert {(s.prefix, s.count) for s in found.stacks} == {("encoder.block", 3), ("decoder.block", 2)}
    assert found.main is None
    assert found.gradient("decoder.block.1.layer.0.w") == 1.0
    assert found.gradient("shared.weight") == 0.0


def test_vision_towers_have_layers_of_their_own():
    names_ = (
        [f"model.layers.{i}.w" for i in range(4)]
        + [f"visual.blocks.{i}.w" for i in range(6)]
        + ["visual.merger.mlp.0.w", "visual.merger.mlp.2.w"]
    )
    found = structure(names_, {"text_config": {"num_hidden_layers": 4}, "vision_config": {"depth": 6}})
    assert {(s.prefix, s.count) for s in found.stacks} == {("model.layers", 4), ("visual.blocks", 6)}
    assert found.main.prefix == "model.layers"
    assert found.keys == (("text_config", "num_hidden_layers"),)


def test_an_outer_index_that_is_not_the_layer():
    found = structure([f"model.{k}.layers.{i}.w" for k in range(2) for i in range(5)], {"num_hidden_layers": 5})
    assert {s.prefix for s in found.stacks} == {"model.0.layers", "model.1.layers"}
    assert found.main is None


def test_prediction_layers_beyond_the_count():
    found = structure([f"model.layers.{i}.w" for i in range(7)], {"num_hidden_layers": 6})
    assert (found.main.count, found.gradient("model.layers.5.w"), found.gradient("model.layers.6.w")) == (6, 1.0, 0.0)


def test_holes_and_nothing():
    assert structure([f"layers.{i}.w" for i in (0, 1, 3)], {"num_layers": 4}).main.count == 4
    assert structure([f"layers.{i}.w" for i in (0, 1, 3)], {}).main is None
    assert structure([], {}).stacks == ()
    assert structure(["0.weight", "1.weight", "x.007.y"], {}).stacks == ()


def test_a_vision_tower_of_as_many_layers():
    for prefix, other in (
        ("language_model.model.layers", "vision_tower.encoder.layers"),
        ("model.language_model.layers", "model.visual.blocks"),
        ("model.layers", "audio_tower.layers"),
    ):
        names_ = [f"{p}.{i}.w" for p in (other, prefix) for i in range(6)]
        found = structure(names_, {"text_config": {"num_hidden_layers": 6}, "vision_config": {"num_hidden_layers": 6}})
        assert (found.main.prefix, found.keys) == (prefix, (("text_config", "num_hidden_layers"),))


def test_as_many_experts_as_layers():
    """Even where the layers themselves are one more, for the prediction of further tokens."""
    for layers in (4, 5):
        moe = [f"model.layers.{i}.mlp.experts.{e}.w" for i in range(layers) for e in range(4)]
        found = structure(moe, {"num_hidden_layers": 4, "n_routed_experts": 4})
        assert [(s.prefix, s.count) for s in found.stacks] == [("model.layers", 4)]
