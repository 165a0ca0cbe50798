"""Outputs in trouble: full disks, existing directories, other processes, missing features."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastmerge.checkpoint import Writer, staging, system
from fastmerge.errors import CheckpointError, OutputError
from tests.checkpoint.shim import FaultyIo, PosixIo, chunks, example_layout, expected, names, save, tensor, tree, write

EXTRAS = {"config.json": b"{}\n"}
PLAN, DATA = example_layout()
WANT = expected(PLAN, DATA, EXTRAS)


def open_writer(out, *, io=None, fingerprint="f", **kwargs) -> Writer:
    return Writer(out, PLAN, fingerprint=fingerprint, io=io or PosixIo(), **kwargs)


def run(out, *, io=None, **kwargs) -> Writer:
    """A whole merge: what is not done is written, synced now and then, and committed."""
    with open_writer(out, io=io, **kwargs) as writer:
        for i, (shard, offset, piece) in enumerate(chunks(PLAN, DATA, 3000)):
            if not writer.done(shard, offset, len(piece)):
                write(writer, [(shard, offset, piece)])
            if i % 3 == 2:
                writer.sync()
        for name, data in EXTRAS.items():
            writer.add(name, data)
        writer.commit()
    return writer


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def old(out):
    """An output of an earlier merge, with files that the new one does not have."""
    save(out, {"model-00009-of-00009.safetensors": {"a": tensor("U8", 3)}})
    (out / "sub").mkdir()
    (out / "sub" / "x").write_bytes(b"x")
    return {p.name for p in out.iterdir()}


# A full disk.


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_from_the_start(out, monkeypatch, code):
    monkeypatch.setattr(system, "fallocate", lambda fd, n: code)
    with pytest.raises(OutputError, match=f"{PLAN.total} bytes needed"):
        open_writer(out)
    assert names(out.parent) == []


def test_a_disk_that_is_too_small_without_fallocate(out, monkeypatch):
    monkeypatch.setattr(system, "fallocate", lambda fd, n: errno.EOPNOTSUPP)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((1, 100, 9, 9, 9, 1, 1, 1, 0, 255)))
    with pytest.raises(OutputError, match=f"not enough space: {PLAN.total} bytes needed, 900 free"):
        open_writer(out)
    assert names(out.parent) == []


def test_a_disk_that_fills_up_at_any_byte(out):
    """ENOSPC at byte k for k all over the run: headers, data, config, index. Then room again, and resume."""
    total = sum(len(content) for content in WANT.values())
    for k in [0, 1, 4096, 9000, *range(13_000, total, 1999), total - 1]:
        with pytest.raises(OutputError, match="No space left on device: at least"):
            run(out, io=FaultyIo(fail=errno.ENOSPC, after=k), resume=True)
        assert not out.exists()
    assert run(out, resume=True).resumed > 10_000
    assert tree(out) == WANT
    assert names(out.parent) == ["out"]


def test_a_lost_write_voids_the_shard(out, monkeypatch):
    pieces = chunks(PLAN, DATA)
    writer = open_writer(out)
    write(writer, pieces)
    writer.sync()
    write(writer, pieces[:1])
    real = os.fdatasync
    victim = f"{PLAN.shards[0].name}.part"

    def fdatasync(fd):
        if Path(f"/proc/self/fd/{fd}").readlink().name == victim:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(OutputError, match=f"{PLAN.shards[0].name}: fdatasync failed"):
        writer.sync()
    for call in (writer.sync, writer.commit, lambda: write(writer, pieces[:1])):
        with pytest.raises(OutputError, match="fdatasync failed"):
            call()
    writer.abort()
    monkeypatch.undo()
    with open_writer(out, resume=True) as again:
        assert [again.done(s, o, len(p)) for s, o, p in pieces] == [s != 0 for s, _, _ in pieces]
    run(out, resume=True)
    assert tree(out) == WANT


# Outputs that must not be touched.


def test_an_existing_output_is_refused(out, old):
    for directory in (out, out.parent / "empty"):
        directory.mkdir(exist_ok=True)
        with pytest.raises(OutputError, match="exists; --overwrite replaces it"):
            open_writer(directory)
    assert {p.name for p in out.iterdir()} == old


def test_overwrite_swaps_and_leaves_nothing_stale(out, old):
    with open_writer(out, overwrite=True) as writer:
        write(writer, chunks(PLAN, DATA))
        assert {p.name for p in out.iterdir()} == old
        writer.add("config.json", EXTRAS["config.json"])
        writer.commit()
    assert tree(out) == WANT
    assert names(out.parent) == ["out"]


def test_overwrite_without_the_exchange_call(out, old, monkeypatch):
    monkeypatch.setattr(system, "rename_exchange", lambda a, b: errno.EINVAL)
    assert run(out, overwrite=True).features["rename_exchange"] is False
    assert tree(out) == WANT
    assert names(out.parent) == ["out"]


def test_a_fresh_output_without_the_noreplace_call(out, monkeypatch):
    monkeypatch.setattr(system, "rename_new", lambda a, b: errno.ENOSYS)
    assert run(out).features["rename_noreplace"] is False
    assert tree(out) == WANT


def test_overwrite_replaces_models_only(out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds no \*.safetensors file"):
        open_writer(out, overwrite=True)
    assert (out / "thesis.tex").exists()


def test_an_output_that_appears_meanwhile_is_kept(out):
    with open_writer(out) as writer:
        write(writer, chunks(PLAN, DATA))
        out.mkdir()
        (out / "x").write_text("x")
        with pytest.raises(OutputError, match="appeared while the merge ran"):
            writer.commit()
    assert names(out) == ["x"]
    (out / "x").unlink()
    out.rmdir()
    assert run(out, resume=True).resumed > 0
    assert tree(out) == WANT


def test_links_files_and_odd_names(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    for name, said in (("link", "symbolic link"), ("dangling", "symbolic link"), ("file", "not a directory")):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=said):
                open_writer(tmp_path / name, overwrite=overwrite)
    with pytest.raises(OutputError, match="name of a new directory"):
        open_writer("/", overwrite=True)
    with pytest.raises(OutputError, match=r"file: "):
        open_writer(tmp_path / "file" / "out")
    long = tmp_path / ("x" * 250)
    run(long)
    assert tree(long) == WANT


def test_inputs_are_not_outputs(tmp_path):
    model = save(tmp_path / "model", {"model.safetensors": {"a": tensor("U8", 1)}})
    (tmp_path / "alias").symlink_to(tmp_path)
    for given in (model, model / "model.safetensors", tmp_path / "alias" / "model"):
        for target in (model, tmp_path / "alias" / "model"):
            with pytest.raises(OutputError, match="input"):
                open_writer(target, overwrite=True, inputs=[given])
    with pytest.raises(OutputError, match="holds the input"):
        open_writer(tmp_path, overwrite=True, inputs=[model])
    assert (model / "model.safetensors").exists()


def test_the_hub_cache_is_not_an_output(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="inside the Hugging Face cache"):
        open_writer(tmp_path / "models--a--b" / "snapshots" / "x")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(OutputError, match="inside the Hugging Face cache"):
        open_writer(tmp_path / "hub" / "out")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(OutputError, match="inside the Hugging Face cache"):
        open_writer(tmp_path / "hub" / "out")
    assert names(tmp_path) == []


def test_permissions_follow_the_umask(out):
    before = os.umask(0o022)
    try:
        run(out)
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o644}


# Two processes.

HOLD = """
import sys
from tests.faults.test_output import open_writer
writer = open_writer(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


def test_two_processes_with_one_output(out):
    command = [sys.executable, "-c", HOLD, str(out)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "ready\n"
        for kwargs in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(OutputError, match=f"already running: process {other.pid} on "):
                open_writer(out, **kwargs)
        other.kill()
    run(out, resume=True)
    assert tree(out) == WANT


def test_one_process_with_one_output_twice(out):
    with open_writer(out), pytest.raises(OutputError, match="already running"):
        open_writer(out)


def test_a_lock_without_flock(out, monkeypatch):
    def flock(fd, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with open_writer(out) as writer:
        assert writer.features == {"flock": False}
        with pytest.raises(OutputError, match="already running: process"):
            open_writer(out)
        write(writer, chunks(PLAN, DATA)[:1])
    owner = staging.staging_path(out) / "owner"
    assert not owner.exists()
    owner.write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename}))
    run(out, resume=True)
    assert tree(out) == WANT
    other = out.with_name("other")
    owner = staging.staging_path(other) / "owner"
    owner.parent.mkdir()
    owner.write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(OutputError, match=f"process 1 on elsewhere writes it; if it is not, remove {owner}"):
        open_writer(other)


