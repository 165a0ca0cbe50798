"""Re-stacked layers: names, ends, gradients, configuration."""

import pytest

from fastmerge.errors import CheckpointError, RecipeError, ShapeError
from tests.planning.plans import by_name, make, method_of, models_of, names, tensors_of
from tests.recipe.fakes import checkpoint, llama


def stack(*parts, extra=""):
    text = "merge_method: passthrough\nslices:\n"
    for model, a, b in parts:
        text += f"  - sources: [{{model: {model}, layer_range: [{a}, {b}]}}]\n"
    return text + extra


def sources(*parts, **more):
    """One slice: sources of (model, first layer, end), and what else it says."""
    return {"sources": [{"model": m, "layer_range": [a, b]} for m, a, b in parts], **more}


def projections(recipe, **models):
    """The outputs of one projection, layer by layer."""
    out = by_name(make(recipe, **models))
    return [out[name] for name in sorted(out) if name.endswith(".mlp.down_proj.weight")]


def test_slices_restack_layers():
    made = make(stack(("a", 0, 3), ("b", 2, 4), ("a", 2, 3)), a=llama(4), b=llama(4))
    out = by_name(made)
    where = {n: (models_of(o)[0], tensors_of(o)[0]) for n, o in out.items()}
    origin = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (0, 2)]
    for i, (model, layer) in enumerate(origin):
        assert where[f"model.layers.{i}.mlp.down_proj.weight"] == (model, f"model.layers.{layer}.mlp.down_proj.weight")
    assert where["model.embed_tokens.weight"][0] == 0
    assert where["model.norm.weight"][0] == 0
    assert len(out) == 3 + 6 * 3
    assert made.config["num_hidden_layers"] == 6
    assert all(method_of(o) is None for o in made.ops)
    assert names(made)[0] == "model.embed_tokens.weight"
    assert names(made)[-2:] == ["lm_head.weight", "model.norm.weight"]


def test_ends_come_from_the_first_and_the_last_slice():
    made = make(stack(("a", 0, 2), ("b", 2, 4)), a=llama(), b=llama())
    where = {n: models_of(o)[0] for n, o in by_name(made).items() if "layers" not in n}
    assert where == {"model.embed_tokens.weight": 0, "lm_head.weight": 1, "model.norm.weight": 1}


def test_a_single_slice_of_everything_is_in_file_order():
    text = """
merge_method: slerp
base_model: a
slices: [{sources: [{model: a, layer_range: [0, 12]}, {model: b, layer_range: [0, 12]}]}]
parameters: {t: 0.5}
"""
    a = llama(12)
    made = make(text, a=a, b=llama(12))
    assert names(made) == list(a.tensors)


def test_gradients_and_filters_of_slices():
    last = {"base_model": "b", "parameters": {"t": {"filter": "layers.3.", "value": 0.875}}}
    slices = [sources(("a", 0, 3), ("b", 1, 4)), sources(("b", 3, 4), ("a", 0, 1), **last)]
    recipe = {"merge_method": "slerp", "base_model": "a", "slices": slices, "parameters": {"t": [0, 1]}}
    out = projections(recipe, a=llama(4), b=llama(4))
    assert [o.spec.method.t for o in out] == [0.0, 0.5, 1.0, 0.875], "the shared filter sees the output's name"
    _, first, _, last = out

    def read(o):
        return [(model, name.split(".")[2]) for model, name in zip(models_of(o), tensors_of(o), strict=True)]

    assert read(first) == [(0, "1"), (1, "2")]
    assert read(last) == [(1, "3"), (0, "0")], "the slice's base"


def test_per_model_filters_see_the_names_of_the_inputs():
    text = """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: layers.0., value: 1}, {value: 2}]}}
      - {model: b, layer_range: [2, 4], parameters: {weight: [{filter: layers.2., value: 3}, {value: 4}]}}
"""
    out = projections(text, a=llama(4), b=llama(4))
    assert [o.spec.method.weight for o in out] == [(1.0, 3.0), (2.0, 4.0)]


