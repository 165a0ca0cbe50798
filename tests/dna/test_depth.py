"""Deeper models: layers of no effect, and repeated ones, against modules put together by hand."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from fastmerge.dna import (
    DepthUpscaleConfig,
    GrowthMethod,
    IDUSType,
    ModelGrowthConfig,
    Parent,
    depth_upscale,
    get_idus_layer_arrangement,
    grow_model_depth,
    plan_depth_growth,
    plan_depth_upscale,
)
from fastmerge.dna.depth import InsertionMethod
from fastmerge.dna.results import Made, plan, state_dict, write
from fastmerge.errors import CheckpointError, RecipeError
from tests.dna import zoo

FEW = ("llama biased", "qwen2", "gemma2", "olmo2")
"""Pre-norm with and without biases, norms on both sides, norms behind."""

OUTPUTS = ("o_proj", "down_proj", "w2", "output_linear")


def by_hand(model, sources):
    """A module of these layers, with a configuration that says every layer's kind by a list."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(sources)
    for key in ("layer_types", "no_rope_layers", "mlp_layer_types"):
        if getattr(config, key, None):
            setattr(config, key, [getattr(config, key)[i] for i in sources])
    if getattr(config, "first_k_dense_replace", 0):
        config.first_k_dense_replace = sum(i < config.first_k_dense_replace for i in sources)
    made = type(model)(config).to(model.dtype).eval()
    state = {n: t for n, t in model.state_dict().items() if ".layers." not in n}
    for new, old in enumerate(sources):
        prefix = f"model.layers.{old}."
        for name, tensor in model.state_dict().items():
            if name.startswith(prefix):
                state[f"model.layers.{new}.{name[len(prefix) :]}"] = tensor
    made.load_state_dict(state)
    return made


def tensors_of(path):
    from safetensors.torch import load_file

    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def unlike(left, right):
    """Names of tensors that two state dictionaries do not share, bit for bit."""
    return sorted(
        name
        for name in left.keys() | right.keys()
        if name not in left or name not in right or not torch.equal(left[name], right[name])
    )


def grown_unlike(kind, path, **settings):
    """What is wrong with identity growth of one kind of model, in fp32 and bf16, from disk to disk."""
    wrong = []
    config = ModelGrowthConfig(GrowthMethod.NET2DEEPER, num_new_layers=2, noise_std=0.5, **settings)
    for dtype in (torch.float32, torch.bfloat16):
        here, there, again = (path / f"{what}-{dtype}" for what in ("model", "grown", "again"))
        zoo.saved(kind, here, dtype=dtype)
        model = zoo.load(here, dtype)
        grow_model_depth(here, config, out=there)
        new = zoo.load(there, dtype)
        if new.config.num_hidden_layers != model.config.num_hidden_layers + 2:
            wrong.append(f"{dtype}: {new.config.num_hidden_layers} layers")
        if not torch.equal(zoo.logits(model), zoo.logits(new)):
            wrong.append(f"{dtype}: logits")
        wrong += [
            f"{dtype}: generated, cache {cache}"
            for cache in (True, False)
            if not torch.equal(zoo.generated(model, cache=cache), zoo.generated(new, cache=cache))
        ]
        new.save_pretrained(again)
        wrong += [f"{dtype}: saved again: {name}" for name in unlike(tensors_of(there), tensors_of(again))]
        if dtype is torch.float32:
            wrong += lazy(model, new)
    return wrong


def lazy(model, new):
    """Parameters of the new layers whose gradient is not what it should be: something at the zeros, nothing else."""
    old = {id(layer) for layer in (new.model.layers[i] for i in kept(model, new))}
    new.zero_grad()
    new(zoo.tokens(), labels=zoo.tokens()).loss.backward()
    wrong = []
    for i, layer in enumerate(new.model.layers):
        if id(layer) in old:
            continue
        norms = [n for n, _ in layer.named_parameters() if "post_feedforward_layernorm" in n]
        for name, p in layer.named_parameters():
            zeroed = "post_" in name if norms else any(o in name for o in OUTPUTS)
            moved = p.grad is not None and bool(p.grad.abs().max() > 0)
            if moved != zeroed:
                wrong.append(f"layer {i}: {name}: {'a' if moved else 'no'} gradient")
    return wrong


def kept(model, new):
    """Where the model's own layers are in the grown one."""
    first = next(n for n, _ in model.model.layers[0].named_parameters() if "q_proj" in n or "qkv" in n)
    at, found = 0, []
    for layer in model.model.layers:
        wanted = dict(layer.named_parameters())[first]
        while not torch.equal(dict(new.model.layers[at].named_parameters())[first], wanted):
            at += 1
        found.append(at)
        at += 1
    return found


