"""LoRA extraction beside mergekit 0.1.5's, matrix by matrix in one process: ``python bench/extract_lora.py``.

Both decompose the same fp32 differences of one thread, in turn; seconds are of the processor, best of the runs, so that
other programs on the machine do not count. ``error`` is that of our factors over that of mergekit's, which are those of
the exact truncated SVD. ``noise`` has no structure at all, the hardest case; ``tuned`` falls like a fine-tune's.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from fastmerge.commands.mergekit.svd import truncated


def mergekits(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.scripts.extract_lora import TaskVectorDecompositionTask as Task

    return Task.model_construct(max_rank=rank, distribute_scale=True, transpose=False, sv_epsilon=0).execute(matrix)


def ours(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, vh = truncated(matrix, rank, name="w")
    root = s.sqrt()
    return root[:, None] * vh, u * root


def timed(call: Callable[..., Any], matrix: torch.Tensor, rank: int) -> tuple[float, float]:
    """Seconds, and the error of the factors."""
    started = time.process_time()
    a, b = call(matrix, rank)
    seconds = time.process_time() - started
    return seconds, float((matrix - b @ a).norm())


def matrix_of(kind: str, size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(size)
    noise = torch.randn(size, size, generator=g) * 1e-3
    if kind == "noise":
        return noise
    left, right = torch.randn(size, 256, generator=g), torch.randn(256, size, generator=g)
    return noise + (left * torch.logspace(-3, -5, 256)) @ right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    mergekits(torch.randn(8, 8), 2)  # what loads at its first call
    for kind in ("noise", "tuned"):
        matrix = matrix_of(kind, options.size)
        runs = [[timed(call, matrix, options.rank) for call in (ours, mergekits)] for _ in range(options.runs)]
        (mine, error), (theirs, exact) = (min(r) for r in zip(*runs, strict=True))
        row = {"kind": kind, "size": options.size, "rank": options.rank, "fastmerge": round(mine, 2)}
        row |= {"mergekit": round(theirs, 2), "times": round(theirs / mine, 1), "error": round(error / exact, 6)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
