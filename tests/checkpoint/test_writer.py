"""The writer without faults: any order, any thread, copies, extras, resume."""

from __future__ import annotations

import os
import random
import stat
import threading

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fastmerge.checkpoint import Writer, layout, shards, system
from fastmerge.checkpoint import writer as writers
from fastmerge.checkpoint.ranges import Ranges
from fastmerge.dtypes import F32
from fastmerge.errors import OutputError
from tests.checkpoint.shim import FaultyIo, PosixIo, chunks, example_layout, expected, names, primitives, tree, write

EXTRAS = {"config.json": b"{}\n", "empty.txt": b""}


@pytest.fixture(params=primitives())
def io(request):
    return primitives()[request.param]


def finish(writer, extras=EXTRAS):
    for name, data in extras.items():
        writer.add(name, data)
    writer.commit()


@pytest.mark.parametrize("count", [1, 3])
def test_any_order(tmp_path, io, count):
    plan, data = example_layout(count)
    pieces = chunks(plan, data)
    random.Random(0).shuffle(pieces)
    out = tmp_path / "deep" / "out"
    with Writer(out, plan, fingerprint="f", io=io) as writer:
        for i in range(0, len(pieces), 3):
            write(writer, pieces[i : i + 3])
            if i % 2:
                writer.sync()
        assert not out.exists()
        finish(writer)
    assert tree(out) == expected(plan, data, EXTRAS)
    assert names(out.parent) == ["out"]
    assert writer.finished
    for shard in plan.shards:
        assert (out / shard.name).stat().st_size == shard.size


def test_safetensors_reads_it(tmp_path):
    plan = layout([("a", F32, (3, 5)), ("b", F32, ())], shard_size=1e9, metadata={"recipe": "{}"})
    values = np.arange(16, dtype=np.float32)
    with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer:
        write(writer, [(0, plan.places["a"].offset, values.tobytes())])
        writer.commit()
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert np.array_equal(loaded["a"], values[:15].reshape(3, 5))
    assert loaded["b"] == 15


def test_many_threads_and_a_syncer(tmp_path):
    plan, data = example_layout()
    pieces = chunks(plan, data, 50)
    over = threading.Event()
    with Writer(tmp_path / "out", plan, fingerprint="f", io=FaultyIo(3)) as writer:

        def work(k):
            for piece in pieces[k::4]:
                write(writer, [piece])

        def sync():
            while not over.wait(0.001):
                writer.sync()

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        syncer = threading.Thread(target=sync)
        for t in (*threads, syncer):
            t.start()
        for t in threads:
            t.join()
        over.set()
        syncer.join()
        assert all(writer.done(s, o, len(p)) for s, o, p in pieces)
        finish(writer)
    assert tree(tmp_path / "out") == expected(plan, data, EXTRAS)


@pytest.mark.parametrize("direct", [False, True])
def test_copies(tmp_path, io, direct, monkeypatch):
    """In the kernel, and past the page cache; pieces and buffers are made so small that each tensor has several."""
    if not direct:
        monkeypatch.setattr(system, "direct_is_good", lambda fd: False)
    monkeypatch.setattr(shards, "DIRECT_BYTES", 1)
    monkeypatch.setattr(shards, "_BUFFER", 2 * system.PAGE)
    monkeypatch.setattr(writers, "COPY_PIECE", 3 * system.PAGE)
    plan = layout(
        [("a", F32, (9 * 1024 + 5,)), ("b", F32, (3,)), ("c", F32, (4 * 1024,))], shard_size=60_000, metadata={}
    )
    data = {n: np.random.default_rng(i).bytes(plan.places[n].nbytes) for i, n in enumerate("abc")}
    source = tmp_path / "source"
    source.write_bytes(b"xyz" + b"".join(data.values()))
    fd = os.open(source, os.O_RDONLY)
    try:
        rows, at = [], 3
        for name, place in plan.places.items():
            at = 3 + sum(len(data[n]) for n in list(data)[: list(data).index(name)])
            rows.append([fd, at, place.shard, place.offset, place.nbytes])
        with Writer(tmp_path / "out", plan, fingerprint="f", io=io) as writer:
            writer.copy(np.array(rows, np.int64))
            sums = writer.checksums()
            finish(writer)
    finally:
        os.close(fd)
    assert tree(tmp_path / "out") == expected(plan, data, EXTRAS)
    assert sum(n for _, _, n, _ in sums) == sum(map(len, data.values()))
    for name, offset, nbytes, x in sums:
        content = (tmp_path / "out" / name).read_bytes()[offset : offset + nbytes]
        assert xxhash.xxh3_64_hexdigest(content) == x