@pytest.mark.parametrize("kind", FEW)
def test_layers_that_are_put_in_change_no_bit(tmp_path, kind):
    assert grown_unlike(kind, tmp_path) == []


@pytest.mark.conformance
@pytest.mark.parametrize("kind", [k for k in zoo.KINDS if k not in FEW])
def test_layers_that_are_put_in_change_no_bit_of_any_architecture(tmp_path, kind):
    assert grown_unlike(kind, tmp_path, noise_mode="absolute") == []


def repeated_unlike(kind, arrangement):
    """How far depth up-scaling of one kind of model is from a module of these layers, put together by hand."""
    model = zoo.model(kind)
    config, state = copy.deepcopy(model.config.to_dict()), {n: t.clone() for n, t in model.state_dict().items()}
    new = depth_upscale(model, DepthUpscaleConfig(arrangement=arrangement, init_noise=0))
    assert unlike(state, model.state_dict()) == []
    assert config == model.config.to_dict()
    assert new.config.num_hidden_layers == len(arrangement)
    assert [layer.self_attn.layer_idx for layer in new.model.layers] == list(range(len(arrangement)))
    places = [p.data_ptr() for m in (model, new) for p in m.parameters()]
    assert len(set(places)) == len(places)
    hand = by_hand(model, arrangement)
    assert torch.equal(zoo.generated(hand), zoo.generated(new))
    return zoo.difference(hand, new)


@pytest.mark.parametrize("kind", FEW)
def test_repeated_layers_are_those_of_a_module_by_hand(kind):
    assert repeated_unlike(kind, [0, 1, 1, 2]) == 0


@pytest.mark.conformance
@pytest.mark.parametrize("arrangement", [[0, 1, 1, 2], [0, 0, 1, 1, 2, 2], [0, 2]], ids=str)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_repeated_layers_of_any_architecture_are_those_of_a_module_by_hand(kind, arrangement):
    assert repeated_unlike(kind, arrangement) == 0


def layers_of(n, **settings):
    model = zoo.model("llama", num_hidden_layers=n)
    return plan_depth_upscale(Parent.open(model), DepthUpscaleConfig(**settings)).facts["layers"]


