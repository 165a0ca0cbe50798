"""Claims, leases and results of a store, without any merge."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastmerge.errors import OutputError
from fastmerge.farm.run import status, tidy
from fastmerge.farm.store import ATTEMPTS, Job, Result, Store, read_json

IDS = [f"{i:02x}" + f"{i:062x}" for i in range(20)]


@pytest.fixture
def store(tmp_path):
    made = Store.create(tmp_path / "store", {"lease": 60})
    for i, identity in enumerate(IDS):
        assert made.add(Job(identity, f"job {i}", "recipe", 0, 1000, "models"))
    return made


def result(identity, **more):
    return Result(identity, "a job", "recipe", **{"state": "done", "worker": "w", "seconds": 1.0, **more})


def publish(store, claim, **more):
    (claim.staging / "model").mkdir()
    (claim.staging / "model" / "weights").write_text(claim.worker)
    return store.publish(claim.staging, result(claim.id, worker=claim.worker, **more))


def expire(claim):
    os.utime(claim.path, (1, 1))


def weights(store, identity):
    return (store.entry(identity) / "model" / "weights").read_text()


def test_a_job_is_added_once(store):
    assert store.jobs() == IDS
    assert not store.add(Job(IDS[0], "another name", "recipe", 0, 1000, "models"))
    assert store.job(IDS[0]).name == "job 0"


def test_of_many_workers_one_has_a_job(store):
    def take(n):
        return [identity for identity in IDS if store.claim(identity, f"w{n}", 60) is not None]

    with ThreadPoolExecutor(8) as pool:
        taken = [identity for found in pool.map(take, range(8)) for identity in found]
    assert sorted(taken) == IDS


def test_results_appear_once(store):
    claim = store.claim(IDS[0], "w", 60)
    assert store.result(IDS[0]) is None
    assert publish(store, claim)
    assert store.result(IDS[0]).state == "done"
    assert store.claim(IDS[0], "v", 60) is None
    assert store.open() == IDS[1:]
    assert not claim.staging.exists()


def test_an_owner_whose_lease_expired_cannot_publish_over_another(store):
    first = store.claim(IDS[0], "slow", 60)
    assert store.claim(IDS[0], "quick", 60) is None
    expire(first)
    second = store.claim(IDS[0], "quick", 60)
    assert (first.number, second.number) == (1, 2)
    store.touch(first)  # it is alive after all, and helps itself to nothing by that
    assert store.claim(IDS[0], "third", 60) is None
    assert publish(store, second)
    assert not publish(store, first)
    assert weights(store, IDS[0]) == "quick"
    assert [*(store.root / "staging").glob(f"{IDS[0]}*")] == []


def test_an_owner_whose_lease_expired_may_be_first(store):
    first = store.claim(IDS[0], "slow", 60)
    expire(first)
    second = store.claim(IDS[0], "quick", 60)
    assert publish(store, first)
    assert not publish(store, second)
    assert weights(store, IDS[0]) == "slow"


def test_of_two_that_find_a_lease_expired_one_has_the_job(store):
    expire(store.claim(IDS[0], "gone", 60))
    known = store.attempts()[IDS[0]]
    claims = [store.claim(IDS[0], worker, 60, known) for worker in ("a", "b")]
    assert [c is not None for c in claims] == [True, False]


def test_a_claim_on_a_job_that_was_done_meanwhile_is_given_back(store, monkeypatch):
    first = store.claim(IDS[0], "w", 60)
    expire(first)
    real = Store.claim_path

    def racing(self, identity, number):
        if number == 2 and first.staging.exists():
            publish(store, first)
        return real(self, identity, number)

    monkeypatch.setattr(Store, "claim_path", racing)
    assert store.claim(IDS[0], "v", 60) is None
    assert read_json(store.claim_path(IDS[0], 2).with_name(f"{IDS[0]}.2.ended"))["why"] == "released"


def test_workers_that_die_cost_a_job_its_second_chance(store):
    first = store.claim(IDS[0], "a", 60)
    assert store.bury("a", "killed by signal 9") == 1
    assert store.bury("a", "again") == 0
    assert store.claim(IDS[0], "b", 60).number == 2
    assert store.bury("b", "killed by signal 11", [IDS[0], IDS[1]]) == 1
    assert store.claim(IDS[0], "c", 60) is None
    said = store.result(IDS[0])
    assert said.state == "quarantined"
    assert "a: killed by signal 9; b: killed by signal 11" in said.error
    # One of them was not dead: what it brings is better than nothing.
    first.staging.mkdir(exist_ok=True)
    assert publish(store, first)
    assert store.result(IDS[0]).state == "done"


def test_one_worker_may_try_a_few_times(store):
    for number in range(1, ATTEMPTS + 1):
        claim = store.claim(IDS[0], "w", 60)
        assert claim.number == number
        store.end(IDS[0], number, "lost", "the disk is full")
    assert store.claim(IDS[0], "w", 60) is None
    assert store.result(IDS[0]).state == "quarantined"


def test_jobs_that_were_given_up_do_not_count(store):
    for number in range(1, 8):
        claim = store.claim(IDS[0], f"w{number}", 60)
        store.end(IDS[0], claim.number, "released", "stopped")
    assert store.claim(IDS[0], "w", 60).number == 8


def test_results_that_are_no_models_stay_until_they_are_retried(store):
    claim = store.claim(IDS[0], "w", 60)
    assert store.publish(claim.staging, result(IDS[0], state="failed", error="CheckpointError: no"))
    assert IDS[0] not in store.open()
    assert tidy(store) == []
    assert tidy(store, retry=True) == ["failed: a job"]
    assert IDS[0] in store.open()
    assert store.claim(IDS[0], "w", 60).number == 1


def test_what_dead_workers_left_is_removed_and_what_live_ones_have_is_not(store):
    gone, here, done = (store.claim(identity, "w", 60) for identity in IDS[:3])
    store.end(IDS[0], 1, "lost", "killed")
    store.claim(IDS[0], "v", 60)
    publish(store, done)
    for path in (gone.staging, here.staging):
        os.utime(path, (1, 1))
    assert tidy(store) == [f"staging: {gone.staging.name}"]
    assert here.staging.is_dir()
    assert [*(store.root / "claims").rglob(f"{IDS[2]}.*")] == []


def test_the_table(store):
    assert status(store).counts == {"queued": len(IDS)}
    store.claim(IDS[0], "w", 60)
    expire(store.claim(IDS[1], "v", 60))
    publish(store, store.claim(IDS[2], "u", 60), score=0.5, bytes=7)
    publish(store, store.claim(IDS[3], "u", 60), score=0.75, bytes=9)
    store.make_virtual(IDS[2])
    claim = store.claim(IDS[4], "u", 60)
    store.publish(claim.staging, result(IDS[4], state="failed", error="ShapeError: no\x1b"))
    found = status(store)
    assert found.counts == {"queued": len(IDS) - 4, "running": 1, "done": 2, "failed": 1}
    assert [(name, worker) for name, worker, _ in found.running] == [("job 0", "w")]
    assert [r.score for r in found.best] == [0.75, 0.5]
    assert found.bytes == 9
    assert not found.ok
    assert "16 queued, 1 running, 2 done, 1 failed" in str(found)
    assert json.loads(json.dumps(found.facts()))["counts"]["done"] == 2


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(OutputError, match="expected the store of a farm"):
        Store(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(OutputError, match="holds other files"):
        Store.create(tmp_path, {})
    with pytest.raises(OutputError, match="is not a directory"):
        Store.create(tmp_path / "thesis.txt", {})


def test_half_a_file_is_none(store):
    path = store.claim_path(IDS[5], 1)
    path.write_text('{"worker": "w')
    os.utime(path, (1, 1))
    assert store.claim(IDS[5], "v", 60).number == 2
    assert status(store).counts == {"queued": len(IDS) - 1, "running": 1}
