"""A farm of 10,000 workers, and one merge of 1.7 T parameters over a thousand nodes, simulated event by event.

    python bench/farm_simulation.py            # both; twenty seconds
    python bench/farm_simulation.py --json

Nothing is measured here: the rates of the shared filesystem are assumptions, which :class:`Filesystem` states and the
command line changes. What is simulated is the protocol of the store (listings of a shard, claims of which one succeeds,
results in one rename, heartbeats) and the division of a plan into parts, which is the real one.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from fastmerge.checkpoint import Place
from fastmerge.checkpoint.header import TensorInfo
from fastmerge.dtypes import BY_NAME
from fastmerge.farm.slurm import WAITING
from fastmerge.farm.worker import LOOKS, STALE
from fastmerge.methods import METHODS
from fastmerge.ops.sources import FileRange
from fastmerge.ops.spec import Op, Spec
from fastmerge.planning.parts import cuts

SHARDS = 256


@dataclass(frozen=True)
class Filesystem:
    """What a shared filesystem of a large cluster does: assumptions, of the order of published Lustre figures.

    Attributes:
        lookups: of names per second, all clients together.
        changes: files created, renamed or removed per second.
        entries: names listed per second.
        read, write: bytes per second, all clients together.
        link: bytes per second of one client.
        latency: seconds of any request, when nobody else asks.
    """

    lookups: float = 50_000.0
    changes: float = 10_000.0
    entries: float = 2_000_000.0
    read: float = 1e12
    write: float = 0.5e12
    link: float = 25e9
    latency: float = 0.5e-3


class Clock:
    """Events in the order of their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self.events = 0

    def at(self, when: float, then: Callable[[], None]) -> None:
        """Calls ``then`` at a time."""
        heapq.heappush(self._events, (when, next(self._number), then))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._events:
            self.now, _, then = heapq.heappop(self._events)
            self.events += 1
            then()


class Server:
    """The metadata server: one request after the other."""

    def __init__(self, clock: Clock, system: Filesystem) -> None:
        self._clock = clock
        self._system = system
        self._free = 0.0
        self.busy = 0.0
        self.waited = 0.0

    def ask(self, then: Callable[[], None], *, lookups: float = 0, changes: float = 0, entries: float = 0) -> None:
        """Calls ``then`` when a request of so much work is served."""
        s = self._system
        work = lookups / s.lookups + changes / s.changes + entries / s.entries
        start = max(self._free, self._clock.now)
        self.waited = max(self.waited, start - self._clock.now)
        self._free = start + work
        self.busy += work
        self._clock.at(self._free + s.latency, then)