def test_random_numbers_know_a_model_by_its_place_in_the_recipe():
    slices = [sources(("x", 0, 2), ("a", 0, 2)), sources(("b", 2, 4), ("x", 2, 4), ("a", 2, 4))]
    recipe = {"merge_method": "ties", "base_model": "x", "slices": slices, "parameters": {"weight": 1}}
    out = projections(recipe, x=llama(4), a=llama(4), b=llama(4))
    assert [o.spec.models for o in out] == [(0,), (0,), (1, 0), (1, 0)]


def test_slices_that_do_not_fit():
    with pytest.raises(RecipeError) as e:
        make(stack(("a", 0, 5), ("b", 8, 12)), a=llama(4), b=llama(4))
    assert e.value.problems == [
        "recipe:3: slices[0].sources[0].layer_range: [0, 5) of 'a', which has 4 layers",
        "recipe:4: slices[1].sources[0].layer_range: [8, 12) of 'b', which has 4 layers",
    ]
    flat = checkpoint({"x": (1,)})
    with pytest.raises(
        RecipeError, match=r"'a': 'slices' needs one stack of layers that fits config\.json; found none"
    ):
        make(stack(("a", 0, 1)), a=flat)
    gpt = checkpoint({f"h.{i}.w": (1,) for i in range(4)}, config={"n_layer": 4})
    gpt = checkpoint({**{n: i.shape for n, i in gpt.tensors.items()}, "lm_head.weight": (32, 8)}, config=gpt.config)
    with pytest.raises(RecipeError, match=r"'b': its layers are called 'h', elsewhere 'model\.layers'"):
        make(stack(("a", 0, 2), ("b", 0, 2)), a=llama(), b=gpt)


def test_lists_of_the_configuration_follow_the_layers():
    config = {
        "num_hidden_layers": 4,
        "layer_types": ["f", "s", "t", "u"],
        "mlp_only_layers": [0, 3],
        "architectures": ["a", "b", "c", "d"],
        "max_window_layers": 4,
    }
    other = {**config, "layer_types": ["F", "S", "T", "U"], "mlp_only_layers": [2]}
    made = make(stack(("a", 0, 2), ("b", 1, 4)), a=llama(config=config), b=llama(config=other))
    assert made.config["num_hidden_layers"] == 5
    assert made.config["layer_types"] == ["f", "s", "S", "T", "U"]
    assert made.config["mlp_only_layers"] == [0, 3]
    assert made.config["architectures"] == config["architectures"]
    assert any("mlp_only_layers" in w for w in made.warnings)
    assert config["num_hidden_layers"] == 4


def test_nested_configurations():
    config = {"text_config": {"num_hidden_layers": 4, "layer_types": list("abcd")}}
    made = make(stack(("a", 1, 3)), a=llama(config=config))
    assert made.config["text_config"] == {"num_hidden_layers": 2, "layer_types": ["b", "c"]}


def test_prediction_layers_move_with_the_end():
    extra = {"model.layers.4.eh_proj.weight": (8, 8)}
    made = make(stack(("a", 0, 4), ("a", 2, 4)), a=llama(4, extra=extra))
    assert "model.layers.6.eh_proj.weight" in names(made)
    assert "model.layers.4.mlp.down_proj.weight" in names(made)


def two_slices(a, b):
    """For each tensor outside the layers, which of two models it comes from."""
    made = make(stack(("a", 0, 2), ("b", 0, 2)), a=a, b=b)
    return {n: models_of(o)[0] for n, o in by_name(made).items() if ".layers." not in n}


