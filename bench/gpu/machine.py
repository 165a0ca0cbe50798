"""Which machine a result belongs to; asked in a process of its own, so that the run itself holds no GPU."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from typing import Any

from bench.gpu.plan import Context
from bench.gpu.state import sources
from bench.report import provenance, version

PROBE = """
import json
try:
    import torch
except ImportError as error:
    print(json.dumps({"no_gpu": f"torch cannot be imported: {error}"}))
    raise SystemExit
if torch.version.cuda is None:
    print(json.dumps({"no_gpu": f"torch {torch.__version__} was built without CUDA"}))
    raise SystemExit
try:
    torch.cuda.init()
    p = torch.cuda.get_device_properties(0)
except Exception as error:
    print(json.dumps({"no_gpu": " ".join(str(error).split())[:300]}))
    raise SystemExit
print(json.dumps({
    "gpu": p.name, "capability": f"{p.major}.{p.minor}", "gpus": torch.cuda.device_count(),
    "multiprocessors": p.multi_processor_count, "gpu_memory_gb": round(p.total_memory / 1e9, 1),
    "l2_mb": round(getattr(p, "L2_cache_size", 0) / 1e6, 1), "torch_cuda": torch.version.cuda,
}))
"""

QUERY = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"


def facts(context: Context, *, commit: str | None) -> dict[str, Any]:
    """Provenance; ``no_gpu`` says why there is no usable GPU, where there is none.

    Args:
        context: of the run.
        commit: what to name where the copy of the tree has no history of its own.
    """
    about = provenance(None)
    about["commit"] = commit or about["commit"]
    about |= {
        "sources": sources(),
        "dry": context.dry,
        "torch": version("torch"),
        "triton": version("triton"),
        "machine": platform.machine(),
    }
    if context.dry:
        return {**about, "gpu": "none (dry run)", "driver": None}
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            env=context.environment(), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        found = json.loads(done.stdout) if done.stdout else {"no_gpu": " ".join(done.stderr.split())[-300:]}
    except (subprocess.TimeoutExpired, ValueError) as error:
        found = {"no_gpu": f"the driver does not answer: {error}"}
    return {**about, **found, **nvidia_smi()}


def nvidia_smi() -> dict[str, Any]:
    """Driver and clocks, where the tool is there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"driver": None}
    command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (subprocess.SubprocessError, OSError):
        return {"driver": None}
    values = [v.strip() for v in done.stdout.split(",")]
    named = dict(zip(QUERY.split(","), values, strict=False))
    clocks = {k: v for k, v in named.items() if k != "driver_version"}
    return {"driver": named.get("driver_version"), "nvidia_smi": {"time": time.strftime("%H:%M:%S"), **clocks}}
