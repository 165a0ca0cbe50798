"""Opening models: files, indices, plain directories, and everything that is refused."""

from __future__ import annotations

import json
import os

import pytest

from fastmerge.checkpoint import Checkpoint, Seen
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import file_bytes, raw, save, tensor, write_index
from tests.counted import calls

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def two(directory, *, index=True):
    return save(directory, {A: {"a": tensor("BF16", 4)}, B: {"b": tensor("F32", 2, 2)}}, index=index)


def refused(path, **kwargs) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, **kwargs)
    return caught.value.problems


def test_single_file_and_config(tmp_path):
    save(tmp_path, {"model.safetensors": {"b": tensor("BF16", 4), "a": tensor("F32", 2)}})
    (tmp_path / "config.json").write_text('{"model_type": "llama", "x": Infinity}')
    for given in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        model = Checkpoint.open(given)
        assert list(model.tensors) == ["b", "a"]
        assert model.config["model_type"] == "llama"
        assert model.path == tmp_path
        assert model.files[0].size == (tmp_path / "model.safetensors").stat().st_size
    assert model.ref == str(tmp_path)


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path, index):
    model = Checkpoint.open(two(tmp_path, index=index))
    assert [f.path.name for f in model.files] == [A, B]
    assert {n: i.file for n, i in model.tensors.items()} == {"a": 0, "b": 1}
    info = model.tensors["b"]
    content = model.files[info.file].path.read_bytes()
    assert content[info.offset : info.offset + info.nbytes] == tensor("F32", 2, 2)[2]


def test_models_with_the_same_headers_share_their_table(tmp_path):
    seen = Seen()
    one, other = (Checkpoint.open(two(tmp_path / name), seen=seen) for name in "xy")
    assert one.tensors is other.tensors
    save(tmp_path / "z", {A: {"a": tensor("BF16", 4)}, B: {"c": tensor("F32", 2, 2)}}, index=True)
    assert list(Checkpoint.open(tmp_path / "z", seen=seen).tensors) == ["a", "c"]
    assert list(one.tensors) == ["a", "b"]


def test_a_tensor_in_two_files_is_found_in_every_model(tmp_path):
    seen = Seen()
    for name in "xy":
        save(tmp_path / name, {A: {"a": tensor("BF16", 4)}, B: {"a": tensor("BF16", 4)}})
        assert f"{tmp_path / name}: tensors in both {A} and {B}: 'a'" in refused(tmp_path / name, seen=seen)


def test_index_given_by_name(tmp_path):
    two(tmp_path)
    assert len(Checkpoint.open(tmp_path / "model.safetensors.index.json").files) == 2


def test_identity_is_free_of_paths_and_content_id_sees_values(tmp_path):
    one = Checkpoint.open(two(tmp_path / "x"))
    other = Checkpoint.open(two(tmp_path / "y"))
    assert one.identity == other.identity
    save(tmp_path / "z", {A: {"a": tensor("BF16", 4, seed=9)}, B: {"b": tensor("F32", 2, 2)}}, index=True)
    changed = Checkpoint.open(tmp_path / "z")
    assert changed.identity == one.identity
    assert changed.content_id() != one.content_id()


def test_missing_shard_of_a_numbered_set(tmp_path):
    two(tmp_path, index=False)
    (tmp_path / A).unlink()
    assert refused(tmp_path) == [f"{tmp_path}: 1 of 2 shards, missing: '{A}'"]


def test_files_beside_the_model_are_named_in_a_warning(tmp_path):
    two(tmp_path)
    save(tmp_path, {"consolidated.safetensors": {"a": tensor("BF16", 4)}})
    assert "consolidated.safetensors" in Checkpoint.open(tmp_path).warnings[0]


def test_plain_directory_without_numbers(tmp_path):
    save(tmp_path, {"x.safetensors": {"a": tensor("U8", 1)}, "y.safetensors": {"b": tensor("U8", 1)}})
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]


def test_not_there(tmp_path):
    assert "no such file or directory" in refused(tmp_path / "nothing")[0]
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "does not exist" in refused(tmp_path / "link")[0]
    assert "no *.safetensors file" in refused(tmp_path)[0]
    (tmp_path / "notes.txt").write_text("x")
    assert "expected a *.safetensors file" in refused(tmp_path / "notes.txt")[0]


@pytest.mark.parametrize("ref", ["", " ", "a\0b"])
def test_what_can_be_no_model(ref):
    assert refused(ref) == [f"{ref!r}: expected a path or a hub id"]


def test_a_user_that_does_not_exist():
    assert refused("~no_such_user/m") == ["~no_such_user/m: no such file or directory"]


def test_an_at_in_a_local_path_is_part_of_it(tmp_path, monkeypatch):
    save(tmp_path / "ft", {"model.safetensors": {"old": tensor("BF16", 2)}})
    save(tmp_path / "ft@v2", {"model.safetensors": {"new": tensor("BF16", 2)}})
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / "ft@v2", "ft@v2", "./ft@v2"):
        assert list(Checkpoint.open(given).tensors) == ["new"]