@pytest.mark.parametrize(
    ("n", "settings", "expected"),
    [
        (3, {}, [0, 0, 1, 1, 2, 2]),
        (3, {"scale_factor": 3}, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
        (6, {"scale_factor": 1.5}, [0, 1, 1, 2, 3, 3, 4, 5, 5]),
        (6, {"target_layers": 7}, [0, 1, 2, 3, 4, 5, 5]),
        (3, {"insertion_method": "stack"}, [0, 1, 2, 0, 1, 2]),
        (4, {"insertion_method": "stack", "scale_factor": 2.5}, [0, 1, 2, 3, 0, 1, 2, 3, 2, 3]),
        (6, {"insertion_method": "idus_original", "idus_overlap_start": 2}, [0, 1, 2, 3, 2, 3, 4, 5]),
        (6, {"insertion_method": InsertionMethod.IDUS_ORIGINAL, "target_layers": 9}, [0, 1, 2, 3, 4, 2, 3, 4, 5]),
        (6, {"insertion_method": "idus_interlocked_1", "idus_overlap_start": 2}, [0, 2, 1, 3, 2, 4, 3, 5]),
        (6, {"insertion_method": "idus_interlocked_8", "target_layers": 8}, [0, 1, 2, 3, 2, 3, 4, 5]),
        (3, {"arrangement": (2, 0)}, [2, 0]),
    ],
    ids=str,
)
def test_arrangements(n, settings, expected):
    assert layers_of(n, **settings) == expected


def test_interlocked_arrangements_are_the_published_ones():
    solar = get_idus_layer_arrangement(32, IDUSType.ORIGINAL)
    assert solar == [*range(24), *range(8, 32)]
    one = get_idus_layer_arrangement(32, IDUSType.INTERLOCKED_1)
    assert one[:6] == [0, 8, 1, 9, 2, 10]
    assert one[-2:] == [23, 31]
    eight = get_idus_layer_arrangement(32, "interlocked_8")
    assert eight == [*range(8), *[*range(8, 16)] * 2, *[*range(16, 24)] * 2, *range(24, 32)]


def test_the_examples_of_the_guide():
    config = DepthUpscaleConfig(
        scale_factor=2,
        insertion_method="interleave",
        init_noise=0.001,
    )
    model = zoo.model("llama", num_hidden_layers=4)
    scaled_model = depth_upscale(model, config)
    assert scaled_model.config.num_hidden_layers == len(scaled_model.model.layers) == 8

    config = ModelGrowthConfig(
        method=GrowthMethod.NET2DEEPER,
        num_new_layers=8,
        preserve_output=True,
    )
    deeper_model = grow_model_depth(model, config)
    assert deeper_model.config.num_hidden_layers == len(deeper_model.model.layers) == 12
    assert zoo.difference(model, deeper_model) == 0


def test_evenly_spread_positions():
    parent = Parent.open(zoo.model("llama", num_hidden_layers=4))
    spread = {k: plan_depth_growth(parent, ModelGrowthConfig(num_new_layers=k)).facts["layers"] for k in (1, 3, 4, 6)}
    assert spread == {
        1: [0, 1, 2, 3, 3],
        3: [0, 0, 1, 2, 2, 3, 3],
        4: [0, 0, 1, 1, 2, 2, 3, 3],
        6: [0, 0, 0, 1, 1, 2, 2, 2, 3, 3],
    }
    given = plan_depth_growth(parent, ModelGrowthConfig(insertion_positions=[3, 0, 3]))
    assert given.facts["layers"] == [0, 0, 1, 2, 3, 3, 3]
    assert given.facts["silent_layers"] == [1, 5, 6]


def test_preserved_output_is_exact_and_repeated_layers_are_not():
    model = zoo.model("gemma2")
    silent = depth_upscale(model, DepthUpscaleConfig(preserve_output=True, init_noise=0.1))
    assert zoo.difference(model, silent) == 0
    assert zoo.difference(model, depth_upscale(model, DepthUpscaleConfig())) > 1e-2
    plain = grow_model_depth(model, ModelGrowthConfig(num_new_layers=1, preserve_output=False))
    assert zoo.difference(model, plain) > 1e-2


def test_wrong_kinds_of_layers_fail_the_gate(tmp_path):
    """What a configuration says when layers are put in and its lists are not: the old pattern goes on."""
    model = zoo.saved("gemma2", tmp_path / "model")
    grow_model_depth(tmp_path / "model", ModelGrowthConfig(insertion_positions=[0]), out=tmp_path / "grown")
    file = tmp_path / "grown" / "config.json"
    config = json.loads(file.read_text())
    old = model.config.layer_types
    assert config["layer_types"] == [old[0], *old]
    file.write_text(json.dumps({**config, "layer_types": [*old, old[1]]}))  # the stale list, continued
    assert zoo.difference(model, zoo.load(tmp_path / "grown")) > 1e-3
    del config["layer_types"]
    file.write_text(json.dumps(config))  # transformers makes the pattern anew
    assert zoo.difference(model, zoo.load(tmp_path / "grown")) > 1e-3


CONCISE = {
    "gemma2": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "gemma3_text": {"sliding_window_pattern": 2},
    "smollm3": {"no_rope_layer_interval": 2},
}
"""Configurations as older files have them: the kinds of layers follow from their places, or from a period."""


def concise_unlike(kind, path):
    """How far growth is from exact where config.json has no list of layers."""
    zoo.saved(kind, path / "model", num_hidden_layers=3)
    file = path / "model" / "config.json"
    config = {**json.loads(file.read_text()), **CONCISE[kind]}
    for key in ("layer_types", "no_rope_layers", "_sliding_window_pattern"):
        config.pop(key, None)
    file.write_text(json.dumps(config))
    model = zoo.load(path / "model")
    grow_model_depth(path / "model", ModelGrowthConfig(insertion_positions=[0, 1]), out=path / "grown")
    new = zoo.load(path / "grown")
    if getattr(model.config, "layer_types", None):
        assert new.config.layer_types == [model.config.layer_types[i] for i in (0, 0, 1, 1, 2)]
    return zoo.difference(model, new)


@pytest.mark.parametrize("kind", ["gemma2", "qwen2"])
def test_kinds_of_layers_that_follow_from_their_places_are_kept(tmp_path, kind):
    assert concise_unlike(kind, tmp_path) == 0


@pytest.mark.conformance
@pytest.mark.parametrize("kind", ["gemma3_text", "smollm3"])
def test_kinds_of_layers_that_follow_from_a_period_are_kept(tmp_path, kind):
    assert concise_unlike(kind, tmp_path) == 0


@pytest.mark.conformance
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
        ("dots1", {"first_k_dense_replace": 2}),
    ],
    ids=str,
)
def test_dense_layers_among_sparse_ones_are_kept(kind, settings):
    model = zoo.model(kind, **settings)
    new = grow_model_depth(model, ModelGrowthConfig(insertion_positions=[0, 1]))
    assert [hasattr(layer.mlp, "gate") for layer in new.model.layers] == [
        hasattr(model.model.layers[i].mlp, "gate") for i in (0, 0, 1, 1, 2)
    ]
    assert zoo.difference(model, new) == 0


