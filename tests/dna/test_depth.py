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
