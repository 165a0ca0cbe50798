"""Adapters merged with each other: what peft makes of the files, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmerge.api.lora import KINDS, merge_adapters
from fastmerge.errors import BudgetError, CheckpointError, OutputError, RecipeError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
"""peft warns of much."""

PREFIX = "base_model.model."
NAMES = {"q": ["q.lora_A.weight", "q.lora_B.weight"], "embed": ["embed.lora_embedding_A", "embed.lora_embedding_B"]}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(23, 10)
        self.q = torch.nn.Linear(10, 12)
        self.down = torch.nn.Linear(12, 8)

    def forward(self, x):
        return self.down(self.q(self.embed(x)))


def net():
    torch.manual_seed(0)
    return Net()


def train(path, seed, targets=("embed", "q", "down"), dtype=None, **config):
    """An adapter of random factors, as peft saves it."""
    config = {"r": 3, "lora_alpha": 6, "target_modules": list(targets), **config}
    model = peft.get_peft_model(net(), peft.LoraConfig(**config))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g))
    model.save_pretrained(path)
    if dtype is not None:
        tensors = load_file(path / "adapter_model.safetensors")
        save_file({n: t.to(dtype) for n, t in tensors.items()}, path / "adapter_model.safetensors")
    return path


def deltas(path):
    """The updates of an adapter by module, as peft loads it: every tensor of the file is used."""
    from safetensors import safe_open

    model = peft.PeftModel.from_pretrained(net(), path)
    loaded = peft.get_peft_model_state_dict(model)
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  not a mapping
            assert torch.equal(loaded[name].float(), file.get_tensor(name).float())
    layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {n: m.get_delta_weight("default").detach().double() for n, m in layers.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Adapters with all that a scaling can be made of."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        "plain": train(root / "plain", 1),
        "same": train(root / "same", 6, lora_alpha=1),
        "rslora": train(root / "rslora", 2, r=5, use_rslora=True, targets=("q", "down")),
        "patterns": train(root / "patterns", 3, rank_pattern={"q": 2}, alpha_pattern={"down": 1.5}),
        "bf16": train(root / "bf16", 4, dtype=torch.bfloat16),
        "q": train(root / "q", 5, r=1, targets=("q",)),
    }


def summed(paths, weights):
    out = {}
    for path, w in zip(paths, weights, strict=True):
        for name, d in deltas(path).items():
            out[name] = out.get(name, 0) + w * d
    return out


def far(got, want, share):
    assert got.keys() == want.keys()
    return [n for n in want if (got[n] - want[n]).norm() > share * want[n].norm()]


SETS = [
    (["plain", "rslora"], [0.7, -0.4]),
    (["rslora", "patterns", "bf16"], [1.0, 2.0, 0.1]),
    (["q", "plain"], [3.0, 1.0]),
    (["rslora"], [0.5]),
]


@pytest.mark.parametrize(("names", "weights"), SETS)
def test_cat_is_the_sum(trained, tmp_path, names, weights):
    paths = [trained[n] for n in names]
    out = merge_adapters(paths, tmp_path / "out", weights=weights)
    assert far(deltas(out), summed(paths, weights), 1e-6) == []
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert not config["use_rslora"]


@pytest.mark.parametrize(("names", "weights"), SETS)
@pytest.mark.parametrize("rank", [None, 1, 4, 30])
def test_svd_is_the_best_of_its_rank(trained, tmp_path, names, weights, rank):
    paths = [trained[n] for n in names]
    out = merge_adapters(paths, tmp_path / "out", weights=weights, kind="svd", rank=rank)
    kept = json.loads((out / "adapter_config.json").read_text())["r"]
    assert kept == (rank or max({"rslora": 5}.get(n, 3) for n in names))
    want = {}
    for name, d in summed(paths, weights).items():
        u, s, vh = torch.linalg.svd(d, full_matrices=False)
        want[name] = (u[:, :kept] * s[:kept]) @ vh[:kept]
    assert far(deltas(out), want, 1e-6) == []


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.startswith("dare")])
def test_the_kinds_of_peft(trained, tmp_path, kind):
    paths, weights = [trained["plain"], trained["same"]], [0.7, 0.4]
    density = None if kind in ("cat", "svd", "linear") else 0.4
    out = merge_adapters(paths, tmp_path / "out", weights=weights, kind=kind, density=density)
    model = peft.PeftModel.from_pretrained(net(), paths[0], adapter_name="one")
    model.load_adapter(paths[1], "two")
    model.add_weighted_adapter(["one", "two"], weights, "merged", kind, density=density)
    layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    want = {n: m.get_delta_weight("merged").detach().double() for n, m in layers.items()}
    assert far(deltas(out), want, 2e-6) == []


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_kinds_follow_the_seed(trained, tmp_path, kind):
    paths = [trained["plain"], trained["same"]]
    files = [
        merge_adapters(paths, tmp_path / f"{i}", kind=kind, density=0.5, seed=seed) / "adapter_model.safetensors"
        for i, seed in enumerate((1, 1, 2))
    ]
    one, again, other = (load_file(f) for f in files)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)
    assert all(t.isfinite().all() and t.any() for t in one.values())


def test_dropping_is_unbiased(trained, tmp_path):
    """The mean over many masks of DARE on the updates is their sum."""
    paths = [trained["plain"], trained["same"]]
    want = summed(paths, [1, 1])["q"]
    found = []
    for seed in range(12):
        out = merge_adapters(paths, tmp_path / f"{seed}", kind="dare_linear_svd", density=0.8, seed=seed, rank=30)
        a, b = (load_file(out / "adapter_model.safetensors")[PREFIX + n].double() for n in NAMES["q"])
        found.append(b @ a)
    mean, spread = torch.stack(found).mean(0), torch.stack(found).std(0).mean() / np.sqrt(12)
    assert (mean - want).abs().mean() < 2 * spread


def test_modules_of_other_adapters_are_named_in_full(trained, tmp_path):
    out = merge_adapters([trained["plain"], trained["q"]], tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == ["down", "embed", "q"]
    same = merge_adapters([trained["plain"], trained["same"]], tmp_path / "same")
    assert sorted(json.loads((same / "adapter_config.json").read_text())["target_modules"]) == ["down", "embed", "q"]


def test_copies_of_the_base_are_carried_and_trained_tensors_refused(tmp_path):
    one, two = (train(tmp_path / n, i, modules_to_save=["down"], targets=("q",)) for i, n in enumerate("ab"))
    with pytest.raises(CheckpointError, match=r"whole tensors .*'down.bias', 'down.weight': bake them"):
        merge_adapters([one, two], tmp_path / "out")
    out = merge_adapters([one, one], tmp_path / "out", weights=[0.25, 0.75])
    assert far(deltas(out), deltas(one), 1e-6) == []
    got, was = (load_file(p / "adapter_model.safetensors") for p in (out, one))
    assert torch.equal(got[f"{PREFIX}down.weight"], was[f"{PREFIX}down.weight"])
    with pytest.raises(CheckpointError, match=r"whole tensors .*: bake them"):
        merge_adapters([one, train(tmp_path / "c", 2, targets=("q",))], tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True, "target_modules": ["q"]}, "DoRA and lora_bias are no low-rank updates ('q.weight'): bake"),
        ({"lora_bias": True, "target_modules": ["q"]}, "DoRA and lora_bias are no low-rank updates ('q.bias'): bake"),
        (
            {"trainable_token_indices": {"embed": [2]}, "target_modules": ["q"]},
            "rows of tokens are no low-rank updates",
        ),
        (
            {"target_modules": [], "target_parameters": ["q.weight"]},
            "target_parameters is not the same in all adapters",
        ),
        ({"init_lora_weights": "pissa", "target_modules": ["q"]}, "init_lora_weights 'pissa' changed the base"),
    ],
)
def test_what_is_no_sum_of_updates_is_refused(trained, tmp_path, config, said):
    odd = train(tmp_path / "odd", 1, **config)
    with pytest.raises(CheckpointError) as e:
        merge_adapters([trained["plain"], odd], tmp_path / "out")
    assert said in str(e.value)
    assert not (tmp_path / "out").exists()


def test_layers_that_do_not_fit_are_named(trained, tmp_path):
    turned = train(tmp_path / "turned", 1, lora_alpha=-2)
    with pytest.raises(
        CheckpointError, match="ties of factors elects a sign, and lora_alpha is negative: 'down', 'embed', 'q'"
    ):
        merge_adapters([trained["plain"], turned], tmp_path / "out", kind="ties", density=0.5)
    for name, other in (("wide", (3, 11)), ("narrow", (3, 10))):
        path = train(tmp_path / name, 1, targets=("q",))
        tensors = load_file(path / "adapter_model.safetensors")
        tensors[f"{PREFIX}q.lora_A.weight"] = torch.zeros(other)
        save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"different sizes or kinds: 'q'"):
        merge_adapters([trained["plain"], tmp_path / "wide"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"linear needs equal ranks, and they are \[3, 5\]: 'down', 'q'"):
        merge_adapters([trained["plain"], trained["rslora"]], tmp_path / "out", kind="linear")
    assert merge_adapters([trained["plain"], tmp_path / "narrow"], tmp_path / "out").is_dir()


def test_factors_that_are_not_finite_are_named(trained, tmp_path):
    path = train(tmp_path / "nan", 1)
    tensors = load_file(path / "adapter_model.safetensors")
    tensors[f"{PREFIX}q.lora_B.weight"][1, 1] = torch.nan
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="q: NaN or infinity among the factors"):
        merge_adapters([trained["plain"], path], tmp_path / "out", kind="svd")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"kind": "tise"}, "'tise' is no kind of merge of adapters (did you mean 'ties'?)"),
        ({"weights": [1.0]}, "weights: expected 2, one for each adapter; got 1"),
        ({"weights": [1.0, float("nan")]}, "weight nan: expected a finite number other than 0"),
        ({"weights": [0.0, 1.0]}, "weight 0.0: expected a finite number other than 0"),
        ({"kind": "ties"}, "density None: ties needs one between 0 and 1"),
        ({"kind": "dare_ties_svd", "density": 1.5}, "density 1.5: dare_ties_svd needs one between 0 and 1"),
        ({"density": 0.5}, "density: cat takes none"),
        ({"rank": 4}, "rank: cat takes none"),
        ({"kind": "svd", "rank": 0}, "rank 0: expected at least 1"),
        ({"kind": "ties", "density": 0.5, "weights": [1.0, -1.0]}, "ties elects a sign, which takes positive ones"),
    ],
)
def test_arguments_that_mean_nothing(trained, tmp_path, how, said):
    with pytest.raises(RecipeError) as e:
        merge_adapters([trained["plain"], trained["same"]], tmp_path / "out", **how)
    assert said in str(e.value)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_a_layer_beyond_the_budget_is_refused(trained, tmp_path, kind):
    density = 0.5 if kind == "ties_svd" else None
    with pytest.raises(BudgetError, match=rf"embed: {kind} takes .*, and the budget is 1 kB: see --memory"):
        merge_adapters([trained["plain"], trained["same"]], tmp_path / "out", kind=kind, density=density, memory=1000)
    assert not (tmp_path / "out").exists()


def test_an_output_is_there_once(trained, tmp_path):
    paths = [trained["plain"], trained["same"]]
    first = merge_adapters(paths, tmp_path / "out")
    before = (first / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        merge_adapters(paths, tmp_path / "out")
    merge_adapters(paths, tmp_path / "out", overwrite=True)
    assert (first / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(OutputError, match="holds the input"):
        merge_adapters(paths, trained["plain"], overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in first.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
