"""Recipes that others published: of the specification, and the shapes of mergekit's examples."""

import pytest

from fastmerge.recipe import Recipe
from tests.recipe.fakes import problems

# The SLERP recipe of the user's specification: base and two other models, t for each.
SPEC_SLERP = """\
merge_method: slerp
base_model: mistralai/Mistral-7B-v0.1
models:
  - model: WizardLM/WizardLM-7B-V1.0
    parameters:
      t: 0.5
  - model: teknium/OpenHermes-2.5-Mistral-7B
    parameters:
      t: 0.5
dtype: bfloat16
"""


def test_equal_t_of_each_model_is_the_shared_t():
    recipe = Recipe.load(SPEC_SLERP)
    assert recipe.parameters["t"].plain() == 0.5
    assert not any(m.parameters for m in recipe.models)
    assert recipe.donor_only_base
    (part,) = recipe.parts
    assert [str(s.model) for s in part.sources] == ["WizardLM/WizardLM-7B-V1.0", "teknium/OpenHermes-2.5-Mistral-7B"]
    assert part.base == part.sources[0].model
    assert Recipe.load(recipe.to_yaml()) == recipe
    with_top = Recipe.load(SPEC_SLERP + "parameters: {t: 0.5}\n")
    assert with_top == recipe
    one = Recipe.load("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b, parameters: {t: [0, 1]}}]\n")
    assert one.parameters["t"].plain() == [0.0, 1.0]
    assert not one.donor_only_base


def test_different_t_is_an_error_with_its_line():
    found = problems(SPEC_SLERP.replace("t: 0.5\ndtype", "t: 0.4\ndtype"))
    assert found == [
        "recipe:9: models[1].parameters.t: one 't' is shared by both models; got 0.4 here and 0.5 elsewhere"
    ]
    found = problems(SPEC_SLERP + "parameters: {t: 0.1}\n")
    assert len(found) == 2
    assert "got 0.5 here and 0.1 elsewhere" in found[0]


def test_per_source_t_moves_to_its_slice():
    text = """\
merge_method: slerp
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {t: 0.2}}
      - {model: b, layer_range: [0, 2], parameters: {t: 0.2}}
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
parameters: {t: 0.9}
"""
    assert "got 0.2 here" not in "\n".join(str(Recipe.load(text).slices))
    recipe = Recipe.load(text)
    assert recipe.slices[0].parameters["t"].plain() == 0.2
    assert not recipe.slices[1].parameters


EXAMPLES = {
    "linear": """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      weight: 1.0
  - model: WizardLM/WizardLM-13B-V1.2
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
""",
    "ties with gradients": """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "ties biomedical": """\
models:
  - model: mistralai/Mistral-7B-Instruct-v0.2
    parameters:
      density: 0.5
      weight: 0.5
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: false
  int8_mask: true
dtype: float16
""",
    "gradient slerp": """\
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
""",
    "layer stack": """\
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_shapes_of_mergekits_examples(name):
    import yaml

    from tests.recipe.oracle import config

    recipe = Recipe.load(EXAMPLES[name])
    assert Recipe.load(recipe.to_yaml()) == recipe
    ours = config.MergeConfiguration.model_validate(yaml.safe_load(recipe.to_yaml()))
    theirs = config.MergeConfiguration.model_validate(yaml.safe_load(EXAMPLES[name]))
    assert ours == theirs


def test_shape_of_the_arcee_fusion_example():
    text = "models: [{model: model_a}, {model: model_b}]\nmerge_method: arcee_fusion\nbase_model: model_a\n"
    (part,) = Recipe.load(text + "dtype: bfloat16\n").parts
    assert str(part.base) == "model_a"