def test_noise_is_that_of_its_seed_and_goes_to_copies_alone(tmp_path):
    zoo.saved("qwen2", tmp_path / "model", dtype=torch.bfloat16)
    parent = Parent.open(tmp_path / "model")

    def made(**settings):
        return state_dict(plan_depth_upscale(parent, DepthUpscaleConfig(init_noise=0.1, **settings)))

    relative = made()
    old = tensors_of(tmp_path / "model")
    for i in range(3):
        for name in (n.split(".", 3)[3] for n in old if n.startswith("model.layers.0.")):
            before = old[f"model.layers.{i}.{name}"]
            assert torch.equal(relative[f"model.layers.{2 * i}.{name}"], before)
            added = (relative[f"model.layers.{2 * i + 1}.{name}"].double() - before.double()).square().mean().sqrt()
            share = (added / before.double().square().mean().sqrt()).item()
            assert 0.05 < share < 0.2, name
    assert unlike(relative, made()) == []
    assert len(unlike(relative, made(seed=1))) == 3 * 12
    weight = "model.layers.{}.mlp.down_proj.weight"
    for noise, expected in ((0.001, 0.22), (0.01, 0.83)):
        few = state_dict(plan_depth_upscale(parent, DepthUpscaleConfig(init_noise=noise)))
        assert (few[weight.format(1)] != old[weight.format(0)]).float().mean() == pytest.approx(expected, abs=0.02)
    absolute = made(noise_mode="absolute")
    added = absolute[weight.format(1)].double() - old[weight.format(0)].double()
    assert 0.095 < added.square().mean().sqrt() < 0.105


@pytest.mark.parametrize("kind", ["llama tied", "olmo2"])
def test_disk_memory_and_every_backend_give_the_same_bytes(tmp_path, kind):
    model = zoo.saved(kind, tmp_path / "model", dtype=torch.bfloat16)
    parent = Parent.open(tmp_path / "model")
    config = DepthUpscaleConfig(preserve_output=True, init_noise=0.1)
    draft = plan_depth_upscale(parent, config)
    write(draft, tmp_path / "out", memory="100MB")
    there = tensors_of(tmp_path / "out")
    assert ("lm_head.weight" in there) != (kind == "llama tied")
    assert unlike(there, state_dict(draft)) == []
    assert unlike(there, state_dict(draft, backend="reference")) == []
    state = {n: t for n, t in model.state_dict().items() if n in tensors_of(tmp_path / "model")}
    made = depth_upscale(state, config, model_config=json.loads((tmp_path / "model" / "config.json").read_text()))
    assert isinstance(made, Made)
    assert unlike(there, made.state_dict) == []
    assert made.config == json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_report_says_what_became_of_the_layers(tmp_path):
    zoo.saved("llama", tmp_path / "model")
    grow_model_depth(tmp_path / "model", ModelGrowthConfig(num_new_layers=1, seed=7), out=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())
    assert report["operation"] == "grow-depth"
    assert report["layers"] == [0, 1, 2, 2]
    assert report["silent_layers"] == report["noisy_layers"] == [3]
    assert report["silent_by"] == {"o": 0, "down": 0}
    assert report["seed"] == 7
    assert report["options"]["method"] == "net2wider"


