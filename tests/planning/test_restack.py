"""What config.json says about single layers follows them: lists, numbers, and scalars that give kinds by position."""

import copy

import pytest

from fastmerge.errors import RecipeError
from fastmerge.planning.config_json import rewrite
from fastmerge.planning.restack import SourceLayer
from fastmerge.planning.structure import Stack, structure

DROP_FIRST = (1, 2, 3, 4, 5, 6, 7)
REPEAT = (0, 1, 2, 3, 4, 3, 4, 5, 6, 7)
FOUR = (0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7)
"""Layers of a model of eight, repeated so that each keeps its place in periods of 2 and 4."""

F, S, L = "full_attention", "sliding_attention", "linear_attention"


def config(layers=8, **more):
    return {"model_type": "x", "num_hidden_layers": layers, **more}


def restacked(donor, layers, *others):
    """The configuration of an output of these layers: numbers of the donor's, or (index of another model, layer)."""
    configs = [donor, *others]
    picked = [(0, at) if isinstance(at, int) else at for at in layers]
    block = donor.get("text_config", donor)
    n = block.get("num_hidden_layers", 8)
    names = [f"model.layers.{i}.w" for i in range(n)]
    before = copy.deepcopy(donor)
    found = structure(names, donor)
    layers = [SourceLayer(f"m{m}", configs[m], at) for m, at in picked]
    stacks = [(Stack("model.layers", n, n), layers)]
    out, _ = rewrite(donor, dtype=None, untied=False, stacks=stacks, structure=found)
    assert donor == before
    return out


def changed(donor, layers, *others):
    """What the output's configuration says otherwise than the donor's."""
    out = restacked(donor, layers, *others)
    return {k: out.get(k) for k in {**out, **donor} if out.get(k, "absent") != donor.get(k, "absent")}


def error(donor, layers, *others):
    with pytest.raises(RecipeError) as e:
        restacked(donor, layers, *others)
    return e.value.problems


KINDS = [S, S, S, F, S, S, S, F]


def test_lists_are_found_by_their_length():
    donor = config(intermediate_size=[8, 7, 6, 5, 4, 3, 2, 1], activation_sparsity_pattern=[0.5] * 4 + [0.0] * 4)
    assert changed(donor, DROP_FIRST) == {
        "num_hidden_layers": 7,
        "intermediate_size": [7, 6, 5, 4, 3, 2, 1],
        "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 4,
    }


def test_lists_of_other_things_stay():
    donor = config(
        architectures=list("abcdefgh"),
        eos_token_id=[1, 2, 3, 4, 5, 6, 7, 8],
        image_grid_pinpoints=[[1, 2]] * 8,
        id2label={"0": "a", "1": "b"},
        vision_config={"fullatt_block_indexes": [1, 3]},
    )
    assert changed(donor, DROP_FIRST) == {"num_hidden_layers": 7}


def test_a_list_longer_than_the_layers_is_composed_and_cut():
    assert restacked(config(layer_types=[*KINDS, "x", "y"]), DROP_FIRST)["layer_types"] == KINDS[1:]


def test_entries_of_prediction_layers_stay_at_the_end():
    donor = config(layer_types=[*KINDS, "p"], compress_ratios=[*range(10, 18), 99], num_nextn_predict_layers=1)
    out = restacked(donor, DROP_FIRST)
    assert out["layer_types"] == [*KINDS[1:], "p"]
    assert out["compress_ratios"] == [*range(11, 18), 99]
    none = config(layer_types=KINDS, compress_ratios=list(range(10, 18)))
    assert changed(donor, [*range(7), (1, 7)], none) == {
        "num_nextn_predict_layers": 0,
        "layer_types": KINDS,
        "compress_ratios": [*range(10, 18)],
    }


