"""Slices of models: against models whose left-out parts are zeros, and against tensors indexed by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastmerge.checkpoint import Checkpoint
from fastmerge.dna.anatomy import anatomy
from fastmerge.dna.kept import Sizes, proportional
from fastmerge.dna.parent import Parent
from fastmerge.dna.results import Made, module, state_dict, write
from fastmerge.dna.slicing import ModelSlicingConfig, Study, draft_slice, slice_model
from fastmerge.errors import CheckpointError, RecipeError
from tests.dna import zoo

TIGHT = 1e-5
FEW = ["llama", "gemma2", "olmo2"]
ALL = [k for k in zoo.KINDS if k not in FEW]


def drafted(model, **options):
    parent = Parent.open(model)
    config = ModelSlicingConfig(**options)
    return draft_slice(Study(parent, model, config), config)


def numbers(text):
    """``0-2,5`` as indices."""
    parts = [p.split("-") for p in text.split(",")]
    return [i for p in parts for i in range(int(p[0]), int(p[-1]) + 1)]


def left_out(n, kept):
    return [i for i in range(n) if i not in set(kept)]


@torch.no_grad()
def zeroed(model, kept):
    """The parent with zeros for what is left out, and norms that divide by the length of what is left.

    It computes what the slice computes: a dropped channel stays 0 in the residual stream, and a norm over D numbers of
    which D' are not 0 is one over D' times sqrt(D'/D), with eps times D'/D.
    """
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def narrowed(module, size, keep):
        s = len(keep) / size
        one = 1.0 if config.model_type.startswith("gemma") else 0.0
        module.weight.copy_((module.weight + one) * s**0.5 - one)
        for eps in ("variance_epsilon", "eps"):
            if hasattr(module, eps):
                setattr(module, eps, getattr(module, eps) * s)

    hidden = numbers(kept["hidden"]) if "hidden" in kept else None
    modules = dict(model.named_modules())
    for name, p in model.named_parameters():
        if hidden is not None:
            drop = left_out(config.hidden_size, hidden)
            if name.endswith("embed_tokens.weight"):
                p[:, drop] = 0
            elif name.endswith("experts.down_proj"):
                p[(..., drop) if config.model_type == "gpt_oss" else (slice(None), drop)] = 0
            elif name.endswith("experts.down_proj_bias"):
                p[..., drop] = 0
            elif name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                p[drop] = 0
            elif name.endswith("output_linear.weight"):
                p[:, drop] = 0
            elif name.endswith("norm.weight") and "q_norm" not in name and "k_norm" not in name:
                narrowed(modules[name.removesuffix(".weight")], config.hidden_size, hidden)
        layer = name.split(".")[2] if ".layers." in name else None
        if layer in kept.get("heads", {}) and ".self_attn." in name:
            q, kv = (
                [i * head + j for i in numbers(kept[k][layer]) for j in range(head)] for k in ("heads", "kv_heads")
            )
            if name.endswith("o_proj.weight"):
                p[:, left_out(p.shape[1], q)] = 0
            elif "norm" in name and len(p) != head:  # over all heads
                over = q if "q_norm" in name else kv
                projection = modules[name.removesuffix(".weight").replace("_norm", "_proj")]
                projection.weight[left_out(len(p), over)] = 0
                narrowed(modules[name.removesuffix(".weight")], len(p), over)
        if layer in kept.get("ffn", {}) and name.endswith("mlp.down_proj.weight"):
            p[:, left_out(p.shape[1], numbers(kept["ffn"][layer]))] = 0
    return model


def slices_and_zeros(kind):
    """How far slices are from models with zeros, and from the model."""
    found_differences = []
    made = zoo.model(kind)
    found = anatomy(Parent.open(made))
    sizes = Sizes.of(found)
    whole = {INNER[axis]: n for axis, n in sizes.inner.items()}  # experts are looked at elsewhere
    inner = whole if found.arch.experts else {"target_intermediate_size": 48}
    heads = {"target_num_heads": 2, "target_kv_heads": 2}
    wanted = [
        {"target_hidden_size": 24, **whole},
        {"target_kv_heads": 1, **inner},
        {"target_hidden_size": 20, **heads, **inner},
    ]
    if kind == "olmoe":  # has norms that are as long as the hidden size
        wanted = [{"target_hidden_size": 16, **heads, **whole}]
    for options in wanted:
        draft = drafted(made, **options)
        reference, small = zeroed(zoo.model(kind), draft.facts["kept"]), module(draft)
        found_differences.append((zoo.difference(reference, small), zoo.difference(made, small)))
    return np.array(found_differences).T


INNER = {
    "ffn": "target_intermediate_size",
    "expert_ffn": "target_moe_intermediate_size",
    "shared_ffn": "target_shared_intermediate_size",
}


@pytest.mark.parametrize("kind", FEW)
def test_a_slice_computes_what_zeros_compute(kind):
    near, far = slices_and_zeros(kind)
    assert near.max() < TIGHT
    assert far.min() > 100 * TIGHT


@pytest.mark.conformance
@pytest.mark.parametrize("kind", ALL)
def test_a_slice_computes_what_zeros_compute_everywhere(kind):
    near, far = slices_and_zeros(kind)
    assert near.max() < TIGHT
    assert far.min() > 100 * TIGHT


def indexed(state, kept):
    """Tensors of a llama, indexed by hand."""
    h = torch.tensor(numbers(kept["hidden"]))
    made = {"model.embed_tokens.weight": state["model.embed_tokens.weight"][:, h]}
    made["lm_head.weight"], made["model.norm.weight"] = state["lm_head.weight"][:, h], state["model.norm.weight"][h]
    for new, old in enumerate(kept["layers"]):
        f = torch.tensor(numbers(kept["ffn"][str(old)]))
        q, kv = ([8 * i + j for i in numbers(kept[k][str(old)]) for j in range(8)] for k in ("heads", "kv_heads"))
        there, here = f"model.layers.{old}.", f"model.layers.{new}."
        for part, rows, columns in (
            ("self_attn.q_proj", q, h),
            ("self_attn.k_proj", kv, h),
            ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, q),
            ("mlp.gate_proj", f, h),
            ("mlp.up_proj", f, h),
            ("mlp.down_proj", h, f),
        ):
            made[f"{here}{part}.weight"] = state[f"{there}{part}.weight"][rows][:, columns]
            if f"{there}{part}.bias" in state:
                made[f"{here}{part}.bias"] = state[f"{there}{part}.bias"][rows]
        for part in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            made[here + part] = state[there + part][h]
    return made


def test_all_axes_at_once_are_what_indexing_gives(tmp_path):
    """On disk, from a module and from a state dictionary; loaded, saved and loaded again."""
    made = zoo.saved("llama biased", tmp_path / "model", dtype=torch.bfloat16)
    config = ModelSlicingConfig(target_layers=2, target_hidden_size=24, target_intermediate_size=52, target_kv_heads=1)
    before = {name: t.clone() for name, t in made.state_dict().items()}
    report = slice_model(tmp_path / "model", config, out=tmp_path / "small")
    facts = json.loads((tmp_path / "small" / "fastmerge_report.json").read_text())
    assert facts["operation"] == "slice"
    assert facts["matched"] == {"copied": 0, "cut": 3 + 2 * 16, "left_out": 16}
    assert any("ranked by the lengths" in w for w in report.warnings)
    expected = indexed(before, facts["kept"])
    small = slice_model(made, config)
    given = slice_model(before, config, model_config=Parent.open(made).config)
    assert isinstance(given, Made)
    on_disk = zoo.load(tmp_path / "small", torch.bfloat16)
    on_disk.save_pretrained(tmp_path / "again")
    again = zoo.load(tmp_path / "again", torch.bfloat16)
    for one in (small.state_dict(), given.state_dict, on_disk.state_dict(), again.state_dict()):
        assert one.keys() == expected.keys()
        assert all(torch.equal(one[name], expected[name]) for name in expected)
    assert all(torch.equal(before[name], t) for name, t in made.state_dict().items())
    assert made.config.num_hidden_layers == 3
    for key, value in {"head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 24}.items():
        assert on_disk.config.to_dict()[key] == small.config.to_dict()[key] == value
    assert torch.equal(zoo.generated(small), zoo.generated(on_disk, cache=False))


@pytest.mark.parametrize("kind", ["qwen2", "gpt_oss"])
def test_full_sizes_are_the_identity(kind, tmp_path):
    made = zoo.model(kind, dtype=torch.bfloat16)
    parent = Parent.open(made)
    sizes = anatomy(parent).sizes
    experts = {"target_experts": 4} if "experts" in sizes else {}
    config = ModelSlicingConfig(target_layers=3, target_hidden_size=32, target_num_heads=4, **experts)
    draft = drafted(made, target_layers=3, target_hidden_size=32, target_num_heads=4, **experts)
    assert draft.facts["matched"] == {"copied": len(parent.tensors), "cut": 0, "left_out": 0}
    assert dict(draft.config) == dict(parent.config)
    same = slice_model(made, config)
    assert all(torch.equal(t, made.state_dict()[name]) for name, t in same.state_dict().items())


def test_fused_experts_are_cut_one_by_one():
    """GPT-OSS holds all experts in one tensor, gate and up alternating, and each keeps neurons of its own."""
    made = zoo.model("gpt_oss", dtype=torch.bfloat16)
    draft = drafted(made, target_experts=3, target_intermediate_size=48)
    kept, state = draft.facts["kept"], made.state_dict()
    small = state_dict(draft)
    assert draft.config["num_local_experts"] == 3
    assert draft.config["intermediate_size"] == 48
    rows = [state["model.layers.1.mlp.router.weight"][e].float().norm() for e in range(4)]
    assert numbers(kept["experts"]["1"]) == sorted(np.argsort([-r.item() for r in rows])[:3].tolist())
    seen = set()
    for i, e in enumerate(numbers(kept["experts"]["1"])):
        f = torch.tensor(numbers(kept["ffn"][f"1.{e}"]))
        seen.add(kept["ffn"][f"1.{e}"])
        both = torch.stack([2 * f, 2 * f + 1], 1).flatten()
        prefix = "model.layers.1.mlp.experts."
        for name, index in (
            ("gate_up_proj", (e, slice(None), both)),
            ("gate_up_proj_bias", (e, both)),
            ("down_proj", (e, f)),
            ("down_proj_bias", (e,)),
        ):
            assert torch.equal(small[prefix + name][i], state[prefix + name][index]), name
        assert torch.equal(small["model.layers.1.mlp.router.weight"][i], state["model.layers.1.mlp.router.weight"][e])
    assert len(seen) == 3


def test_fewer_experts_of_their_own_names(tmp_path):
    """Experts move to the numbers that are free, router rows with them, in order of given scores."""
    made = zoo.saved("qwen3_moe", tmp_path / "model")
    scores = {i: [0.1, 3.0, -1.0, 2.0] for i in range(3)}
    config = ModelSlicingConfig(target_experts=2, target_moe_intermediate_size=16, expert_scores=scores)
    slice_model(tmp_path / "model", config, out=tmp_path / "small")
    small, parent = Checkpoint.open(tmp_path / "small"), Parent.open(made)
    facts = json.loads((tmp_path / "small" / "fastmerge_report.json").read_text())
    assert facts["kept"]["experts"] == {str(i): "1,3" for i in range(3)}
    assert {small.config[k] for k in ("num_experts", "num_local_experts") if k in small.config} == {2}
    loaded = zoo.load(tmp_path / "small")
    zoo.generated(loaded)
    state, whole = Parent.open(loaded).kept, parent.kept
    for new, old in ((0, 1), (1, 3)):
        f = numbers(facts["kept"]["expert_ffn"][f"2.{old}"])
        there, here = (f"model.layers.2.mlp.experts.{e}." for e in (old, new))
        assert torch.equal(state[here + "up_proj.weight"], whole[there + "up_proj.weight"][f])
        assert torch.equal(state[here + "down_proj.weight"], whole[there + "down_proj.weight"][:, f])
    assert torch.equal(state["model.layers.2.mlp.gate.weight"], whole["model.layers.2.mlp.gate.weight"][[1, 3]])


def test_gemma_without_its_compensation_fails_the_gate():
    """The embedding's scale is the root of the hidden size: left alone, logits are others."""
    draft = drafted(zoo.model("gemma2"), target_hidden_size=24, target_intermediate_size=80)
    kept = draft.facts["kept"]
    right = module(draft)
    reference = zeroed(zoo.model("gemma2"), kept)
    assert zoo.difference(reference, right) < TIGHT
    with torch.no_grad():
        right.model.embed_tokens.weight.mul_((24 / 32) ** 0.5)
    assert zoo.difference(reference, right) > 100 * TIGHT


def test_wrong_requests_are_refused_all_at_once(tmp_path):
    made = zoo.model("llama")

    def refused(match, kind=made, **options):
        with pytest.raises((RecipeError, CheckpointError), match=match):
            slice_model(kind, ModelSlicingConfig(**options))

    refused("nothing to slice: expected one of target_layers")
    refused("target_hidden_size: expected 1 to 32, the model's hidden size, got 33", target_hidden_size=33)
    refused("target_layers: expected 2 or more with preserve_first_last, got 1", target_layers=1)
    refused("target_num_heads: expected a multiple of 2, the query heads of a group, got 3", target_num_heads=3)
    refused("expected a multiple of the 4 heads, which llama of transformers asks for, got 30", target_hidden_size=30)
    refused(
        "expected 32, the length of the norms of queries and keys of 4 heads", zoo.model("olmoe"), target_hidden_size=24
    )
    refused("at most 2 for each, got 4 for 1", target_num_heads=4, target_kv_heads=1)
    refused("target_experts: llama has no experts, got 2", target_experts=2)
    refused("target_moe_intermediate_size: no layer of llama has such an MLP", target_moe_intermediate_size=8)
    refused("importance_metric: activation needs calibration_data", target_layers=2, importance_metric="activation")
    refused(
        "importance_metric: expected one of auto, .*did you mean 'taylor'", target_layers=2, importance_metric="tailor"
    )
    refused("layer_selection: expected one of importance", target_layers=2, layer_selection="middle")
    refused("refit: lstsq needs calibration_data", target_intermediate_size=8, refit="lstsq")
    refused("batch 0: expected token ids", target_layers=2, calibration_data=torch.zeros(2, 3))
    refused("expected at least one batch", target_layers=2, calibration_data=[])
    refused("rotate: gemma2: norms stand between", zoo.model("gemma2"), rotate=True, calibration_data=zoo.tokens())
    with pytest.raises(RecipeError) as caught:
        slice_model(made, ModelSlicingConfig(target_layers=9, target_hidden_size=-1, target_intermediate_size=True))
    assert len(caught.value.problems) == 3
    sparse = zoo.model("gpt_oss")
    refused("expected 2 .num_experts_per_tok. to 4", sparse, target_experts=1)
    refused("expert_scores: expected target_experts", sparse, target_intermediate_size=8, expert_scores={})
    refused("refit: lstsq is for dense layers", sparse, refit="lstsq", target_layers=2, calibration_data=zoo.tokens())
    refused("damping: expected a number from 0, got -1", target_layers=2, damping=-1)
    refused("seed: expected a 64-bit", target_layers=2, seed=1 << 64)
    refused("expert_scores: layer 1: expected 4 finite numbers", sparse, target_experts=2, expert_scores={0: [1] * 4})
    zoo.saved("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match="expected out: the directory to write"):
        slice_model(tmp_path / "model", ModelSlicingConfig(target_layers=2))


def test_inner_sizes_follow_the_hidden_size():
    assert proportional(14336, 3072, 4096) == 10752
    assert proportional(11008, 3072, 4096) == 8320  # 8256, to a multiple of 128
    assert proportional(80, 24, 32) == 64  # 60, to a multiple of 16
    assert drafted(zoo.model("llama"), target_hidden_size=24).config["intermediate_size"] == 64


def test_slicing_on_disk_loads_no_torch(tmp_path):
    zoo.saved("llama", tmp_path / "model")
    code = (
        "import sys; from fastmerge.dna import ModelSlicingConfig, create_model_family, slice_model; "
        "slice_model(sys.argv[1], ModelSlicingConfig(target_layers=2, target_hidden_size=24), out=sys.argv[2]); "
        "create_model_family(sys.argv[1], [(3, 32), (2, 24)], out=sys.argv[3]); "
        "assert not sys.modules.keys() & {'torch', 'transformers'}"
    )
    subprocess.run([sys.executable, "-c", code, *[tmp_path / n for n in ("model", "small", "family")]], check=True)
    assert zoo.load(tmp_path / "small").config.intermediate_size == 64
    assert {p.name for p in (tmp_path / "family").iterdir()} == {"3L_32D", "2L_24D"}


def test_disk_and_memory_give_the_same_bytes_of_corrected_slices(tmp_path):
    """With norms that are corrected, a refit, and a rotation."""
    for i, options in enumerate(({"target_intermediate_size": 60}, {"rotate": True})):
        zoo.saved("llama", tmp_path / f"model{i}", dtype=torch.bfloat16)
        made = zoo.load(tmp_path / f"model{i}", torch.bfloat16)  # whose rotary frequencies are not rounded
        config = ModelSlicingConfig(target_hidden_size=24, calibration_data=zoo.tokens(), **options)
        draft = drafted(tmp_path / f"model{i}", target_hidden_size=24, calibration_data=zoo.tokens(), **options)
        write(draft, tmp_path / f"small{i}")
        there = zoo.load(tmp_path / f"small{i}", torch.bfloat16).state_dict()
        here = slice_model(made, config).state_dict()
        assert all(torch.equal(here[name], there[name]) for name in there)
