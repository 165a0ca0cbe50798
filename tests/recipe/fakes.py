"""Checkpoints without files: real values of the package, made-up headers."""

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from fastmerge.checkpoint import Checkpoint, ShardFile, TensorInfo
from fastmerge.dtypes import BY_NAME
from fastmerge.errors import RecipeError
from fastmerge.recipe import Recipe

_count = itertools.count(1)


def checkpoint(tensors, *, ref="m", dtype="bfloat16", config=None, path="/nowhere", files=1):
    """A checkpoint of ``{name: shape}`` or ``{name: (dtype, shape)}``, in that order, over ``files`` shards."""
    infos, per, offset = {}, -(-len(tensors) // files), 4096
    for i, (name, spec) in enumerate(tensors.items()):
        kind, shape = spec if spec and isinstance(spec[0], str) else (dtype, spec)
        n = BY_NAME[kind].size
        for d in shape:
            n *= d
        offset = 4096 if i % per == 0 else offset
        infos[name] = TensorInfo(name, BY_NAME[kind], tuple(shape), i // per, offset, n)
        offset += n
    digest = hashlib.sha256(json.dumps([[n, i.dtype.name, i.shape] for n, i in infos.items()]).encode()).hexdigest()
    shards = tuple(
        ShardFile(Path(path) / f"{f}.safetensors", offset, (1, next(_count), offset, 7), digest, {})
        for f in range(files)
    )
    return Checkpoint(ref, Path(path), shards, infos, config or {})


def llama(layers=4, *, hidden=8, vocab=32, head=True, extra=None, **more):
    """Names and order of a Llama file as save_pretrained writes it: the head first, layers as strings sort."""
    out = {"lm_head.weight": (vocab, hidden)} if head else {}
    out["model.embed_tokens.weight"] = (vocab, hidden)
    for i in sorted(range(layers), key=str):
        p = f"model.layers.{i}"
        out |= {
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.mlp.down_proj.weight": (hidden, 3 * hidden),
            f"{p}.self_attn.q_proj.weight": (hidden, hidden),
        }
    out["model.norm.weight"] = (hidden,)
    out |= extra or {}
    config = {"model_type": "llama", "num_hidden_layers": layers, "torch_dtype": "bfloat16", "vocab_size": vocab}
    return checkpoint(out, **{"config": config, **more})


def problems(text):
    with pytest.raises(RecipeError) as e:
        Recipe.load(text)
    return e.value.problems
