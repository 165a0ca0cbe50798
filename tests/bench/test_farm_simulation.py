"""The simulated farm: what can be computed by hand comes out, and limits show where they are."""

import pytest

from bench.farm_simulation import Clock, Farm, Filesystem, Pipe, Server, giant, simulate, spread

FREE = Filesystem(lookups=1e12, changes=1e12, entries=1e12, latency=0.0)


def test_flows_share_a_pipe():
    clock, arrived = Clock(), []
    pipe = Pipe(clock, whole=10.0, link=6.0)
    for name, nbytes in (("a", 30.0), ("b", 10.0)):
        pipe.move(nbytes, lambda name=name: arrived.append((name, clock.now)))
    clock.run()
    # Together 5 each until b has its 10 at 2 s; then a has 20 left at its link's 6.
    assert arrived == [("b", 2.0), ("a", pytest.approx(2 + 20 / 6))]


def test_requests_wait_for_each_other():
    clock, served = Clock(), []
    server = Server(clock, Filesystem(changes=10.0, latency=1.0))
    for _ in range(2):
        server.ask(lambda: served.append(clock.now), changes=5)
    clock.run()
    assert served == [1.5, 2.0]
    assert server.busy == 1.0


def test_workers_that_wait_for_nothing_are_ideal():
    farm = Farm(workers=8, jobs=8, inputs=0.0, seconds=10.0, spread=0.0)
    found = simulate(farm, FREE)
    assert found.seconds == pytest.approx(10.0)
    assert found.claims_per_second == 8
    assert simulate(farm, FREE) == found


def test_every_job_is_done_and_models_are_read_once_per_worker():
    farm = Farm(workers=20, jobs=400, inputs=1e9, seconds=10.0)
    found = simulate(farm)
    assert found.read_per_node == 1e9
    assert found.ideal <= found.seconds < 1.3 * found.ideal
    slow = simulate(farm, Filesystem(changes=10.0))
    assert slow.seconds > 1.3 * found.seconds
    assert slow.metadata_busy > 0.8


def test_parts_of_a_giant_are_even_and_read_each_byte_once():
    ops = giant(layers=4, experts=8, hidden=1024)
    total = 3 * 2 * sum(op.spec.numel for op in ops)
    alone, four = spread(ops, 1, FREE), spread(ops, 4, FREE)
    assert alone.read_per_node == total
    assert total / 4 <= four.read_per_node < 0.3 * total * 2
    assert four.moving == pytest.approx(alone.moving * four.uneven / 4, rel=0.01)