def test_files_on_disk_have_no_revision(tmp_path, monkeypatch):
    save(tmp_path / "org" / "ft", {"model.safetensors": {"a": tensor("BF16", 2)}})
    monkeypatch.chdir(tmp_path)
    for ref, revision in (("org/ft", "v2"), ("org/ft@v2", None), (str(tmp_path / "org/ft"), "v2")):
        assert "a local path has no revisions" in refused(ref, revision=revision)[0]
        assert "'v2'" in refused(ref, revision=revision)[0]


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "regular file" in refused(tmp_path)[0]


@pytest.mark.parametrize("text", ["[1]", "{", '"x"', "\xff", '{"a":' * 5000, '{"a":' + "[" * 900 + "]" * 900 + "}"])
def test_bad_config(tmp_path, text):
    two(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert str(tmp_path / "config.json") in refused(tmp_path)[0]


CONFIGS = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
    ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"quantization_config": {"quant_method": "fp8"}}, "FP8 with scales"),
    ({"quantization_config": {"bits": 4}}, "an unnamed method"),
    ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "MXFP4"),
    ({"thinker_config": {"compression_config": {"quant_method": "new"}}}, "new"),
]


@pytest.mark.parametrize(
    "tensors", [{"l.weight": tensor("I32", 2, 2)}, {"l.weight": tensor("BF16", 2), "l.weight_scale": tensor("F32", 1)}]
)
@pytest.mark.parametrize(("config", "said"), CONFIGS)
def test_quantised_by_config(tmp_path, config, said, tensors):
    save(tmp_path, {"model.safetensors": tensors})
    (tmp_path / "config.json").write_text(json.dumps(config))
    problem = refused(tmp_path)[0]
    assert f"quantised with {said}, and there are " in problem
    assert "unquantised weights" in problem


@pytest.mark.parametrize(("config", "said"), CONFIGS)
def test_a_config_that_speaks_of_a_quantisation_which_is_not_there(tmp_path, config, said):
    save(tmp_path, {"model.safetensors": {"l.weight": tensor("BF16", 2), "ids": tensor("I64", 1, 4)}})
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = Checkpoint.open(tmp_path)
    outer, inner = next(iter(config.items()))
    key = outer if "quanti" in outer else f"{outer}.{next(iter(inner))}"
    assert model.stale_quantisation == (key,)
    assert f"{key}: no weight is quantised" in model.warnings[0]


def test_all_sections_of_one_quantisation_are_stale_together(tmp_path):
    save(tmp_path, {"model.safetensors": {"l.weight": tensor("BF16", 2), "logit_scale": tensor("F32", 1)}})
    section = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"quantization_config": section, "text_config": {"quantization_config": section}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text("{}")
    model = Checkpoint.open(tmp_path)
    assert model.stale_quantisation == ("quantization_config", "text_config.quantization_config")
    assert "quantize_config.json: no weight is quantised" in model.warnings[2]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"l.qweight": tensor("I32", 2), "l.scales": tensor("F16", 2)}, "GPTQ or AWQ"),
        ({"l.qweight": tensor("I32", 2), "l.qzeros": tensor("I32", 2), "l.g_idx": tensor("I32", 2)}, "GPTQ"),
        ({"l.weight_packed": tensor("I32", 2), "l.weight_scale": tensor("F16", 2)}, "compressed-tensors"),
        (
            {
                "l.weight_packed": tensor("U8", 2),
                "l.weight_scale": tensor("F8_E4M3", 2),
                "l.weight_global_scale": tensor("F32", 1),
            },
            "compressed-tensors (NVFP4)",
        ),
        ({"l.weight_packed": tensor("U8", 2), "l.weight_scale": tensor("U8", 2)}, "compressed-tensors"),
        ({"l.weight": tensor("I8", 2, 2), "l.weight_scale": tensor("BF16", 2, 1)}, "int8 and scales"),
        ({"l.weight": tensor("U8", 2), "l.weight.absmax": tensor("F32", 2)}, "bitsandbytes"),
        ({"l.weight": tensor("I8", 2), "l.SCB": tensor("F32", 2)}, "bitsandbytes"),
        ({"l.weight": tensor("F8_E4M3", 2), "l.weight_scale_inv": tensor("F32", 1)}, "FP8 with scales"),
        ({"e.gate_up_proj": tensor("F8_E4M3", 2), "e.gate_up_proj_scale_inv": tensor("F32", 1)}, "FP8 with scales"),
        ({"l.weight": tensor("F8_E4M3", 2), "l.weight_scale": tensor("BF16", 1)}, "FP8 with scales"),
        ({"l.weight": tensor("F8_E5M2", 2), "l.scale_weight": tensor("F32")}, "FP8 with scales"),
        ({"l_blocks": tensor("U8", 2), "l_scales": tensor("U8", 2)}, "MXFP4"),
        ({"e.down_proj_blocks": tensor("U8", 2)}, "MXFP4"),
        ({"l.weight": tensor("U32", 2), "l.scales": tensor("BF16", 2), "l.biases": tensor("BF16", 2)}, "MLX"),
        (
            {"l.weight": tensor("U8", 2), "l.weight_scale": tensor("F8_E4M3", 2), "l.weight_scale_2": tensor("F32")},
            "ModelOpt",
        ),
        ({"l.W_q": tensor("U8", 2), "l.scale": tensor("F16", 2)}, "HQQ"),
        ({"l.codes": tensor("I16", 2), "l.codebooks": tensor("F16", 2)}, "AQLM"),
        ({"l.q_weight": tensor("I32", 2)}, "EXL2"),
    ],
)
def test_quantised_by_tensors(tmp_path, tensors, said):
    save(tmp_path, {"model.safetensors": tensors})
    problem = refused(tmp_path)[0]
    assert f"quantised with {said}" in problem
    assert "dequantise" in problem


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"e.gate_up_proj_blocks": tensor("BF16", 2, 2, 2)}, "under the names of MXFP4 blocks"),
        ({"l.weight": tensor("BF16", 2), "l.weight_scale_inv": tensor("F32", 1)}, "beside weights that are not FP8"),
    ],
)
def test_checkpoints_that_a_quantised_load_has_damaged(tmp_path, tensors, said):
    save(tmp_path, {"model.safetensors": tensors})
    assert said in refused(tmp_path)[0]


