"""What a farm costs to start, and one merge over two Ray nodes beside one process.

    python bench/farm.py start                      # a worker, 200 tiny recipes on processes and on Ray; two minutes
    python bench/farm.py spread --size 1.5b         # 24 GB of disk; minutes
    python bench/farm.py spread --size 1.5b --kill  # a node is lost on the way, and another comes

Both nodes are on this machine (``ray.cluster_utils``), so nothing here says how fast several machines are: shown
is that the bytes are those of one process, and what Ray itself costs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.generate import generate  # noqa: E402  once the root is on the path
from bench.recipes import recipe  # noqa: E402

DATA = Path(os.environ.get("FASTMERGE_BENCH_DATA", ROOT / ".cache" / "bench"))
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80_000_000}


@contextmanager
def nodes() -> Iterator[Any]:
    """Two local Ray nodes with a logical GPU each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="fm", dir="/tmp", ignore_cleanup_errors=True) as home:
        head = {**NODE, "include_dashboard": False, "temp_dir": home}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**NODE)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def digest(model: Path) -> str:
    """sha256 over names and bytes of everything but the report."""
    h = hashlib.sha256()
    for path in sorted(p for p in model.iterdir() if p.name != "merge_report.json"):
        h.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                h.update(block)
    return h.hexdigest()


def start() -> dict[str, float]:
    """Seconds from nothing to the first result, and per tiny recipe after that."""
    from fastmerge.farm import run as farms

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="farm") as name:
        home = Path(name)
        models = generate(home / "models", "tiny", 2)
        template = {"merge_method": "linear", "dtype": "bfloat16"}
        template |= {"models": [{"model": str(m), "parameters": {"weight": "${w}"}} for m in models]}  # type: ignore[dict-item]

        def farm(store: str, count: int, **more: Any) -> dict[str, Any]:
            grid = {"w": [(i + 1) / count for i in range(count)]}
            here = {"store": str(home / store), "memory": "256MB", "device": "cpu", "workers": 2}
            return {**here, "recipes": [{"template": template, "grid": grid}], **more}

        empty = home / "empty"
        farms.Store.create(empty, {})
        command = [sys.executable, "-m", "fastmerge", "farm", "worker", str(empty)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        os.environ.update(env)
        found["a worker without work"] = timed(lambda: subprocess.run(command, check=True, env=env))
        found["a farm of 1 on processes"] = timed(lambda: farms.run(farm("one", 1)))
        found["a farm of 200 on processes"] = timed(lambda: farms.run(farm("many", 200)))
        found["the same again, all done"] = timed(lambda: farms.run(farm("many", 200)))
        began = time.perf_counter()
        with nodes():
            found["a Ray of two nodes"] = time.perf_counter() - began
            ray = {"executor": "ray", "ray": {"num_cpus": 0, "num_gpus": 1}}
            found["a farm of 1 on Ray"] = timed(lambda: farms.run(farm("ray-one", 1, **ray)))
            found["a farm of 200 on Ray"] = timed(lambda: farms.run(farm("ray-many", 200, **ray)))
    return found


def spread(size: str, method: str, *, kill: bool) -> dict[str, Any]:
    """One merge by one process, and over two nodes."""
    import fastmerge as fm
    from fastmerge.farm.spread import merge_spread

    family = generate(DATA, size, 3)
    wanted = recipe(method, family)
    facts: dict[str, Any] = {"size": size, "method": method, "killed": kill}
    home = DATA / "spread"
    shutil.rmtree(home, ignore_errors=True)
    for name in ("one", "two"):
        (home / name).mkdir(parents=True)
    try:
        facts["seconds_one"] = timed(lambda: fm.merge(wanted, home / "one" / "out", memory="2GB", device="cpu"))
        with nodes() as cluster, ThreadPoolExecutor(1) as pool:
            merged = partial(merge_spread, wanted, home / "two" / "out", memory="1GB", device="cpu")
            running = pool.submit(timed, merged)
            if kill:
                time.sleep(facts["seconds_one"] / 2)
                lose(cluster)
            facts["seconds_two"] = running.result()
        facts["equal"] = digest(home / "one" / "out") == digest(home / "two" / "out")
        facts["report"] = json.loads((home / "two" / "out" / "merge_report.json").read_text())["bytes_written"]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return facts


def lose(cluster: Any) -> None:
    """Kills a node that is not the head, and adds another."""
    (node,) = [n for n in cluster.list_all_nodes() if n is not cluster.head_node]
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)


def timed(work: Any) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "spread"])
    parser.add_argument("--size", default="768x12", help="of the family [768x12]")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--kill", action="store_true", help="lose a node on the way")
    args = parser.parse_args()
    facts = start() if args.what == "start" else spread(args.size, args.method, kill=args.kill)
    for name, value in facts.items():
        print(f"{name:<28} {value:.2f}" if isinstance(value, float) else f"{name:<28} {value}")
    if not facts.get("equal", True):
        raise SystemExit("the bytes differ")


if __name__ == "__main__":
    main()