# Filesystems that lack something.


def test_without_any_feature(out, monkeypatch):
    monkeypatch.setattr(system, "fallocate", lambda fd, n: errno.EOPNOTSUPP)
    monkeypatch.setattr(system, "rename_new", lambda a, b: errno.EINVAL)
    for name in ("_fallocate", "_renameat2", "_sync_file_range"):
        monkeypatch.setattr(system, name, None)
    writer = run(out)
    assert writer.features == {"fallocate": False, "rename_noreplace": False}
    assert tree(out) == WANT


def test_copies_that_the_kernel_refuses(out, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "direct_is_good", lambda fd: False)
    source = tmp_path / "source"
    source.write_bytes(b"".join(DATA.values()))
    fd = os.open(source, os.O_RDONLY)
    rows = []
    for name, place in PLAN.places.items():
        rows.append([fd, sum(len(DATA[n]) for n in list(DATA)[: list(DATA).index(name)]), place.shard, place.offset])
        rows[-1].append(place.nbytes)

    class NoCopy(FaultyIo):
        def copy_some(self, table, row, done):
            return row, done, self.code

    try:
        for code in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, 0):
            io = NoCopy(7)
            io.code = code
            with open_writer(out, io=io) as writer:
                writer.copy(np.array(rows))
                assert writer.features == {"copy_file_range": False}
                # However they were copied, they have checksums and are journalled.
                assert sum(n for _, _, n, _ in writer.checksums()) == sum(len(d) for d in DATA.values())
                writer.add("config.json", EXTRAS["config.json"])
                writer.commit()
            assert tree(out) == WANT
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        os.truncate(source, 100)
        for primitive in (PosixIo(), io):
            with (
                open_writer(out, io=primitive) as writer,
                pytest.raises(CheckpointError, match=f"{source}:100: the file shrank"),
            ):
                writer.copy(np.array(rows))
    finally:
        os.close(fd)


