"""Dense models into one mixture of experts: mergekit-moe's files, its rows of routers and ours."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import fastmerge
from fastmerge.cli import main
from fastmerge.dna.mixtures.dense import plan_moe_merge, twin_for
from fastmerge.dna.mixtures.document import Expert, MoEMergeConfig, TrunkConfig, read
from fastmerge.dna.mixtures.gates import router_rows
from fastmerge.dna.mixtures.moe import draft_of, merge_to_moe, open_models
from fastmerge.dna.results import state_dict, write
from fastmerge.errors import CheckpointError, RecipeError
from fastmerge.keys import tensor_key
from fastmerge.philox import NOISE, normal
from tests.conformance import standins
from tests.dna import zoo

CLOSE = 1e-5
PROMPTS = (("merge the weights", "of all models"), ("answer the question",), ("tell a story", "weights of a story"))
MIXTRAL = "model.layers.{}.block_sparse_moe."
TARGETS = {
    **dict.fromkeys(["llama", "qwen2", "mistral", "qwen3", "phi3", "olmo2", "granite"]),
    "llama tied": "glm4_moe",
}


def matrix(*kinds):
    more = [pytest.param(k, marks=pytest.mark.conformance) for k in TARGETS if k not in kinds]
    return pytest.mark.parametrize("kind", [*kinds, *more])


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Tiny models with a tokenizer: three of each kind that is asked for."""
    root = tmp_path_factory.mktemp("family")

    def paths(kind, count=3):
        found = [root / f"{kind.replace(' ', '-')}-{i}" for i in range(count)]
        for i, path in enumerate(found):
            if not path.exists():
                zoo.saved(kind, path, seed=i, vocab_size=300)
                standins.tokenizer(False).save_pretrained(path)
        return [str(p) for p in found]

    return paths


def config(paths, **more):
    experts = [Expert(p, prompts) for p, prompts in zip(paths, PROMPTS, strict=False)]
    return MoEMergeConfig(paths[0], experts, **more)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[n]) and x.dtype == b[n].dtype for n, x in a.items())


@matrix("llama", "qwen2")
def test_experts_are_the_models_and_the_rest_is_the_base(tmp_path, family, kind):
    paths = family(kind)
    wanted = config(paths, gate_mode="random", architecture=TARGETS[kind])
    merge_to_moe(wanted, tmp_path / "out")
    there = load_file(tmp_path / "out" / "model.safetensors")
    models = [load_file(f"{p}/model.safetensors") for p in paths]
    assert same(state_dict(draft_of(wanted)), there)
    loaded = zoo.load(tmp_path / "out")
    assert loaded.config.num_experts_per_tok == 2
    loaded.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), there)
    assert zoo.generated(loaded).shape == (2, 14)
    for name, x in models[0].items():
        assert ".mlp." in name or "qkv" in name or torch.equal(there[name], x), name
    arch = twin_for(wanted, kind.split()[0]).arch
    for (e, model), layer in itertools.product(enumerate(models), range(3)):
        source = f"model.layers.{layer}.mlp."
        fused = kind == "phi3"
        gate = model[source + "gate_up_proj.weight"][:80] if fused else model[source + "gate_proj.weight"]
        if kind == "granite":
            new = there[arch.name("gate_up", layer)][e, :80], there[arch.name("down", layer)][e]
        else:
            new = there[arch.name("gate", layer, e)], there[arch.name("down", layer, e)]
        assert torch.equal(new[0], gate)
        assert torch.equal(new[1], model[source + "down_proj.weight"])


@matrix("llama", "qwen2")
def test_a_mixture_of_one_model_computes_what_it_does(kind):
    made = zoo.model(kind)
    options = {"gate_mode": "random", "allow_same": True, "architecture": TARGETS[kind]}
    mixture = merge_to_moe(MoEMergeConfig(made, [Expert(made)] * 3, **options))
    assert zoo.difference(made, mixture) <= CLOSE
    assert torch.equal(zoo.generated(made), zoo.generated(mixture))
    turned = [Expert(made, residual_scale=-0.5)] * 3  # a norm behind the experts, as in OLMo-2, takes a factor out
    assert zoo.difference(made, merge_to_moe(MoEMergeConfig(made, turned, **options))) > 100 * CLOSE


