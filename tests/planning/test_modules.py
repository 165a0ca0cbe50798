"""Recipes that name parts of models: which tensors a module is, and what it is merged from."""

import json
import re
from pathlib import Path

import pytest

from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.planning.modules import known_parts, meant
from fastmerge.planning.structure import roots, structure
from tests.planning.plans import by_name, make, method_of, models_of, names, tensors_of
from tests.recipe.fakes import checkpoint, llama

README = Path(__file__).resolve().parents[2] / "README.md"
LAYOUTS = {
    "old": ("language_model.model", "language_model.lm_head", "vision_tower.encoder", "multi_modal_projector"),
    "new": ("model.language_model", "lm_head", "model.vision_tower.encoder", "model.multi_modal_projector"),
    "qwen": ("model", "lm_head", "visual", "visual.merger"),
}  # fmt: skip


def vlm(layout="new", *, text=4, vision=3, lists=None):
    """A language model with a vision tower and a projector."""
    language, head, tower, between = LAYOUTS[layout]
    out = {f"{language}.embed_tokens.weight": (32, 8), f"{head}.weight": (32, 8), f"{language}.norm.weight": (8,)}
    out |= {f"{language}.layers.{i}.w": (8, 8) for i in range(text)}
    out |= {f"{tower}.layers.{i}.w": (4, 4) for i in range(vision)}
    out |= {
        f"{tower}.patch_embed.weight": (4, 4),
        f"{tower}.post_norm.weight": (4,),
        f"{between}.linear.weight": (8, 4),
    }
    config = {"text_config": {"num_hidden_layers": text}, "vision_config": {"depth": vision, **(lists or {})}}
    return checkpoint(out, config={"model_type": "x", **config})


def linear(modules, **more):
    return {"merge_method": "linear", "modules": modules, "parameters": {"weight": 1}, **more}


def listed(*models):
    return {"models": [{"model": m} for m in models]}


def ranges(*parts):
    return {"slices": [{"sources": [{"model": m, "layer_range": [a, b]} for m in models]} for models, a, b in parts]}


