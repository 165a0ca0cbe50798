"""A model that is to be overwritten survives every failure; a merge of copies, which journals nothing, is kept."""

from __future__ import annotations

import errno
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest

from fastmerge.checkpoint import Writer, staging, system
from fastmerge.errors import OutputError
from tests.checkpoint.shim import FaultyIo, PosixIo, names, save, tensor, tree, write
from tests.faults.test_output import DATA, EXTRAS, PLAN, WANT, open_writer


@pytest.fixture
def out(tmp_path):
    return tmp_path / "home" / "out"


@pytest.fixture
def old(out):
    """An output of an earlier merge, on a filesystem that cannot swap names."""
    save(out, {"model-00009-of-00009.safetensors": {"a": tensor("U8", 3)}})
    return tree(out)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(system, "rename_exchange", lambda a, b: errno.EINVAL)


@pytest.fixture
def rows(tmp_path):
    """The whole output as copies from one input file: nothing of it is journalled."""
    source = tmp_path / "source"
    source.write_bytes(b"".join(DATA.values()))
    fd = os.open(source, os.O_RDONLY)
    at = np.cumsum([0, *map(len, DATA.values())]).tolist()
    places = [PLAN.places[name] for name in DATA]
    yield np.array([[fd, a, p.shard, p.offset, p.nbytes] for a, p in zip(at, places, strict=False)], np.int64)
    os.close(fd)


def merge(out: Path, rows: np.ndarray, *, error: type[BaseException] | None = None, **kwargs) -> Writer:
    """A whole merge; with ``error`` it ends before the commit."""
    with open_writer(out, **kwargs) as writer:
        if not writer.finished:
            writer.copy(rows)
        if error is not None:
            raise error
        for name, data in EXTRAS.items():
            writer.add(name, data)
        writer.commit()
    return writer


def fail(patch: pytest.MonkeyPatch, *victims: str, error: BaseException | None = None) -> None:
    """Renames of these names fail; without an error the process dies there."""
    rename = Path.rename

    def call(self, target):
        if self.name in victims:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error
        return rename(self, target)

    patch.setattr(Path, "rename", call)


def kill_between_renames(out: Path, rows: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        try:
            fail(pytest.MonkeyPatch(), "data")
            merge(out, rows, overwrite=True)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert not out.exists()


def left(out: Path) -> tuple[dict[str, bytes], list[str]]:
    """The output, and all that lies in its directory."""
    return tree(out), names(out.parent)


EIO = OSError(errno.EIO, os.strerror(errno.EIO))
anew_or_resumed = pytest.mark.parametrize("resume", [False, True], ids=["anew", "resume"])


@pytest.mark.parametrize("error", [EIO, KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.usefixtures("plain")
def test_the_second_rename_fails(out, old, rows, error):
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, "data", error=error)
        with pytest.raises(OutputError if error is EIO else KeyboardInterrupt):
            merge(out, rows, overwrite=True)
    assert tree(out) == old
    assert names(staging.staging_path(out)) == ["data", "journal.jsonl", "lock"]
    merge(out, rows, overwrite=True, resume=True)
    assert left(out) == (WANT, ["out"])


@pytest.mark.usefixtures("plain")
@anew_or_resumed
def test_the_way_back_fails_too(out, old, rows, resume):
    with pytest.MonkeyPatch.context() as patch:
        fail(patch, "data", "old", error=EIO)
        with pytest.raises(OutputError, match="Input/output error"):
            merge(out, rows, overwrite=True)
        # Whatever comes next, the only copy is not removed while it cannot be put back.
        for again in (False, True):
            with pytest.raises(OutputError, match="Input/output error"):
                open_writer(out, overwrite=True, resume=again)
        lock = staging.Staging(out, {})
        with pytest.raises(OSError, match="Input/output error"):
            lock.clear()
        lock.release(remove=True)
        assert not out.exists()
        assert tree(staging.staging_path(out) / "old") == old
    with open_writer(out, overwrite=True, resume=resume):
        assert tree(out) == old
    assert tree(out) == old
    merge(out, rows, overwrite=True, resume=resume)
    assert left(out) == (WANT, ["out"])


@pytest.mark.usefixtures("plain")
@anew_or_resumed
def test_killed_between_the_renames(out, old, rows, resume):
    kill_between_renames(out, rows)
    with pytest.raises(OutputError, match="exists; --overwrite"):
        open_writer(out, resume=resume)
    assert tree(out) == old
    merge(out, rows, overwrite=True, resume=resume)
    assert left(out) == (WANT, ["out"])


@pytest.mark.usefixtures("plain")
@anew_or_resumed
@pytest.mark.parametrize("copied", [0, 2])
def test_killed_between_the_renames_and_interrupted_again(out, old, rows, resume, copied):
    kill_between_renames(out, rows)
    with open_writer(out, overwrite=True, resume=resume) as writer:
        assert tree(out) == old
        writer.copy(rows[:copied])
    assert tree(out) == old
    merge(out, rows, overwrite=True, resume=True)
    assert left(out) == (WANT, ["out"])


@pytest.mark.usefixtures("plain")
def test_the_displaced_output_is_the_same_merge(out, rows):
    """Restored by a resume without --overwrite, it is finished already, and nothing else is left."""
    with open_writer(out) as writer:
        writer.copy(rows)
        writer.add("merge_report.json", b'{"fingerprint": "f"}')
        writer.commit()
    before = tree(out)
    kill_between_renames(out, rows)
    assert merge(out, rows, resume=True).finished
    assert left(out) == (before, ["out"])


# Merges that only copy.


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_merge_of_copies_is_kept_for_resume(out, rows, error):
    with pytest.raises(error):
        merge(out, rows[:2], error=error)
    root = staging.staging_path(out)
    assert names(root) == ["data", "journal.jsonl", "lock"]
    inode = (root / "data").stat().st_ino
    # Interrupted again before it came to anything: still there.
    with open_writer(out, resume=True):
        pass
    assert (root / "data").stat().st_ino == inode
    merge(out, rows, resume=True)
    assert out.stat().st_ino == inode
    assert left(out) == (WANT, ["out"])


def test_what_was_written_but_not_made_durable_is_kept(out, monkeypatch):
    with open_writer(out) as writer:
        name, place = next(iter(PLAN.places.items()))
        write(writer, [(place.shard, place.offset, DATA[name])])

        def fdatasync(fd):
            raise EIO

        monkeypatch.setattr(os, "fdatasync", fdatasync)
    assert names(staging.staging_path(out)) == ["data", "journal.jsonl", "lock"]


def test_a_copy_of_nothing_leaves_nothing(out, rows):
    class Full(FaultyIo):
        def read_some(self, table, row, done):
            return PosixIo().read_some(table, row, done)

    headers = sum(len(s.header) for s in PLAN.shards)
    with open_writer(out, io=Full(fail=errno.ENOSPC, after=headers)) as writer:
        writer.copy(rows[:0])
        with pytest.raises(OutputError, match="No space left"):
            writer.copy(rows)
    assert names(out.parent) == []