def across(rows, common):
    """Rows without their component along a vector."""
    unit = common / common.norm(dim=-1, keepdim=True)
    return rows - (rows * unit).sum(-1, keepdim=True) * unit


def normed_inputs(path, texts, *, last):
    """What the MLPs of a dense model see: the output of the norm before them. An oracle beside the package's hooks."""
    from transformers import AutoTokenizer

    words, model = AutoTokenizer.from_pretrained(path), zoo.load(path)
    rows = []
    for text in texts:
        seen = []
        handles = [
            layer.post_attention_layernorm.register_forward_hook(
                lambda m, i, out, seen=seen: seen.append(out[0].double())
            )
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(torch.tensor([words.encode("<s>" + text, add_special_tokens=False)]))
        for handle in handles:
            handle.remove()
        rows.append(torch.stack([x[-1] if last else x.mean(0) for x in seen]))
    return torch.stack(rows).mean(0)


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_rows_are_the_states_that_the_router_sees_told_apart(family, mode):
    paths = family("llama")
    wanted = config(paths, gate_mode=mode, router_scale=2.0)
    found = router_rows(wanted, open_models(wanted)[0])
    states = torch.stack([normed_inputs(paths[0], p, last=mode == "hidden") for p in PROMPTS], dim=1)
    apart = across(states - states.mean(1, keepdim=True), states.mean(1, keepdim=True))
    expected = 2 * apart / apart.norm(dim=2, keepdim=True)
    assert torch.allclose(torch.from_numpy(found).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_goes_to_its_own_expert_in_every_layer():
    made, words = zoo.model("llama", vocab_size=300, num_hidden_layers=6), standins.tokenizer(False)
    texts = [p for prompts in PROMPTS for p in prompts]
    wanted = MoEMergeConfig(made, [Expert(made, [t]) for t in texts], allow_same=True)
    mixture = merge_to_moe(wanted, tokenizer=words)
    chosen = []
    for layer in mixture.model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, i, said: chosen.append(int(said[0][-1].argmax())))
    with torch.no_grad():
        for text in texts:
            mixture(torch.tensor([words.encode("<s>" + text, add_special_tokens=False)]))
    assert chosen == [e for e in range(len(texts)) for _ in range(6)]


def test_negative_prompts_count_against_and_embeddings_stand_for_states(family):
    paths = family("llama")
    experts = [Expert(paths[0], PROMPTS[0], PROMPTS[1]), Expert(paths[1], PROMPTS[1], PROMPTS[0])]
    wanted = MoEMergeConfig(paths[0], experts, "cheap_embed")
    found = router_rows(wanted, open_models(wanted)[0])
    from transformers import AutoTokenizer

    words, state = AutoTokenizer.from_pretrained(paths[0]), load_file(f"{paths[0]}/model.safetensors")
    eps = json.loads(Path(paths[0], "config.json").read_text())["rms_norm_eps"]
    rows = []
    for prompts in PROMPTS[:2]:
        mean = []
        for p in prompts:
            x = state["model.embed_tokens.weight"][words.encode("<s>" + p, add_special_tokens=False)].double()
            mean.append((x / (x.square().mean(1, keepdim=True) + eps).sqrt()).mean(0))
        rows.append(torch.stack(mean).mean(0))
    gain = state["model.layers.1.post_attention_layernorm.weight"].double()
    row = across((rows[0] - rows[1]) * gain, (rows[0] + rows[1]) * gain)
    assert torch.allclose(torch.from_numpy(found[1, 0]).double(), row / row.norm(), rtol=1e-5, atol=1e-6)
    assert np.allclose(found[1, 1], -found[1, 0], rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_mergekit_s_rows_where_they_are_wanted(family, mode):
    from mergekit.common import ModelReference
    from mergekit.moe.config import Expert as Theirs
    from mergekit.moe.router import get_gate_params
    from transformers import AutoTokenizer

    paths = family("llama")
    words = AutoTokenizer.from_pretrained(paths[0])
    words.padding_side, words.pad_token_id = "left", words.bos_token_id
    experts = [Theirs(source_model=p, positive_prompts=list(t)) for p, t in zip(paths, PROMPTS, strict=True)]
    theirs = get_gate_params(ModelReference.parse(paths[0]), words, experts, mode=mode, device="cpu").float()
    wanted = config(paths, gate_mode=mode, router="mergekit")
    found = torch.from_numpy(router_rows(wanted, open_models(wanted)[0]))
    # hidden states are bf16 there, and their norm is
    near = 1e-5 if mode == "cheap_embed" else 1e-2
    assert (found - theirs).abs().max() <= near * theirs.abs().max()
    ours = router_rows(config(paths, gate_mode=mode), open_models(wanted)[0])
    assert (torch.from_numpy(ours) - theirs).abs().max() > 0.1


def test_noise_and_scale_are_those_of_the_definition(family):
    paths = family("llama", 2)
    experts = [Expert(paths[0]), Expert(paths[1], noise_scale=0.25, residual_scale=-0.5)]
    wanted = MoEMergeConfig(paths[0], experts, "uniform_random", dtype="bfloat16", seed=5)
    new = state_dict(draft_of(wanted))
    old = load_file(f"{paths[1]}/model.safetensors")
    for role, source, scale in (("w2", "down", -0.5), ("w3", "up", 1.0)):
        name = MIXTRAL.format(2) + f"experts.1.{role}.weight"
        x = old[f"model.layers.2.mlp.{source}_proj.weight"]
        noise = normal(tensor_key(5, name), 1, NOISE, 0, x.numel()) * np.float32(0.25)
        expected = (scale * x + scale * torch.from_numpy(noise).reshape(x.shape)).bfloat16()
        assert torch.equal(new[name], expected)
    gate = new[MIXTRAL.format(0) + "gate.weight"].float()
    assert gate.abs().max() <= 1 / 32**0.5
    assert 0.4 < gate.std() * 32**0.5 < 0.7
    other = state_dict(draft_of(MoEMergeConfig(paths[0], experts, "uniform_random", dtype="bfloat16", seed=6)))
    assert not torch.equal(other[MIXTRAL.format(0) + "gate.weight"].float(), gate)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_trunk_is_merged_by_any_method(family, method):
    paths = family("llama")
    given = {"density": 0.5, "weight": [1.0, 0.5]} if method == "ties" else {}
    wanted = config(paths, gate_mode="random", trunk=TrunkConfig(method, given))
    new = state_dict(draft_of(wanted))
    models = [load_file(f"{p}/model.safetensors") for p in paths]
    name = "model.layers.1.self_attn.q_proj.weight"
    base = 0 if method == "ties" else None
    expected = fastmerge.merge_tensors(
        [m[name] for m in models], method, parameters=given or {"weight": 1.0}, base_index=base, name=name
    )
    assert torch.equal(new[name], expected)
    assert torch.equal(new[MIXTRAL.format(1) + "experts.2.w1.weight"], models[2]["model.layers.1.mlp.gate_proj.weight"])


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, family):
    a, b, _ = family("llama")
    other = family("qwen2", 1)[0]
    with pytest.raises(RecipeError, match="experts_per_token: expected a whole number in 1 .. 2"):
        MoEMergeConfig(a, [Expert(a), Expert(b)], "random", experts_per_token=3)
    with pytest.raises(RecipeError, match=r"gate_mode: expected one of .* \(did you mean 'hidden_avg'"):
        MoEMergeConfig(a, [Expert(a), Expert(b)], "hiden_avg")
    with pytest.raises(RecipeError, match="all have the same prompts"):
        MoEMergeConfig(a, [Expert(a, ["x"]), Expert(b, ["x"])])
    with pytest.raises(RecipeError, match="all are the same model"):
        MoEMergeConfig(a, [Expert(a, ["x"]), Expert(a, ["y"])])
    with pytest.raises(RecipeError, match=r"experts\[1\]: positive_prompts: expected some"):
        MoEMergeConfig(a, [Expert(a, ["x"]), Expert(b)])
    with pytest.raises(CheckpointError, match="model_type: expected llama, as the base, got qwen2"):
        merge_to_moe(MoEMergeConfig(a, [Expert(a), Expert(other)], "random"), tmp_path / "out")
    shared = {"shared_experts": [Expert(a)]}
    with pytest.raises(RecipeError, match="shared_experts: mixtral has none"):
        merge_to_moe(config([a, b], architecture="Mixtral", **shared), tmp_path / "out")
    with pytest.raises(RecipeError, match="becomes one of mixtral, qwen2_moe, glm4_moe, solar_open, got 'olmoe'"):
        merge_to_moe(config([a, b], architecture="olmoe"), tmp_path / "out")
    biased = zoo.model("llama biased")
    with pytest.raises(CheckpointError, match="attention has biases of qkvo; mixtral takes none"):
        merge_to_moe(MoEMergeConfig(biased, [Expert(biased)] * 2, "random", allow_same=True))
    with pytest.raises(RecipeError, match="deepseek"):
        merge_to_moe(config([a, b], architecture="DeepSeek"), tmp_path / "out")
    with pytest.raises(RecipeError, match="merge_method: unknown method 'tie'"):
        merge_to_moe(config([a, b], trunk=TrunkConfig("tie")), tmp_path / "out")
    wanted = config([a, b], gate_mode="random")
    with pytest.raises(RecipeError, match="gates: expected shape"):
        plan_moe_merge(open_models(wanted), wanted, np.zeros((3, 2, 31), np.float32))
    assert not (tmp_path / "out").exists()


def test_every_mistake_of_a_file_is_named_with_its_line():
    text = "base_model: a\ngate_mod: hidden\nexperts:\n  - {source_model: b+c+d}\n  - {positive_prompts: y}\n"
    with pytest.raises(RecipeError) as caught:
        read(text + "tokenizer_source: union\ntrunk: linear\n")
    said = "\n".join(caught.value.problems)
    assert "recipe:2: gate_mod: unknown key (did you mean 'gate_mode'?)" in said
    assert "recipe:4: experts[0].source_model: 'b+c+d': expected one model[+adapter]" in said
    assert "recipe:5: experts[1]: expected a mapping with 'source_model'" in said
    assert "recipe:6: tokenizer_source: the embeddings are the base model's" in said
    assert "recipe:7: trunk: expected a mapping with 'merge_method'" in said
    fine = "base_model: a\nname: x\ngate_mode: random\nexperts: [{source_model: b}, {source_model: c}]\n"
    found, warnings = read(fine)
    assert (found.gate_mode, len(found.experts), len(warnings)) == ("random", 2, 1)
    with pytest.raises(RecipeError, match="name: unknown key"):
        read(fine, strict=True)
    with pytest.raises(RecipeError, match="this is a recipe"):
        read("merge_method: linear\nbase_model: a\nexperts: []\n")


WILD = {
    "hidden": """\
base_model: ${A}
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: ${A}
    positive_prompts: &general
      - "explain"
      - "code"
    negative_prompts: &stories
      - "scene"
      - "character"
  - source_model: ${B}
    positive_prompts: *stories
    negative_prompts: *general
""",
    "cheap": """\
base_model: ${A}
dtype: float16
gate_mode: cheap_embed
experts:
  - source_model: ${A}
    positive_prompts: ["answer the question"]
  - source_model: ${B}
    positive_prompts: ["tell a story"]
tokenizer_source: base
""",
    "shared": """\
base_model: ${QWEN_A}
architecture: qwen
gate_mode: hidden
dtype: float32
experts_per_token: 2
experts:
  - source_model: ${QWEN_A}
    positive_prompts:
      - "chat"
  - source_model: ${QWEN_B}
    positive_prompts:
      - "code"
shared_experts:
  - source_model: ${QWEN_A}
    positive_prompts:
      - "chat"
    residual_scale: 0.1
""",
}
"""mergekit-moe's files that people use, as structures."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory, family):
    llamas = standins.Family(tmp_path_factory.mktemp("llamas"))

    def text(name):
        found = WILD[name]
        for one in "AB":
            found = found.replace(f"${{{one}}}", str(llamas.path(one, more=True)) if f"${{{one}}}" in found else "")
        qwens = family("qwen2", 2) if "QWEN" in found else ("", "")
        return found.replace("${QWEN_A}", qwens[0]).replace("${QWEN_B}", qwens[1])

    return text


@pytest.mark.parametrize("name", WILD)
def test_files_that_people_use(tmp_path, filled, name):
    (tmp_path / "c.yml").write_text(filled(name))
    done = CliRunner().invoke(main, ["mergekit-moe", str(tmp_path / "c.yml"), str(tmp_path / "out"), "--load-in-4bit"])
    assert done.exit_code == 0, done.output
    assert "have no effect" in done.output
    made = zoo.load(tmp_path / "out")
    assert zoo.generated(made).shape == (2, 14)
    assert made.config.architectures == ["Qwen2MoeForCausalLM" if name == "shared" else "MixtralForCausalLM"]
    assert str(json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]) in WILD[name]
    assert (tmp_path / "out" / "mergekit_moe_config.yml").read_text() == filled(name)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    again = CliRunner().invoke(main, ["mergekit-moe", str(tmp_path / "c.yml"), str(tmp_path / "out")])
    assert again.exit_code == 4


@pytest.mark.conformance
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WILD)
def test_the_model_is_mergekit_s_with_mergekit_s_rows(tmp_path, filled, name):
    import yaml
    from mergekit.merge import MergeOptions
    from mergekit.moe.config import MoEMergeConfig as Theirs
    from mergekit.scripts.moe import build

    text = filled(name)
    build(Theirs.model_validate(yaml.safe_load(text)), str(tmp_path / "theirs"), MergeOptions(), device="cpu")
    merge_to_moe(f"{text}router: mergekit\n", tmp_path / "ours")
    theirs, ours = (zoo.load(tmp_path / n, dtype="auto").state_dict() for n in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, x in theirs.items():
        if key.endswith(("gate.weight", "expert_gate.weight")):
            assert (x.float() - ours[key].float()).abs().max() <= 2e-2 * x.float().abs().max(), key
        elif key.endswith("shared_expert.down_proj.weight"):  # scaled: mergekit rounds the factor first
            assert ((x - ours[key]).abs() <= 2**-23 * x.abs()).all(), key
        else:
            assert x.dtype == ours[key].dtype
            assert torch.equal(x, ours[key]), key


def test_random_rows_and_embeddings_take_no_torch(tmp_path, family):
    paths = family("llama")
    code = (
        "import sys\nfrom fastmerge.dna.mixtures.moe import merge_to_moe\n"
        "from fastmerge.dna.mixtures.document import Expert, MoEMergeConfig\n"
        f"experts = [Expert({paths[0]!r}, ['merge']), Expert({paths[1]!r}, ['story'])]\n"
        f"paths = [{str(tmp_path)!r} + '/' + mode for mode in ('random', 'cheap_embed')]\n"
        "for mode, path in zip(('random', 'cheap_embed'), paths):\n"
        f"    merge_to_moe(MoEMergeConfig({paths[0]!r}, experts, mode), path, device='cpu')\n"
        "from fastmerge.dna import FewerExpertsConfig, fewer_experts, join_experts, more_experts\n"
        "join_experts(paths, out=paths[0] + '-joined', device='cpu')\n"
        "more_experts(paths[0], out=paths[0] + '-more', device='cpu')\n"
        "fewer_experts(paths[0] + '-more', FewerExpertsConfig(2), out=paths[0] + '-fewer', device='cpu')\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("cheap_embed", "random", "random-fewer", "random-joined", "random-more")
    ]


def test_a_merge_that_was_stopped_goes_on_only_with_the_same_rows(tmp_path, family):
    wanted = config(family("llama"), gate_mode="random")
    parents = open_models(wanted)
    gates = router_rows(wanted, parents[0])
    from fastmerge.dna.results import plan

    first, other = (plan(plan_moe_merge(parents, wanted, g)).fingerprint for g in (gates, 2 * gates))
    assert first == plan(plan_moe_merge(parents, wanted, gates)).fingerprint
    assert first != other
    write(plan_moe_merge(parents, wanted, gates), tmp_path / "out", shard_size="40kB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert zoo.load(tmp_path / "out").config.num_local_experts == 3
