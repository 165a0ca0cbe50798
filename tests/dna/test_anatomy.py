"""Every tensor of every architecture is known, with the shape that its axes say."""

import pytest
import torch

from fastmerge.checkpoint import Checkpoint
from fastmerge.dna.anatomy import anatomy
from fastmerge.dna.draft import Draft, Request
from fastmerge.dna.parent import Parent
from fastmerge.dna.results import module, state_dict, write
from fastmerge.errors import CheckpointError
from tests.dna import zoo


def copied(parent):
    """The same model again."""
    draft = Draft(Request("copy", (parent.ref,), {}), (parent,), dict(parent.config))
    for name, source in parent.tensors.items():
        draft.copy(name, source)
    return draft


QUICK = ("llama tied", "gemma2", "gpt_oss", "glm4_moe")


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.conformance) for k in zoo.KINDS]
)
def test_every_tensor_of_every_architecture_is_known(tmp_path, kind):
    made = zoo.saved(kind, tmp_path / "model")
    on_disk, in_memory = Parent.open(tmp_path / "model"), Parent.open(made)
    assert sorted(on_disk.tensors) == sorted(in_memory.tensors)
    found = anatomy(on_disk)
    assert found.places.keys() == on_disk.tensors.keys()
    assert found.layers == made.config.num_hidden_layers
    assert found.tied == made.config.tie_word_embeddings
    assert anatomy(in_memory).sizes == found.sizes
    again = module(copied(in_memory))
    assert zoo.difference(made, again) == 0
    write(copied(on_disk), tmp_path / "again")
    assert zoo.difference(made, zoo.load(tmp_path / "again")) == 0


def test_disk_and_memory_give_the_same_bytes(tmp_path):
    zoo.saved("qwen2", tmp_path / "model", dtype=torch.bfloat16)
    draft = copied(Parent.open(tmp_path / "model"))
    write(draft, tmp_path / "out")
    state = state_dict(draft)
    there = Checkpoint.open(tmp_path / "out").tensors
    assert state.keys() == there.keys()


def test_what_is_not_known_is_named(tmp_path):
    made = zoo.model("llama")
    config = made.config.to_dict()
    state = dict(made.state_dict())
    with pytest.raises(CheckpointError, match="model_type 'quokka' has no entry"):
        anatomy(Parent.open(state, config={**config, "model_type": "quokka"}))
    odd = {**state, "model.layers.1.mlp.router.weight": torch.zeros(2, 2)}
    del odd["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError) as caught:
        anatomy(Parent.open(odd, config={**config, "hidden_size": 48}))
    text = str(caught.value)
    assert "model.layers.1.mlp.router.weight" in text
    assert "model.layers.2.mlp.up_proj.weight" in text
    assert "expected [97, 48] as config.json says, got [97, 32]" in text


def test_a_draft_must_be_whole():
    made = zoo.model("llama")
    draft = copied(Parent.open(made))
    draft.tensor("more", draft.tensors["lm_head.weight"].dtype, (4, 4))
    with pytest.raises(CheckpointError, match="more: 0 of 16 elements are made"):
        draft.check()