def test_a_model_that_lists_its_layers_and_does_not_count_them():
    donor = {"model_type": "nemotron_h", "layers_block_type": list("abcdefgh"), "hybrid_override_pattern": "M-M*M-M*"}
    assert changed(donor, DROP_FIRST) == {"layers_block_type": list("bcdefgh"), "hybrid_override_pattern": "-M*M-M*"}


def test_layers_counted_under_another_name():
    donor = {"model_type": "openelm", "num_transformer_layers": 8, "num_query_heads": [1, 2, 3, 4, 5, 6, 7, 8]}
    assert changed(donor, DROP_FIRST) == {"num_transformer_layers": 7, "num_query_heads": [2, 3, 4, 5, 6, 7, 8]}


@pytest.mark.parametrize(
    "key", ["moe_layers", "full_attn_idxs", "mlp_only_layers", "cross_attention_layers", "own_layer_indices"]
)
def test_numbers_of_layers_are_renumbered(key):
    assert restacked(config(**{key: [0, 3, 7]}), DROP_FIRST)[key] == [2, 6]
    assert restacked(config(**{key: [0, 3, 7]}), REPEAT)[key] == [0, 3, 5, 9]
    assert restacked(config(**{key: list(range(8))}), REPEAT)[key] == list(range(10))


def test_numbers_that_begin_at_one():
    donor = config(linear_attn_config={"full_attn_layers": [4, 8], "kda_layers": [1, 2, 3, 5, 6, 7], "num_heads": 4})
    assert restacked(donor, DROP_FIRST)["linear_attn_config"] == {
        "full_attn_layers": [3, 7],
        "kda_layers": [1, 2, 4, 5, 6],
        "num_heads": 4,
    }


def test_mappings_by_layer_number():
    donor = config(per_layer_config={"0": {"a": 1}, "3": {"a": 2}})
    assert restacked(donor, DROP_FIRST)["per_layer_config"] == {"2": {"a": 2}}
    assert restacked(donor, REPEAT)["per_layer_config"] == {"0": {"a": 1}, "3": {"a": 2}, "5": {"a": 2}}


def test_each_entry_comes_from_its_own_models_configuration():
    donor, other = config(layer_types=KINDS), config(layer_types=["x", "y"] * 4)
    assert restacked(donor, [0, (1, 0), (1, 1), 7], other)["layer_types"] == [S, "x", "y", F]
    assert restacked(donor, [0, (1, 3)], {})["layer_types"] == [S, F], "a model without a configuration"
    old = config(model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=4)
    assert restacked(donor, [3, (1, 3), (1, 4)], old)["layer_types"] == [F, F, S], "another dialect"
    assert error(config(kinds=list("abcdefgh")), [0, (1, 3)], config()) == [
        "config.json: kinds: 'm1' has no entry for its layer 3"
    ]


def test_a_number_for_all_layers_beside_a_list():
    one, listed = config(intermediate_size=5), config(intermediate_size=list("abcdefgh"))
    assert restacked(one, [0, (1, 2)], listed)["intermediate_size"] == [5, "c"]
    assert restacked(listed, [0, (1, 2)], one)["intermediate_size"] == ["a", 5]
    assert changed(one, DROP_FIRST, listed) == {"num_hidden_layers": 7}, "a model that gives no layers"


def test_other_model_in_another_block():
    donor = config(layer_types=KINDS)
    other = {"text_config": config(layer_types=["x", "y"] * 4)}
    assert restacked(donor, [0, (1, 1)], other)["layer_types"] == [S, "y"]
    assert restacked(other, [0, (1, 3)], donor)["text_config"]["layer_types"] == ["x", F]


def test_alternating_attention():
    donor = config(model_type="gemma2", sliding_window=9)
    assert changed(donor, FOUR) == {"num_hidden_layers": 12}
    assert restacked(donor, DROP_FIRST)["layer_types"] == [F, S, F, S, F, S, F]
    gemma3 = config(model_type="gemma3_text", sliding_window=9, sliding_window_pattern=4)
    assert changed(gemma3, FOUR) == {"num_hidden_layers": 12}
    assert restacked(gemma3, DROP_FIRST)["layer_types"] == KINDS[1:]
    assert changed(gemma3, [0, 3, 4, 7]) == {"num_hidden_layers": 4, "sliding_window_pattern": 2}


