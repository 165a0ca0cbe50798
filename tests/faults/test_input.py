"""Damaged and hostile models: refused before any work, with every problem named; never a wrong read."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct

import numpy as np
import pytest

from fastmerge.checkpoint import Checkpoint, Files, Writer, layout
from fastmerge.checkpoint import io as _io
from fastmerge.dtypes import BF16, BY_TAG, F32
from fastmerge.errors import CheckpointError
from tests.checkpoint.shim import FaultyIo, PosixIo, names, primitives, raw, save, tensor, write_index
from tests.counted import calls

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def model(tmp_path):
    """A sound model of two shards with an index."""
    shards = {A: {"a": tensor("BF16", 4, 8), "b": tensor("F32", 3)}, B: {"c": tensor("BF16", 5)}}
    return save(tmp_path / "model", shards, index=True)


def refused(path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return caught.value.problems


# Names in an index that lead out of the directory.


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "/abs/x.safetensors", "../x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..",
        ".hidden.safetensors", "x.bin", "", "a\x00.safetensors", "./" + A,
    ],
)  # fmt: skip
def test_paths_in_an_index(model, name):
    write_index(model, {"a": A, "b": A, "c": name})
    problems = refused(model)
    assert any("tensor 'c'" in p and repr(name) in p for p in problems)


def test_links_are_followed_wherever_they_lead(model, tmp_path):
    elsewhere = tmp_path / "another disk"
    elsewhere.mkdir()
    (model / "config.json").write_text('{"model_type": "x"}')
    for name in (A, B, "model.safetensors.index.json", "config.json"):
        (model / name).rename(elsewhere / f"blob of {name}")
        (model / name).symlink_to(elsewhere / f"blob of {name}")
    found = Checkpoint.open(model)
    assert len(found.tensors) == 3
    assert found.config == {"model_type": "x"}
    assert found.warnings == ()
    (elsewhere / f"blob of {B}").unlink()
    assert f"{model / B}: cannot open: No such file" in refused(model)[0]


def test_a_link_to_the_directory_itself_is_no_weight_file(model):
    (model / B).unlink()
    (model / B).symlink_to(model)
    assert f"{model / B}: cannot open: expected a regular file, got a directory" in refused(model)[0]


@pytest.mark.parametrize(
    "content", ['{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", "[]", "{", '{"weight_map": {"a":"x","a":"y"}}']
)
def test_broken_indices(model, content):
    (model / "model.safetensors.index.json").write_text(content)
    assert "index.json" in refused(model)[0]


def test_index_and_shards_that_differ(model):
    write_index(model, {"a": A, "gone": A, "c": A, "x": "model-00009-of-00002.safetensors", "bad\n": B})
    problems = refused(model)
    assert "control character" in problems[0]
    assert "shards that the index names are missing: 'model-00009-of-00002.safetensors'" in problems[1]
    assert len(problems) == 2
    write_index(model, {"a": A, "gone": B, "c": A})
    found = Checkpoint.open(model)
    assert list(found.tensors) == ["a", "b", "c"]
    assert found.warnings == (
        f"{model}: tensors that the index does not name are read as well: 'b'",
        f"{model}: tensors are in other shards than the index says: 'c'",
        f"{model}: the index names tensors that are in no shard: 'gone'",
    )


LAYER = "model.layers.{}.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("name", "config", "whole"),
    [
        ("mtp.fc.weight", {}, True),
        ("mtp.layers.0.self_attn.q_proj.weight", {}, True),
        ("model.mtp.norm.weight", {}, True),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", {}, True),
        ("model.vision.position_ids", {}, True),
        ("vision_tower.norm.weight", {}, True),  # nothing of that part is there: the other models tell
        ("model.extra.weight", {}, True),
        ("lm_head.weight", {"tie_word_embeddings": True}, True),
        ("lm_head.weight", {}, True),
        ("lm_head.weight", {"tie_word_embeddings": False}, False),
        (LAYER.format(2), {"num_hidden_layers": 2}, True),
        (LAYER.format(2), {"text_config": {"num_hidden_layers": 2}}, True),
        (LAYER.format(2), {"num_hidden_layers": 3}, False),
        (LAYER.format(2), {}, False),
        ("model.norm.weight", {}, False),
        ("model.embed_tokens.weight", {}, False),
        ("wte.weight", {}, False),
        ("transformer.ln_f.bias", {}, True),
    ],
)
def test_a_tensor_that_only_the_index_has(tmp_path, name, config, whole):
    held = {LAYER.format(i): tensor("BF16", 4) for i in range(2)}
    save(tmp_path, {A: held, B: {"model.layers.0.input_layernorm.weight": tensor("BF16", 2)}}, index=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(tmp_path, index | {name: B})
    if whole:
        said = Checkpoint.open(tmp_path).warnings
        assert said == (f"{tmp_path}: the index names tensors that are in no shard: {name!r}",)
    else:
        assert refused(tmp_path) == [f"{tmp_path}: tensors that the index places in {B} are in no shard: {name!r}"]


def test_problems_of_an_index_are_listed_shortly(model):
    write_index(model, {f"t{i}\n": f"../x{i}.safetensors" for i in range(5_000)})
    few = calls(refused, model)
    write_index(model, {f"t{i}\n": f"../x{i}.safetensors" for i in range(50_000)})
    problems = refused(model)
    assert calls(refused, model) - few < 12 * 45_000  # 9 in November 2026
    assert len(problems) == 42
    assert problems[20].endswith("and 49980 more like these")
    assert problems[41].endswith("and 49980 more like these")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", A])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory"])
def test_what_is_no_regular_file_is_never_opened(model, name, kind, monkeypatch):
    path = model / name
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            monkeypatch.chdir(model)  # names of sockets are short
            listener.bind(name)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()
        problems = refused(model)
    assert f"{path}: cannot " in problems[0]
    assert f"expected a regular file, got a {kind}" in problems[0]


def test_the_same_tensor_in_two_shards(model):
    save(model, {B: {"a": tensor("BF16", 4, 8), "c": tensor("BF16", 5)}})
    assert f"{model}: tensors in both {A} and {B}: 'a'" in refused(model)[0]


def test_an_index_beside_a_stale_single_file(model):
    save(model, {"model.safetensors": {"a": tensor("BF16", 4, 8)}})
    assert "which weights are meant is unclear" in refused(model)[0]
    assert len(Checkpoint.open(model / "model.safetensors").tensors) == 1
    assert len(Checkpoint.open(model / "model.safetensors.index.json").tensors) == 3


# Truncated files: known from the header and the size alone.


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_truncated_shards(model, keep):
    path = model / A
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    problems = refused(model)
    assert str(path) in problems[0]
    assert "truncated" in problems[0]


def test_a_tensor_beyond_the_end_and_bytes_that_nobody_owns(model):
    header = {"a": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}
    (model / A).write_bytes(raw(json.dumps(header).encode(), b"x"))
    (model / B).write_bytes((model / B).read_bytes() + b"\0")
    problems = refused(model)
    assert "truncated" in problems[0]
    assert "expected 10 bytes of data, got 11" in problems[1]


def test_shrinking_during_a_merge(model):
    checkpoint = Checkpoint.open(model)
    info = checkpoint.tensors["a"]
    buffer = np.zeros(info.nbytes, np.uint8)
    for io in primitives().values():
        with Files([checkpoint], io) as files:
            table = np.array([[files.fd(0, info.file), info.offset, buffer.ctypes.data, info.nbytes]])
            files.read(table)
            copy = (model / A).read_bytes()
            os.truncate(model / A, info.offset + 10)
            with pytest.raises(CheckpointError, match=f"{A}:{info.offset + 10}: the file shrank while being read"):
                files.read(table)
        (model / A).write_bytes(copy)
        checkpoint = Checkpoint.open(model)


def test_recheck_names_every_file_that_changed(model):
    checkpoint = Checkpoint.open(model)
    checkpoint.recheck()
    (model / A).with_suffix(".new").write_bytes((model / A).read_bytes())
    (model / A).with_suffix(".new").rename(model / A)
    os.utime(model / B, ns=(5, 5))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.recheck()
    assert len(caught.value.problems) == 2
    assert "inode" in caught.value.problems[0]
    assert "mtime_ns" in caught.value.problems[1]
    (model / B).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.recheck()


# Sizes that are meant to exhaust the reader.


def test_header_length_of_a_lie(tmp_path):
    path = tmp_path / "model.safetensors"
    for length, said in ((2**63, "at most 100000000"), (100_000_001, "at most 100000000"), (1000, "truncated")):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        assert said in refused(path)[0]


def test_a_sparse_header_of_the_largest_size_is_refused_like_a_small_one(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", 100_000_000) + b"{")
        f.truncate(100_000_100)
    assert "not valid" in refused(path)[0]
    assert calls(refused, path) < 1000  # about 300, as for one of a thousand bytes


def test_sizes_whose_product_overflows(tmp_path):
    header = {"a": {"dtype": "F64", "shape": [2**31, 2**32, 4], "data_offsets": [0, 0]}}
    (tmp_path / "model.safetensors").write_bytes(raw(json.dumps(header).encode()))
    assert "overflows" in refused(tmp_path)[0]


def test_too_many_tensors(model, monkeypatch):
    monkeypatch.setattr("fastmerge.checkpoint.model.MAX_TENSORS", 1)
    assert "more than 1 tensors" in refused(model)[0]


# Pickle.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt"])
def test_pickle_is_refused_with_the_way_out(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    for given in (tmp_path, path):
        with pytest.raises(CheckpointError, match="save_pretrained"):
            Checkpoint.open(given)
    assert names(tmp_path) == [name]


def test_safetensors_beside_a_pickle_are_taken(model):
    (model / "pytorch_model.bin").write_bytes(b"x")
    (model / "training_args.bin").write_bytes(b"x")
    assert len(Checkpoint.open(model).tensors) == 3


def test_code_in_a_model_directory_is_not_run(model):
    (model / "modeling_evil.py").write_text("raise SystemExit")
    (model / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_evil.Model"}, "trust_remote_code": true}')
    assert Checkpoint.open(model).config["auto_map"] == {"AutoModel": "modeling_evil.Model"}


# Storage that fails now and then.


def test_flaky_storage(model, monkeypatch):
    monkeypatch.setattr(_io, "_sleep", lambda _: None)
    checkpoint = Checkpoint.open(model)
    info = checkpoint.tensors["a"]
    want = (model / A).read_bytes()[info.offset : info.offset + info.nbytes]
    for seed, fail, times, works in (
        (1, 0, None, True),
        (None, errno.EIO, 2, True),
        (None, errno.ESTALE, 2, True),
        (2, errno.EIO, 2, True),
        (None, errno.EIO, None, False),
        (None, errno.ESTALE, None, False),
    ):
        buffer = np.zeros(info.nbytes, np.uint8)
        with Files([checkpoint], FaultyIo(seed, fail=fail, after=30, times=times)) as files:
            table = np.array([[files.fd(0, info.file), info.offset, buffer.ctypes.data, info.nbytes]])
            if works:
                files.read(table)
                assert buffer.tobytes() == want
            else:
                with pytest.raises(CheckpointError, match=f"{A}:{info.offset + 30}: read failed: {os.strerror(fail)}"):
                    files.read(table)


# Large files, as sparse ones.

HUGE = (1 << 32) + 4096 + 6


def test_tensors_beyond_four_gigabytes(tmp_path):
    """A tensor of more than 2^32 bytes: marks around every power of two that counters could wrap at."""
    header = {"big": {"dtype": "U8", "shape": [HUGE], "data_offsets": [0, HUGE]}}
    header["after"] = {"dtype": "BF16", "shape": [2], "data_offsets": [HUGE, HUGE + 4]}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    marks = [0, (1 << 31) - 3, (1 << 31) + 5, 2_147_479_552, (1 << 32) - 1, HUGE - 1]
    with path.open("wb") as f:
        f.write(raw(text))
        start = f.tell()
        for i, at in enumerate(marks):
            f.seek(start + at)
            f.write(bytes([i + 1]))
        f.seek(start + HUGE)
        f.write(b"tail")
    checkpoint = Checkpoint.open(tmp_path)
    big = checkpoint.tensors["big"]
    assert (big.offset, big.nbytes) == (start, HUGE)
    for io in primitives().values():
        with Files([checkpoint], io) as files:
            buffer = np.zeros(10, np.uint8)
            fd = files.fd(0, 0)
            rows = [[fd, big.offset + at, buffer.ctypes.data + i, 1] for i, at in enumerate(marks)]
            rows.append([fd, checkpoint.tensors["after"].offset, buffer.ctypes.data + 6, 4])
            files.read(np.array(rows))
        assert buffer.tobytes() == bytes([1, 2, 3, 4, 5, 6]) + b"tail"


def test_output_offsets_beyond_four_gigabytes(tmp_path, monkeypatch):
    """Written, copied and resumed past 2^32, on a filesystem that cannot reserve, so that the file is sparse."""
    monkeypatch.setattr("fastmerge.checkpoint.system.fallocate", lambda fd, n: errno.EOPNOTSUPP)
    monkeypatch.setattr("os.statvfs", lambda _: os.statvfs_result((1, 1, 1 << 40, 1 << 40, 1 << 40, 1, 1, 1, 0, 255)))
    plan = layout([("big", F32, ((1 << 30) + 1000,)), ("end", BF16, (4,))], shard_size=1e12, metadata={})
    at = plan.places["big"].offset + (1 << 32) - 50
    piece = np.frombuffer(np.random.default_rng(0).bytes(200), np.uint8)
    source = tmp_path / "source"
    source.write_bytes(b"copied" * 10)
    fd = os.open(source, os.O_RDONLY)
    try:
        with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer:
            writer.write(np.array([[0, at, piece.ctypes.data, 200]]))
            writer.copy(np.array([[fd, 6, 0, at + 200, 54]]))
            assert writer.features == {"fallocate": False}
        with Writer(tmp_path / "out", plan, fingerprint="f", resume=True, io=PosixIo()) as writer:
            assert writer.resumed == 254
            assert writer.done(0, at, 254)
            assert not writer.done(0, at, 255)
            part = next(writer.staging.glob("data/*"))
            with part.open("rb") as f:
                f.seek(at)
                assert f.read(254) == piece.tobytes() + b"copied" * 9
    finally:
        os.close(fd)


@pytest.mark.parametrize("shape", [(), (0,), (0, 2**40), (1,), (7,), (1, 1, 3), (2**31,)])
def test_odd_shapes(tmp_path, shape):
    nbytes = 2 * int(np.prod(shape, dtype=object))
    header = {"a": {"dtype": "BF16", "shape": list(shape), "data_offsets": [0, nbytes]}}
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw(json.dumps(header).encode()))
    start = path.stat().st_size
    os.truncate(path, start + nbytes)
    info = Checkpoint.open(tmp_path).tensors["a"]
    assert (info.shape, info.offset, info.nbytes, info.dtype) == (shape, start, nbytes, BY_TAG["BF16"])
