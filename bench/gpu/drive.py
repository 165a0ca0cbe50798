"""What compute-sanitizer watches: ``python -m bench.gpu.drive extension|triton``; prints what it drove.

Few small launches with every awkward shape: odd lengths, odd addresses, the last elements of an allocation.
"""

from __future__ import annotations

import sys
from typing import Any

from bench.gpu.plan import Absent

LENGTHS = (1, 7, 8, 255, 4096, 65_536 + 13)


def extension() -> str:
    """Replicates experts of every length and type, with and without noise."""
    import torch

    from bench.gpu.replicate import entry

    replicate = entry()
    calls = 0
    for length in LENGTHS:
        for shift in (0, 1):
            for dtype in (torch.bfloat16, torch.float32):
                x = torch.randn(length + shift).to(dtype).cuda()[shift:]  # no kernel but ours
                for noise in (0.0, 0.01):
                    made = replicate(x, 3, noise=noise, mode="absolute", name="w")
                    assert all(tuple(e.shape) == (length,) for e in made)
                    calls += 1
    torch.cuda.synchronize()
    return f"replicate_experts, {calls} calls"


def triton() -> str:
    """Weighted sums at odd addresses and lengths."""
    import torch

    from bench.calls import Family, combine
    from fastmerge.kernels import TritonKernels

    kernels: Any = TritonKernels("cuda")
    for length in LENGTHS:
        x = torch.randn(3 * (length + 1)).bfloat16().cuda().view(3, -1)
        tensors = [row[1:] for row in x]
        combine(kernels, Family(tensors[0], tensors[1:], torch.empty_like(tensors[0])), delta=False)()
    torch.cuda.synchronize()
    return f"combine, {len(LENGTHS)} lengths at odd addresses"


def main() -> None:
    """Runs the one that is asked for."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    try:
        print("driven:", {"extension": extension, "triton": triton}[sys.argv[1]](), flush=True)
    except Absent as error:
        print("absent:", error, flush=True)


if __name__ == "__main__":
    main()
