"""Checks a built wheel: one top level, the extension, the kernels, the types, and nothing else.

Run as ``python tests/check_wheel.py dist/*.whl``; ``.ci/run`` does.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIRED = ("fastmerge/__init__.py", "fastmerge/py.typed", "fastmerge/kernels/__init__.py", "fastmerge/cli.py")
FORBIDDEN = ("tests/", "bench/", "demo/", "csrc/", ".so.", "__pycache__")


def check(wheel: Path) -> list[str]:
    """Problems of the wheel."""
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        tops = {n.split("/")[0] for n in names}
        problems = [f"{top}: a second top level" for top in tops if top != "fastmerge" and ".dist-info" not in top]
        problems += [f"{n}: missing" for n in REQUIRED if n not in names]
        problems += [f"{n}: does not belong in the wheel" for n in names for f in FORBIDDEN if f in n]
        if not any(n.startswith("fastmerge/_native") and n.endswith(".so") for n in names):
            problems.append("the native extension is missing")
        # -S: an editable installation in the environment would come first.
        with tempfile.TemporaryDirectory() as d:
            z.extractall(d)
            run = (
                "import fastmerge, sys; from fastmerge import _native; _native.isa(); assert 'torch' not in sys.modules"
            )
            done = subprocess.run(
                [sys.executable, "-S", "-c", run], cwd="/", env={"PYTHONPATH": d}, capture_output=True, text=True
            )
            if done.returncode:
                problems.append(f"does not import: {done.stderr.strip()}")
            elif d not in subprocess.run(
                [sys.executable, "-S", "-c", "import fastmerge; print(fastmerge.__file__)"],
                cwd="/", env={"PYTHONPATH": d}, capture_output=True, text=True,
            ).stdout:  # fmt: skip
                problems.append("another fastmerge was imported instead of the wheel's")
    return problems


if __name__ == "__main__":
    found = [f"{w}: {p}" for w in sys.argv[1:] for p in check(Path(w))]
    print("\n".join(found) or f"{sys.argv[1:]}: good")
    sys.exit(bool(found))
