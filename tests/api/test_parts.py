"""One merge by several processes: each writes a part, one publishes."""

import subprocess
import sys
from dataclasses import replace

import pytest

import fastmerge as fm
from fastmerge.checkpoint import Writer
from fastmerge.checkpoint.part_writer import PartWriter
from fastmerge.checkpoint.parts import Part
from fastmerge.checkpoint.staging import staging_path
from fastmerge.errors import OutputError, RecipeError
from fastmerge.planning.parts import BLOCK, share
from tests import tiny

SHARD = "200kB"
HERE = {"shard_size": SHARD, "memory": "64MB"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"))


def texts(paths):
    return {
        "linear": tiny.recipe(paths, "linear", base=None, weight=0.3),
        "ties": tiny.recipe(paths, "ties", weight=0.5, density=0.3),
        "whole": tiny.recipe(paths, "ties", extra="preset: paper", weight=0.5, density=0.3),
        "stages": f"name: first\n{tiny.recipe(paths, 'ties', weight=0.5, density=0.3)}---\n"
        + tiny.recipe({**paths, "a": "first"}, "linear", base=None, weight=0.4),
    }


def tree(directory):
    return {
        p.relative_to(directory): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != "merge_report.json"
    }


@pytest.fixture(scope="module")
def wanted(paths, tmp_path_factory):
    """What one process writes, by recipe: the directory has the output's name, which its card tells."""
    root = tmp_path_factory.mktemp("wanted")
    for name, text in texts(paths).items():
        fm.merge(text, root / name / "out", **HERE)
    return {name: root / name / "out" for name in texts(paths)}


@pytest.mark.parametrize("name", ["linear", "ties", "whole", "stages"])
@pytest.mark.parametrize("count", [2, 5])
def test_parts_in_any_order_are_the_whole(paths, wanted, tmp_path, name, count):
    out, text = tmp_path / "out", texts(paths)[name]
    for number in (*range(2, count + 1), 1):
        assert not out.exists()
        fm.merge(text, out, part=(number, count), **HERE)
    assert tree(out) == tree(wanted[name])
    assert not staging_path(out).exists()
    one, several = fm.Report.load(wanted[name]), fm.Report.load(out)
    assert several.bytes_written == one.bytes_written
    assert several.account == one.account
    assert several.details["checksums"] != []
    shares = [share(fm.plan(text, shard_size=SHARD).ops, Part(n, count)) for n in range(1, count + 1)]
    passes = sum(1 for s in shares if s.ops) if name == "whole" else 1
    assert several.bytes_read == passes * one.bytes_read


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 500])
def test_parts_hold_every_op_once_and_share_no_block(paths, count):
    planned = fm.plan(texts(paths)["ties"], shard_size=200_000)
    shares = [share(planned.ops, Part(n, count)) for n in range(1, count + 1)]
    assert [op for one in shares for op in one.ops] == list(planned.ops)
    blocks = [{(s, b) for s, o, n in one.ranges for b in range(o // BLOCK, -(-(o + n) // BLOCK))} for one in shares]
    assert sum(map(len, blocks)) == len(set().union(*blocks))
    sizes = [sum(n for _, _, n in one.ranges) for one in shares]
    largest = max(op.spec.out_dtype.nbytes(op.spec.numel) for op in planned.ops)
    assert max(sizes) <= sum(sizes) / count + 2 * largest + BLOCK


def test_methods_for_the_whole_model_read_all_of_it_in_each_part(paths):
    planned = fm.plan(texts(paths)["whole"], shard_size=200_000)
    one = share(planned.ops, Part(1, 3))
    assert set(one.ops) == set(planned.ops)
    assert sum(n for _, _, n in one.ranges) < planned.layout.total / 2


def test_processes_side_by_side(paths, wanted, tmp_path):
    (tmp_path / "recipe.yml").write_text(texts(paths)["ties"])
    command = [sys.executable, "-m", "fastmerge", "merge", "recipe.yml", "out", "--shard-size", SHARD, "--quiet"]
    running = [
        subprocess.Popen([*command, "--part", f"{i}/4"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for i in range(1, 5)
    ]
    assert [(p.communicate()[1], p.returncode) for p in running] == [("", 0)] * 4
    assert tree(tmp_path / "out") == tree(wanted["ties"])


def test_a_part_that_is_lost_is_written_by_whoever_resumes(paths, wanted, tmp_path):
    out, text = tmp_path / "out", texts(paths)["ties"]
    for number in (1, 3):
        fm.merge(text, out, part=(number, 3), **HERE)
    fm.merge(text, out, resume=True, **HERE)
    assert tree(out) == tree(wanted["ties"])


def test_a_part_that_was_interrupted_goes_on_from_its_journal(paths, wanted, tmp_path, monkeypatch):
    out, text = tmp_path / "out", texts(paths)["linear"]
    real, calls, number = PartWriter.write, [], 1

    def failing(self, table):
        calls.append(len(table))
        if len(calls) == 2 and number == 1:
            raise OutputError("the power went")
        real(self, table)

    monkeypatch.setattr(PartWriter, "write", failing)
    monkeypatch.setattr("fastmerge.runtime.placement.workers", lambda _: 1)
    monkeypatch.setattr("fastmerge.runtime.placement.UNIT_ELEMENTS", 1 << 15)
    with pytest.raises(OutputError, match="the power went"):
        fm.merge(text, out, part=(1, 2), **HERE)
    again = fm.merge(text, out, part=(1, 2), **HERE)
    whole = sum(n for _, _, n in share(fm.plan(text, shard_size=SHARD).ops, Part(1, 2)).ranges)
    assert 0 < again.bytes_written < whole
    number = 2
    calls.clear()
    same = fm.merge(text, out, part="1/2", **HERE)
    assert calls == []
    assert same == replace(again, seconds=same.seconds)
    fm.merge(text, out, part=(2, 2), **HERE)
    assert tree(out) == tree(wanted["linear"])


def test_a_finished_output_is_left_alone(paths, tmp_path):
    out, text = tmp_path / "out", texts(paths)["linear"]
    fm.merge(text, out, **HERE)
    shard = out / "model-00001-of-00002.safetensors"

    def file():
        about = shard.stat()
        return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns

    before = file()
    assert fm.merge(text, out, part=(2, 2), **HERE).fingerprint == fm.Report.load(out).fingerprint
    assert file() == before
    assert not staging_path(out).exists()
    with pytest.raises(OutputError, match="exists; --overwrite replaces it"):
        fm.merge(texts(paths)["ties"], out, part=(1, 2), **HERE)
    for number in (1, 2):
        fm.merge(texts(paths)["ties"], out, part=(number, 2), overwrite=True, **HERE)
    assert "ties" in (out / "mergekit_config.yml").read_text()


def opened(paths, out, name="linear", number=1, **how):
    planned = fm.plan(texts(paths)[name], shard_size=200_000)
    mine = share(planned.ops, Part(number, 2)).ranges
    return PartWriter(out, planned.layout, part=Part(number, 2), mine=mine, fingerprint=name, **how)


def test_who_may_run_beside_whom(paths, tmp_path):
    out = tmp_path / "out"
    with opened(paths, out):
        with pytest.raises(OutputError, match="part 1/2: already running"):
            opened(paths, out)
        with opened(paths, out, number=2):
            pass
        planned = fm.plan(texts(paths)["linear"], shard_size=200_000)
        with pytest.raises(OutputError, match="already running"):
            Writer(out, planned.layout, fingerprint="linear", resume=True)
        with pytest.raises(OutputError, match="belongs to another recipe"):
            opened(paths, out, name="ties", number=2)
    with Writer(out, planned.layout, fingerprint="linear"), pytest.raises(OutputError, match="already running"):
        opened(paths, out)


def test_without_locks_owners_are_files(paths, tmp_path, monkeypatch):
    def flock(fd, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    out = tmp_path / "out"
    planned = fm.plan(texts(paths)["linear"], shard_size=200_000)
    with opened(paths, out):
        with pytest.raises(OutputError, match="already running"):
            opened(paths, out)
        with pytest.raises(OutputError, match="already running: a part of it"):
            Writer(out, planned.layout, fingerprint="linear")
        with opened(paths, out, number=2):
            pass
    with Writer(out, planned.layout, fingerprint="linear", resume=True):
        pass
    assert not staging_path(out).exists()


def test_what_another_merge_left_is_discarded_or_kept(paths, wanted, tmp_path):
    out = tmp_path / "out"
    fm.merge(texts(paths)["linear"], out, part=(1, 2), **HERE)
    with pytest.raises(OutputError, match="belongs to another recipe"):
        fm.merge(texts(paths)["ties"], out, part=(1, 2), resume=True, **HERE)
    with pytest.raises(OutputError, match="another recipe"):
        fm.merge(texts(paths)["ties"], out, resume=True, **HERE)
    for number in (1, 2):
        fm.merge(texts(paths)["ties"], out, part=(number, 2), **HERE)
    assert tree(out) == tree(wanted["ties"])


def test_values_that_are_not_finite_are_counted_over_all_parts(tmp_path):
    state = tiny.state(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name].view(-1)[3] = float("nan")
    models = {n: tiny.write(tmp_path / n, state) for n in ("a", "b")}
    text = tiny.recipe(models, "linear", names=("a", "b"), base=None, weight=0.5)
    for number in (1, 2, 3):
        report = fm.merge(text, tmp_path / "out", part=(number, 3), **HERE)
    assert report.nonfinite == {"model.embed_tokens.weight": 1, "lm_head.weight": 1}
    assert len([w for w in report.warnings if "NaN" in w]) == 2


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "1/0", "1/9999999", ""])
def test_odd_parts_are_refused(paths, tmp_path, text):
    with pytest.raises(RecipeError, match="expected NUMBER/COUNT"):
        fm.merge(texts(paths)["linear"], tmp_path / "out", part=text)
    assert [*tmp_path.iterdir()] == []


def test_a_part_is_not_committed(paths, tmp_path):
    with opened(paths, tmp_path / "out") as writer:
        with pytest.raises(ValueError, match="finished, not committed"):
            writer.commit()
        with pytest.raises(OutputError, match="part 1/2: not written: model-00001"):
            writer.finish("{}")
