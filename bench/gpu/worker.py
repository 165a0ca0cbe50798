"""Runs items when asked, in a process of its own: ``python -m bench.gpu.worker CONTEXT``.

Part and name of an item come by standard input, one a line; one line of JSON answers each. What items print goes to
standard error. After a failure the process ends: a CUDA error leaves a context in which nothing works any more.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from typing import Any

from bench.gpu.plan import Absent, Context, Item, items


def perform(item: Item) -> dict[str, Any]:
    """Runs one item: its status, and its row or the reason why there is none."""
    start = time.perf_counter()
    try:
        answer: dict[str, Any] = {"status": "ok", "row": item.run()}
    except Absent as error:
        answer = {"status": "absent", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  whatever it is, it belongs in the table, and the rest runs
        traceback.print_exc()
        text = " ".join(str(error).split())
        answer = {"status": "failed", "reason": f"{type(error).__name__}: {text[:600]}"}
    return {**answer, "seconds": round(time.perf_counter() - start, 2)}


def tidy() -> None:
    """Gives back what an item left on the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def main() -> None:
    """Answers until standard input ends."""
    context = Context.from_json(sys.argv[1])
    # transformers asks for a package called "kernels"; the repository's folder of that name is on the path.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            part, name = line.rstrip("\n").split("\t")
            answer = perform(next(item for item in items(part, context) if item.name == name))
            answers.write(json.dumps(answer, default=str) + "\n")
            answers.flush()
            if answer["status"] == "failed":
                return
            tidy()


if __name__ == "__main__":
    main()