def origins(made):
    return {n: models_of(o) for n, o in by_name(made).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_module_is_merged_from_its_own_models(layout):
    language, head, tower, between = LAYOUTS[layout]
    recipe = linear({"text_decoder": listed("a", "b"), "vision_tower": listed("c")}, base_model=None)
    made = make(recipe, a=vlm(layout), b=vlm(layout), c=vlm(layout))
    from_ = origins(made)
    assert from_[f"{language}.layers.3.w"] == from_[f"{language}.embed_tokens.weight"] == (0, 1)
    assert from_[f"{head}.weight"] == from_[f"{language}.norm.weight"] == (0, 1)
    assert from_[f"{tower}.layers.2.w"] == from_[f"{tower}.patch_embed.weight"] == (2,)
    assert from_[f"{between}.linear.weight"] == (0,)
    assert set(from_) == set(vlm(layout).tensors)
    assert f"no module of the recipe names {between}.linear.weight: taken from 'a' alone" in made.warnings
    whole = make({**recipe, "modules": {**recipe["modules"], "multi_modal_projector": listed("b")}},
                 a=vlm(layout), b=vlm(layout), c=vlm(layout))  # fmt: skip
    assert origins(whole)[f"{between}.linear.weight"] == (1,)
    assert [w for w in whole.warnings if "module" in w] == []


def test_what_no_module_names_is_the_base_s():
    recipe = linear({"vision_tower": listed("a", "b")}, base_model="a")
    made = make(recipe, a=vlm(), b=vlm())
    assert origins(made)["model.language_model.norm.weight"] == (0,)
    assert method_of(by_name(made)["lm_head.weight"]) is None
    assert json.loads(made.recipe.canonical())["modules"]["vision_tower"]["models"] == [{"model": 0}, {"model": 1}]


def test_default_is_the_rest_of_a_model_or_all_of_it():
    recipe = linear({"default": listed("a", "b"), "vision_tower": listed("b")})
    from_ = origins(make(recipe, a=vlm(), b=vlm()))
    assert from_["model.vision_tower.encoder.layers.0.w"] == (1,)
    assert from_["lm_head.weight"] == from_["model.multi_modal_projector.linear.weight"] == (0, 1)
    assert set(origins(make(linear({"default": listed("a", "b")}), a=vlm(), b=vlm())).values()) == {(0, 1)}


@pytest.mark.parametrize(
    ("name", "like"),
    [
        ("language_model", "text_decoder"),
        ("model.language_model", None),
        ("vision_model", "vision_tower"),
        ("visual", "vision_tower"),
        ("vision_encoder", "vision_tower"),
        ("mm_projector", "multi_modal_projector"),
        ("multi_modal_projector", "multi_modal_projector"),
        ("model.vision_tower.encoder.layers", None),
        ("embed_tokens", None),
    ],
)
def test_a_module_is_a_part_by_any_of_its_names_or_a_path(name, like):
    tensors = list(vlm().tensors)
    parts = known_parts(tensors, "model.language_model")
    under = [n for n in tensors if f".{name}." in f".{n}."]
    found = meant(name, tensors, parts)
    assert found == (under or parts[like])
    assert found


def test_the_smaller_of_two_modules_has_what_is_in_both():
    recipe = linear({"default": listed("a"), "visual": listed("b"), "merger": listed("a", "b")})
    from_ = origins(make(recipe, a=vlm("qwen"), b=vlm("qwen")))
    assert from_["visual.layers.0.w"] == (1,)
    assert from_["visual.merger.linear.weight"] == (0, 1)


@pytest.mark.parametrize(
    ("modules", "model", "said"),
    [
        (
            {"vison_tower": listed("a", "b")},
            vlm(),
            (
                "modules.vison_tower: no part of the models has this name (did you mean 'vision_tower'?); "
                "parts: text_decoder, vision_tower, multi_modal_projector, or a path in the names of tensors"
            ),
        ),
        ({"text_decoder": listed("a")}, llama(), "no part of the models has this name; parts: default, or a path"),
        ({"audio_tower": listed("a")}, vlm(), "no part of the models has this name"),
        ({"visual": listed("a"), "vision_tower": listed("b")}, vlm(), "other modules of the recipe have all of"),
        (
            {"multi_modal_projector": ranges(("ab", 0, 1))},
            vlm(),
            "'slices' of 'multi_modal_projector' need layers in that module; found model.language_model.layers (4), ",
        ),
        (
            {"vision_tower": ranges(("ab", 2, 4))},
            vlm(),
            "modules.vision_tower.slices[0].sources[0].layer_range: [2, 4) of 'a', which has 3 layers",
        ),
    ],
)
def test_refused(modules, model, said):
    with pytest.raises(RecipeError) as error:
        make(linear(modules, base_model="b"), a=model, b=model)
    assert said in "\n".join(error.value.problems)


def test_slices_of_the_language_model_leave_the_rest_alone():
    recipe = {"merge_method": "passthrough", "modules": {"text_decoder": ranges(("a", 0, 3), ("b", 1, 4)),
              "vision_tower": listed("b"), "multi_modal_projector": listed("a")}}  # fmt: skip
    made = make(recipe, a=vlm(), b=vlm())
    out = by_name(made)
    layers = [(models_of(o)[0], tensors_of(o)[0][-3]) for n, o in sorted(out.items()) if "language_model.layers" in n]
    assert layers == [(0, "0"), (0, "1"), (0, "2"), (1, "1"), (1, "2"), (1, "3")]
    assert models_of(out["model.language_model.embed_tokens.weight"]) == (0,)
    assert models_of(out["lm_head.weight"]) == models_of(out["model.language_model.norm.weight"]) == (1,)
    assert models_of(out["model.vision_tower.encoder.layers.1.w"]) == (1,)
    assert made.config["text_config"]["num_hidden_layers"] == 6
    assert made.config["vision_config"]["depth"] == 3


def test_slices_of_a_vision_tower():
    model = vlm(lists={"deepstack_visual_indexes": [1, 2], "fullatt_block_indexes": [2]})
    recipe = {"merge_method": "passthrough", "modules": {"vision_tower": ranges(("a", 0, 2), ("a", 1, 3)),
              "default": listed("a")}}  # fmt: skip
    made = make(recipe, a=model)
    assert sum(".encoder.layers." in n for n in names(made)) == 4
    assert made.config["vision_config"] == {
        "depth": 4, "deepstack_visual_indexes": [1, 2, 3], "fullatt_block_indexes": [3]}  # fmt: skip
    assert made.config["text_config"]["num_hidden_layers"] == 4


def t5(encoder=3, decoder=2):
    out = {"shared.weight": (16, 4), "lm_head.weight": (16, 4)}
    for side, n in (("encoder", encoder), ("decoder", decoder)):
        out |= {f"{side}.block.{i}.layer.{j}.w": (4, 4) for i in range(n) for j in range(2)}
        out[f"{side}.final_layer_norm.weight"] = (4,)
    config = {"is_encoder_decoder": True, "num_layers": encoder, "num_decoder_layers": decoder, "model_type": "t5"}
    return checkpoint(out, config={**config, "tie_word_embeddings": False})


def test_encoder_and_decoder():
    recipe = {"merge_method": "passthrough", "modules": {"decoder": ranges(("a", 0, 2), ("b", 1, 2)),
              "encoder": ranges(("b", 1, 3)), "shared": listed("a")}}  # fmt: skip
    made = make(recipe, a=t5(), b=t5())
    from_ = origins(made)
    assert [from_[f"decoder.block.{i}.layer.1.w"] for i in range(3)] == [(0,), (0,), (1,)]
    assert from_["decoder.final_layer_norm.weight"] == (1,)
    assert "encoder.block.2.layer.0.w" not in from_
    assert from_["shared.weight"] == from_["lm_head.weight"] == (0,)
    assert (made.config["num_layers"], made.config["num_decoder_layers"]) == (2, 3)


def test_a_bias_of_the_first_layer_stays_there():
    bias = {"decoder.block.0.layer.0.relative_attention_bias.weight": (4, 2)}
    shapes = {n: i.shape for n, i in t5().tensors.items()} | bias
    model = checkpoint(shapes, config=dict(t5().config))

    def decoder(first):
        modules = {"decoder": ranges(("a", first, 2), ("a", 0, 1)), "default": listed("a")}
        return make({"merge_method": "passthrough", "modules": modules}, a=model)

    assert by_name(decoder(0)).keys() >= bias.keys()
    with pytest.raises(CheckpointError, match=r"the first layer of 'a' has decoder\.block\.0\..* for all layers"):
        decoder(1)


def test_a_language_model_alone_goes_into_the_language_model_of_another():
    text = {n.replace("model.language_model", "model"): i.shape for n, i in vlm().tensors.items()}
    text = {n: s for n, s in text.items() if "vision" not in n and "projector" not in n}
    alone = checkpoint(text, config={"num_hidden_layers": 4, "model_type": "y"})
    modules = {"text_decoder": listed("a", "b"), "vision_tower": listed("a"), "multi_modal_projector": listed("a")}
    from_ = origins(make(linear(modules), a=vlm(), b=alone))
    assert from_["model.language_model.layers.0.w"] == from_["lm_head.weight"] == (0, 1)
    assert from_["model.vision_tower.encoder.layers.0.w"] == (0,)


def test_the_example_of_the_readme():
    (text,) = re.findall(r"```yml\n(.*?)```", README.read_text(), re.DOTALL)
    made = make(text, **{"models/vl-a": vlm(), "models/vl-b": vlm()})
    t = [by_name(made)[f"model.language_model.layers.{i}.w"].spec.method.t for i in (0, 3)]
    assert (t, by_name(made)["model.vision_tower.encoder.layers.0.w"].spec.method.t) == ([0, 1], 0.3)


def test_depths_are_compared_in_each_module():
    with pytest.raises(CheckpointError, match=r"vision_tower\.encoder\.layers: the models have different numbers"):
        make(linear({"vision_tower": listed("a", "b"), "default": listed("a")}), a=vlm(), b=vlm(vision=2))
    assert make(linear({"text_decoder": listed("a", "b"), "default": listed("a")}), a=vlm(), b=vlm(vision=2))


def test_gradients_and_parameters_of_each_module():
    text = """
merge_method: slerp
base_model: a
modules:
  text_decoder:
    models: [{model: a}, {model: b}]
    parameters: {t: [0, 0.75]}
  vision_tower:
    slices:
      - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
        parameters: {t: {filter: layers.1., value: 0.125}}
    parameters: {t: {filter: layers, value: [1, 0]}}
parameters: {t: 0.25}
"""
    out = by_name(make(text, a=vlm(), b=vlm()))
    text_layers = [out[f"model.language_model.layers.{i}.w"].spec.method.t for i in range(4)]
    assert text_layers == [0, 0.25, 0.5, 0.75]
    vision = [out[f"model.vision_tower.encoder.layers.{i}.w"].spec.method.t for i in range(3)]
    assert vision == [1, 0.125, 0]
    assert out["model.vision_tower.encoder.patch_embed.weight"].spec.method.t == 0.25
    assert method_of(out["model.multi_modal_projector.linear.weight"]) is None


class Config:
    """A configuration in which every key of mergekit's tables is a number."""

    num_hidden_layers, encoder_layers, depth, decoder_layers, num_decoder_layers = 3, 3, 2, 2, 2

    def __getattr__(self, key):
        return Config()


def test_the_modules_of_mergekit_s_tables_have_the_same_tensors():
    from tests.recipe.oracle import JSON_ARCHITECTURES

    tables = [a for a in JSON_ARCHITECTURES if len(a.modules) > 1]
    assert len(tables) >= 9
    for table in tables:
        theirs = {}
        for name, module in table.modules.items():
            prefix = module.weight_prefix or ""
            prefix += "." * (prefix.count(".") == 1 and not prefix.endswith("."))  # Whisper's decoder lacks it
            theirs[name] = {prefix + w.name for w in module.architecture.all_weights(Config())}
        every = [n for found in theirs.values() for n in found]
        config = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 2, "num_hidden_layers": 3}}
        if "encoder" in theirs:
            config = {"num_layers": 3, "encoder_layers": 3, "num_decoder_layers": 2, "decoder_layers": 2}
        found = structure(every, config)
        parts = known_parts(every, roots(found).get(found.main.prefix, "") if found.main else "")
        assert {name: set(meant(name, every, parts)) for name in theirs} == theirs, table.architectures
