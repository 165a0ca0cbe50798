"""Adapters of fused experts and of repeated layers, beside what peft makes of the files, and beside the formula."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge as fm
from fastmerge.errors import CheckpointError

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
"""Both warn of much, of what becomes of their own names first."""

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SAVED = {"mixtral-fused": {"save_original_format": False}}
"""transformers writes the experts of a Mixtral one by one, and of a GPT-OSS as they are in memory."""

PREFIX = "base_model.model."
EXPERTS, RANK, SCALE = 4, 4, 1.5


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Mixtrals whose experts are single ones and fused, GPT-OSS whose square ones are [E, in, out], and a Llama."""
    root = tmp_path_factory.mktemp("bases")
    gpt_oss = transformers.GptOssConfig(**{**SHAPE, "intermediate_size": 32}, head_dim=8)
    llama = {k: v for k, v in SHAPE.items() if "experts" not in k}
    configs = {
        "mixtral": transformers.MixtralConfig(**SHAPE),
        "mixtral-fused": transformers.MixtralConfig(**SHAPE),
        "gpt-oss": gpt_oss,
        "llama": transformers.LlamaConfig(**llama),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 2:
                    p.normal_(0, 0.05)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype).save_pretrained(root / f"{name}-{dtype}", **SAVED.get(name, {}))
    return root


