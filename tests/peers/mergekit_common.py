"""Tiny models and one checked merge: ``tests/common.py`` for mergekit's suite, whose sdist leaves that file out."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

WIDTH = 32
TINY = dict(hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)


def _saved(model, path):
    model.save_pretrained(path, safe_serialization=True)
    return str(path)


def make_picollama(path, vocab_size=64):
    """A Llama of two layers and width 32."""
    return _saved(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **TINY)), path)


def make_picogranite(path, vocab_size=64):
    """A Granite of the same shape."""
    return _saved(GraniteForCausalLM(GraniteConfig(vocab_size=vocab_size, **TINY)), path)


def make_gpt2size(path, vocab_size=64):
    """A GPT-2 with its twelve layers."""
    shape = dict(n_embd=WIDTH, n_head=4, n_layer=12, n_positions=64)
    return _saved(GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape)), path)


def make_picoLlaVa(path):
    """A Llava: a CLIP tower, a projector and a Llama."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=WIDTH, **TINY),
        text_config=LlamaConfig(vocab_size=64, **TINY),
        image_token_index=63,
    )
    return _saved(LlavaForConditionalGeneration(config), path)


def run_and_check_merge(config, check_nan=True, validate=None, auto_arch=False):
    """Merges into an empty directory; every tensor of the output can be read, and all are there."""
    with tempfile.TemporaryDirectory() as out:
        run_merge(config, out_path=out, options=MergeOptions())
        loader = LazyTensorLoader.from_disk(out)
        for name in loader.index.tensor_paths:
            tensor = loader.get_tensor(name)
            assert not check_nan or not tensor.is_floating_point() or not torch.isnan(tensor).any(), name
        assert (Path(out) / "config.json").exists()
        if not auto_arch:
            assert len(loader.index.tensor_paths) >= TINY["num_hidden_layers"] * 4
        if validate is not None:
            validate(out)
