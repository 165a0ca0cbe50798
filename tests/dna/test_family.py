"""Families: every member is the beginning of the larger ones."""

import json

import pytest
import torch

from fastmerge.dna.family import create_model_family
from fastmerge.dna.parent import Parent
from fastmerge.dna.results import Made
from fastmerge.dna.slicing import ModelSlicingConfig
from fastmerge.errors import OutputError, RecipeError
from tests.dna import zoo

SIZES = [(3, 32), (3, 24), (2, 16)]


def layers_of(report):
    return json.loads(report.read_text())["kept"]["layers"]


def strangers(large, small, kept_large, kept_small):
    """Tensors of the small one that are not the beginning of that of the large one, in all dimensions."""
    found = []
    for name, tensor in small.items():
        there = name
        if ".layers." in name:
            parts = name.split(".")
            parts[2] = str(kept_large.index(kept_small[int(parts[2])]))
            there = ".".join(parts)
        if not torch.equal(large[there][tuple(slice(n) for n in tensor.shape)], tensor):
            found.append(name)
    return found


def nested(kind, path):
    """A family on disk: tensors that are no beginnings, and how far members are from the model."""
    made = zoo.saved(kind, path / "model", num_hidden_layers=3)
    create_model_family(path / "model", SIZES, out=path / "family", nested=True)
    names = ["3L_32D", "3L_24D", "2L_16D"]
    loaded = [zoo.load(path / "family" / n) for n in names]
    kept = [layers_of(path / "family" / n / "fastmerge_report.json") for n in names]
    states = [Parent.open(m).kept for m in loaded]  # by their names on disk
    pairs = [(0, 1), (0, 2), (1, 2)] if kind != "phi3" else []  # whose fused weights are several beginnings
    zoo.generated(loaded[2])
    odd = [name for a, b in pairs for name in strangers(states[a], states[b], kept[a], kept[b])]
    return odd, [zoo.difference(made, m) for m in loaded]


@pytest.mark.parametrize("kind", ["llama biased"])
def test_members_are_the_beginning_of_larger_ones(kind, tmp_path):
    """The largest is the model with its channels in another order."""
    odd, differences = nested(kind, tmp_path)
    assert odd == []
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 1e-3


@pytest.mark.conformance
@pytest.mark.parametrize("kind", ["qwen2", "qwen3 tied", "olmo2", "phi3", "mixtral", "qwen3_moe", "granite", "smollm3"])
def test_members_are_the_beginning_of_larger_ones_everywhere(kind, tmp_path):
    odd, differences = nested(kind, tmp_path)
    assert odd == []
    assert differences[0] < 1e-5
    assert min(differences[1:]) > 1e-3


def test_modules_and_state_dictionaries_give_the_same_members():
    made = zoo.model("llama")
    config = ModelSlicingConfig(calibration_data=zoo.tokens())
    family = create_model_family(made, sizes=SIZES, config=config)
    given = create_model_family(made.state_dict(), SIZES, config=config, model_config=made.config.to_dict())
    for name, member in family.items():
        assert isinstance(given[name], Made)
        assert given[name].config["architectures"] == ["LlamaForCausalLM"]
        assert all(torch.equal(t, given[name].state_dict[n]) for n, t in member.state_dict().items())
        assert f"{member.config.num_hidden_layers}L_{member.config.hidden_size}D" == name
    assert zoo.difference(made, family["3L_32D"]) == 0
    with torch.no_grad():
        family["3L_32D"].lm_head.weight.zero_()
    assert made.lm_head.weight.abs().sum() > 0


def test_layers_alone_leave_channels_in_their_order():
    made = zoo.model("llama")
    family = create_model_family(made, [(3, 32), (2, 32)], nested=True)
    assert all(torch.equal(t, made.state_dict()[n]) for n, t in family["3L_32D"].state_dict().items())


def test_what_holds_of_several_members_is_said_once(caplog):
    create_model_family(zoo.model("llama"), [(2, 32), (2, 24), (2, 16)])
    assert [r.getMessage().startswith("layers were ranked by the lengths") for r in caplog.records] == [True]


def test_members_of_their_own_are_corrected():
    made = zoo.model("llama")
    config = ModelSlicingConfig(calibration_data=zoo.tokens())
    apart = create_model_family(made, [(3, 32), (3, 24)], config=config)
    together = create_model_family(made, [(3, 32), (3, 24)], config=config, nested=True)
    assert all(torch.equal(t, made.state_dict()[n]) for n, t in apart["3L_32D"].state_dict().items())
    a, b = (f["3L_24D"].state_dict()["model.layers.0.mlp.down_proj.weight"] for f in (apart, together))
    assert not torch.equal(a.sort().values, b.sort().values)


def test_wrong_families_are_refused_before_anything_is_written(tmp_path):
    made = zoo.saved("llama", tmp_path / "model")

    def refused(match, sizes=SIZES, **options):
        with pytest.raises(RecipeError, match=match) as caught:
            create_model_family(made, sizes, config=ModelSlicingConfig(**options), nested=True)
        return caught.value.problems

    assert len(refused("4L_32D: target_layers: expected 1 to 3", [(4, 32), (3, 64)])) == 2
    refused("3L_24D is there twice", [(3, 24), (3, 24)])
    refused("expected pairs of layers and hidden size, got 3", [3])
    refused("expected at least one pair", [])
    refused("target_layers: expected none, sizes say it of each member, got 2", target_layers=2)
    data = zoo.tokens()
    refused("refit: lstsq gives each member weights of its own", calibration_data=data, refit="lstsq")
    refused("rotate: a rotation turns what members share", calibration_data=data, rotate=True)
    refused("uniform keeps other layers", layer_selection="uniform")
    (tmp_path / "family" / "2L_16D").mkdir(parents=True)
    with pytest.raises(OutputError, match="2L_16D: exists"):
        create_model_family(tmp_path / "model", SIZES, out=tmp_path / "family")
    assert [p.name for p in (tmp_path / "family").iterdir()] == ["2L_16D"]