def test_unchanged_tensors_are_copied_by_the_kernel(tmp_path):
    """And none of it by torch: bytes of files go to files, twice where a layer is there twice."""
    zoo.saved("llama", tmp_path / "model")
    draft = plan_depth_upscale(Parent.open(tmp_path / "model"), DepthUpscaleConfig(init_noise=0))
    ops = plan(draft).ops
    assert {op.spec.grain for op in ops} == {"copy"}
    inside = [op.inputs[0].info.name for op in ops if ".layers." in op.name]
    assert sorted(inside) == sorted(2 * list(dict.fromkeys(inside)))
    code = (
        "import sys, fastmerge.dna; print('numpy' in sys.modules)\nfrom fastmerge.dna import *\n"
        "depth_upscale(sys.argv[1], DepthUpscaleConfig(preserve_output=True), out=sys.argv[2])\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert done.stdout == "False\nset()\n"
    assert len(tensors_of(tmp_path / "out")) == 3 + 6 * 9


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"scale_factor": 1}, "expected more than 3 layers"),
        ({"scale_factor": 0.5}, "expected more than 3 layers"),
        ({"scale_factor": "2x"}, "scale_factor: expected a number"),
        ({"insertion_method": "interleaved"}, "did you mean 'interleave'"),
        ({"insertion_method": "idus_original"}, "idus_overlap_start: expected 0 to 1, half of 3 layers, got 8"),
        ({"insertion_method": "idus_interlocked_8", "idus_overlap_start": 0}, "three or more groups"),
        ({"insertion_method": "idus_interlocked_1", "target_layers": 5}, "expected an even number"),
        ({"insertion_method": "idus_original", "scale_factor": 3}, "scale_factor: idus_original decides"),
        ({"arrangement": [0, 3]}, "arrangement: expected layers from 0 to 2, got 3"),
        ({"arrangement": []}, "arrangement: expected layers from 0 to 2, got none"),
        ({"arrangement": [0, 1, 2]}, "the result would be the model"),
        ({"arrangement": [0, 0], "target_layers": 3}, "target_layers: expected 2"),
        ({"arrangement": [0, 2, 1], "preserve_output": True}, "preserve_output: expected an arrangement"),
        ({"init_noise": -1}, "init_noise: expected a number from 0"),
        ({"noise_mode": "absolut"}, "did you mean 'absolute'"),
        ({"skip_embed_and_head": False}, "one embedding and one head"),
    ],
    ids=str,
)
def test_wrong_requests_are_refused(settings, match):
    parent = Parent.open(zoo.model("llama"))
    with pytest.raises(RecipeError, match=match):
        plan_depth_upscale(parent, DepthUpscaleConfig(**settings))


def test_every_problem_is_said_at_once():
    parent = Parent.open(zoo.model("llama"))
    wrong = DepthUpscaleConfig(init_noise=-1, noise_mode="loud", skip_embed_and_head=False, target_layers=0)
    with pytest.raises(RecipeError) as caught:
        plan_depth_upscale(parent, wrong)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_new_layers": 0}, "num_new_layers: expected a whole number from 1"),
        ({"insertion_positions": [3]}, "insertion_positions: expected layers from 0 to 2, got 3"),
        ({"method": "deeper"}, "method: expected one of net2wider, net2deeper, bert2bert, got 'deeper'"),
        ({"noise_std": float("nan")}, "noise_std: expected a number from 0"),
    ],
    ids=str,
)
def test_wrong_growth_is_refused(settings, match):
    parent = Parent.open(zoo.model("llama"))
    with pytest.raises(RecipeError, match=match):
        plan_depth_growth(parent, ModelGrowthConfig(**settings))


@pytest.mark.parametrize(
    ("kind", "filled"),
    [
        ("llama biased", {"o": 0, "o_bias": 0, "down": 0, "down_bias": 0}),
        ("olmo2", {"attention_norm": 0, "output_norm": 0}),
        ("gemma2", {"attention_norm": -1, "output_norm": -1}),
    ],
)
def test_what_makes_a_layer_silent(kind, filled):
    draft = plan_depth_growth(Parent.open(zoo.model(kind)), ModelGrowthConfig(num_new_layers=1))
    assert draft.facts["silent_by"] == filled


def test_kinds_of_layers_that_no_configuration_can_say_are_refused():
    """A count of first dense layers cannot put a dense one behind sparse ones."""
    parent = Parent.open(zoo.model("glm4_moe"))
    with pytest.raises(RecipeError, match="first_k_dense_replace"):
        plan_depth_upscale(parent, DepthUpscaleConfig(insertion_method="stack"))


def test_other_wrong_calls_are_refused(tmp_path):
    model = zoo.saved("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match="has its layers in model.layers, got 'h'"):
        depth_upscale(model, DepthUpscaleConfig(), "h")
    with pytest.raises(CheckpointError, match="no out"):
        grow_model_depth(model, ModelGrowthConfig(), out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="expected out"):
        depth_upscale(tmp_path / "model", DepthUpscaleConfig())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "quokka"}))
    with pytest.raises(CheckpointError, match="quokka"):
        depth_upscale(tmp_path / "model", DepthUpscaleConfig(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
