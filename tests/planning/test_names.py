"""Names of one model as another writes them."""

import pytest

from fastmerge.errors import CheckpointError
from fastmerge.planning.names import align, kind, shown, unwrapped
from tests.planning.plans import LINEAR, SLERP, TIES, by_name, make, names, tensors_of
from tests.recipe.fakes import checkpoint, llama


def tensors(names, shapes=None):
    return checkpoint({n: (shapes or {}).get(n, (4, 4)) for n in names}).tensors


def layers(prefix, count=3, suffixes=("attn.q.weight", "mlp.up.weight")):
    return [f"{prefix}.{i}.{s}" for i in range(count) for s in suffixes]


def renamed(reference, other, **more):
    found = align(tensors(reference), tensors(other, **more))
    return {n: to for n, to in found.names.items() if n != to}


BERT = [
    "embeddings.word_embeddings.weight",
    "embeddings.LayerNorm.weight",
    "embeddings.LayerNorm.bias",
    *layers("encoder.layer"),
    "pooler.dense.weight",
]
GPT2 = ["wte.weight", "wpe.weight", *layers("h"), "ln_f.weight", "ln_f.bias"]
LLAMA = ["model.embed_tokens.weight", *layers("model.layers"), "model.norm.weight", "lm_head.weight"]
VISION = ["embeddings.patch.weight", *layers("encoder.layers", 2), "post_layernorm.weight"]
LLAVA_OLD = [
    *(f"language_model.{n}" for n in LLAMA),
    "multi_modal_projector.linear_1.weight",
    *(f"vision_tower.vision_model.{n}" for n in VISION),
]
LLAVA_NEW = [
    *(f"model.language_model.{n.removeprefix('model.')}" for n in LLAMA if n != "lm_head.weight"),
    "lm_head.weight",
    "model.multi_modal_projector.linear_1.weight",
    *(f"model.vision_tower.{n}" for n in VISION),
]
QWEN_OLD = [*LLAMA, *layers("visual.blocks"), "visual.merger.ln_q.weight"]
QWEN_NEW = [
    *(n.replace("model.", "model.language_model.") for n in LLAMA),
    *layers("model.visual.blocks"),
    "model.visual.merger.ln_q.weight",
]


def test_siblings_are_of_one_kind():
    assert kind("model.layers.12.experts.3.w1.weight") == "model.layers.*.experts.*.w1.weight"
    assert kind("0.auto_model.x.7") == "0.auto_model.x.7"
    assert shown(["a.0.b", "a.1.b", "c"]) == "a.*.b, c (3 tensors)"
    assert shown(["a.0.b"]) == "a.0.b"
    assert shown(list("abcd")) == "a, b, c, ... (4 tensors)"


@pytest.mark.parametrize("prefix", ["bert.", "model.", "transformer.", "base_model.model.", "0.auto_model.", "x.y."])
@pytest.mark.parametrize("plain", [BERT, GPT2, LLAMA], ids=["bert", "gpt2", "llama"])
def test_a_constant_prefix(plain, prefix):
    more = [prefix + n for n in plain]
    assert renamed(plain, more) == dict(zip(more, plain, strict=True))
    assert renamed(more, plain) == dict(zip(plain, more, strict=True))


@pytest.mark.parametrize(("a", "b"), [(LLAVA_OLD, LLAVA_NEW), (QWEN_OLD, QWEN_NEW)], ids=["llava", "qwen2-vl"])
def test_layouts_of_other_versions(a, b):
    for one, other in ((a, b), (b, a)):
        assert list(align(tensors(one), tensors(other)).names.values()) == one


def test_vision_towers_with_and_without_a_module():
    a = [*LLAMA, *(f"vision_tower.vision_model.{n}" for n in VISION)]
    b = [*LLAMA, *(f"vision_tower.{n}" for n in VISION)]
    assert list(align(tensors(a), tensors(b)).names.values()) == a
    assert list(align(tensors(b), tensors(a)).names.values()) == b


def test_a_text_model_and_the_text_of_a_vision_model():
    found = align(tensors(QWEN_NEW), tensors(LLAMA))
    assert list(found.names.values()) == QWEN_NEW[: len(LLAMA)]
    assert found.rules == ("'model.' as 'model.language_model.' (8 tensors)",)


def test_towers_of_equal_names_are_told_apart():
    clip = [f"{side}_model.{n}" for side in ("text", "vision") for n in layers("encoder.layers")]
    clip += ["text_model.token.weight", "vision_model.patch.weight"]
    bare = [*layers("encoder.layers"), "patch.weight"]
    assert set(renamed(clip, bare).values()) == {n for n in clip if n.startswith("vision")}
    assert renamed(clip[:-2], bare[:-1]) == {}, "between equals none is taken"
    wide = {n: (8, 8) for n in clip if n.startswith("text")}
    found = align(tensors(clip[:-2], wide), tensors(bare[:-1]))
    assert all(to.startswith("vision_model.") for to in found.names.values()), "shapes tell"


