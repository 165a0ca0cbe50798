"""What was changed behind a merge's back: inputs before --resume, outputs before --resume and verify."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest

import fastmerge
from fastmerge.api import merge as engine
from fastmerge.checkpoint import Writer, content
from fastmerge.commands.verify import verify
from fastmerge.errors import CheckpointError, OutputError
from fastmerge.planning import tokens
from tests.checkpoint.shim import PosixIo, chunks, example_layout, names, save, tensor, write

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def numbers(n, seed):
    return "F32", (n,), np.random.default_rng(seed).standard_normal(n).astype("<f4").tobytes()


def model(directory, seed):
    """A model with everything that is carried, in directories too."""
    save(directory, {"model.safetensors": {"a": numbers(3000, seed), "b": numbers(2000, seed + 100)}})
    (directory / "config.json").write_text('{"num_hidden_layers": 1}')
    (directory / "tokenizer.json").write_text('{"v": 1}')
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return directory


@pytest.fixture
def recipe(tmp_path):
    paths = [model(tmp_path / name, seed) for seed, name in enumerate("xy")]
    return {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 0.5}} for p in paths]}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def copies(recipe):
    """The recipe of a merge that only copies: the first model as it is."""
    return {"merge_method": "passthrough", "models": recipe["models"][:1]}


def merge(recipe, out, **kwargs):
    return fastmerge.merge(recipe, out, device="cpu", **kwargs)


def interrupted(recipe, out, monkeypatch):
    """A merge that stops before its end."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_extras", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(recipe, out)
    assert not out.exists()


def replaced_by_another(path, seed=50):
    """Another file of equal header, size and time in the place of one."""
    info = path.stat()
    other = save(path.parent / "tmp", {path.name: {"a": numbers(3000, seed), "b": numbers(2000, seed)}}) / path.name
    os.utime(other, ns=(info.st_atime_ns, info.st_mtime_ns))
    other.rename(path)
    other.parent.rmdir()
    assert path.stat().st_size == info.st_size
    assert path.stat().st_mtime_ns == info.st_mtime_ns


def written_over(path):
    """One byte changed in place, and the time set back."""
    info = path.stat()
    with path.open("r+b") as f:
        f.seek(info.st_size // 2 + 5)
        f.write(b"\x07")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def link_moved(path):
    """A link that leads to another file of equal header, size and time."""
    info = path.stat()
    replaced_by_another(path)
    moved = path.with_name("elsewhere.data")
    path.rename(moved)
    path.symlink_to(moved)
    assert path.stat().st_mtime_ns == info.st_mtime_ns


@pytest.mark.parametrize("change", [replaced_by_another, written_over, link_moved])
@pytest.mark.parametrize("which", [0, 1])
def test_an_input_that_was_replaced_is_not_resumed_with(recipe, out, monkeypatch, change, which):
    interrupted(recipe, out, monkeypatch)
    change(out.parent / "xy"[which] / "model.safetensors")
    with pytest.raises(OutputError, match="another recipe, seed, input"):
        merge(recipe, out, resume=True)
    merge(recipe, out)
    assert verify(out).ok


def test_inputs_that_stayed_are_resumed_with(recipe, out, monkeypatch):
    interrupted(recipe, out, monkeypatch)
    merge(recipe, out, resume=True)
    assert verify(out).ok
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    merge(recipe, out, resume=True)
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_finished_merge_of_other_inputs_is_not_this_one(recipe, out, name):
    merge(recipe, out)
    path = out.parent / "x" / name
    if name == "model.safetensors":
        replaced_by_another(path)
    else:
        path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(OutputError, match="exists; --overwrite replaces it"):
        merge(recipe, out, resume=True)
    merge(recipe, out, overwrite=True)
    assert verify(out).ok


def test_a_plan_reads_no_weights(recipe, monkeypatch):
    monkeypatch.setattr(content, "of", lambda _: pytest.fail("the plan reads"))
    assert engine.plan(recipe).fingerprint


def test_content_of_small_files_is_seen_byte_by_byte(tmp_path):
    path = tmp_path / "f"
    seen = set()
    for at in (None, 0, 4096, 100_000, 199_999):
        data = bytearray(200_000)
        if at is not None:
            data[at] = 1
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
        seen.add(content.of([path]))
    assert len(seen) == 5


def test_content_of_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "gone"):
        with pytest.raises(CheckpointError, match=f"{name}: cannot read"):
            content.of([tmp_path / name])


# Finished outputs.