def test_output_on_another_filesystem(tmp_path):
    other = Path("/dev/shm")  # noqa: S108  a second filesystem, not a place for secrets
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one filesystem only")
    out = other / f"fastmerge-test-{os.getpid()}"
    source = tmp_path / "source"
    source.write_bytes(DATA["layer.1.weight"])
    place = PLAN.places["layer.1.weight"]
    fd = os.open(source, os.O_RDONLY)
    try:
        with open_writer(out) as writer:
            writer.copy(np.array([[fd, 0, place.shard, place.offset, place.nbytes]]))
            write(writer, chunks(PLAN, DATA))
            writer.add("config.json", EXTRAS["config.json"])
            writer.commit()
        assert tree(out) == WANT
    finally:
        os.close(fd)
        for path in sorted(out.glob("*")):
            path.unlink()
        if out.exists():
            out.rmdir()


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OutputError, match="Permission denied"):
        open_writer(tmp_path / "out")


def test_inputs_are_never_written(tmp_path, out):
    model = save(tmp_path / "model", {"model.safetensors": {"a": tensor("U8", 1)}})
    before = {p.name: p.stat().st_mtime_ns for p in (model, *model.iterdir())}
    run(out, inputs=[model])
    assert {p.name: p.stat().st_mtime_ns for p in (model, *model.iterdir())} == before