def test_models_of_the_first_full_layer():
    donor = config(model_type="modernbert", global_attn_every_n_layers=4)
    assert changed(donor, [0, 1, 4, 5]) == {"num_hidden_layers": 4, "global_attn_every_n_layers": 2}
    assert restacked(donor, DROP_FIRST)["layer_types"] == [S, S, S, F, S, S, S]
    afmoe = config(model_type="afmoe", global_attn_every_n_layers=4)
    assert restacked(afmoe, DROP_FIRST)["layer_types"] == KINDS[1:]
    hybrid = config(model_type="qwen3_next", full_attention_interval=4)
    assert restacked(hybrid, DROP_FIRST)["layer_types"] == [L, L, F, L, L, L, F]


def test_a_pattern_in_letters():
    donor = config(model_type="exaone4", sliding_window=9, sliding_window_pattern="LLLG")
    assert changed(donor, FOUR) == {"num_hidden_layers": 12}
    assert restacked(donor, DROP_FIRST)["layer_types"] == KINDS[1:]


def test_an_unknown_model_with_a_period_is_refused():
    (problem,) = error(config(sliding_window=9, sliding_window_pattern=4), DROP_FIRST)
    assert "sliding_window_pattern: no value gives the output's layers the kinds" in problem
    assert changed(config(sliding_window=9, sliding_window_pattern=4), FOUR) == {"num_hidden_layers": 12}
    (problem,) = error(config(cross_layer_interval=4), DROP_FIRST)
    assert problem.startswith("config.json: cross_layer_interval: 4 gives kinds of layers by their position")
    assert changed(config(cross_layer_interval=4, rope_freq_base=100, global_step=77), FOUR) == {
        "num_hidden_layers": 12
    }


def test_windows_from_a_layer_on():
    donor = config(model_type="qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=4)
    assert changed(donor, DROP_FIRST) == {"num_hidden_layers": 7, "max_window_layers": 3}
    assert restacked(donor, REPEAT)["layer_types"] == [F, F, F, F, S, F, S, S, S, S]
    off = config(model_type="qwen2", use_sliding_window=False, sliding_window=9, max_window_layers=4)
    assert changed(off, REPEAT) == {"num_hidden_layers": 10}


def test_positions_that_some_layers_go_without():
    donor = config(model_type="smollm3", no_rope_layer_interval=4)
    assert restacked(donor, DROP_FIRST)["no_rope_layers"] == [1, 1, 0, 1, 1, 1, 0]
    assert restacked(config(no_rope_layers=[1, 0] * 4), DROP_FIRST)["no_rope_layers"] == [0, 1, 0, 1, 0, 1, 0]
    llama4 = config(model_type="llama4_text", no_rope_layers=[], interleave_moe_layer_step=2)
    out = restacked(llama4, DROP_FIRST)
    assert out["no_rope_layers"] == [1, 1, 0, 1, 1, 1, 0]
    assert out["moe_layers"] == [0, 2, 4, 6]


@pytest.mark.parametrize("key", ["first_k_dense_replace", "num_dense_layers"])
def test_first_dense_layers(key):
    donor = config(**{key: 2})
    assert changed(donor, DROP_FIRST) == {"num_hidden_layers": 7, key: 1}
    assert changed(donor, [0, 1, 0, 1, 2, 3]) == {"num_hidden_layers": 6, key: 4}
    assert changed(donor, [0, (1, 0), 2], config(**{key: 0})) == {"num_hidden_layers": 3, key: 1}
    (problem,) = error(donor, [0, 1, 2, 3, 0, 1])
    assert problem.startswith(f"config.json: {key}: no value gives")
    (problem,) = error(donor, [0, (1, 3)], config())
    assert problem == f"config.json: {key}: 'm1' does not say this of its layers"


def test_sparse_layers_with_a_list_of_kinds():
    donor = config(first_k_dense_replace=1, mlp_layer_types=["dense"] + ["sparse"] * 7)
    assert restacked(donor, [0, 1, 0, 1])["mlp_layer_types"] == ["dense", "sparse"] * 2
    assert restacked(donor, [0, (1, 2), (1, 1)], config(first_k_dense_replace=2))["mlp_layer_types"] == [
        "dense", "sparse", "dense",
    ]  # fmt: skip


def test_sparse_steps():
    donor = config(decoder_sparse_step=2, mlp_only_layers=[3])
    assert changed(donor, FOUR) == {"num_hidden_layers": 12, "mlp_only_layers": [3, 7]}
    assert changed(donor, DROP_FIRST) == {
        "num_hidden_layers": 7,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1, 2, 3, 5],
    }
    assert changed(config(decoder_sparse_step=1, mlp_only_layers=[0]), DROP_FIRST) == {
        "num_hidden_layers": 7,
        "mlp_only_layers": [],
    }