def lost(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def header_flipped(path):
    """The last byte of the header: a space, before and after."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[: end - 1] + b"\n" + data[end:])


SHARDS = [A, B]
FILES = [
    *("config.json", "tokenizer.json", "mergekit_config.yml", "model.safetensors.index.json"),
    "additional_chat_templates/tools.jinja",
]


def sharded(recipe, out):
    return merge(recipe, out, shard_size=12_000)


@pytest.mark.parametrize("name", [*SHARDS, *FILES])
@pytest.mark.parametrize("change", [lost, cut])
def test_a_finished_output_that_lost_something_is_not_taken_for_finished(recipe, out, name, change):
    sharded(recipe, out)
    change(out / name)
    with pytest.raises(OutputError, match=rf"was finished, and changed since: .*{name}"):
        merge(recipe, out, shard_size=12_000, resume=True)
    merge(recipe, out, shard_size=12_000, overwrite=True)
    assert verify(out).ok


@pytest.mark.parametrize("make", [dict, copies], ids=["merged", "copied"])
@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("change", [flipped, header_flipped])
def test_verify_sees_any_bit_of_a_shard(recipe, out, make, name, change):
    sharded(make(recipe), out)
    good = verify(out)
    assert good.ok, good.problems
    assert good.checked == good.nbytes == 20_000
    assert good.unchecked == 0
    change(out / name)
    bad = verify(out)
    assert len(bad.problems) == 1
    assert name in bad.problems[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lost, flipped])
def test_verify_sees_every_other_file(recipe, out, name, change):
    sharded(recipe, out)
    if name == "model.safetensors.index.json" and change is flipped:
        (out / name).write_text((out / name).read_text() + " ")
    elif name == "config.json" and change is flipped:
        (out / name).write_text('{"num_hidden_layers": 3}')
    else:
        change(out / name)
    said = "is missing" if change is lost else "differs from what the merge wrote"
    assert verify(out).problems == [f"{out / name}: {said}"]


def test_verify_leaves_the_card_to_people(recipe, out):
    merge(recipe, out)
    (out / "README.md").write_text("# Mine\n")
    (out / "notes.txt").write_text("x")
    assert verify(out).ok


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "extra.safetensors", "x.safetensors.index.json"])
def test_verify_sees_what_was_added(recipe, out, name):
    sharded(recipe, out)
    if name.endswith("json"):
        (out / name).write_text("{}")
    else:
        save(out, {name: {"c": tensor("F32", 2)}})
    assert f"{out / name}: was not there when the merge ended" in verify(out).problems


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts.update(seconds=1.5), "was edited"),
        (lambda facts: facts["details"].update(recipe="x"), "was edited"),
        (lambda facts: facts["details"]["checksums"].pop(), "was edited"),
        (lambda facts: facts.pop("digest"), "was edited"),
        (lambda facts: facts["details"].pop("files"), "names no files"),
        (lambda facts: facts["details"].update(files={"../x": [1, "y"]}), "names no files"),
        (lambda facts: facts["details"].update(files={"config.json": ["1", 2]}), "names no files"),
    ],
)
def test_verify_sees_an_edited_report(recipe, out, change, said):
    merge(recipe, out)
    path = out / "merge_report.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts))  # written in another way, it says the same
    assert verify(out).ok
    change(facts)
    path.write_text(json.dumps(facts))
    assert any(said in p for p in verify(out).problems)


def test_verify_sees_a_deleted_report(recipe, out):
    merge(recipe, out)
    (out / "merge_report.json").unlink()
    assert "merge_report.json: is missing" in verify(out).problems[0]


def test_verify_says_nothing_of_reports_where_fastmerge_wrote_none(tmp_path):
    found = verify(save(tmp_path / "m", {"model.safetensors": {"a": tensor("F32", 2)}}))
    assert found.ok
    assert (found.checked, found.unchecked) == (0, 8)


@pytest.mark.parametrize(
    "text", ["{}", '{"fingerprint": %s}', "[" * 100_000, '{"fingerprint": %s, "details": []}', "\ud800"]
)
def test_resume_beside_a_report_that_is_none(recipe, out, text):
    merge(recipe, out)
    report = out / "merge_report.json"
    fingerprint = json.dumps(json.loads(report.read_text())["fingerprint"])
    report.write_bytes((text % fingerprint if "%" in text else text).encode("utf-8", "surrogatepass"))
    with pytest.raises(OutputError, match=r"exists; --overwrite|merge_report.json: not a merge report"):
        merge(recipe, out, resume=True)


def test_a_large_file_is_carried_without_being_held(recipe, out, monkeypatch):
    """A tokenizer of 64 MB passes in pieces: nothing near its size is allocated for it."""
    monkeypatch.setattr(tokens, "MOST", 1 << 20)
    path = out.parent / "x" / "tokenizer.json"
    with path.open("wb") as f:
        f.truncate(64 << 20)
    tracemalloc.start()
    try:
        merge(recipe, out, memory="20MB")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (out / "tokenizer.json").stat().st_size == 64 << 20
    assert most < 40 << 20


def test_a_carried_file_that_changes_meanwhile_is_an_error(tmp_path):
    plan, data = example_layout(1)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"old")
    with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer:
        write(writer, chunks(plan, data))
        writer.add("tokenizer.json", path)
        assert writer.files()["tokenizer.json"][0] == 3
        path.write_bytes(b"new")
        with pytest.raises(OutputError, match=f"{path}: changed while the merge ran"):
            writer.commit()
    assert not (tmp_path / "out").exists()


# Staging directories that were tampered with.


@pytest.mark.parametrize("name", ["data", "old"])
def test_nothing_behind_a_link_is_deleted(recipe, out, monkeypatch, name):
    interrupted(recipe, out, monkeypatch)
    staging = out.parent / ".out.fastmerge-staging"
    victim = out.parent / "victim"
    victim.mkdir()
    (victim / "precious").write_text("x")
    if name == "data":
        for path in (staging / "data").iterdir():
            shutil.copy(path, victim)
        shutil.rmtree(staging / "data")
    (staging / name).symlink_to(victim)
    before = sorted(p.name for p in victim.iterdir())
    with pytest.raises(OutputError, match=rf"{name}: expected a directory of its own"):
        merge(recipe, out, resume=True)
    assert sorted(p.name for p in victim.iterdir()) == before
    merge(recipe, out)
    assert sorted(p.name for p in victim.iterdir()) == before
    assert verify(out).ok
    assert not staging.exists()


@pytest.mark.parametrize("kind", ["hard", "soft", "directory"])
def test_no_byte_is_written_through_a_link_in_the_staging_directory(recipe, out, monkeypatch, kind):
    interrupted(recipe, out, monkeypatch)
    part = out.parent / ".out.fastmerge-staging" / "data" / "model.safetensors.part"
    victim = out.parent / "victim"
    victim.write_bytes(b"precious" * 1000)
    part.unlink()
    if kind == "hard":
        os.link(victim, part)
    elif kind == "soft":
        part.symlink_to(victim)
    else:
        part.mkdir()
    if kind == "directory":
        with pytest.raises(OutputError, match="model.safetensors.part"):
            merge(recipe, out, resume=True)
        merge(recipe, out)
    else:
        merge(recipe, out, resume=True)
    assert victim.read_bytes() == b"precious" * 1000
    assert verify(out).ok


def test_a_journal_that_is_a_pipe_is_not_waited_for(recipe, out, monkeypatch):
    interrupted(recipe, out, monkeypatch)
    journal = out.parent / ".out.fastmerge-staging" / "journal.jsonl"
    journal.unlink()
    os.mkfifo(journal)
    with pytest.raises(OutputError, match="expected a regular file, got a pipe"):
        merge(recipe, out, resume=True)
    merge(recipe, out)
    assert verify(out).ok


# Names of outputs.


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "expected the name"),
        (" ", "expected the name"),
        (".", "expected the name"),
        ("..", "expected the name"),
        ("/", "expected the name"),
        ("//", "expected the name"),
        ("./", "expected the name"),
        ("a/..", "expected the name"),
        ("a/.", "expected the name"),
        ("a\0b", "expected the name"),
        ("~no_such_user/o", "there is no such user"),
        ("~no_such_user", "there is no such user"),
        ("~", "home directory"),
        ("o\udcff", "UTF-8"),
        ("\udcff/o", "UTF-8"),
        ("n" * 256, "at most 255"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_are_no_output(recipe, tmp_path, monkeypatch, name, said, overwrite):
    here = tmp_path / "here"
    here.mkdir()
    save(here, {"model.safetensors": {"mine": tensor("F32", 2)}})
    monkeypatch.chdir(here)
    before = names(tmp_path), names(here)
    with pytest.raises(OutputError, match=said):
        merge(recipe, name, overwrite=overwrite)
    assert (names(tmp_path), names(here)) == before


@pytest.mark.parametrize("levels", [0, 1])
def test_the_current_directory_is_not_replaced_by_its_full_name(recipe, tmp_path, monkeypatch, levels):
    here = tmp_path / "here" / "deep"
    here.mkdir(parents=True)
    target = here.parents[levels - 1] if levels else here
    save(target, {"model.safetensors": {"mine": tensor("F32", 2)}})
    monkeypatch.chdir(here)
    with pytest.raises(OutputError, match="is or holds the current directory"):
        merge(recipe, target, overwrite=True)
    assert (target / "model.safetensors").exists()