def test_checksums_cover_what_was_written(tmp_path):
    plan, data = example_layout()
    with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer:
        write(writer, chunks(plan, data))
        write(writer, chunks(plan, data)[:2])
        sums = writer.checksums()
        finish(writer)
    assert sum(n for _, _, n, _ in sums) == sum(len(d) for d in data.values())
    for name, offset, nbytes, x in sums:
        content = (tmp_path / "out" / name).read_bytes()[offset : offset + nbytes]
        assert xxhash.xxh3_64_hexdigest(content) == x


def test_resume_skips_what_is_journalled_and_intact(tmp_path):
    plan, data = example_layout()
    pieces = chunks(plan, data)
    writer = Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo())
    write(writer, pieces[:4])
    writer.sync()
    write(writer, pieces[4:6])
    writer.abort()
    writer.abort()
    with Writer(tmp_path / "out", plan, fingerprint="f", resume=True, io=PosixIo()) as again:
        todo = [p for p in pieces if not again.done(p[0], p[1], len(p[2]))]
        assert todo == pieces[6:]
        assert again.resumed == sum(len(p[2]) for p in pieces[:6])
        write(again, todo)
        finish(again)
    assert tree(tmp_path / "out") == expected(plan, data, EXTRAS)


def test_a_run_that_stored_nothing_leaves_nothing(tmp_path):
    plan, _ = example_layout()
    with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()):
        pass
    assert names(tmp_path) == []


def test_commit_refuses_holes(tmp_path):
    plan, data = example_layout()
    with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer:
        write(writer, chunks(plan, data)[:-1])
        with pytest.raises(OutputError, match=r"not written: model-0000\d-of-0000\d.safetensors: bytes \d+ to \d+"):
            writer.commit()
    assert not (tmp_path / "out").exists()


def test_rows_outside_the_data_are_refused(tmp_path):
    plan, _ = example_layout()
    with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer:
        for row in ([0, 0, 0, 1], [0, plan.shards[0].size, 0, 1], [9, 4096, 0, 1], [-1, 4096, 0, 1]):
            with pytest.raises(ValueError, match="outside"):
                writer.write(np.array([row]))
    with pytest.raises(ValueError, match="closed"):
        writer.write(np.array([[0, 4096, 0, 1]]))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../x", "a//b", "a/", "a/b/c/d/e", "/etc/x", "a\x00", "model.safetensors.index.json"],
)
def test_extras_are_plain_names(tmp_path, name):
    plan, _ = example_layout()
    with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer, pytest.raises(OutputError):
        writer.add(name, b"")


def test_extras_from_files_and_permissions(tmp_path):
    plan, data = example_layout()
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "tokenizer.json").chmod(0o600)
    before = os.umask(0o027)
    try:
        with Writer(tmp_path / "out", plan, fingerprint="f", io=PosixIo()) as writer:
            write(writer, chunks(plan, data))
            finish(writer, {"tokenizer.json": tmp_path / "tokenizer.json"})
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), max_size=25), st.integers(0, 40), st.integers(0, 40))
def test_ranges(adds, start, stop):
    ranges, model = Ranges(), set()
    for at, n in adds:
        ranges.add(at, at + n)
        model |= set(range(at, at + n))
    wanted = set(range(start, stop))
    assert ranges.covers(start, stop) == (wanted <= model)
    gaps = ranges.missing(start, stop)
    assert {b for a, z in gaps for b in range(a, z)} == wanted - model
    assert all(a < z for a, z in gaps)
