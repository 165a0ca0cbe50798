"""``base+adapter`` beside what peft itself makes of the same files."""

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
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A Llama with biases in bf16, one in fp32, and a GPT-2 (layers stored [in, out])."""
    root = tmp_path_factory.mktemp("bases")
    llama = {**SHAPE, "attention_bias": True, "tie_word_embeddings": False}
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32}
    for name, config, dtype in (
        ("bf16", transformers.LlamaConfig(**llama), torch.bfloat16),
        ("fp32", transformers.LlamaConfig(**llama), torch.float32),
        ("tied", transformers.LlamaConfig(**{**llama, "tie_word_embeddings": True}), torch.float32),
        ("gpt2", transformers.GPT2Config(**gpt2), torch.float32),
    ):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(root / name)
    return root


def train(base, path, **config):
    """An adapter whose every trained tensor moved, as peft saves it."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **config}
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    )
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((0.05 * torch.randn(p.shape, generator=g)).to(p.dtype))
    model.save_pretrained(path)
    return path


def unloaded(base, path, out):
    """What peft's own merge of the saved adapter saves."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.PeftModel.from_pretrained(model, path).merge_and_unload().save_pretrained(out)
    return load_file(out / "model.safetensors")


def baked(base, path, out):
    fm.merge(f"merge_method: passthrough\nmodels:\n  - model: {base}+{path}\n", out, device="cpu")
    return load_file(out / "model.safetensors")


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, ".*0.*down_proj": 8}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "tokens": {"trainable_token_indices": [3, 9, 1]},
}


@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_peft_with_one_rounding(bases, tmp_path, name):
    base = bases / "bf16"
    path = train(base, tmp_path / "adapter", **CASES[name])
    want, got = unloaded(base, path, tmp_path / "want"), baked(base, path, tmp_path / "got")
    before = load_file(base / "model.safetensors")
    assert got.keys() == want.keys()
    assert sum(not torch.equal(want[n], before[n]) for n in want) >= 4
    # peft multiplies matrices in an order of its own: of thousands of elements one may fall on the other side.
    off = {n: int((got[n] != want[n]).sum()) for n in want if not torch.equal(got[n], want[n])}
    assert sum(off.values()) <= 2, off
    assert all(torch.allclose(got[n].float(), want[n].float(), rtol=2**-7, atol=1e-6) for n in want)


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("fp32", {"use_dora": True}),
        ("fp32", {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "k_proj"]}),
        ("fp32", {"target_modules": ["embed_tokens", "q_proj"]}),  # in bf16 peft rounds the update first
        ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_fc"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["wte", "c_attn", "c_proj"], "use_dora": True}),
        ("fp32", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        ("fp32", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 1]}),
        ("fp32", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
        ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 2]}}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_as_close_as_fp32_allows(bases, tmp_path, base, config):
    path = train(bases / base, tmp_path / "adapter", **config)
    want, got = unloaded(bases / base, path, tmp_path / "want"), baked(bases / base, path, tmp_path / "got")
    before = load_file(bases / base / "model.safetensors")
    assert got.keys() == want.keys()
    assert sum(n not in before or not torch.equal(want[n], before[n]) for n in want) >= 2
    assert [n for n in want if not torch.allclose(got[n], want[n], rtol=1e-5, atol=1e-6)] == []


def test_lengths_of_rows_against_the_formula(bases, tmp_path):
    path = train(bases / "bf16", tmp_path / "adapter", use_dora=True)
    got, x = baked(bases / "bf16", path, tmp_path / "got"), load_file(bases / "bf16" / "model.safetensors")
    a = load_file(path / "adapter_model.safetensors")
    module = "model.layers.1.mlp.down_proj"
    one, two, m = (
        a[f"base_model.model.{module}.lora_{n}"].double() for n in ("A.weight", "B.weight", "magnitude_vector")
    )
    v = x[f"{module}.weight"].double() + 1.5 * (two @ one)
    want = v * (m / v.norm(dim=1))[:, None]
    assert torch.equal(got[f"{module}.weight"], want.bfloat16())


def test_a_base_without_biases_takes_none(bases, tmp_path):
    """peft cannot merge these either; no tensor of an adapter is left out in silence."""
    path = train(bases / "fp32", tmp_path / "adapter", lora_bias=True, target_modules=["q_proj"])
    tensors = load_file(bases / "fp32" / "model.safetensors")
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({n: t for n, t in tensors.items() if not n.endswith("bias")}, bare / "model.safetensors")
    config = json.loads((bases / "fp32" / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"has no such tensors: 'model.layers.0.self_attn.q_proj.bias'"):
        baked(bare, path, tmp_path / "got")
