"""Spaces: where genes stand, what they are called, and which recipe a candidate is."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

import fastmerge as fm
from fastmerge.errors import RecipeError
from fastmerge.recipe import Recipe
from fastmerge.search import Space, layer_paths
from tests import tiny

LAYERS = 5


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(
        tmp_path_factory.mktemp("models"), models=2, layers=LAYERS, hidden=16, vocab=40, dtype=torch.float32
    )


def merged(recipe, out):
    fm.merge(recipe, out)
    return {n: t for path in sorted(out.glob("*.safetensors")) for n, t in load_file(path).items()}


def scaled(paths, scale, **more):
    entry = {"model": str(paths["a"]), "parameters": {"scale": scale}}
    return {"merge_method": "passthrough", "models": [entry], "dtype": "float32", **more}


@pytest.mark.parametrize(
    ("wanted", "groups"),
    [
        ({}, {"all": lambda n: True}),
        (
            {"layers": 2},
            {
                "layers.0-1": lambda n: ".layers.0." in n or ".layers.1." in n,
                "layers.2-4": lambda n: any(f".layers.{i}." in n for i in (2, 3, 4)),
                "rest": lambda n: ".layers." not in n,
            },
        ),
        (
            {"modules": ["mlp", "self_attn.q_proj"]},
            {
                "mlp": lambda n: "mlp" in n,
                "self_attn.q_proj": lambda n: "q_proj" in n,
                "rest": lambda n: "mlp" not in n and "q_proj" not in n,
            },
        ),
        (
            {"layers": 5, "modules": ["self_attn", "norm"]},
            {
                **{f"layers.{i}.self_attn": lambda n, i=i: f"layers.{i}.self_attn" in n for i in range(5)},
                **{f"layers.{i}.norm": lambda n, i=i: f"layers.{i}." in n and "norm" in n for i in range(5)},
                "rest": lambda n: ".layers." not in n or "mlp" in n,
            },
        ),
    ],
)
def test_every_group_has_a_gene_of_its_own(paths, tmp_path, wanted, groups):
    """``passthrough`` with a scale writes each gene's value into the tensors that it is for."""
    space = Space(scaled(paths, {"low": 0.0, "high": 4.0, **wanted}))
    assert {g.group for g in space.genes} == set(groups)
    assert [g.name for g in space.genes] == [f"a/{g.group}/scale" for g in space.genes]
    values = [0.5 + i / 8 for i in range(len(groups))]  # exact in fp32
    state = merged(space.recipe(values), tmp_path / "out")
    for name, before in load_file(paths["a"] / "model-00001-of-00002.safetensors").items():
        (value,) = [v for g, v in zip(space.genes, values) if groups[g.group](name)]
        assert torch.equal(state[name], before * value), name


def test_each_tensor_can_have_a_gene(paths, tmp_path):
    space = Space(scaled(paths, {"low": 0.0, "high": 4.0, "each": "tensor"}))
    values = [0.5 + i / 64 for i in range(len(space.genes))]
    state = merged(space.recipe(values), tmp_path / "out")
    assert len(state) == len(space.genes) == 3 + 9 * LAYERS
    before = {n: t for p in paths["a"].glob("*.safetensors") for n, t in load_file(p).items()}
    for gene, value in zip(space.genes, values):
        assert torch.equal(state[gene.group], before[gene.group] * value)


def test_names_that_hide_in_others_are_told_apart():
    names = ["norm.weight", "layers.0.norm.weight", "layers.1.norm.weight", "layers.1.in_norm.weight"]
    template = {"merge_method": "linear", "models": [{"model": "m", "parameters": {"weight": {"low": 0, "high": 1}}}]}
    weight = template["models"][0]["parameters"]["weight"]
    weight["each"] = "tensor"
    rules = Space(template, names).template["models"][0]["parameters"]["weight"]
    for name in names:
        assert next(r["filter"] for r in rules if r["filter"] in name) == name
    del weight["each"]
    weight |= {"layers": 2, "modules": ["norm"]}
    space = Space(template, names)
    own = {"layers.0.norm": 0.25, "layers.1.norm": 0.5, "rest": 0.75}
    rules = space.recipe([own[g.group] for g in space.genes])["models"][0]["parameters"]["weight"]
    found = {name: next(r["value"] for r in rules if r.get("filter", "") in name) for name in names}
    assert found == {names[0]: 0.75, names[1]: 0.25, names[2]: 0.5, names[3]: 0.5}


def test_genes_stand_wherever_values_do():
    template = {
        "merge_method": {"choices": ["ties", "dare_ties"]},
        "base_model": "org/base",
        "models": [
            {
                "model": "/m/math",
                "parameters": {"weight": [{"filter": "mlp", "value": {"low": 0, "high": 1}}, {"value": 0.5}]},
            },
            {"model": "/m/code", "parameters": {"weight": [{"low": 0, "high": 1}, 0.25, {"low": 0, "high": 2}]}},
        ],
        "parameters": {"density": {"choices": [0.25, 0.5]}, "lambda": {"low": 0.5, "high": 2}},
        "dtype": "bfloat16",
    }
    before = copy.deepcopy(template)
    space = Space(template)
    assert [g.name for g in space.genes] == [
        "all/all/merge_method",
        "math/mlp/weight",
        "code/point.0/weight",
        "code/point.2/weight",
        "all/all/density",
        "all/all/lambda",
    ]
    assert space.models == ("math", "code", "base")
    candidate = [1, 0.75, 0.125, 1.5, 0, 0.5]
    recipe = space.recipe(candidate)
    assert recipe["merge_method"] == "dare_ties"
    assert recipe["models"][0]["parameters"]["weight"][0] == {"filter": "mlp", "value": 0.75}
    assert recipe["models"][1]["parameters"]["weight"] == [0.125, 0.25, 1.5]
    assert recipe["parameters"] == {"density": 0.25, "lambda": 0.5}
    assert Recipe.load(space.yaml(candidate)) == Recipe.load(recipe)
    recipe["models"].clear()
    assert space.recipe(candidate) == space.recipe(candidate)
    assert space.recipe(candidate)["models"]
    assert template == before
    json.dumps([g.plain() for g in space.genes])