def open_model(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def train(base, path, **config):
    """An adapter whose every trained tensor moved, as peft saves it."""
    config = {"r": RANK, "lora_alpha": 6, **config}
    model = peft.get_peft_model(open_model(base), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((0.05 * torch.randn(p.shape, generator=g)).to(p.dtype))
    model.save_pretrained(path)
    return path


def baked(base, path, out):
    fm.merge(f"merge_method: passthrough\nmodels:\n  - model: {base}+{path}\n", out, device="cpu")
    return load_file(out / "model.safetensors")


def moved(base, tensors):
    before = load_file(base / "model.safetensors")
    return sum(not torch.equal(t, before[n]) for n, t in tensors.items())


def rank_by_rank(x, a, b, scale=SCALE):
    """``x + scale (B A)`` in fp32, one rank after the other, as the engine promises it."""
    total = b[:, :1] * a[:1]
    for k in range(1, len(a)):
        total = total + b[:, k : k + 1] * a[k : k + 1]
    return x.float() + scale * total


@pytest.mark.parametrize("name", ["mixtral", "mixtral-fused", "gpt-oss"])
@pytest.mark.parametrize(
    ("config", "least"),
    [
        ({"target_modules": ["q_proj"], "target_parameters": FUSED}, 6),
        ({"target_modules": [], "target_parameters": FUSED[1:]}, 2),
        ({"target_modules": [], "target_parameters": FUSED[:1], "use_rslora": True}, 2),
        (
            {
                "target_modules": ["k_proj"],
                "target_parameters": FUSED,
                "rank_pattern": {".*down_proj": 2},
                "alpha_pattern": {"layers.1.*experts.gate_up_proj": 3},
            },
            6,
        ),
    ],
)
def test_fused_experts_as_peft_merges_them(bases, tmp_path, name, config, least):
    base = bases / f"{name}-torch.float32"
    path = train(base, tmp_path / "adapter", **config)
    merged = peft.PeftModel.from_pretrained(open_model(base), path).merge_and_unload()
    merged.save_pretrained(tmp_path / "want", **SAVED.get(name, {}))
    want, got = load_file(tmp_path / "want" / "model.safetensors"), baked(base, path, tmp_path / "got")
    assert got.keys() == want.keys()
    assert moved(base, want) == moved(base, got) >= least
    assert [n for n in want if not torch.allclose(got[n], want[n], rtol=1e-5, atol=1e-6)] == []


@pytest.mark.parametrize("name", ["mixtral", "mixtral-fused", "gpt-oss"])
def test_fused_experts_are_rounded_once(bases, tmp_path, name):
    """peft rounds the update to bf16 before it adds it."""
    base = bases / f"{name}-torch.bfloat16"
    path = train(base, tmp_path / "adapter", target_modules=[], target_parameters=FUSED)
    got, x = baked(base, path, tmp_path / "got"), load_file(base / "model.safetensors")
    factors = {n: t.float() for n, t in load_file(path / "adapter_model.safetensors").items()}
    for layer in range(2):
        for kind, inner in (("gate_up_proj", "base_layer."), ("down_proj", "")):
            module = f"{PREFIX}model.layers.{layer}.mlp.experts.{inner}"
            a, b = (factors[f"{module}lora_{side}.weight"] for side in "AB")
            for e in range(EXPERTS):
                pair = a.reshape(EXPERTS, RANK, -1)[e], b.reshape(len(b), RANK, EXPERTS)[..., e]
                for old, new in parts(x, got, layer, kind, e, turned=name == "gpt-oss"):
                    rows = len(old)
                    want = rank_by_rank(old, pair[0], pair[1][:rows])
                    pair = pair[0], pair[1][rows:]
                    assert torch.equal(new, want.bfloat16())


def parts(x, got, layer, kind, e, *, turned=False):
    """The matrices of one expert, before and after, [out, in], one behind the other along the output."""
    fused = f"model.layers.{layer}.mlp.experts.{kind}"
    if fused in x:
        return [(x[fused][e].T, got[fused][e].T) if turned else (x[fused][e], got[fused][e])]
    names = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    every = [f"model.layers.{layer}.block_sparse_moe.experts.{e}.{n}.weight" for n in names]
    return [(x[n], got[n]) for n in every]


@pytest.mark.parametrize("name", ["mixtral", "mixtral-fused"])
@pytest.mark.parametrize("kinds", [("w1", "w2", "w3"), ("w1", "w3"), ("w2",)])
def test_an_adapter_of_single_experts(bases, tmp_path, name, kinds):
    """As transformers 4 had them. peft loses one of w1 and w3 alone: B is zero, and the merged model is the base."""
    base, path = bases / f"{name}-torch.float32", tmp_path / "adapter"
    factors, g = {}, torch.Generator().manual_seed(3)
    for layer in range(2):
        for e in range(EXPERTS):
            for kind in kinds:
                rows, columns = (32, 48) if kind == "w2" else (48, 32)
                module = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{e}.{kind}"
                factors[f"{module}.lora_A.weight"] = torch.randn(RANK, columns, generator=g) * 0.1
                factors[f"{module}.lora_B.weight"] = torch.randn(rows, RANK, generator=g) * 0.1
    path.mkdir()
    save_file(factors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "target_modules": list(kinds)}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    got, x = baked(base, path, tmp_path / "got"), load_file(base / "model.safetensors")
    used = 0
    for layer in range(2):
        for e in range(EXPERTS):
            found = [parts(x, got, layer, kind, e) for kind in ("gate_up_proj", "down_proj")]
            old, new = (torch.cat([m[i] for m in found[0]]) for i in (0, 1))
            matrices = {"w1": (old[:48], new[:48]), "w3": (old[48:], new[48:]), "w2": found[1][0]}
            for kind, (before, after) in matrices.items():
                module = f"{PREFIX}model.layers.{layer}.block_sparse_moe.experts.{e}.{kind}"
                a, b = (factors.get(f"{module}.lora_{side}.weight") for side in "AB")
                assert torch.equal(after, before if a is None else rank_by_rank(before, a, b))
                used += a is not None
    assert used == 8 * len(kinds)


def test_v4_targets_that_peft_rewrote(bases, tmp_path):
    """Of w1 and w3 peft makes one update of twice the rank, and of the router a parameter."""
    base = bases / "mixtral-torch.float32"
    path = train(base, tmp_path / "adapter", target_modules=["w1", "w2", "w3", "gate", "q_proj"])
    merged = peft.PeftModel.from_pretrained(open_model(base), path).merge_and_unload()
    merged.save_pretrained(tmp_path / "want")
    want, got = load_file(tmp_path / "want" / "model.safetensors"), baked(base, path, tmp_path / "got")
    assert moved(base, want) == moved(base, got) == 28
    assert [n for n in want if not torch.allclose(got[n], want[n], rtol=1e-5, atol=1e-6)] == []


def test_layers_that_the_adapter_repeats(bases, tmp_path):
    """peft's merge adds the updates of all copies to each, as they share their weights; side by side it is right."""
    base = bases / "llama-torch.float32"
    runs = [[0, 2], [0, 1], [1, 2]]
    path = train(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], layer_replication=runs)
    got, x = baked(base, path, tmp_path / "got"), load_file(base / "model.safetensors")
    factors = load_file(path / "adapter_model.safetensors")
    assert json.loads((tmp_path / "got" / "config.json").read_text())["num_hidden_layers"] == 4
    for new, old in enumerate((0, 1, 0, 1)):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            a, b = (factors[f"{PREFIX}model.layers.{new}.{module}.lora_{side}.weight"] for side in "AB")
            want = rank_by_rank(x[f"model.layers.{old}.{module}.weight"], a, b)
            assert torch.equal(got[f"model.layers.{new}.{module}.weight"], want)
        name = "post_attention_layernorm.weight"
        assert torch.equal(got[f"model.layers.{new}.{name}"], x[f"model.layers.{old}.{name}"])
    words = torch.arange(16)[None]
    with torch.no_grad():
        beside = peft.PeftModel.from_pretrained(open_model(base), path)(words).logits
        merged = open_model(tmp_path / "got")(words).logits
    assert torch.allclose(merged, beside, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(merged, open_model(base)(words).logits, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("runs", "said"),
    [([[0, 3]], "layer_replication [0, 3); the model has 2 layers"), ([[5, 6], [0, 1]], "the model has 2 layers")],
)
def test_layers_that_are_not_there(bases, tmp_path, runs, said):
    path = train(bases / "llama-torch.float32", tmp_path / "adapter", target_modules=["q_proj"])
    settings = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(settings | {"layer_replication": runs}))
    with pytest.raises(CheckpointError, match="layer_replication") as e:
        baked(bases / "llama-torch.float32", path, tmp_path / "got")
    assert said in str(e.value)


def test_repeated_layers_of_one_document_are_not_those_of_another(bases, tmp_path):
    base = bases / "llama-torch.float32"
    path = train(base, tmp_path / "adapter", target_modules=["q_proj"], layer_replication=[[1, 2], [0, 2]])
    deep = f"name: deep\nmerge_method: passthrough\nmodels: [{{model: {base}+{path}}}]\n---\n"
    first = f"merge_method: passthrough\nslices: [{{sources: [{{model: {base}, layer_range: [0, 1]}}]}}, "
    fm.merge(f"{deep}{first}{{sources: [{{model: deep, layer_range: [2, 3]}}]}}]\n", tmp_path / "a", device="cpu")
    got, x = load_file(tmp_path / "a" / "model.safetensors"), load_file(base / "model.safetensors")
    assert got.keys() == x.keys()
    q = "self_attn.q_proj.weight"
    assert [torch.equal(got[f"model.layers.{i}.{q}"], x[f"model.layers.{i}.{q}"]) for i in range(2)] == [True, False]
    with pytest.raises(CheckpointError, match="of what another document makes"):
        fm.merge(
            f"name: first\nmerge_method: passthrough\nmodels: [{{model: {base}}}]\n---\n"
            f"merge_method: passthrough\nmodels: [{{model: first+{path}}}]\n",
            tmp_path / "b",
            device="cpu",
        )