def test_old_spellings():
    old = [n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in BERT]
    assert list(align(tensors(BERT), tensors(old)).names.values()) == BERT
    assert list(align(tensors(old), tensors(BERT)).names.values()) == old
    both = [f"bert.{n}" for n in old]
    assert list(align(tensors(BERT), tensors(both)).names.values()) == BERT
    scale = ["block.0.gamma", "block.1.gamma", "x"]
    assert renamed(["block.0.w", "block.1.w", "x"], scale) == {}
    new = ["conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"]
    assert list(align(tensors(new), tensors(["conv.weight_g", "conv.weight_v"])).names.values()) == new


def test_heads_that_transformers_5_calls_otherwise():
    old, new = (["gpt_neox.layers.0.x", head] for head in ("embed_out.weight", "lm_head.weight"))
    assert renamed(old, new) == {"lm_head.weight": "embed_out.weight"}
    assert renamed(new, old) == {"embed_out.weight": "lm_head.weight"}
    assert renamed([*old, "lm_head.weight"], new) == {}
    assert renamed(["gpt_neox.layers.0.x"], new) == {}
    assert align(tensors(old), tensors(new, {new[1]: (7, 7)})).rules == ()


def test_wrappers():
    assert unwrapped(LLAMA) is None
    wrapped = [f"module._orig_mod.{n.replace('layers.0.', 'layers.0._checkpoint_wrapped_module.')}" for n in LLAMA]
    assert list(unwrapped(wrapped).values()) == LLAMA
    assert unwrapped(["module.x", "x"]) is None


@pytest.mark.parametrize(
    ("reference", "other"),
    [
        (layers("a.layers", 3)[1:] + layers("b.layers", 3), layers("a.layers", 3) + layers("b.layers", 3)[1:]),
        (LLAMA, ["score.weight", *LLAMA[:-1]]),
        (LLAMA, [n for n in LLAMA if "layers.1.attn" not in n]),
        (["shared.weight", *layers("encoder.block")], ["encoder.embed_tokens.weight", *layers("encoder.block")]),
        (LLAMA, [n.replace("mlp.up", "feed_forward.w1").replace("model.", "") for n in layers("model.layers")]),
    ],
    ids=["lost in two towers", "another head", "lost", "a tied name", "another architecture"],
)
def test_what_no_prefix_explains_stays(reference, other):
    assert renamed(reference, other) == {}


def prefixed(model, prefix="module."):
    kept = {f"{prefix}{n}": (i.dtype.name, i.shape) for n, i in model.tensors.items()}
    return checkpoint(kept, config=dict(model.config))


@pytest.mark.parametrize("text", [LINEAR, TIES, SLERP], ids=["linear", "ties", "slerp"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_outputs_have_the_names_of_the_reference(text, prefix):
    made = make(text, base=llama(), a=llama(), b=prefixed(llama(), prefix))
    assert names(made) == list(llama().tensors)
    out = by_name(made)["model.layers.2.mlp.down_proj.weight"]
    assert tensors_of(out)[-1] == f"{prefix}model.layers.2.mlp.down_proj.weight"
    assert len(made.warnings) == 1


def test_wrappers_of_the_reference_go():
    made = make(TIES, base=prefixed(llama()), a=llama(), b=prefixed(llama()))
    assert names(made) == list(llama().tensors)


def test_a_prefix_that_holds_a_lost_tensor():
    b = prefixed(llama(), "x.")
    b.tensors.pop("x.model.layers.1.mlp.down_proj.weight")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight \(missing from 'b'\)"):
        make(LINEAR, a=llama(), b=b)


def test_slices_of_models_whose_prefixes_differ():
    text = "merge_method: passthrough\nslices:\n" + "".join(
        f"  - sources: [{{model: {m}, layer_range: [0, 2]}}]\n" for m in "ab"
    )
    made = make(text, a=llama(2), b=prefixed(llama(2), "x."))
    assert (
        tensors_of(by_name(made)["model.layers.3.mlp.down_proj.weight"])[0] == "x.model.layers.1.mlp.down_proj.weight"
    )


def test_names_in_a_flat_model_cost_little():
    """Endings that everything shares are no hint of a prefix: no quadratic search."""
    many = [f"m{i}.norm.weight" for i in range(3000)]
    assert renamed(many, [f"k{i}.norm.weight" for i in range(3000)]) == {}
