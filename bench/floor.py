"""The floor of a merge: the time that its bytes take when nothing is computed.

    python bench/floor.py MODEL_DIR... [--out-bytes N] [--again-bytes N] [--runs 5]

``cat`` of the inputs to /dev/null, once, and of ``--again-bytes`` a second time (tensors that a method with
statistics must read twice because they exceed the memory budget); then ``dd conv=fdatasync`` of as many zeros
as the output has bytes, into a new file on the same filesystem. Both are a single process without threads.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from process import Spread, warm, weights

BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class Floor:
    """One probe, in seconds."""

    read: float
    write: float

    @property
    def seconds(self) -> float:
        """Both halves."""
        return self.read + self.write


def probe(files: Sequence[Path], out_bytes: int, directory: Path, *, again_bytes: int = 0) -> Floor:
    """Measures the floor once.

    Args:
        files: inputs, each read once.
        out_bytes: bytes of output, written durably into a new file in ``directory`` and removed afterwards,
            outside of the measured time.
        directory: where the merge's output goes.
        again_bytes: bytes of the inputs to read a second time.
    """
    start = time.perf_counter()
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)
    if again_bytes:
        with subprocess.Popen(["cat", *map(str, files)], stdout=subprocess.PIPE) as again:
            head = ["head", "-c", str(again_bytes)]
            subprocess.run(head, stdin=again.stdout, stdout=subprocess.DEVNULL, check=True)
            again.kill()
    read = time.perf_counter() - start

    zeros = directory / ".floor-of-zeros"
    zeros.unlink(missing_ok=True)
    flags = ["iflag=count_bytes", "conv=fdatasync", f"bs={BLOCK}", f"count={out_bytes}"]
    start = time.perf_counter()
    subprocess.run(["dd", "if=/dev/zero", f"of={zeros}", *flags], stderr=subprocess.DEVNULL, check=True)
    write = time.perf_counter() - start
    zeros.unlink()
    return Floor(read, write)


def alternate(work: Callable[[], float], floor: Callable[[], Floor], runs: int) -> tuple[Spread, Spread, list[Floor]]:
    """Alternates merges with their floor, in the same state of the cache; the first pair is not counted.

    Args:
        work: does the merge and returns its seconds.
        floor: probes the floor.
        runs: counted pairs.

    Returns:
        Spread of the merges, spread of the floors, and the counted floors.
    """
    merges, floors = [], []
    for count in range(runs + 1):
        seconds = work()
        probed = floor()
        if count:
            merges.append(seconds)
            floors.append(probed)
    return Spread.of(merges), Spread.of([f.seconds for f in floors]), floors


def main() -> None:
    """Probes the floor of merging some checkpoints and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL_DIR")
    parser.add_argument("--out-bytes", type=int, help="bytes of the output [those of the first model]")
    parser.add_argument("--again-bytes", type=int, default=0, help="input bytes to read twice [0]")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    files = [f for model in args.models for f in weights(model)]
    if not files:
        parser.error("no *.safetensors in " + ", ".join(map(str, args.models)))
    out_bytes = args.out_bytes or sum(f.stat().st_size for f in weights(args.models[0]))
    warm(files)
    found = [probe(files, out_bytes, args.models[0].parent, again_bytes=args.again_bytes) for _ in range(args.runs)]
    total = sum(f.stat().st_size for f in files)
    read, write = Spread.of([f.read for f in found]), Spread.of([f.write for f in found])
    print(f"read   {total / 1e9:7.2f} GB  {read} s  {(total + args.again_bytes) / read.median / 1e9:.2f} GB/s")
    print(f"write  {out_bytes / 1e9:7.2f} GB  {write} s  {out_bytes / write.median / 1e9:.2f} GB/s")
    print(f"floor  {Spread.of([f.seconds for f in found])} s")


if __name__ == "__main__":
    main()