class Pipe:
    """Bytes that flow: every flow gets the same share of the whole, and at most what one client's link takes."""

    def __init__(self, clock: Clock, whole: float, link: float) -> None:
        self._clock = clock
        self._whole = whole
        self._link = link
        self._served = 0.0  # bytes of each flow that was there from the start
        self._last = 0.0
        self._flows: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._turn = 0
        self.bytes = 0.0

    def move(self, nbytes: float, then: Callable[[], None]) -> None:
        """Calls ``then`` when so many bytes have arrived."""
        self._advance()
        self.bytes += nbytes
        heapq.heappush(self._flows, (self._served + nbytes, next(self._number), then))
        self._plan()

    def _rate(self) -> float:
        return min(self._link, self._whole / len(self._flows))

    def _advance(self) -> None:
        if self._flows:
            self._served += (self._clock.now - self._last) * self._rate()
        self._last = self._clock.now

    def _plan(self) -> None:
        self._turn += 1
        if self._flows:
            turn = self._turn
            left = max(0.0, self._flows[0][0] - self._served) / self._rate()
            self._clock.at(self._clock.now + left, lambda: self._arrive(turn))

    def _arrive(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._advance()
        done = [heapq.heappop(self._flows)]
        while self._flows and self._flows[0][0] <= done[0][0] * (1 + 1e-12):
            done.append(heapq.heappop(self._flows))
        self._plan()
        for _, _, then in done:
            then()


class Farm(NamedTuple):
    """A farm to be simulated.

    Attributes:
        workers, jobs: how many.
        inputs: bytes that a worker reads once, and keeps: the models.
        output: bytes that it writes per job; 0 where results are virtual.
        seconds: of a merge and its score.
        spread: of these seconds, as a share.
        lease: seconds; a worker gives six signs of life in one.
    """

    workers: int = 10_000
    jobs: int = 50_000
    inputs: float = 4 * 16.1e9
    output: float = 0.0
    seconds: float = 60.0
    spread: float = 0.5
    lease: float = 120.0


@dataclass
class Shard:
    """Jobs whose ids begin alike, by number: who has them."""

    free: set[int]
    open: int


@dataclass
class Outcome:
    """What a farm did.

    Attributes:
        seconds: until the last result.
        ideal: seconds of so many workers that wait for nothing, models read at their links' speed.
        claims_per_second: of those that succeeded, at most in one second.
        lost_claims: claims that found the job another's.
        metadata_busy: share of the time in which the metadata server works, signs of life included.
        metadata_wait: longest wait for it, in seconds.
        read_per_node: bytes.
        first_merge: seconds until the last worker has its models.
        events: of the simulation.
    """

    seconds: float
    ideal: float
    claims_per_second: float
    lost_claims: int
    metadata_busy: float
    metadata_wait: float
    read_per_node: float
    first_merge: float
    events: int


def simulate(farm: Farm, system: Filesystem = Filesystem(), seed: int = 0) -> Outcome:
    """Runs a farm from the start of its workers to its last result."""
    rng = random.Random(seed)
    clock = Clock()
    server = Server(clock, system)
    reads, writes = Pipe(clock, system.read, system.link), Pipe(clock, system.write, system.link)
    shards = [Shard(set(range(i, farm.jobs, SHARDS)), len(range(i, farm.jobs, SHARDS))) for i in range(SHARDS)]
    per_second: dict[int, int] = {}
    lost = finished = 0
    last = ready = 0.0

    def worker(number: int) -> None:
        order = rng.sample(range(SHARDS), SHARDS)
        seen: list[int] = []
        misses = fruitless = 0
        warm = False

        def look() -> None:
            """Lists the shard that is next: its jobs, its results, its claims."""
            nonlocal seen, misses
            if not order or (number >= WAITING and fruitless == LOOKS):
                return
            shard = shards[order[0]]
            size = len(range(order[0], farm.jobs, SHARDS))
            seen, misses = [*shard.free], 0
            rng.shuffle(seen)
            server.ask(step, lookups=3, entries=3 * size)

        def step() -> None:
            """Tries the next job of the listing."""
            nonlocal fruitless
            if misses == STALE:
                look()
            elif seen:
                server.ask(claimed, lookups=1, changes=1)
            else:
                order.pop(0)
                fruitless += 1
                look()

        def claimed() -> None:
            nonlocal misses, lost, fruitless
            job = seen.pop()
            if job not in shards[order[0]].free:
                misses += 1
                lost += 1
                step()
                return
            misses = fruitless = 0
            shards[order[0]].free.discard(job)
            per_second[int(clock.now)] = per_second.get(int(clock.now), 0) + 1
            if warm:
                merge()
            else:
                reads.move(farm.inputs, opened)

        def opened() -> None:
            nonlocal warm, ready
            warm = True
            ready = max(ready, clock.now)
            merge()

        def merge() -> None:
            took = farm.seconds * (1 + farm.spread * (2 * rng.random() - 1))
            clock.at(clock.now + took, lambda: writes.move(farm.output, publish) if farm.output else publish())

        def publish() -> None:
            # The directory of the result, its file and the model's, the rename, and what goes away.
            server.ask(done, lookups=4, changes=6)

        def done() -> None:
            nonlocal finished, last
            finished += 1
            last = max(last, clock.now)
            step()

        look()

    for number in range(farm.workers):
        worker(number)
    clock.run()
    assert finished == farm.jobs
    beats = farm.workers * 6 / farm.lease / system.changes
    rounds = -(-farm.jobs // farm.workers)
    return Outcome(
        seconds=last,
        ideal=farm.inputs / system.link + rounds * (farm.seconds + farm.output / system.link),
        claims_per_second=max(per_second.values()),
        lost_claims=lost,
        metadata_busy=server.busy / last + beats,
        metadata_wait=server.waited,
        read_per_node=reads.bytes / farm.workers,
        first_merge=ready,
        events=clock.events,
    )


def giant(*, layers: int = 96, hidden: int = 8192, experts: int = 352, inner: int = 2048, models: int = 3) -> list[Op]:
    """The ops of a linear merge of mixtures of experts, 1.7 T parameters by default, in shards of 5 GB."""
    bf16 = BY_NAME["bfloat16"]
    shapes: dict[str, tuple[int, int]] = {"model.embed_tokens.weight": (160_000, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        for expert in range(experts):
            at = f"{prefix}.mlp.experts.{expert}"
            shapes |= {f"{at}.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
            shapes[f"{at}.down_proj.weight"] = (hidden, inner)
    shapes["lm_head.weight"] = (160_000, hidden)
    method = METHODS["linear"](weight=(1.0 / models,) * models, normalize=True)
    specs = {shape: Spec(method, shape, (bf16,) * models, bf16) for shape in set(shapes.values())}
    ops, shard, at = [], 0, 4096
    for name, (rows, columns) in shapes.items():
        nbytes = rows * columns * 2
        if at + nbytes > 5e9:
            shard, at = shard + 1, 4096
        info = TensorInfo(name, bf16, (rows, columns), shard, at, nbytes)
        inputs = tuple(FileRange(info, m) for m in range(models))
        ops.append(Op(name, specs[rows, columns], 0, inputs, (Place(shard, at, nbytes),)))
        at += nbytes
    return ops


@dataclass
class Spread:
    """One merge over many nodes.

    Attributes:
        nodes: how many, each with one part.
        seconds: until the output is published.
        moving: seconds of these in which weights are read and written.
        read_per_node: bytes, of the part with most.
        uneven: bytes of the largest part over the mean.
        metadata_wait: longest wait for the metadata server, in seconds.
    """

    nodes: int
    seconds: float
    moving: float
    read_per_node: float
    uneven: float
    metadata_wait: float = field(default=0.0)


def spread(ops: list[Op], nodes: int, system: Filesystem = Filesystem(), start: float = 5.0) -> Spread:
    """One merge, from the start of its processes to its commit.

    Args:
        ops: of its plan.
        nodes: each writes one part.
        system: shared.
        start: seconds in which a process starts and plans 100,000 tensors of three models.
    """
    clock = Clock()
    server = Server(clock, system)
    reads, writes = Pipe(clock, system.read, system.link), Pipe(clock, system.write, system.link)
    models = len(ops[0].inputs)
    shards = max(t.shard for op in ops for t in op.targets if isinstance(t, Place)) + 1
    header = 150 * len(ops)
    at = cuts(ops, nodes)
    parts = [ops[a:b] for a, b in itertools.pairwise(at)]
    outputs = [sum(op.spec.numel * 2 for op in part) for part in parts]
    ended = 0
    first = last = 0.0
    free = 0.0

    def node(number: int) -> None:
        left = 2

        def planned() -> None:
            # One part at a time looks at the staging directory, and makes the files that it writes.
            nonlocal free
            own = len({t.shard for op in parts[number] for t in op.targets if isinstance(t, Place)})
            work = (8 + 4 * own) * (system.latency + 1 / system.changes)
            free = max(free, clock.now) + work
            clock.at(free, moving)

        def moving() -> None:
            # Reading and writing overlap: the slower of the two is what a part takes.
            nonlocal first
            first = first or clock.now
            reads.move(max(1.0, models * outputs[number]), half)
            writes.move(max(1.0, float(outputs[number])), half)

        def half() -> None:
            nonlocal left
            left -= 1
            if not left:
                server.ask(done, changes=4, entries=3 * nodes)

        def done() -> None:
            nonlocal ended, last
            ended += 1
            last = max(last, clock.now)

        def headers() -> None:
            server.ask(lambda: clock.at(clock.now + start, planned), lookups=2 * models * shards)

        reads.move(models * header, headers)

    for number in range(nodes):
        node(number)
    clock.run()
    assert ended == nodes
    # Whoever publishes opens and renames all shards, and reads a journal and a report of each part.
    commit = start + (6 * shards + 4 * nodes) * (system.latency + 1 / system.changes)
    return Spread(
        nodes=nodes,
        seconds=last + commit,
        moving=last - first,
        read_per_node=models * max(outputs),
        uneven=max(outputs) * nodes / sum(outputs),
        metadata_wait=server.waited,
    )


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Filesystem()).items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"of the filesystem [{value:g}]")
    parser.add_argument("--json", action="store_true", dest="as_json")
    args = parser.parse_args()
    system = Filesystem(**{name: getattr(args, name) for name in asdict(Filesystem())})
    farms: dict[str, Farm] = {
        "8b, virtual, 60 s of scoring": Farm(),
        "8b, virtual, 5 s of scoring": Farm(seconds=5.0),
        "8b, every model written": Farm(jobs=20_000, output=16.1e9),
        "100 workers": Farm(workers=100, jobs=10_000),
    }
    found: dict[str, Any] = {name: asdict(simulate(farm, system)) for name, farm in farms.items()}
    ops = giant()
    parameters = sum(op.spec.numel for op in ops)
    merges = [asdict(spread(ops, nodes, system)) for nodes in (1, 8, 64, 256, 1000, 4000, 10_000)]
    if args.as_json:
        print(json.dumps({"filesystem": asdict(system), "farms": found, "parameters": parameters, "merges": merges}))
        return
    for title, rows in (("farm", found), ("merge", {f"{m['nodes']} nodes": m for m in merges})):
        print(f"\n{title}" if title == "farm" else f"\n{title} of {parameters / 1e12:.2f} T parameters, 3 models")
        for name, facts in rows.items():
            print(f"  {name:<30}" + "  ".join(f"{k} {v:.4g}" for k, v in facts.items() if k != "nodes"))


if __name__ == "__main__":
    main()