def test_layer_paths_take_each_layer_from_where_a_gene_says(paths, tmp_path):
    a, b = str(paths["a"]), str(paths["b"])
    space = Space(layer_paths([a, b], layers=6, blocks=6, dtype="float32"))
    labels = space.genes[0].labels
    assert labels == tuple(f"{m}:{i}" for m in (a, b) for i in range(LAYERS))
    wanted = [f"{a}:0", f"{b}:0", f"{b}:3", f"{a}:2", f"{a}:2", f"{b}:4"]
    state = merged(space.recipe([labels.index(w) for w in wanted]), tmp_path / "out")
    states = {m: {n: t for p in paths[m[-1]].glob("*.safetensors") for n, t in load_file(p).items()} for m in (a, b)}
    for i, label in enumerate(wanted):
        model, _, layer = label.rpartition(":")
        name = "self_attn.q_proj.weight"
        assert torch.equal(state[f"model.layers.{i}.{name}"], states[model][f"model.layers.{layer}.{name}"])
    assert torch.equal(state["model.embed_tokens.weight"], states[a]["model.embed_tokens.weight"])
    assert torch.equal(state["lm_head.weight"], states[b]["lm_head.weight"])


def test_layer_paths_can_stay_near():
    space = Space(layer_paths({"x": 8, "y": 4}, blocks=4, near=0))
    assert [g.labels for g in space.genes] == [
        ("x:0-1", "y:0-1"),
        ("x:2-3", "y:0-1"),
        ("x:4-5", "y:2-3"),
        ("x:6-7", "y:2-3"),
    ]
    assert [g.group for g in space.genes] == ["layers.0-1", "layers.2-3", "layers.4-5", "layers.6-7"]
    genes = Space(
        {
            "merge_method": "slerp",
            "base_model": "x",
            "slices": [
                {
                    "sources": [{"model": m, "layer_range": [0, 2]} for m in "xy"],
                    "parameters": {"t": {"low": 0, "high": 1}},
                },
                {
                    "sources": [{"model": m, "layer_range": [8, 9]} for m in "xy"],
                    "parameters": {"t": [{"filter": "mlp", "value": {"low": 0, "high": 1}}, {"value": 0.5}]},
                },
            ],
        }
    ).genes
    assert [g.name for g in genes] == ["all/layers.0-1/t", "all/layers.2.mlp/t"]
    with pytest.raises(RecipeError, match="blocks: expected a number that divides 8 layers, got 3"):
        layer_paths({"x": 8}, blocks=3)
    with pytest.raises(RecipeError, match="y: 5 layers are no whole blocks of 2"):
        layer_paths({"x": 8, "y": 5}, blocks=4)


def test_what_is_wrong_with_a_space_is_said_at_once(paths):
    with pytest.raises(RecipeError) as caught:
        Space(
            {
                "merge_method": "ties",
                "base_model": "base",
                "models": [
                    {
                        "model": "a",
                        "parameters": {"weight": {"low": 0, "hihg": 1}, "density": {"low": 0, "choices": [1]}},
                    },
                    {
                        "model": "b",
                        "parameters": {"weight": {"choices": []}, "density": {"low": 0, "high": 1, "layer": 2}},
                    },
                ],
            }
        )
    text = str(caught.value)
    for said in (
        "models.0.parameters.weight: unknown key 'hihg' (did you mean 'high'?)",
        "models.0.parameters.density: expected either low and high or choices, got low, choices",
        "models.1.parameters.weight: choices: expected a list of one or more, got []",
        "models.1.parameters.density: unknown key 'layer' (did you mean 'layers'?)",
    ):
        assert said in text
    with pytest.raises(RecipeError, match="expected one with genes in it, got a gene"):
        Space({"low": 0, "high": 1})
    with pytest.raises(RecipeError, match="low < high, got 1 and 1"):
        Space(scaled(paths, {"low": 1, "high": 1}))
    with pytest.raises(RecipeError, match="layers: expected the number of groups, from 1 to 5; got 6"):
        Space(scaled(paths, {"low": 0, "high": 1, "layers": 6}))
    with pytest.raises(RecipeError, match="no tensor has 'attn_x' in its name"):
        Space(scaled(paths, {"low": 0, "high": 1, "modules": ["mlp", "attn_x"]}))
    with pytest.raises(RecipeError, match="nothing is left to search for"):
        Space(scaled(paths, 1.0))
    with pytest.raises(RecipeError, match=r"did you mean 'ties'"):
        Space({**scaled(paths, {"low": 0, "high": 1}), "merge_method": {"choices": ["passthrough", "tise"]}})
    tied = {"model": "a", "parameters": {"weight": 1, "density": {"low": -1, "high": 1}}}
    with pytest.raises(RecipeError, match=r"density.*0 .. 1; got -1"):
        Space({"merge_method": "ties", "base_model": "base", "models": [tied]})
    space = Space(scaled(paths, {"low": 0, "high": 1}))
    for candidate, said in (([], "expected 1 values"), ([2.0], "2.0 is none of its values"), (["x"], "'x' is none")):
        with pytest.raises(RecipeError, match=said):
            space.recipe(candidate)