def test_sparse_ranges():
    donor = config(moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1)
    assert changed(donor, DROP_FIRST) == {"num_hidden_layers": 7, "moe_layer_start_index": 0}
    assert "moe_layer_start_index" in error(donor, [0, 1, 0, 1])[0]


def test_periods_with_offsets():
    donor = config(attn_layer_period=4, attn_layer_offset=2, expert_layer_period=2, expert_layer_offset=1)
    assert changed(donor, DROP_FIRST) == {"num_hidden_layers": 7, "attn_layer_offset": 1, "expert_layer_offset": 0}
    assert changed(donor, [0, 1, 2]) == {"num_hidden_layers": 3}
    assert restacked(donor, [0, 2, 4])["expert_layer_offset"] == 3, "no layer of the kind"
    problems = error(donor, [0, 1, 2, 2, 3, 3])
    assert [p.split(":")[1] for p in problems] == [" attn_layer_period", " expert_layer_period"]


def test_repeating_patterns():
    griffin = config(block_types=["r", "r", "a"])
    assert restacked(griffin, DROP_FIRST)["block_types"] == ["r", "a", "r", "r", "a", "r", "r"]
    assert changed(griffin, [0, 1, 2, 0, 1, 2, 3]) == {"num_hidden_layers": 7}
    neo = config(attention_types=[[["g", "l"], 4]], attention_layers=["g", "l"] * 4)
    out = restacked(neo, DROP_FIRST)
    assert out["attention_layers"] == ["l", "g", "l", "g", "l", "g", "l"]
    assert out["attention_types"] == [[["l", "g", "l", "g", "l", "g", "l"], 1]]


def test_layers_that_share_keys_and_values():
    donor = config(model_type="gemma3n_text", layer_types=KINDS, num_kv_shared_layers=3)
    assert changed(donor, DROP_FIRST) == {"num_hidden_layers": 7, "layer_types": KINDS[1:]}
    assert restacked(donor, [*range(6), 6])["num_kv_shared_layers"] == 2
    assert "would not be the last ones" in error(donor, [*range(8), 0])[0]
    assert restacked(donor, REPEAT)["num_kv_shared_layers"] == 3, "all of them follow the layers that they share with"
    assert "layer 7 of 'm0' would share" in error(donor, [0, 1, 2, 4, 5, 6, 7])[0]


def test_nothing_changes_where_all_layers_stay():
    donor = config(
        model_type="gemma2", sliding_window=9, first_k_dense_replace=1, cross_layer_interval=3, moe_layers=[1, 2],
        num_kv_shared_layers=2, decoder_sparse_step=2, attn_layer_period=3, odd=list("abcdefgh"),
    )  # fmt: skip
    assert changed(donor, range(8)) == {}
