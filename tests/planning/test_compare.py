"""Configurations that disagree are compared by meaning, in both dialects."""

import pytest

from fastmerge.errors import RecipeError
from fastmerge.planning.compare import differences
from tests.planning.plans import LINEAR, SLERP, make
from tests.recipe.fakes import llama

OLD = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
}  # fmt: skip
NEW = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "rms_norm_eps": 1e-05,
    "num_key_value_heads": 4, "head_dim": 16, "hidden_act": "silu", "pad_token_id": None,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000, "factor": 8, "low_freq_factor": 1.0},
}  # fmt: skip


def differing(a, b):
    return {name: (x, y) for name, x, y in differences(a, b)}


def test_both_dialects_mean_the_same():
    assert differing(OLD, NEW) == {}
    gemma = {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 9, "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip
    nested = {
        "model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window": 9,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000},
        },
    }  # fmt: skip
    assert differing(gemma, {"text_config": nested}) == {}
    nested["rope_parameters"]["sliding_attention"]["rope_theta"] = 5
    assert differing(gemma, nested) == {"rope_local_base_freq": (10000.0, 5)}


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": (1e4, 500000)}),
        ({"rope_theta": None}, {"rope_theta": (10000.0, 500000)}),
        ({"rope_scaling": None}, {"rope type": ("default", "llama3")}),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}}, {"rope factor": (4.0, 8)}),
        ({"rms_norm_eps": None, "layer_norm_epsilon": 1e-6}, {"norm epsilon": (1e-6, 1e-5)}),
        ({"hidden_act": "gelu"}, {"activation": ("gelu", "silu")}),
        ({"hidden_act": "swish"}, {}),
        ({"num_key_value_heads": 2}, {"num_key_value_heads": (2, 4)}),
        ({"sliding_window": 4096}, {"sliding_window": (4096, None)}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {}),
        ({"vocab_size": 7, "max_position_embeddings": 9, "use_cache": False, "transformers_version": "4"}, {}),
    ],
)
def test_values_are_compared_by_meaning(change, want):
    assert differing({**OLD, **change}, NEW) == want


def test_a_merge_warns_with_key_and_values():
    b, c = ({**OLD, "rope_theta": theta} for theta in (1e4, 2.0))
    text = LINEAR.replace("{model: b}", "{model: b}, {model: c}")
    made = make(text, a=llama(config=OLD), b=llama(config=b), c=llama(config=c))
    assert made.warnings == (
        "config.json: rope_theta: 500000.0 in 'a', whose configuration the output takes; 10000.0 in 'b', 2.0 in 'c'",
    )
    assert made.config["rope_theta"] == 500000.0
    assert make(LINEAR, a=llama(config=OLD), b=llama(config=NEW)).warnings == ()


def test_a_tower_is_compared_with_its_part():
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 4, "hidden_size": 32, "layer_norm_eps": 1e-5}
    clip = {"model_type": "clip", "hidden_size": 64, "vision_config": {**vision, "layer_norm_eps": 1e-6}}
    assert differing(clip, vision) == {"norm epsilon": (1e-6, 1e-5)}
    assert differing(vision, clip) == {"norm epsilon": (1e-5, 1e-6)}
    del clip["vision_config"]["model_type"]
    assert differing(clip, vision) == {"norm epsilon": (1e-6, 1e-5)}
    assert differing({}, vision) == {}


STACK = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [2, 4]}]
"""


def test_layers_that_would_compute_something_else_are_refused():
    other = {**OLD, "rms_norm_eps": 1e-6, "hidden_size": 128}
    with pytest.raises(RecipeError) as e:
        make(STACK, a=llama(config=OLD), b=llama(config=other))
    keys = [p.split(":")[1] for p in e.value.problems]
    assert keys == [" hidden_size", " norm epsilon", " head_dim"]
    assert "1e-05 in 'a', whose configuration the output takes, but 1e-06 in 'b'" in e.value.problems[1]
    mistral = {**OLD, "model_type": "mistral"}
    assert "model_type" in make(STACK, a=llama(config=OLD), b=llama(config=mistral)).warnings[0]


def test_slices_that_are_merged_are_warned_of():
    text = SLERP.replace("models: [{model: a}, {model: b}]", "")
    text += "slices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]}]\n"
    made = make(text, a=llama(config=OLD), b=llama(config={**OLD, "rms_norm_eps": 1e-6}))
    assert made.warnings[0].startswith("config.json: norm epsilon: 1e-05 in 'a'")
