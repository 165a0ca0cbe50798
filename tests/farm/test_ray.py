"""Farms and merges on a real Ray: two local nodes with a logical GPU each (make test-ray)."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

import fastmerge as fm
from fastmerge.errors import CheckpointError
from fastmerge.farm import run as farms
from fastmerge.farm.spread import merge_spread
from tests import tiny
from tests.farm.farms import calls, contents, farm, idle, scorer, tree

ROOT = Path(__file__).resolve().parents[2]
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80_000_000}
GPU = {"num_cpus": 0, "num_gpus": 1}
PART = {"shard_size": "200kB", "memory": "64MB"}

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture(scope="session")
def cluster():
    """Two nodes; their sockets want a short path."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 6 << 30:
        pytest.skip("a Ray of two nodes wants 6 GB of free memory")
    ray = pytest.importorskip("ray")
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), before])
    with tempfile.TemporaryDirectory(prefix="fm", dir="/tmp", ignore_cleanup_errors=True) as home:
        head = {**NODE, "include_dashboard": False, "temp_dir": home}
        made = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        made.add_node(**NODE)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
        ray.shutdown()
        made.shutdown()
    os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return tiny.family(tmp_path_factory.mktemp("models"), models=3)


@pytest.fixture
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


def on_ray(root, paths, count, **more):
    return farm(root, paths, count, **{"executor": "ray", "ray": GPU, "memory": "64MB", **more})


def until(true):
    while not true():
        time.sleep(0.01)


def test_two_hundred_recipes_on_processes_and_on_ray_are_the_same(cluster, paths, home, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"])
    (home / "a").mkdir()
    (home / "b").mkdir()
    local = farms.run(farm(home, paths, 200, score=scorer(home), store=str(home / "a" / "store")))
    assert len(calls(home)) == 200
    there = farms.run(on_ray(home, paths, 200, score=scorer(home), store=str(home / "b" / "store")))
    assert len(calls(home)) == 400
    assert contents(there) == contents(local)
    assert farms.status(there).counts == {"done": 200}
    assert len({r.worker for r in there.results()}) == 2
    assert idle(there) == []


def test_actors_are_killed(cluster, paths, home):
    """Poison is quarantined, what was lost by bad luck is merged again, and calls that waited behind are innocent."""
    (home / "poison.0.5").touch()
    (home / "once.0.25").touch()
    store = farms.run(on_ray(home, paths, 12, score=scorer(home)))
    found = {r.name: r for r in store.results()}
    assert {name: r.state for name, r in found.items() if r.state != "done"} == {"w=0.5": "quarantined"}
    assert found["w=0.5"].error.count("its actor died") == 2
    scores = calls(home)
    assert {w for w in scores if scores.count(w) != 1} == {"0.5", "0.25"}
    assert (scores.count("0.5"), scores.count("0.25")) == (2, 2)


def test_the_driver_is_killed_and_another_goes_on(cluster, paths, home):
    source = on_ray(home, paths, 6, score=scorer(home), lease=2)
    source["ray"] = {**GPU, "address": cluster.address}
    (home / "farm.yml").write_text(yaml.safe_dump(source))
    for i in range(4, 7):
        (home / f"hold.{i / 6}").touch()
    command = [sys.executable, "-m", "fastmerge", "farm", "run", str(home / "farm.yml")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        until(lambda: [*home.glob("pid.*")] != [] and len(calls(home)) >= 2)
        time.sleep(0.5)
        driver.kill()
    for path in home.glob("hold.*"):
        path.unlink()
    store = farms.Store(home / "store")
    before = contents(store)
    farms.run(source)
    assert farms.status(store).counts == {"done": 6}
    after = contents(store)
    assert {i: after[i] for i in before} == before
    done = {after[i][0]["name"].removeprefix("w=") for i in before}
    assert all(calls(home).count(w) == 1 for w in done)


@pytest.mark.parametrize("name", ["ties", "whole"])
def test_one_merge_over_two_nodes_is_that_of_one_process(cluster, paths, home, name):
    extra = "preset: paper" if name == "whole" else ""
    text = tiny.recipe(paths, "ties", weight=0.5, density=0.3, extra=extra)
    (home / "one").mkdir()
    (home / "two").mkdir()
    fm.merge(text, home / "one" / "out", **PART)
    report = merge_spread(text, home / "two" / "out", **PART)
    assert tree(home / "two" / "out") == tree(home / "one" / "out")
    assert report.bytes_written == fm.Report.load(home / "one" / "out").bytes_written
    again = merge_spread(text, home / "two" / "out", **PART)
    assert again.fingerprint == report.fingerprint


def test_errors_of_parts_are_ours(cluster, paths, home):
    (home / "out").mkdir()
    text = tiny.recipe(paths, "linear", base=None, weight=0.5)
    with pytest.raises(fm.OutputError, match="exists; --overwrite replaces it"):
        merge_spread(text, home / "out", **PART)
    with pytest.raises(CheckpointError, match="no such file"):
        merge_spread(text.replace(str(paths["a"]), str(home / "nothing")), home / "new", **PART)
    assert not (home / "new").exists()


def test_a_node_is_killed(cluster, paths, home):
    """What it had in hand is merged elsewhere; its actor starts again on the node that comes in its place."""
    for i in range(1, 13):
        (home / f"hold.{i / 12}").touch()
    source = {**on_ray(home, paths, 12, score=scorer(home)), "ray": {**GPU, "address": cluster.address}}
    (home / "farm.yml").write_text(yaml.safe_dump(source))
    command = [sys.executable, "-m", "fastmerge", "farm", "run", str(home / "farm.yml"), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        until(lambda: len([p for p in home.glob("pid.*") if p.read_text()]) == 2)
        nodes = {p.name.removeprefix("pid."): _node_of(cluster, int(p.read_text())) for p in home.glob("pid.*")}
        (lost,) = [weight for weight, node in nodes.items() if node is not cluster.head_node]
        cluster.remove_node(nodes[lost], allow_graceful=False)
        pid = (home / f"pid.{lost}").read_text().strip()
        until(lambda: not Path(f"/proc/{pid}").exists())  # it goes a little later than its node
        for path in home.glob("hold.*"):
            path.unlink()
        cluster.add_node(**NODE)
        said = driver.communicate()[0]
        assert driver.returncode == 0, said
    store = farms.Store(home / "store")
    assert farms.status(store).counts == {"done": 12}
    assert {w: calls(home).count(w) for w in calls(home)} == {
        str(i / 12): 1 + (str(i / 12) == lost) for i in range(1, 13)
    }


def _node_of(cluster, pid):
    """The node on which a process runs: that whose raylet is above it."""
    above = set()
    while pid > 1:
        above.add(pid)
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    for node in cluster.list_all_nodes():
        if {p.process.pid for p in node.all_processes["raylet"]} & above:
            return node
    raise AssertionError("no node has the process")