def test_fp8_whose_scales_are_lost(tmp_path):
    save(tmp_path, {"model.safetensors": {"l.weight": tensor("F8_E4M3", 2, 2)}})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert "quantised with FP8 with scales, and there are weights of type float8_e4m3fn" in refused(tmp_path)[0]


def test_plain_integers_and_fp8_without_scales_are_no_quantisation(tmp_path):
    save(tmp_path, {"model.safetensors": {"ids": tensor("I64", 2), "x": tensor("F8_E4M3", 2)}})
    assert len(Checkpoint.open(tmp_path).tensors) == 2


def test_adapters(tmp_path):
    save(tmp_path / "a", {"adapter_model.safetensors": {"x.lora_A.weight": tensor("F32", 2)}})
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refused(tmp_path / "a")[0]
    assert "LoRA adapter" in refused(tmp_path / "a" / "adapter_model.safetensors")[0]
    save(tmp_path / "b", {"model.safetensors": {"x.lora_A.weight": tensor("F32", 2)}})
    assert "LoRA adapter" in refused(tmp_path / "b")[0]
    save(tmp_path / "c", {"model.safetensors": {"x": tensor("F32", 2)}, "adapter_model.safetensors": {}})
    assert "not used" in Checkpoint.open(tmp_path / "c").warnings[0]


def test_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(tmp_path)[0]
    assert "GGUF" in refused(tmp_path / "m.gguf")[0]


def test_hugging_face_cache_links_are_inside(tmp_path):
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    shared = tmp_path / "blobs" / "ab" / ("ab" + "0" * 62)
    shared.parent.mkdir(parents=True)
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs" / ("1" * 64)).write_bytes(file_bytes({"a": tensor("BF16", 4)}))
    shared.write_bytes(file_bytes({"b": tensor("BF16", 4)}))
    (repo / "blobs" / ("2" * 64)).symlink_to(f"../../blobs/ab/{shared.name}")
    (snapshot / A).symlink_to("../../blobs/" + "1" * 64)
    (snapshot / B).symlink_to("../../blobs/" + "2" * 64)
    write_index(snapshot, {"a": A, "b": B})
    model = Checkpoint.open(snapshot)
    assert list(model.tensors) == ["a", "b"]
    before = model.content_id()
    os.utime(repo / "blobs" / ("1" * 64), ns=(1, 1))
    assert Checkpoint.open(snapshot).content_id() == before


def test_all_problems_of_a_model_at_once(tmp_path):
    two(tmp_path)
    (tmp_path / A).write_bytes(raw(b"{"))
    (tmp_path / B).write_bytes(b"")
    (tmp_path / "config.json").write_text("[]")
    problems = refused(tmp_path)
    assert len(problems) == 3
    assert all(name in text for name, text in zip((A, B, "config.json"), problems, strict=True))


def test_opening_a_mixture_of_experts_costs_a_few_calls_per_tensor(tmp_path):
    def experts(tensors):
        names = [f"model.layers.{i // 384}.mlp.experts.{i % 384}.down_proj.weight" for i in range(tensors)]
        shards = {
            f"model-{s + 1:05d}-of-00010.safetensors": dict.fromkeys(names[s::10], ("BF16", (2, 2), b"12345678"))
            for s in range(10)
        }
        save(tmp_path / str(tensors), shards, index=True)
        return tmp_path / str(tensors)

    few, many = experts(1_000), experts(18_000)
    assert len(Checkpoint.open(many).tensors) == 18_000
    assert calls(Checkpoint.open, many) - calls(Checkpoint.open, few) < 30 * 17_000  # 23 in November 2026