@pytest.mark.parametrize(
    ("language", "vision", "projector", "head"),
    [
        (
            "language_model.model",
            "vision_tower.vision_model.encoder",
            "multi_modal_projector",
            "language_model.lm_head",
        ),
        ("model.language_model", "model.visual", "model.multi_modal_projector", "lm_head"),
        ("model", "visual", "visual.merger", "lm_head"),
    ],
)
def test_a_vision_tower_is_of_one_piece(language, vision, projector, head):
    names_ = [f"{language}.embed_tokens.weight", *(f"{language}.layers.{i}.w" for i in range(2))]
    names_ += [f"{language}.norm.weight", f"{head}.weight"]
    towers = [*(f"{vision}.layers.{i}.w" for i in range(2)), f"{vision}.norm.weight", f"{projector}.norm.weight"]
    towers += [f"{projector}.linear_1.weight"]
    for order in (names_ + towers, towers + names_):
        config = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"num_hidden_layers": 2}}
        model = checkpoint(dict.fromkeys(order, (4, 4)), config=config)
        out = two_slices(model, model)
        made = by_name(make(stack(("a", 0, 2), ("b", 0, 2)), a=model, b=model))
        assert {models_of(made[n]) for n in towers} == {(0,)}
        assert (out[f"{language}.norm.weight"], out[f"{head}.weight"]) == (1, 1)
        assert out[f"{language}.embed_tokens.weight"] == 0


def test_a_last_norm_that_is_named_after_embeddings():
    lfm = llama(2, extra={"model.embedding_norm.weight": (8,)}, head=False)
    kept = {n: i.shape for n, i in lfm.tensors.items() if n != "model.norm.weight"}
    model = checkpoint(kept, config=dict(lfm.config))
    assert two_slices(model, model)["model.embedding_norm.weight"] == 1
    assert two_slices(lfm, lfm)["model.embedding_norm.weight"] == 0, "there is another last norm"


def test_prediction_modules_come_from_the_last_slice():
    extra = {f"mtp.layers.{i}.w": (8, 8) for i in range(2)} | {"mtp.norm.weight": (8,)}
    model = llama(2, extra=extra)
    made = by_name(make(stack(("a", 0, 2), ("b", 0, 2)), a=model, b=model))
    assert {models_of(made[n]) for n in extra} == {(1,)}


def test_layers_of_different_sizes():
    with pytest.raises(
        ShapeError, match=r"layers of 'b' and of 'a' have different sizes: input_layernorm.weight \[16\]"
    ):
        make(stack(("a", 0, 2), ("b", 0, 2)), a=llama(2), b=llama(2, hidden=16))


def wide(by_layer=(16, 16), **config):
    shapes = {n: i.shape for n, i in llama(2).tensors.items()}
    shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (8, n) for i, n in enumerate(by_layer)}
    return checkpoint(shapes, config={"num_hidden_layers": 2, **config})


def test_sizes_that_a_configuration_gives_by_layer():
    text = stack(("a", 0, 2), ("b", 0, 2))
    with pytest.raises(ShapeError, match="down_proj"):
        make(text, a=wide((16, 16)), b=wide((32, 32)))
    made = make(text, a=wide((16, 24), intermediate_size=[16, 24]), b=wide((32, 48), intermediate_size=[32, 48]))
    assert by_name(made)["model.layers.3.mlp.down_proj.weight"].spec.shape == (8, 48)
    assert make(stack(("a", 0, 2), ("a", 0, 2)), a=wide((16, 24)))


def test_layers_that_lack_what_the_layers_of_the_other_model_have():
    biases = {f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(2)}
    with pytest.raises(
        CheckpointError, match=r"'b' lacks model\.layers\.\*\.self_attn\.q_proj\.bias \(2 tensors\), which"
    ):
        make(stack(("a", 0, 2), ("b", 0, 2)), a=llama(2, extra=biases), b=llama(2))
    some = {f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in (2, 3)}
    assert make(stack(("a", 0, 4), ("b", 0, 4)), a=llama(4, extra=some), b=llama(4)), "not all layers have it"
