"""kill -9 at every step of a merge, then resume: the target is absent or old until it is whole, and the bytes agree."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastmerge.checkpoint import staging
from fastmerge.errors import OutputError
from tests.checkpoint.shim import chunks, save, tensor, tree, write
from tests.faults.kill import killed, no_waiting_for_the_disk
from tests.faults.test_output import DATA, PLAN, WANT, open_writer, run


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    no_waiting_for_the_disk(monkeypatch)


@pytest.mark.parametrize(
    "words",
    [(), ("overwrite",), ("overwrite", "plain")],
    ids=["fresh", "exchange", "two renames"],
)
def test_kill_at_every_step(tmp_path, words):
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kill", str(tmp_path), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    steps, resumed = json.loads(done.stdout)
    assert steps > 30
    assert resumed > 8


def test_kill_again_and_again(tmp_path):
    """The same output, killed a little later every time: work is never lost for good."""
    out = tmp_path / "out"
    step = 10
    while killed(out, step, resume=True):
        assert not out.exists() or tree(out) == WANT
        step += 3
    assert tree(out) == WANT


def test_starting_anew_puts_a_displaced_output_back(tmp_path, monkeypatch):
    """Killed between the two renames; without --resume and --overwrite the old output is there again."""
    out = tmp_path / "out"
    save(out, {"model.safetensors": {"old": tensor("U8", 3)}})
    old = tree(out)
    rename = Path.rename

    def die_on_the_second(self, target):
        if self.name == "data":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", die_on_the_second)
    assert killed(out, -1, plain=True, overwrite=True)
    monkeypatch.undo()
    assert not out.exists()
    with pytest.raises(OutputError, match="exists; --overwrite"):
        open_writer(out)
    assert tree(out) == old


def test_a_journal_cut_short_or_damaged(tmp_path):
    pieces = chunks(PLAN, DATA)
    for damage in ("cut", "garbage", "empty", "gone", "foreign"):
        out = tmp_path / damage
        with open_writer(out) as writer:
            for s, o, p in pieces:
                write(writer, [(s, o, p)])
                writer.sync()
        journal = staging.staging_path(out) / "journal.jsonl"
        lines = journal.read_bytes().splitlines(keepends=True)
        assert len(lines) == len(pieces) + 1
        content, kept = {
            "cut": (b"".join(lines[:5]) + lines[5][:-4], 4),
            "garbage": (b"".join(lines[:5]) + b'{"s":0}\n' + b"".join(lines[5:]), 4),
            "empty": (b"", 0),
            "gone": (None, 0),
            "foreign": (b'{"fastmerge":99}\n' + b"".join(lines[1:]), 0),
        }[damage]
        journal.unlink() if content is None else journal.write_bytes(content)
        with open_writer(out, resume=True) as writer:
            assert sum(writer.done(s, o, len(p)) for s, o, p in pieces) == kept
        run(out, resume=True)
        assert tree(out) == WANT


def test_bytes_that_changed_under_the_journal_are_written_again(tmp_path):
    out = tmp_path / "out"
    pieces = chunks(PLAN, DATA)
    with open_writer(out) as writer:
        for piece in pieces:
            write(writer, [piece])
    part = staging.staging_path(out) / "data" / f"{PLAN.shards[1].name}.part"
    content = bytearray(part.read_bytes())
    content[pieces_of(1)[0][1] + 3] ^= 1
    content[10] ^= 1
    part.write_bytes(content)
    (staging.staging_path(out) / "data" / "stray.safetensors").write_bytes(b"x")
    with open_writer(out, resume=True) as writer:
        missing = [p for p in pieces if not writer.done(p[0], p[1], len(p[2]))]
        assert missing == pieces_of(1)[:1]
    run(out, resume=True)
    assert tree(out) == WANT


def pieces_of(shard: int):
    return [p for p in chunks(PLAN, DATA) if p[0] == shard]


def test_a_journal_of_another_merge(tmp_path):
    out = tmp_path / "out"
    with open_writer(out) as writer:
        write(writer, chunks(PLAN, DATA)[:2])
    with pytest.raises(OutputError, match="interrupted run of another recipe"):
        run(out, resume=True, fingerprint="other")
    assert run(out, resume=True).resumed > 0
    assert tree(out) == WANT


def test_a_new_run_discards_the_interrupted_one(tmp_path):
    out = tmp_path / "out"
    with open_writer(out) as writer:
        write(writer, chunks(PLAN, DATA)[:2])
    assert run(out, fingerprint="other").resumed == 0
    assert tree(out) == WANT


def test_resuming_what_is_finished_does_nothing(tmp_path):
    out = tmp_path / "out"
    with open_writer(out) as writer:
        write(writer, chunks(PLAN, DATA))
        writer.add("merge_report.json", b'{"details": {"fingerprint": "f"}}')
        writer.commit()
    before = tree(out)
    writer = run(out, resume=True)
    assert writer.finished
    assert writer.checksums() == []
    assert tree(out) == before
    with pytest.raises(OutputError, match="exists"):
        run(out, resume=True, fingerprint="other")


def test_a_journal_that_meets_a_full_disk_stays_readable(tmp_path, monkeypatch):
    out = tmp_path / "out"
    pieces = chunks(PLAN, DATA)
    real = os.write

    def half(fd, data):
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data[:10])

    with open_writer(out) as writer:
        write(writer, pieces[:2])
        writer.sync()
        write(writer, pieces[2:4])
        monkeypatch.setattr(os, "write", half)
        with pytest.raises(OutputError, match="No space left"):
            writer.sync()
        monkeypatch.setattr(os, "write", real)
        write(writer, pieces[4:6])
    with open_writer(out, resume=True) as writer:
        assert [writer.done(s, o, len(p)) for s, o, p in pieces[:7]] == [True, True, False, False, True, True, False]
    run(out, resume=True)
    assert tree(out) == WANT
