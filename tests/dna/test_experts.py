"""Mixtures of experts into larger and smaller ones, and several into one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastmerge.dna.mixtures.fewer import FewerExpertsConfig, Weighed, fewer_experts, plan_fewer_experts, weigh
from fastmerge.dna.mixtures.join import JoinExpertsConfig, join_experts, plan_join_experts
from fastmerge.dna.mixtures.more import MoreExpertsConfig, more_experts, plan_more_experts
from fastmerge.dna.mixtures.routing import router_statistics
from fastmerge.dna.parent import Parent
from fastmerge.dna.results import state_dict, write
from fastmerge.errors import CheckpointError, RecipeError
from tests.dna import zoo

CLOSE = 1e-5
FEW = ("mixtral", "qwen2_moe")


def matrix(*kinds):
    """The kinds of the default run, and all others for ``make conformance``."""
    more = [pytest.param(k, marks=pytest.mark.conformance) for k in zoo.SPARSE if k not in kinds]
    return pytest.mark.parametrize("kind", [*kinds, *more])


def groups(kind, **settings):
    """Settings of four experts in two groups, where the architecture has groups."""
    return {"n_group": 2, "topk_group": 1, **settings} if "n_group" in zoo.KINDS[kind] else settings


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[n]) and x.dtype == b[n].dtype for n, x in a.items())


@matrix(*FEW, "gpt_oss")
def test_twice_the_experts_and_twice_as_many_per_token_compute_the_same(tmp_path, kind):
    made = zoo.saved(kind, tmp_path / "model")
    larger = more_experts(made)
    assert zoo.difference(made, larger) <= CLOSE
    assert torch.equal(zoo.generated(made), zoo.generated(larger))
    assert zoo.difference(made, more_experts(made, MoreExpertsConfig(num_experts_per_token=2))) > 100 * CLOSE
    more_experts(tmp_path / "model", out=tmp_path / "out")
    loaded = zoo.load(tmp_path / "out")
    assert zoo.difference(larger, loaded) == 0
    loaded.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors"))
    facts = json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())
    assert facts["experts"] == {"before": 4, "after": 8, "from": [0, 0, 1, 1, 2, 2, 3, 3]}


@pytest.mark.conformance
@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "dots1"])
@pytest.mark.parametrize("normalised", [True, False])
def test_copies_are_exact_with_groups_and_without_normalised_weights(kind, normalised):
    made = zoo.model(kind, **groups(kind, norm_topk_prob=normalised))
    larger = more_experts(made, MoreExpertsConfig(num_experts=12))
    assert larger.config.num_experts_per_tok == 6
    assert zoo.difference(made, larger) <= CLOSE


@pytest.mark.conformance
def test_fused_experts_get_noise_of_their_own(tmp_path):
    made = zoo.saved("granitemoe", tmp_path / "model")
    config = MoreExpertsConfig(noise=0.1)
    draft = plan_more_experts(Parent.open(tmp_path / "model"), config)
    write(draft, tmp_path / "out")
    there = load_file(tmp_path / "out" / "model.safetensors")
    assert same(state_dict(draft), there)
    assert same(state_dict(plan_more_experts(Parent.open(made), config)), there)
    old, new = (d["model.layers.0.block_sparse_moe.output_linear.weight"] for d in (state_dict_of(tmp_path), there))
    noise = new[1::2] - old
    assert torch.equal(new[::2], old)
    assert 0.05 < (noise / old.square().mean().sqrt()).std() < 0.15
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.1


def state_dict_of(path):
    return load_file(path / "model" / "model.safetensors")


def test_configurations_of_transformers_4_are_read_and_both_keys_written(tmp_path):
    zoo.saved("mixtral", tmp_path / "model")
    state = state_dict_of(tmp_path)
    mixtral = json.loads((tmp_path / "model" / "config.json").read_text())
    moe = {n.replace("block_sparse_moe", "mlp"): t for n, t in state.items()}
    for old, name in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        moe = {n.replace(f".{old}.", f".{name}."): t for n, t in moe.items()}
    norms = {f"model.layers.{i}.self_attn.{q}_norm.weight": torch.ones(8) for i in range(3) for q in "qk"}
    config = {**mixtral, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 80, "head_dim": 8}
    del config["num_local_experts"]
    made = more_experts({**moe, **norms}, model_config=config)
    assert (made.config["num_experts"], made.config["num_local_experts"], made.config["num_experts_per_tok"]) == (
        8,
        8,
        4,
    )
    assert made.state_dict["model.layers.2.mlp.experts.7.up_proj.weight"].shape == (80, 32)
    assert config.get("num_local_experts") is None


def test_noise_leaves_the_first_copy_and_is_the_same_on_disk_and_in_memory(tmp_path):
    made = zoo.saved("mixtral", tmp_path / "model", dtype=torch.bfloat16)
    config = MoreExpertsConfig(noise=0.1, seed=3)
    draft = plan_more_experts(Parent.open(tmp_path / "model"), config)
    write(draft, tmp_path / "out")
    there = load_file(tmp_path / "out" / "model.safetensors")
    assert same(state_dict(draft), there)
    assert same(state_dict(plan_more_experts(Parent.open(made), config)), there)
    before = load_file(tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    old = before[name.format(1)]
    assert torch.equal(there[name.format(2)], old)
    apart = (there[name.format(3)].float() - old.float()).square().mean().sqrt() / old.float().square().mean().sqrt()
    assert abs(apart - 0.1) < 0.01


@matrix("mixtral")
def test_a_model_joined_with_itself_computes_the_same_with_twice_the_experts(tmp_path, kind):
    made = zoo.saved(kind, tmp_path / "a")
    k = made.config.num_experts_per_tok
    twice = join_experts([made, made], JoinExpertsConfig(num_experts_per_token=2 * k))
    assert zoo.difference(made, twice) <= CLOSE
    other = zoo.saved(kind, tmp_path / "b", seed=1)
    paths = [tmp_path / "a", tmp_path / "b"]
    join_experts(paths, out=tmp_path / "out")
    joined = zoo.load(tmp_path / "out")
    assert joined.config.num_experts_per_tok == k
    a, b, new = made.state_dict(), other.state_dict(), joined.state_dict()
    for name, x in new.items():
        split = ".experts." in name or (x.shape[:1] == (8,) and (".gate." in name or "router" in name))
        expected = torch.cat([a[name], b[name]]) if split else (a[name] + b[name]) / 2
        assert torch.equal(x, expected), name
    in_memory = state_dict(plan_join_experts([Parent.open(made), Parent.open(other)]))
    assert same(in_memory, load_file(tmp_path / "out" / "model.safetensors"))


def test_the_trunk_is_merged_by_any_method(tmp_path):
    models = [zoo.model("qwen2_moe", seed=i) for i in range(3)]
    config = JoinExpertsConfig(None, "ties", {"weight": [1.0, 0.5], "density": 0.5}, base=0)
    new = state_dict(plan_join_experts([Parent.open(m) for m in models], config))
    import fastmerge

    name = "model.layers.0.mlp.shared_expert.up_proj.weight"
    tensors = [m.state_dict()[name] for m in models]
    expected = fastmerge.merge_tensors(tensors, "ties", parameters=config.parameters, base_index=0, name=name)
    assert torch.equal(new[name], expected)
    assert new["model.layers.0.mlp.gate.weight"].shape[0] == 12


@matrix(*FEW)
def test_copies_merge_back_into_what_they_were(tmp_path, kind):
    made = zoo.model(kind)
    more_experts(made).save_pretrained(tmp_path / "large")
    config = FewerExpertsConfig(4, num_experts_per_token=2, keep_by="given", rest="merge")
    sparse = len(weigh(Parent.open(made)))
    fewer_experts(tmp_path / "large", config, scores=[[2, 1] * 4] * sparse, out=tmp_path / "small")
    small = zoo.load(tmp_path / "small")
    assert zoo.difference(made, small) <= CLOSE
    told = json.loads((tmp_path / "small" / "fastmerge_report.json").read_text())["experts"]
    assert list(told["merged"].values()) == [[[0, 1], [2, 3], [4, 5], [6, 7]]] * sparse


@matrix(*FEW, "gpt_oss")
def test_the_largest_norms_are_kept_and_the_bytes_are_theirs(tmp_path, kind):
    made = zoo.saved(kind, tmp_path / "model")
    config = FewerExpertsConfig(3, rest="drop")
    fewer_experts(tmp_path / "model", config, out=tmp_path / "out")
    small = zoo.load(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())["experts"]["kept"]
    old, new = made.state_dict(), small.state_dict()
    for layer, mine in kept.items():
        experts = f"model.layers.{layer}.mlp.experts."
        experts = experts if any(n.startswith(experts) for n in old) else experts.replace("mlp", "block_sparse_moe")
        weights = [n for n in old if n.startswith(experts) and "bias" not in n]
        # on disk gate and up may be two tensors
        halves = [old[n].flatten(1) for n in weights if "down" in n]
        for n in weights:
            if "down" not in n:
                fused = kind in ("gpt_oss", "granitemoe")
                halves += [old[n].flatten(1)] if fused else [h.flatten(1) for h in old[n].chunk(2, dim=1)]
        scores = torch.stack([h.double().norm(dim=1) for h in halves]).prod(dim=0)
        assert mine == sorted(scores.topk(3).indices.tolist())
        for n in old:
            if n.startswith(experts):
                assert torch.equal(new[n], old[n][mine]), n
    in_memory = fewer_experts(made, config)
    assert same(in_memory.state_dict(), new)


def test_experts_that_no_token_gets_are_dropped_without_a_trace():
    made = zoo.model("gpt_oss", num_local_experts=6)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.mlp.router.bias[[1, 4]] = -1e4
    given = router_statistics(made, [zoo.tokens()])
    assert all(row[1] == row[4] == 0 for row in given.counts.values())
    for by in ("counts", "weights", "saliency"):
        small = fewer_experts(made, FewerExpertsConfig(4, keep_by=by, rest="drop"), calibration=[zoo.tokens()])
        assert zoo.difference(made, small) <= CLOSE
    assert zoo.difference(made, fewer_experts(made, FewerExpertsConfig(3, rest="drop"))) > CLOSE


def test_a_model_on_disk_is_calibrated_as_one_in_memory(tmp_path):
    made = zoo.saved("mixtral", tmp_path / "model")
    config = FewerExpertsConfig(2, num_experts_per_token=1, keep_by="saliency", rest="merge", merge_router=True)
    small = fewer_experts(made, config, calibration=[zoo.tokens()])
    fewer_experts(tmp_path / "model", config, calibration=[zoo.tokens()], out=tmp_path / "out")
    assert small.config.num_experts_per_tok == 1
    assert same(small.state_dict(), zoo.load(tmp_path / "out").state_dict())
    facts = json.loads((tmp_path / "out" / "fastmerge_report.json").read_text())
    found = router_statistics(made, [zoo.tokens()]).scores("saliency")
    for layer, clusters in facts["experts"]["merged"].items():
        assert sorted(e for c in clusters for e in c) == [0, 1, 2, 3]
        assert {c[0] for c in clusters} == set(found[int(layer)].argsort()[-2:].tolist())


@matrix("mixtral")
def test_statistics_are_those_of_the_definition(kind):
    made = zoo.model(kind)
    inputs = {}
    block = "block_sparse_moe" if kind == "granitemoe" else "mlp"
    for i, layer in enumerate(made.model.layers):
        part = getattr(layer, block)
        if hasattr(part, "experts"):
            part.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0].flatten(0, 1)))
    ids = zoo.tokens()
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    found = router_statistics(made, [{"input_ids": ids, "attention_mask": mask}])
    assert sorted(found.counts) == sorted(inputs)
    for i, every in inputs.items():
        x = every[mask.flatten().bool()]
        part = getattr(made.model.layers[i], block)
        router = part.gate if hasattr(part, "gate") else part.router
        _, weights, index = router(x)
        k = index.shape[1]
        assert found.counts[i].sum() == k * len(x)
        y = torch.zeros(len(found.counts[i]), dtype=torch.float64)
        for t in range(len(x)):
            for j in range(k):
                e = index[t, j]
                one = part.experts(x[t : t + 1], e.reshape(1, 1), torch.ones(1, 1))
                y[e] += one.double().norm() * weights[t, j]
        assert torch.allclose(torch.from_numpy(found.outputs[i]), y, rtol=1e-4, atol=1e-6)


def test_what_does_not_fit_is_refused_before_anything_is_read():
    made = Parent.open(zoo.model("mixtral"))
    dense = Parent.open(zoo.model("llama"))
    with pytest.raises(CheckpointError, match="expected a mixture of experts, got the dense model type llama"):
        plan_more_experts(dense)
    with pytest.raises(RecipeError, match="expected a multiple of the model's 4, at most 65536, got 6"):
        plan_more_experts(made, MoreExpertsConfig(6))
    with pytest.raises(RecipeError, match=r"expected a whole number in 1 \.\. 8, got 9"):
        plan_more_experts(made, MoreExpertsConfig(8, 9))
    with pytest.raises(RecipeError, match="noise: expected"):
        plan_more_experts(made, MoreExpertsConfig(noise=-1))
    with pytest.raises(RecipeError, match=r"expected a whole number in 1 \.\. 3, got 4"):
        plan_fewer_experts(made, FewerExpertsConfig(4))
    with pytest.raises(RecipeError, match=r"keep_by: expected one of norm, .*\n.*rest: expected one of drop, merge"):
        plan_fewer_experts(made, FewerExpertsConfig(2, keep_by="size", rest="burn"))
    with pytest.raises(RecipeError, match="needs what the weights say"):
        plan_fewer_experts(made, FewerExpertsConfig(2))
    with pytest.raises(RecipeError, match="needs calibration batches"):
        fewer_experts(zoo.model("mixtral"), FewerExpertsConfig(2, keep_by="counts"))
    given = {"keep_by": "given", "rest": "drop"}
    with pytest.raises(RecipeError, match=r"scores: expected one row for each of the layers \[0, 1, 2\], got 1 rows"):
        plan_fewer_experts(made, FewerExpertsConfig(2, **given), scores=[[1, 2, 3, 4]])
    with pytest.raises(RecipeError, match="layer 1: expected 4 finite numbers"):
        plan_fewer_experts(made, FewerExpertsConfig(2, **given), scores=[[1, 2, 3, 4], [1, 2, 3], [1] * 4])
    with pytest.raises(RecipeError, match="expected two or more"):
        plan_join_experts([made])
    with pytest.raises(CheckpointError, match="model_type mixtral, got qwen2_moe"):
        plan_join_experts([made, Parent.open(zoo.model("qwen2_moe"))])
    other = Parent.open(zoo.model("mixtral", rope_theta=5e5, num_experts_per_tok=1))
    with pytest.raises(CheckpointError, match="rope_theta: expected"):
        plan_join_experts([made, other])
    with pytest.raises(RecipeError, match=r"the models have different ones: \[1, 2\]"):
        plan_join_experts([made, Parent.open(zoo.model("mixtral", num_experts_per_tok=1))])
    with pytest.raises(RecipeError, match="unknown method 'tie'"):
        plan_join_experts([made, made], JoinExpertsConfig(merge_method="tie"))


@pytest.mark.conformance
def test_groups_of_experts_stay_groups():
    made = zoo.model("glm4_moe", n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1)
    parent = Parent.open(made)
    scores = [[9, 8, 7, 6, 1, 2, 3, 4]] * 2
    config = FewerExpertsConfig(4, keep_by="given", rest="drop")
    draft = plan_fewer_experts(parent, config, scores=scores)
    assert set(map(tuple, draft.facts["experts"]["kept"].values())) == {(0, 1, 6, 7)}
    with pytest.raises(RecipeError, match="multiple of 2"):
        plan_fewer_experts(parent, FewerExpertsConfig(3, keep_by="given", rest="drop"), scores=scores)
    with pytest.raises(CheckpointError, match="n_group is 2"):
        plan_join_experts([parent, parent])


def test_the_nearest_are_merged_by_their_scores():
    made = zoo.model("mixtral")
    parent = Parent.open(made)
    found = weigh(parent)
    likeness = torch.eye(4).double().numpy()
    likeness[1, 2] = likeness[2, 1] = 0.9
    likeness[3, 0] = likeness[0, 3] = 0.5
    given = {i: Weighed(w.norms, likeness) for i, w in found.items()}
    config = FewerExpertsConfig(2, keep_by="given", rest="merge", merge_router=True)
    draft = plan_fewer_experts(parent, config, scores=[[4, 1, 3, 1]] * 3, weighed=given)
    assert draft.warnings == []
    likeness[0, 3] = 0.4
    (said,) = plan_fewer_experts(parent, config, scores=[[4, 1, 3, 1]] * 3, weighed=given).warnings
    assert "3 of 6 merged experts are unlike the kept ones" in said
    new = state_dict(draft)
    old = made.state_dict()
    gate = old["model.layers.0.mlp.gate.weight"]
    down = old["model.layers.0.mlp.experts.down_proj"]
    expected = torch.stack([(4 * gate[0] + gate[3]) / 5, (3 * gate[2] + gate[1]) / 4])
    assert torch.allclose(new["model.layers.0.block_sparse_moe.gate.weight"], expected, rtol=1e-6, atol=1e-7)
    mixed = new["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    assert torch.allclose(mixed, (3 * down[2] + down[1]) / 4, rtol=1e-6, atol=1e-7)
