"""mergekit's own tests, from its sdist, with the adapter installed: ``make mergekit-suite``.

    python tests/peers/mergekit_suite.py                 # fetches the sdist through pip
    python tests/peers/mergekit_suite.py --sdist FILE    # one that is here
    python tests/peers/mergekit_suite.py --without       # mergekit alone, to compare

The sdist of 0.1.5 leaves ``tests/common.py`` out; mergekit_common.py beside this file stands in for it. Arguments
behind ``--`` go to pytest. No test is left out; those that need a GPU skip themselves where there is none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
VERSION = "0.1.5"


def main() -> int:
    """The exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--without", action="store_true")
    parser.add_argument("pytest", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if args.sdist is None:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest"]
            subprocess.run([*pip, directory, f"mergekit=={VERSION}"], check=True)
        with tarfile.open(args.sdist or next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        root = work / f"mergekit-{VERSION}"
        # What is tested is the installed mergekit of this version, not a second copy beside the tests.
        shutil.rmtree(root / "mergekit")
        for name in ("common", "conftest"):
            shutil.copy(HERE / f"mergekit_{name}.py", root / "tests" / f"{name}.py")
        known = sorted(root.glob("tests/test_*.py"))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", *args.pytest, "tests"]
        environment = {**os.environ, "ADAPTER": "0" if args.without else "1", "HF_HUB_OFFLINE": "1"}
        print(
            f"{len(known)} files of mergekit {VERSION}, {'without' if args.without else 'with'} the adapter", flush=True
        )
        return subprocess.run(command, cwd=root, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
