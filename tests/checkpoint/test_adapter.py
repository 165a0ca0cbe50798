"""Adapters as peft saves them: what is read, and what is refused in one line."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from fastmerge.checkpoint import Checkpoint
from fastmerge.checkpoint.adapter import Adapter
from fastmerge.errors import CheckpointError

Q = "base_model.model.model.layers.0.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (32, 4)}


def adapter(path, tensors=PAIR, **config):
    """An adapter directory; shapes become tensors of random numbers."""
    path.mkdir()
    g = torch.Generator().manual_seed(len(tensors))
    made = {n: torch.randn(t, generator=g) if isinstance(t, tuple) else t for n, t in tensors.items()}
    save_file(made, path / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True, **config}
    (path / "adapter_config.json").write_text(json.dumps(whole))
    return path


def refused(path):
    with pytest.raises(CheckpointError) as e:
        Adapter.open(str(path))
    assert len(e.value.problems) == 1
    return e.value.problems[0]


def scales(path):
    return {n.removeprefix("model.layers."): u.scale for n, u in Adapter.open(str(path)).updates.items()}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4.0),
        ({"use_rslora": None}, 2.0),
        ({"lora_alpha": -0.5}, -0.125),
        ({"rank_pattern": {"q_proj": 4}, "r": 16}, 2.0),
        ({"alpha_pattern": {"q_proj": 3, ".*0.*q_proj": 16}}, 0.75),
        ({"alpha_pattern": {".*0.*q_proj": 16, "q_proj": 3}}, 4.0),
        ({"alpha_pattern": {"k_proj": "x"}}, 2.0),
        ({"rank_pattern": None, "alpha_pattern": None}, 2.0),
        *(({"init_lora_weights": i}, 2.0) for i in (False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica")),
        *(({k: v}, 2.0) for k in ("use_dora", "target_parameters", "layer_replication") for v in (None, False, [])),
    ],
)
def test_the_scale(tmp_path, config, want):
    assert scales(adapter(tmp_path / "a", **config)) == {"0.self_attn.q_proj.weight": want}


def test_the_settings_are_a_part_of_what_it_is(tmp_path):
    one, same, other = (adapter(tmp_path / n, lora_alpha=a) for n, a in (("a", 8), ("b", 8), ("c", 9)))
    ids = [Adapter.open(str(p)).checkpoint.identity for p in (one, same, other)]
    assert ids[0] == ids[1] != ids[2]


def test_whole_tensors(tmp_path):
    names = ["lm_head.weight", "embed_tokens.base_layer.weight", "k_proj.bias", "q_proj.base_layer.bias"]
    names += ["score.modules_to_save.default.weight"]
    found = Adapter.open(str(adapter(tmp_path / "a", {f"base_model.model.{n}": (3,) for n in names})))
    want = ["embed_tokens.weight", "k_proj.bias", "lm_head.weight", "q_proj.bias", "score.weight"]
    assert sorted(found.replaced) == want
    assert found.updates == {}


def test_unknown_settings_are_named(tmp_path):
    found = Adapter.open(str(adapter(tmp_path / "a", loony=1, loopy=0, task_type="CAUSAL_LM", corda_config={"x": 1})))
    assert len(found.checkpoint.warnings) == 1
    assert found.checkpoint.warnings[0].endswith("settings that are not known are ignored: 'loony'")


DEEP = {"a": 1}
for _ in range(50):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; expected LORA"),
        ({"peft_type": "LOHA", "use_dora": True}, "peft_type 'LOHA' is not supported"),
        ({"peft_type": ["x"] * 999}, "expected LORA"),
        ({"use_dora": True}, "no lora_magnitude_vector, and use_dora is True in adapter_config.json"),
        ({"use_dora": "yes"}, "use_dora 'yes'; expected true or false"),
        ({"lora_bias": True}, "no lora_B.bias, and lora_bias is True in adapter_config.json"),
        ({"use_qalora": True}, "use_qalora is not supported: merge the adapter into its base with peft first"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is not supported"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora is not supported"),
        ({"alora_invocation_tokens": [0]}, "alora_invocation_tokens is not supported: such an adapter acts"),
        ({"trainable_token_indices": [3]}, "no rows of tokens, and trainable_token_indices is [3] in"),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "no rows of tokens, and trainable_token_indices is"),
        *(
            ({"layer_replication": r}, "; expected pairs [first, end) with 0 <= first < end")
            for r in (3, [3], [[0]], [[2, 2]], [[-1, 2]], [[0, 1.0]], [[True, 2]], {"a": 1})
        ),
        *(({"target_parameters": t}, "; expected a list of names") for t in ("experts", [3], {"a": 1})),
        *(
            ({"init_lora_weights": i}, f"init_lora_weights {i!r} changed the base when training started")
            for i in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga")
        ),
        *(
            ({"init_lora_weights": i}, f"init_lora_weights {i!r} is not known, and may have changed the base")
            for i in ("new", ["x"], {}, 2, ["pissa"])
        ),
        *(
            (
                {"init_lora_weights": i},
                "path_initial_model_for_weight_conversion (it takes the adapter as it was before",
            )
            for i in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")
        ),
        *(({"init_lora_weights": i}, "or merge it into its base with peft, which") for i in ("pissa", "olora")),
        *(
            ({"init_lora_weights": i}, "peft does not make that change again when it loads the adapter")
            for i in ("pissa_niter_16", "corda", "lora_ga")
        ),
        ({"init_lora_weights": "loftq"}, "merge it with the quantised base that it was trained on"),
        ({"use_rslora": "false"}, "use_rslora 'false'; expected true or false"),
        ({"fan_in_fan_out": [1]}, "fan_in_fan_out [1]; expected true or false"),
        ({"rank_pattern": [4]}, "rank_pattern [4]; expected a map"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern 'q_proj'; expected a map"),
        ({"r": 8}, "rank 4 in the file, 8 in adapter_config.json: 'model.layers.0.self_attn.q_proj'"),
        *(({"r": r}, f"rank 4 in the file, {r!r} in") for r in (0, -4, 4.0, "4", None, True, [4])),
        ({"r": 10**300}, "rank 4 in the file, 1000"),
        ({"r": {"x": DEEP}}, "rank 4 in the file"),
        ({"rank_pattern": {"q_proj": 2}}, "rank 4 in the file, 2 in"),
        *(
            ({"lora_alpha": a}, "expected a number other than 0: 'model.layers.0.self_attn.q_proj'")
            for a in ("8", None, 0, 0.0, float("nan"), float("inf"), -float("inf"), True, [8], 10**400)
        ),
        ({"alpha_pattern": {"q_proj": "3"}}, "lora_alpha '3' in adapter_config.json; expected a number"),
        ({"rank_pattern": {"((a+)+)+b": 4}}, "patterns in adapter_config.json: '((a+)+)+b': only letters"),
        ({"alpha_pattern": {".*" * 10: 4}}, "may take too long to match"),
        ({"alpha_pattern": {"[": 4}}, "patterns in adapter_config.json"),
    ],
)
def test_settings_that_are_refused(tmp_path, config, said):
    assert said in refused(adapter(tmp_path / "a", **config))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({f"{Q}.lora_A.weight": (4, 32)}, "lora_A without lora_B, or the other way round: 'model.layers.0"),
        ({f"{Q}.lora_B.weight": (32, 4)}, "lora_A without lora_B, or the other way round"),
        (
            {**PAIR, f"{Q}.lora_magnitude_vector": (32,)},
            "lora_magnitude_vector, and use_dora is None in adapter_config",
        ),
        ({**PAIR, f"{Q}.lora_B.bias": (32,)}, "lora_B.bias, and lora_bias is None in adapter_config"),
        ({f"{Q}.lora_magnitude_vector": (32,)}, "lora_A without lora_B, or the other way round"),
        ({**PAIR, f"{Q}.lora_diag": (4,)}, "tensors of an unknown kind: "),
        (
            {"base_model.model.embed.token_adapter.trainable_tokens_delta": (1, 8)},
            "rows of tokens, and trainable_token_indices is None in adapter_config.json: 'embed'",
        ),
        ({"base_model.model.embed.token_adapter.other": (1, 8)}, "tensors of an unknown kind: "),
        (
            {n.replace("q_proj", "q_proj.base_layer"): s for n, s in PAIR.items()},
            "wrapped 1 times, and target_parameters names []",
        ),
        ({"base_model.model.x.original_module.weight": (1, 8)}, "tensors of an unknown kind: "),
        ({n.removeprefix("base_model.model."): s for n, s in PAIR.items()}, "do not begin with 'base_model.model.'"),
        ({**PAIR, f"{Q}.lora_A.default.weight": (4, 32)}, "tensors that are given twice"),
        ({**PAIR, f"{Q}.lora_embedding_A": (4, 32), f"{Q}.lora_embedding_B": (32, 4)}, "given twice"),
        ({"base_model.model.x.bias": (2,), "base_model.model.x.base_layer.bias": (2,)}, "given twice"),
        (
            {f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": (32, 8)},
            "lora_A [4, 32] and lora_B [32, 8] do not fit",
        ),
        ({f"{Q}.lora_A.weight": (0, 32), f"{Q}.lora_B.weight": (32, 0)}, "do not fit each other"),
        ({f"{Q}.lora_A.weight": (4, 8, 3, 3), f"{Q}.lora_B.weight": (8, 4, 1, 1)}, "expected [r, in] and [out, r]"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 2).int(), f"{Q}.lora_B.weight": (2, 4)}, "int32 and lora_B float32"),
        ({}, "no tensors: the adapter changes nothing"),
    ],
)
def test_tensors_that_are_refused(tmp_path, tensors, said):
    assert said in refused(adapter(tmp_path / "a", tensors))


def test_a_hundred_layers_of_the_wrong_rank_are_one_line(tmp_path):
    names = [Q.replace("0", str(i)) for i in range(100)]
    tensors = {f"{n}.lora_{s}.weight": shape for n in names for s, shape in (("A", (4, 8)), ("B", (8, 4)))}
    assert refused(adapter(tmp_path / "a", tensors, r=2)).endswith("and 80 more")


def test_files_that_are_none(tmp_path):
    path = adapter(tmp_path / "a")
    weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
    weights.rename(path / "x")
    assert refused(path) == f"{path}: the adapter has no adapter_model.safetensors: save it again with peft"
    (path / "adapter_model.bin").write_bytes(b"x")
    assert "no adapter_model.safetensors, and pickled ones are not read: save it again with peft" in refused(path)
    os.mkfifo(weights)
    assert "expected a regular file" in refused(path)
    weights.unlink()
    weights.symlink_to(path / "gone")
    assert "cannot open" in refused(path)
    weights.unlink()
    (path / "x").rename(weights)
    good = config.read_text()
    for text in ("", "[]", "{", "[" * 100_000, '{"r": ' + "9" * 5000 + "}", "\udcff"):
        config.write_bytes(text.encode(errors="surrogateescape"))
        assert str(config) in refused(path)
    config.unlink()
    os.mkfifo(config)
    assert str(config) in refused(path)
    config.unlink()
    assert refused(path) == f"{path}: expected a LoRA adapter, a directory with adapter_config.json"
    assert "expected a LoRA adapter" in refused(weights)
    config.write_text(good)
    assert scales(path) == {"0.self_attn.q_proj.weight": 2.0}


def test_an_adapter_is_no_model(tmp_path):
    path = adapter(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a LoRA adapter, not a model: 'model: BASE"):
        Checkpoint.open(path)


@pytest.mark.parametrize(
    ("tensors", "silent"),
    [
        ({f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": torch.zeros(32, 4)}, True),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 32), f"{Q}.lora_B.weight": (32, 4)}, True),
        (PAIR, False),
        # Not a zero in the first bytes alone, one update of two, a whole tensor besides.
        ({f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": torch.eye(4096, 4).flip(0)}, False),
        ({**PAIR, f"{Q.replace('q_', 'k_')}.lora_A.weight": (4, 32),
          f"{Q.replace('q_', 'k_')}.lora_B.weight": torch.zeros(32, 4)}, False),
        ({f"{Q}.lora_A.weight": (4, 32), f"{Q}.lora_B.weight": torch.zeros(32, 4),
          "base_model.model.lm_head.weight": (9, 32)}, False),
    ],
)  # fmt: skip
def test_updates_that_are_all_zero_are_warned_of(tmp_path, tensors, silent):
    """As peft saves an adapter whose weights it did not find: the merge would be the base, without a word."""
    said = Adapter.open(str(adapter(tmp_path / "a", tensors))).checkpoint.warnings
    assert bool([w for w in said if "every update is zero" in w]) == silent
