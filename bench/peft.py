"""``add_weighted_adapter`` of peft beside the same call with fastmerge installed, in turn.

``python -m bench.peft [--size 4096] [--rank 64] [--runs 3]`` prints seconds (the least of the runs) and how far the
results are apart, as a share of the norm. One layer, two adapters; peft's slow calls are run once.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch


def model(size: int, rank: int) -> Any:
    """One linear layer with two adapters of random factors."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], init_lora_weights=False)
    made = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(size, size, bias=False)), config, "one")
    made.add_adapter("two", config)
    return made


def timed(made: Any, name: str, kind: str, more: dict[str, Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    made.add_weighted_adapter(["one", "two"], [0.7, 0.4], name, kind, **more)
    return time.perf_counter() - started


def main() -> None:
    """Prints a line for each kind of merge."""
    from fastmerge.adapters import peft as ours

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=["svd", "linear", "ties", "dare_linear", "magnitude_prune"])
    args = parser.parse_args()
    made = model(args.size, args.rank)
    layer = made.base_model.model[0]
    print(f"{args.size} x {args.size}, two adapters of rank {args.rank}, {torch.get_num_threads()} threads of torch")
    print(f"load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
    print(f"{'kind':<18}{'peft':>10}{'fastmerge':>12}{'times':>8}  apart")
    for kind in args.kinds:
        more = {"density": 0.5} if kind not in ("svd", "cat", "linear") else {}
        seconds: dict[str, list[float]] = {"peft": [], "fastmerge": []}
        for run in range(args.runs):
            if run == 0 or seconds["peft"][0] < 5:
                seconds["peft"].append(timed(made, f"peft-{kind}-{run}", kind, more))
            ours.install()
            seconds["fastmerge"].append(timed(made, f"fastmerge-{kind}-{run}", kind, more))
            ours.uninstall()
        theirs, got = (layer.get_delta_weight(f"{who}-{kind}-0").detach() for who in seconds)
        apart = "(random)" if kind.startswith("dare") else f"{float((got - theirs).norm() / theirs.norm()):.1e}"
        slow, fast = (min(s) for s in seconds.values())
        print(f"{kind:<18}{slow:>10.4f}{fast:>12.4f}{slow / fast:>8.1f}  {apart}", flush=True)


if __name__ == "__main__":
    main()
