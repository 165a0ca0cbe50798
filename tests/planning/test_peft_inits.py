"""``init_lora_weights``: those that leave the base as it is are applied, those that change it are refused by name."""

import pytest
import torch
from safetensors.torch import load_file

from fastmerge.errors import CheckpointError
from tests.planning.test_peft import SHAPE, baked, unloaded

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.loraga import preprocess_loraga

pytestmark = pytest.mark.filterwarnings("ignore")  # both warn of much

IDS = torch.arange(24).reshape(1, 24)
MODULE = "layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("inits") / "base"
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE)).save_pretrained(path)
    return path


def prepared(base, init):
    """A model with an adapter that is not trained yet."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    more = {
        "eva": {"eva_config": peft.EvaConfig(rho=1.0)},
        "corda": {"corda_config": CordaConfig()},
        "lora_ga": {"lora_ga_config": peft.LoraGAConfig(stable_gamma=1)},
    }
    known = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], **more.get(init, {})}
    config = peft.LoraConfig(init_lora_weights=init, **known)
    if init == "corda":
        corda = pytest.importorskip("peft.tuners.lora.corda")  # it needs attrs, which peft does not ask for
        corda.preprocess_corda(model, config, run_model=lambda: model(IDS))
    if init == "lora_ga":
        preprocess_loraga(model, config, lambda: model(IDS, labels=IDS).loss.backward())
    made = peft.get_peft_model(model, config)
    if init == "eva":
        batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        peft.initialize_lora_eva_weights(made, [batch] * 4, show_progress_bar=False)
    return made


def trained(model, base):
    """A weight after training, in the memory of peft, and how far the base's is from that of the files."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=g))
        module = model.base_model.model.model.get_submodule(MODULE)
        own = load_file(base / "model.safetensors")[f"model.{MODULE}.weight"]
        return module.base_layer.weight + module.get_delta_weight("default"), (module.base_layer.weight - own).norm()


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_the_base_is_as_it_was(base, tmp_path, init):
    model = prepared(base, init)
    want, moved = trained(model, base)
    assert moved == 0
    model.save_pretrained(tmp_path / "adapter")
    got = baked(base, tmp_path / "adapter", tmp_path / "got")[f"model.{MODULE}.weight"]
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_the_base_was_changed(base, tmp_path, init):
    model = prepared(base, init)
    model.peft_config["default"].init_lora_weights = True  # so that peft can load it as it is
    model.save_pretrained(tmp_path / "before")
    model.peft_config["default"].init_lora_weights = init
    want, moved = trained(model, base)
    assert moved > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=f"init_lora_weights '{init}' changed the base when training") as e:
        baked(base, tmp_path / "adapter", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    if init != "corda":  # which peft does not load
        theirs = unloaded(base, tmp_path / "adapter", tmp_path / "theirs")[f"model.{MODULE}.weight"]
        right = torch.allclose(theirs, want, rtol=1e-5, atol=1e-6)
        assert right == ("or merge it into its base with peft" in str(e.value)), "what the message says of peft"
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    got = baked(base, tmp_path / "plain", tmp_path / "got")[f"model.{MODULE}.weight"]
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)
