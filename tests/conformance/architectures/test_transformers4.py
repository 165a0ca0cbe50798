"""Models that transformers 4.57 saved, merged with models that were born in transformers 5.

The fine-tune of transformers 4 has the names, types, shapes and configuration of a file of its own
(``transformers4.py`` writes them), the base is a new model of that configuration as transformers 5 reads it. By hand,
both are loaded by transformers 5 in fp64, and their tensors averaged.
"""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file

import fastmerge
from tests.conformance.architectures import transformers4
from tests.conformance.architectures.judge import compare
from tests.conformance.architectures.models import MODELS

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns of much

QUICK = {"llama", "mixtral", "gemma3_vision", "mistral3"}
"""Those that ``make test`` runs as well."""

TOWERS = {"llava", "gemma3_vision"}
"""Those whose vision tower has other names in transformers 5."""

FUSED = {"mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "jamba", "granitemoe"}
"""Those whose experts have other names in the memory of transformers 5."""


def kind(name):
    """The class of a model."""
    return getattr(transformers, MODELS[name].kind)


def loaded(name, path):
    """A model in fp64, after a check that transformers finds every tensor, and no other."""
    model, said = kind(name).from_pretrained(path, dtype=torch.float64, output_loading_info=True)
    assert {key: names for key, names in said.items() if names} == {}, path.name
    model.set_experts_implementation("eager")  # others have no fp64
    return model.eval()


def born(name, old, new, **how):
    """A new model of the configuration of an old one, saved by transformers 5."""
    torch.manual_seed(7)
    config = transformers.AutoConfig.from_pretrained(old)
    config.dtype = torch.float32
    model = kind(name)(config)
    with torch.no_grad():
        for i, (_, tensor) in enumerate(sorted(model.state_dict().items())):
            if tensor.is_floating_point():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)))
    model.save_pretrained(new, **how)
    return new


def mean(a, b):
    """The model halfway, in fp64, with two ends where they are tied in one model alone."""
    first, second = (model.state_dict() for model in (a, b))
    assert first.keys() == second.keys()
    untied = max(a, b, key=lambda model: len(list(model.parameters())))
    untied.load_state_dict({n: (t + second[n]) / 2 if t.is_floating_point() else t for n, t in first.items()})
    return untied


def merged(base, other, out):
    """Tensors and configuration of the mean of two models, which transformers loads."""
    models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (base, other)]
    plan = fastmerge.plan({"merge_method": "linear", "models": models, "dtype": "float32"})
    assert "whose configuration the output takes" not in str(plan.warnings), "both dialects mean the same"
    fastmerge.merge(plan, out, device="cpu")
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.conformance) for n in transformers4.NAMES]
)
def test_a_model_of_transformers_4_and_one_of_5(name, tmp_path):
    old = transformers4.write(tmp_path / "old", name, 1)
    new = born(name, old, tmp_path / "new")
    theirs, mine = (load_file(path / "model.safetensors") for path in (old, new))
    renamed = {n for n in theirs if n not in mine and n != "language_model.lm_head.weight"}
    assert bool(renamed) == (name in TOWERS), "one layout would show nothing of the other"
    want = mean(loaded(name, new), loaded(name, old))
    rope = "rope_theta", "rope_parameters"
    for base, other in ((new, old), (old, new)):
        out = tmp_path / f"out-{base.name}"
        got, config = merged(base, other, out)
        names = (mine if base is new else theirs).keys()
        assert got.keys() - {"language_model.lm_head.weight"} == names - {"language_model.lm_head.weight"}
        said = json.loads((base / "config.json").read_text())
        assert [key in config for key in rope] == [key in said for key in rope]
        assert compare(loaded(name, out), want) is None
    if name in FUSED:
        fused = born(name, old, tmp_path / "fused", save_original_format=False)
        got, _ = merged(fused, old, tmp_path / "out-fused")
        assert got.keys() == load_file(fused / "model.safetensors").keys() != mine.keys()
        assert compare(loaded(name, tmp_path / "out-fused"), want) is None


def test_the_headers_are_those_of_transformers_4():
    found = {path.stem: transformers4.read(path.stem) for path in transformers4.HOME.iterdir()}
    assert found.keys() == set(transformers4.NAMES)
    for name, said in found.items():
        assert said["made_with"]["transformers"] == said["config"]["transformers_version"]
        assert said["made_with"]["transformers"].startswith("4.57."), name
        assert "rope_parameters" not in str(said["config"]), name
