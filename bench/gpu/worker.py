"""Runs items when asked, in a process of its own: ``python -m bench.gpu.worker CONTEXT``.

Part and name of an item, its seconds and what it kept come by standard input, as JSON, one a line; one line of JSON
answers each. What items print goes to standard error. After a failure the process ends: a CUDA error leaves a context
in which nothing works any more.
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

from bench.gpu.plan import Absent, Context, Cut, Item, Turn, items

ENDS = ("failed", "cut")
"""After these no item follows in the same process."""


def perform(item: Item, turn: Turn) -> dict[str, Any]:
    """Runs one item: its status, and its row or the reason why there is none."""
    start = time.perf_counter()
    try:
        answer: dict[str, Any] = {"status": "ok", "row": item.run(turn) if item.stops else item.run()}
    except Cut as cut:
        answer = {"status": "cut", "reason": str(cut), "row": cut.row, "kept": cut.kept}
    except Absent as error:
        answer = {"status": "absent", "reason": str(error)}
    except Exception as error:  # noqa: BLE001  whatever it is, it belongs in the table, and the rest runs
        traceback.print_exc()
        text = " ".join(str(error).split())
        answer = {"status": "failed", "reason": f"{type(error).__name__}: {text[:600]}"}
        if kept := getattr(error, "kept", None):
            answer["kept"] = kept
    return {**answer, "seconds": round(time.perf_counter() - start, 2)}


def tidy() -> None:
    """Gives back what an item left on the device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def _quicken() -> None:
    """Spares the interpreter what it does again and again, where it is."""
    with contextlib.suppress(ImportError):
        import triton.runtime.interpreter  # noqa: F401

    from tests.interpreter import quicken

    quicken()


def main() -> None:
    """Answers until standard input ends."""
    context = Context.from_json(sys.argv[1])
    # transformers asks for a package called "kernels"; the repository's folder of that name is on the path.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            asked = json.loads(line)
            item = next(item for item in items(asked["part"], context) if item.name == asked["item"])
            if context.dry and asked["part"] != "build":  # which is what brings the packages
                _quicken()
            answer = perform(item, Turn(asked["seconds"], asked["kept"]))
            answers.write(json.dumps(answer, default=str) + "\n")
            answers.flush()
            if answer["status"] in ENDS:
                return
            tidy()


if __name__ == "__main__":
    main()
