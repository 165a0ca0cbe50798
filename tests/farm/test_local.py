"""Farms on processes of this machine, which are killed; from the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from fastmerge.cli import main
from fastmerge.errors import FastMergeError, NoSpace, OutputError
from fastmerge.farm import executors
from fastmerge.farm import run as farms
from fastmerge.farm.executors import Local, share_of
from fastmerge.farm.file import load
from fastmerge.farm.slurm import SlurmArray
from fastmerge.farm.store import Store
from fastmerge.farm.worker import FULL_STORE
from tests import tiny
from tests.farm.farms import calls, contents, farm, idle, scorer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), models=2)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers are processes of their own: they find what this one does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))


def command(*words, **how):
    # What a shell starts in the background ignores SIGINT, and so do its children.
    code = (
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from fastmerge.__main__ import main\nmain()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "farm", *map(str, words)], stdout=subprocess.PIPE, text=True, **how
    )


def until(true):
    while not true():
        time.sleep(0.01)


def test_a_farm_on_two_processes_is_that_of_one(paths, tmp_path):
    stores = [
        farms.run(farm(tmp_path / str(workers), paths, 8, workers=workers, score=scorer(tmp_path)))
        for workers in (1, 2)
    ]
    assert contents(stores[0]) == contents(stores[1])
    assert len(calls(tmp_path)) == 16
    assert len({r.worker for r in stores[1].results()}) <= 2
    assert farms.status(stores[1]).ok
    assert idle(stores[1]) == []


def test_recipes_that_kill_their_workers_are_quarantined_and_others_are_tried_again(paths, tmp_path):
    """One kills whatever tries it, one killed its first worker by bad luck, and no other is lost or done twice."""
    source = farm(tmp_path, paths, 6, score=scorer(tmp_path))
    (tmp_path / "poison.0.5").touch()
    (tmp_path / f"once.{1 / 6}").touch()
    store = farms.run(source)
    found = {r.name: r for r in store.results()}
    assert [r.name for r in found.values() if r.state != "done"] == ["w=0.5"]
    assert found["w=0.5"].state == "quarantined"
    assert found["w=0.5"].error.count("killed by signal 9") == 2
    scores = calls(tmp_path)
    assert {w: scores.count(w) for w in set(scores)} == {
        **{str(i / 6): 1 for i in (2, 4, 5, 6)},
        str(1 / 6): 2,
        "0.5": 2,
    }
    assert not (store.entry(found["w=0.5"].id) / "model").exists()
    (tmp_path / "poison.0.5").unlink()
    assert farms.tidy(store, retry=True) == ["quarantined: w=0.5"]
    farms.run(source)
    assert farms.status(store).counts == {"done": 6}


def test_the_driver_is_killed_and_started_again(paths, tmp_path):
    """Workers end what they have in hand, and the next driver goes on from there."""
    source = farm(tmp_path, paths, 6, score=scorer(tmp_path))
    (tmp_path / "farm.yml").write_text(yaml.safe_dump(source))
    for i in range(1, 7):
        (tmp_path / f"hold.{i / 6}").touch()
    driver = command("run", tmp_path / "farm.yml")
    until(lambda: len(calls(tmp_path)) == 2)
    driver.kill()
    driver.communicate()
    pids = [int(path.read_text()) for path in tmp_path.glob("pid.*")]
    for path in tmp_path.glob("hold.*"):
        path.unlink()
    for pid in pids:
        until(lambda pid=pid: not Path(f"/proc/{pid}").exists())
    store = Store(tmp_path / "store")
    assert len(store.finished()) == 2
    before = contents(store)
    again = command("run", tmp_path / "farm.yml")
    assert "6 done" in again.communicate()[0]
    assert again.returncode == 0
    after = contents(store)
    assert {i: after[i] for i in before} == before
    assert sorted(calls(tmp_path)) == sorted(str(i / 6) for i in range(1, 7))
    assert idle(store) == []


def test_driver_and_workers_are_killed_at_once(paths, tmp_path):
    """Leases expire; what was in hand is merged by the workers of the next driver."""
    source = farm(tmp_path, paths, 4, score=scorer(tmp_path), lease=1)
    (tmp_path / "farm.yml").write_text(yaml.safe_dump(source))
    (tmp_path / "hold.0.5").touch()
    driver = command("run", tmp_path / "farm.yml", start_new_session=True)
    until((tmp_path / "pid.0.5").exists)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    (tmp_path / "hold.0.5").unlink()
    store = farms.run(source)
    assert farms.status(store).counts == {"done": 4}
    assert calls(tmp_path).count("0.5") == 2


def test_a_driver_that_is_stopped_stops_its_workers(paths, tmp_path):
    source = farm(tmp_path, paths, 4, score=scorer(tmp_path))
    (tmp_path / "farm.yml").write_text(yaml.safe_dump(source))
    for i in range(1, 5):
        (tmp_path / f"hold.{i / 4}").touch()
    driver = command("run", tmp_path / "farm.yml", stderr=subprocess.PIPE)
    until(lambda: len(calls(tmp_path)) == 2)
    driver.send_signal(signal.SIGINT)
    for path in tmp_path.glob("hold.*"):
        path.unlink()
    assert "stopped" in driver.communicate()[1]
    assert driver.returncode == 130
    store = Store(tmp_path / "store")
    claimed = store.attempts()
    assert all(a.last in a.ended for i, a in claimed.items() if store.result(i) is None)
    assert farms.status(farms.run(source)).counts == {"done": 4}


def test_workers_by_hand_and_what_is_to_be_seen(paths, tmp_path):
    file, wanted = load(farm(tmp_path, paths, 4, score=scorer(tmp_path), keep=1))
    store = Store.create(file.store, file.settings)
    for job in farms.jobs_of(wanted, 1 << 30):
        store.add(job)
    assert json.loads(CliRunner().invoke(main, ["farm", "status", str(store.root), "--json"]).output)["counts"] == {
        "queued": 4
    }
    running = [command("worker", store.root, "--memory", "64MB", stderr=subprocess.PIPE) for _ in range(2)]
    assert [(p.communicate(), p.returncode) for p in running] == [(("", ""), 0)] * 2
    said = CliRunner().invoke(main, ["farm", "status", str(store.root)]).output.splitlines()
    assert said[0].startswith("4 done; models 2")
    assert said[1].split()[:3] == ["done", "w=1.0", "1"]
    assert CliRunner().invoke(main, ["farm", "gc", str(store.root), "--keep", "0"]).exit_code == 0
    assert farms.status(store).bytes == 0
    made = CliRunner().invoke(main, ["farm", "make", str(store.root), "w=0.5", str(tmp_path / "made")])
    assert made.exit_code == 0, made.output
    assert "21 tensors" in made.output


def test_workers_that_cannot_start_end_the_farm(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(executors.sys, "executable", "/bin/false")
    with pytest.raises(FastMergeError, match="workers end before they claim anything: exit status 1"):
        farms.run(farm(tmp_path, paths, 4))


@pytest.mark.parametrize(
    ("said", "kind"),
    [(f"store: {FULL_STORE}: No space left on device", NoSpace), ("expected the store of a farm", OutputError)],
)
def test_a_worker_that_cannot_use_the_store_ends_the_farm(paths, tmp_path, monkeypatch, said, kind):
    program = tmp_path / "worker"
    program.write_text(f"#!/bin/sh\necho 'fastmerge: {said}'\nexit 4\n")
    program.chmod(0o755)
    monkeypatch.setattr(executors.sys, "executable", str(program))
    with pytest.raises(OutputError) as caught:
        farms.run(farm(tmp_path, paths, 4))
    assert (type(caught.value), str(caught.value)) == (kind, said)


def test_a_farm_with_problems_says_so(paths, tmp_path):
    (tmp_path / "farm.yml").write_text(yaml.safe_dump(farm(tmp_path, paths, 1, workers=1, score="sh -c 'exit 9'")))
    done = CliRunner().invoke(main, ["farm", "run", str(tmp_path / "farm.yml")])
    assert done.exit_code == 1
    assert "1 quarantined" in done.output
    assert "exit status 9" in done.output


def test_shares_of_a_machine():
    assert [share_of(range(8), i, 3) for i in range(3)] == [{0, 1}, {2, 3, 4}, {5, 6, 7}]
    assert [share_of([3, 5], i, 4) for i in range(4)] == [{3}, {5}, {3}, {5}]
    local = Local(4, "8GB", ["cuda:0", "cuda:1"])
    assert local.memory == 2_000_000_000
    assert Local(None, "8GB", ["cuda:0", "cuda:1", "cuda:2"]).workers == 3


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # submitit leaves the files of its jobs' output open
@pytest.mark.parametrize("cluster", ["debug", pytest.param("local", marks=pytest.mark.conformance)])
def test_an_array_of_submitit(paths, tmp_path, cluster):
    source = farm(tmp_path, paths, 3, executor="slurm", slurm={"cluster": cluster, "time": 5})
    store = farms.run(source)
    assert farms.status(store).counts == {"done": 3}
    assert contents(store) == contents(farms.run(farm(tmp_path / "same", paths, 3, workers=1)))


def test_what_is_asked_of_slurm(tmp_path):
    source = {"store": "s", "recipes": ["a.yml"], "executor": "slurm", "workers": 3}
    (tmp_path / "a.yml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n")
    asked = {"time": 90, "partition": "gpu", "gpus_per_node": 2, "more": {"account": "me", "slurm_qos": "low"}}
    file, _ = load({**source, "recipes": [str(tmp_path / "a.yml")], "slurm": asked})
    assert SlurmArray(3, file.slurm).parameters() == {
        "name": "fastmerge-farm",
        "timeout_min": 90,
        "gpus_per_node": 2,
        "slurm_partition": "gpu",
        "slurm_account": "me",
        "slurm_qos": "low",
    }
