"""Wider models compute what the model computed: on disk and in memory, in every mode, and controls that must not."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmerge.checkpoint import Checkpoint
from fastmerge.dna import GrowthMethod, ModelGrowthConfig, Parent, grow_model_width, plan_width, width
from fastmerge.dna.axes import Growth, channels, heads, units
from fastmerge.dna.growth import NewUnits, WidthMode
from fastmerge.dna.measure import root_mean_squares
from fastmerge.dna.results import Made, state_dict
from fastmerge.dtypes import F32
from fastmerge.errors import CheckpointError, RecipeError
from tests.dna import zoo

EXACT = 1e-5
"""Of the largest logit, in fp32."""

ALL = {
    "x2": {},
    "x2 even": {"noise_std": 0.0},
    "x3": {"hidden_size": 96},
    "x1.5": {"width_multiplier": 1.5},
    "hidden": {"hidden_size": 64},
    "zero": {"hidden_size": 48, "mode": "zero"},
    "zero x4": {"hidden_size": 128, "mode": WidthMode.ZERO, "noise_mode": "absolute", "noise_std": 0.1},
    "scaled": {"hidden_size": 48, "mode": "scaled"},
    "ffn": {"intermediate_size": 112},
    "ffn random": {"intermediate_size": 112, "units": NewUnits.RANDOM, "noise_std": 1.0},
    "experts": {"moe_intermediate_size": 40},
    "shared": {"shared_expert_intermediate_size": 56},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "heads random": {"num_attention_heads": 8, "num_key_value_heads": 4, "units": "random", "noise_std": 1.0},
    "queries": {"num_attention_heads": 8},
    "keys": {"num_key_value_heads": 4},
    "half more": {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
}
DEFAULT = {
    "llama biased": ("x2", "x1.5", "zero", "scaled", "heads random", "queries"),
    "llama tied": ("x2", "zero x4", "scaled"),
    "gemma2": ("x2", "x1.5", "scaled"),
    "olmo2": ("x2", "x1.5", "keys"),
    "qwen2_moe": ("x2 even", "x1.5"),
}
REFUSED = {("olmo2", m) for m in ("heads random", "half more")}
REFUSED |= {(k, m) for k in ("olmo3", "olmoe", "flex_olmo") for m in ("heads random", "half more")}
REFUSED |= {("olmoe", m) for m in ("x3", "x1.5", "hidden", "zero", "zero x4", "scaled", "heads", "queries")}
LESS = {("olmo2", "zero x4"), ("olmo3", "zero x4"), ("olmoe", "zero x4"), ("flex_olmo", "zero x4")}
"""Where norms of queries and keys share an rms_norm_eps that is a quarter: 3e-5."""


def grown(model, **options):
    return grow_model_width(model, ModelGrowthConfig(**options))


def sized(kind, options):
    """Whether a kind of model has what a case grows."""
    settings = {**zoo.SIZES, **zoo.KINDS[kind]}
    if "moe_intermediate_size" in options:
        return "moe_intermediate_size" in settings
    if "shared_expert_intermediate_size" in options:
        return "shared_expert_intermediate_size" in settings
    dense = "moe_intermediate_size" not in settings or settings.get("first_k_dense_replace")
    return "intermediate_size" not in options or dense


@pytest.mark.parametrize("kind", DEFAULT)
def test_wider_models_compute_the_same(kind):
    model = zoo.model(kind)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    config = model.config.to_dict()
    for case in DEFAULT[kind]:
        wide = grown(model, **ALL[case])
        assert zoo.difference(model, wide) <= EXACT, case
        assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in model.parameters())
    assert model.config.to_dict() == config
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


EVERY = [(kind, case) for kind in zoo.KINDS for case in ALL]
FITS = [(kind, case) for kind, case in EVERY if (kind, case) not in REFUSED and sized(kind, ALL[case])]


@pytest.mark.conformance
@pytest.mark.parametrize(("kind", "case"), [pair for pair in EVERY if pair not in FITS])
def test_what_an_architecture_cannot_have_is_refused(kind, case):
    with pytest.raises(RecipeError, match="spans all heads|no such size|knows no head_dim|decides it"):
        plan_width(Parent.open(zoo.model(kind)), ModelGrowthConfig(**ALL[case]))


@pytest.mark.conformance
@pytest.mark.parametrize(("kind", "case"), FITS)
def test_every_architecture_in_every_mode(kind, case, tmp_path):
    model = zoo.model(kind)
    model.save_pretrained(tmp_path / "model")
    grow_model_width(tmp_path / "model", ModelGrowthConfig(**ALL[case]), out=tmp_path / "wide")
    wide = zoo.load(tmp_path / "wide")
    assert zoo.difference(model, wide) <= (3 * EXACT if (kind, case) in LESS else EXACT)
    assert torch.equal(zoo.generated(model), zoo.generated(wide))
    wide.save_pretrained(tmp_path / "again")
    again, there = load_file(tmp_path / "again/model.safetensors"), load_file(tmp_path / "wide/model.safetensors")
    assert again.keys() == there.keys()
    assert all(torch.equal(again[name], there[name]) for name in there)


ULP = 2**-7
"""One bf16 place of the largest logit: sums in another order round a number to its neighbour now and then."""

SAME = ("llama", "llama tied", "llama biased", "mistral", "qwen2", "qwen3", "olmo2", "olmo3")
HALVED = {
    "hidden": {"hidden_size": 64},
    "ffn": {"intermediate_size": 112},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "keys": {"num_key_value_heads": 4},
}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("qwen2", "hidden"),
        ("qwen2", "heads"),
        ("olmo2", "hidden"),
        ("gemma2", "ffn"),
        *[pytest.param(k, c, marks=pytest.mark.conformance) for k in SAME for c in HALVED],
        *[
            pytest.param(k, c, marks=pytest.mark.conformance)
            for k in ("gemma", "gemma3_text")
            for c in ("ffn", "heads")
        ],
    ],
)
def test_in_bf16_logits_differ_by_a_rounding_at_most(kind, case, tmp_path):
    zoo.saved(kind, tmp_path, dtype=torch.bfloat16)
    model = zoo.load(tmp_path, torch.bfloat16)  # .to() rounds the frequencies of the heads as well
    new = grown(model, **HALVED[case])
    assert zoo.difference(model, new) <= (0 if case == "keys" and not kind.startswith("olmo") else ULP)
    assert (zoo.logits(model) == zoo.logits(new)).float().mean() > 0.5


@pytest.mark.parametrize("mode", ["x2", "x1.5"])
def test_disk_memory_and_transformers_agree(tmp_path, mode):
    model = zoo.saved("llama biased", tmp_path / "model", dtype=torch.bfloat16)
    config = ModelGrowthConfig(**ALL[mode], seed=3)
    report = grow_model_width(str(tmp_path / "model"), config, out=tmp_path / "wide", memory="200MB", shard_size="60KB")
    assert report.bytes_written > 0
    given = json.loads((tmp_path / "model/config.json").read_text())
    made = grow_model_width(dict(model.state_dict()), config, model_config=given)
    assert isinstance(made, Made)
    there = {}
    for path in sorted((tmp_path / "wide").glob("*.safetensors")):
        there |= load_file(path)
    assert len(list((tmp_path / "wide").glob("*.safetensors"))) > 1
    assert there.keys() == made.state_dict.keys()
    assert all(torch.equal(t.view(torch.int16), there[n].view(torch.int16)) for n, t in made.state_dict.items())
    wide = zoo.load(tmp_path / "wide", torch.bfloat16)
    assert torch.equal(zoo.logits(wide), zoo.logits(grow_model_width(model, config)))
    assert json.loads((tmp_path / "wide/config.json").read_text()) == made.config
    wide.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert again.keys() == there.keys()
    assert all(torch.equal(again[name], there[name]) for name in there)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_generation_is_the_same_with_and_without_cache(kind):
    model = zoo.model(kind)
    wide = grown(model, width_multiplier=1.5)
    want = zoo.generated(model)
    assert torch.equal(zoo.generated(wide), want)
    assert torch.equal(zoo.generated(wide, cache=False), want)


def test_consumers_are_shared_out_exactly_and_differently():
    model = zoo.model("llama", dtype=torch.bfloat16)
    wide, old = grown(model, hidden_size=64).state_dict(), model.state_dict()
    shares = []
    for name in ("q_proj", "k_proj", "v_proj"):
        key = f"model.layers.0.self_attn.{name}.weight"
        one, two = wide[key][:, :32].double(), wide[key][:, 32:].double()
        assert torch.equal(one + two, old[key].double())
        shares.append((one / old[key]).mean(dim=1))
    assert (shares[0][:16] - shares[1]).abs().min() > 0
    embed = wide["model.embed_tokens.weight"]
    assert torch.equal(embed[:, :32], embed[:, 32:])


def test_the_seed_decides_the_shares():
    parent = Parent.open(zoo.model("llama"))
    one, same, other = (state_dict(plan_width(parent, ModelGrowthConfig(seed=s))) for s in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    head = "lm_head.weight"
    assert not torch.equal(one[head], other[head])
    assert torch.equal(one["model.norm.weight"], other["model.norm.weight"])


# ---- controls: each is a mistake, and must show ------------------------------------------------------------------


def test_without_another_eps_zero_expansion_is_wrong():
    model = zoo.model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.003)
    wide = grown(model, hidden_size=48, mode="zero")
    assert zoo.difference(model, wide) <= EXACT
    for module in wide.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= 1.5
    assert zoo.difference(model, wide) > 1e-3


def test_keys_in_turns_are_wrong(monkeypatch):
    model = zoo.model("llama")
    turns = Growth("heads", 4, np.arange(4)), Growth("kv_heads", 2, np.arange(4) % 2)
    assert zoo.difference(model, grown(model, num_key_value_heads=4)) <= EXACT
    monkeypatch.setattr(width, "heads", lambda *_, **__: turns)
    assert zoo.difference(model, grown(model, num_key_value_heads=4)) > 0.1


def test_halves_on_both_sides_and_heads_out_of_order_are_wrong():
    model = zoo.model("llama")
    wide = grown(model, intermediate_size=160)
    with torch.no_grad():
        wide.model.layers[0].mlp.up_proj.weight.mul_(0.5)
    assert zoo.difference(model, wide) > 1e-3
    wide = grown(model, num_attention_heads=8, num_key_value_heads=4)
    assert zoo.difference(model, wide) <= EXACT
    with torch.no_grad():
        for new, old in zip(wide.model.layers, model.model.layers, strict=True):
            new.self_attn.o_proj.weight.copy_(torch.cat([old.self_attn.o_proj.weight / 2] * 2, dim=1))
    assert zoo.difference(model, wide) > 0.1


# ---- what is asked for -------------------------------------------------------------------------------------------


def test_the_configuration_and_the_map_say_what_grew(tmp_path):
    zoo.saved("qwen2_moe", tmp_path / "model")
    options = {"hidden_size": 48, "num_attention_heads": 8, "moe_intermediate_size": 30}
    grow_model_width(tmp_path / "model", ModelGrowthConfig(method="bert2bert", **options), out=tmp_path / "wide")
    before, config = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("model", "wide"))
    changed = {k: v for k, v in config.items() if before.get(k) != v}
    assert changed == {
        **options, "head_dim": 8, "rms_norm_eps": pytest.approx(before["rms_norm_eps"] * 2 / 3),
    }  # fmt: skip
    found = json.loads((tmp_path / "wide/growth_map.json").read_text())
    assert found["mode"] == "zero"
    assert found["axes"]["hidden"]["index"] == [*range(32), *[-1] * 16]
    assert found["axes"]["heads"] == {"old": 4, "new": 8, "index": [0, 1, 0, 1, 2, 3, 2, 3], "replicas": [2] * 4}
    assert found["axes"]["expert_ffn"]["replicas"] == [2, 1, 1, 1] * 6
    report = json.loads((tmp_path / "wide/fastmerge_report.json").read_text())
    assert report["operation"] == "grow-width"
    assert report["exact"] is True
    assert report["matched"]["router"] == 3
    assert report["axes"]["expert_ffn"] == {"old": 24, "new": 30}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"method": "net2deeper"}, "grow_model_depth"),
        ("llama", {"method": "net2widr"}, "method: expected one of net2wider, .*got 'net2widr' .did you mean"),
        (
            "llama",
            {"mode": "double", "units": 3, "noise_std": -1, "seed": "a"},
            "(?s)mode: .*units: .*seed: .*noise_std: ",
        ),
        ("llama", {"width_multiplier": 1.3}, "whole hidden_size, got 1.3 x 32 = 41.6; hidden_size=42 is near"),
        ("llama", {"width_multiplier": 0.5}, "width_multiplier: expected a number above 1"),
        ("llama", {"width_multiplier": 1.0}, "nothing would grow"),
        (
            "llama",
            {"hidden_size": 16, "intermediate_size": 8.5},
            "(?s)hidden_size: .*from 32, which.*intermediate_size: ",
        ),
        ("llama", {"hidden_size": 42}, "hidden_size: expected a multiple of num_attention_heads 4"),
        ("llama", {"hidden_size": 48, "mode": "duplicate"}, "mode duplicate: expected a multiple of hidden_size 32"),
        ("llama", {"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads, which is 3, got 4"),
        ("llama", {"moe_intermediate_size": 99}, "moe_intermediate_size: a llama of this kind has no such size"),
        ("llama", {"initialization": "aki"}, "aki is of method bert2bert, got net2wider"),
        ("llama", {"initialization": "aki", "method": "bert2bert"}, "preserve_output=False does it all the same"),
        ("llama", {"noise_mode": "loud"}, "noise_mode: expected relative or absolute"),
        ("olmo2", {"num_attention_heads": 6, "num_key_value_heads": 3}, "q_norm spans all heads"),
    ],
)
def test_what_cannot_be_is_refused(kind, options, message):
    with pytest.raises(RecipeError, match=message):
        plan_width(Parent.open(zoo.model(kind)), ModelGrowthConfig(**options))


def test_models_that_cannot_grow_are_refused():
    model = zoo.model("llama")
    config, state = model.config.to_dict(), dict(model.state_dict())
    halves = {n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in state.items()}
    with pytest.raises(CheckpointError, match="q_proj.weight: expected floating-point numbers, got float8_e4m3fn"):
        grow_model_width(halves, ModelGrowthConfig(), model_config=config)
    del config["rms_norm_eps"]
    with pytest.raises(RecipeError, match="rms_norm_eps: expected a number, which mode zero scales"):
        grow_model_width(state, ModelGrowthConfig(width_multiplier=1.5), model_config=config)
    with pytest.raises(CheckpointError, match="quantization_config"):
        grow_model_width(state, ModelGrowthConfig(), model_config={**config, "quantization_config": {"bits": 4}})
    parent = Parent.open(model)
    with pytest.raises(RecipeError, match="root mean square of model.layers.0.self_attn.q_proj.weight"):
        plan_width(parent, ModelGrowthConfig(width_multiplier=1.5))


def test_what_is_not_exact_is_made_with_a_warning(caplog):
    model = zoo.model("llama")
    odd = grown(model, hidden_size=48, mode="duplicate", preserve_output=False)
    assert zoo.difference(model, odd) > 1e-3
    assert "not exact: mode duplicate" in caplog.text
    options = {"method": GrowthMethod.BERT2BERT, "initialization": "aki", "preserve_output": False}
    wide = grown(model, intermediate_size=160, **options)
    layers, old = wide.model.layers, model.model.layers
    assert torch.equal(layers[0].mlp.up_proj.weight[80:], old[1].mlp.up_proj.weight)
    assert torch.equal(layers[2].mlp.up_proj.weight[80:], old[2].mlp.up_proj.weight)
    assert "aki" in caplog.text
    parent = Parent.open(model)
    assert plan_width(parent, ModelGrowthConfig(**options)).facts["exact"] is False
    assert zoo.difference(model, grown(model, **options)) > 0.1


def test_fresh_weights_have_the_spread_that_was_asked_for(tmp_path):
    model = zoo.saved("llama", tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    rms = root_mean_squares(Parent.open(tmp_path / "model"), [name])[name]
    assert rms == pytest.approx(model.state_dict()[name].double().square().mean().sqrt().item(), rel=1e-12)
    wide = grown(model, hidden_size=96, mode="zero", noise_std=0.5).state_dict()
    new = wide[name][:, 32:]
    assert new.std().item() == pytest.approx(0.5 * rms, rel=0.05)
    assert torch.equal(wide[name][:, :32], model.state_dict()[name])
    assert not wide["lm_head.weight"][:, 32:].any()
    assert not wide["model.layers.1.mlp.down_proj.weight"][32:].any()
    silent = grown(model, hidden_size=96, mode="zero", noise_std=0.0).state_dict()
    assert not silent[name][:, 32:].any()


def test_axes():
    made = channels(4, 6, "scaled")
    assert made.index.tolist() == [0, 1, 2, 3, 0, 1]
    assert np.allclose(np.bincount(made.index, made.scale**2), 1.5)
    assert units("ffn", 4, 6, copies=True).index.tolist() == [0, 1, 2, 3, 0, 2]
    assert units("ffn", 3, 7, copies=True).replicas.tolist() == [3, 2, 2]
    q, kv = heads((32, 8), (48, 12), copies=True)
    assert kv.index.tolist() == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]
    assert (kv.index[np.arange(48) // 4] == q.index // 4).all()
    assert q.replicas.min() >= 1
    q, kv = heads((4, 2), (8, 4), copies=False)
    assert (q.index.tolist(), kv.index.tolist()) == ([0, 1, -1, -1, 2, 3, -1, -1], [0, -1, 1, -1])
    q, kv = heads((8, 2), (8, 4), copies=False)
    assert q.identity
    assert kv.index.tolist() == [0, 0, 1, 1]
    with pytest.raises(RecipeError, match="expected 24 heads or more"):
        heads((16, 4), (12, 6), copies=True)


def test_a_plan_reads_headers_and_growing_on_disk_loads_no_torch(tmp_path):
    zoo.saved("llama", tmp_path / "model")
    (tmp_path / "there").mkdir()
    found = Checkpoint.open(tmp_path / "model").tensors
    assert found["lm_head.weight"].dtype is F32
    code = (
        "import sys\nfrom fastmerge.dna import ModelGrowthConfig, grow_model_width\n"
        f"grow_model_width({str(tmp_path / 'model')!r}, ModelGrowthConfig(width_multiplier=1.5), out='wide')\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path / "there"
    )
    assert done.stdout == "[]\n"
