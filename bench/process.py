"""Runs commands as users do, in processes of their own, and reports what each one used."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class Run:
    """One finished process.

    Attributes:
        seconds: wall time from start to exit.
        cpu: user and system seconds, threads and waited-for children included.
        system: the second of them alone.
        rss: peak resident bytes of the process. The kernel counts the launching process's pages until the new
            program is loaded, so launchers stay small: nothing here imports numpy.
        status: exit status; negative for a signal.
        output: the last lines of standard output and error together.
    """

    seconds: float
    cpu: float
    system: float
    rss: int
    status: int
    output: str


LAUNCH = """
import runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if "_editable" not in type(f).__module__]
tree, what = sys.argv[1:3]
del sys.argv[1:3]
sys.path.insert(0, tree)
if what.endswith(".py"):
    sys.path.insert(0, what.rpartition("/")[0])
    runpy.run_path(what, run_name="__main__")
else:
    runpy.run_module(what, run_name="__main__", alter_sys=True)
"""


def within(tree: Path, what: str) -> list[str]:
    """Runs a module or a script on the build of a work tree, whatever is installed."""
    return [sys.executable, "-c", LAUNCH, str(tree), what]


def fastmerge(tree: Path | None = None) -> list[str]:
    """The command line: of what is installed, as its users start it, or of a work tree."""
    return [str(Path(sys.executable).with_name("fastmerge"))] if tree is None else within(tree, "fastmerge")


def run(command: Sequence[str], *, environment: dict[str, str] | None = None) -> Run:
    """Runs a command to its end; a failure is reported, not raised.

    Python keeps its byte code from run to run, as it does for installed packages, whatever the caller's setting.
    """
    variables = {**os.environ, **(environment or {})}
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Run(seconds, cpu, usage.ru_stime, peak, child.returncode, text[-2_000:])


@dataclass(frozen=True, slots=True)
class Spread:
    """Several runs of the same thing: median, fastest and slowest, in seconds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """The spread of at least one time."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}..{self.most:.2f})"


def warm(files: Sequence[Path]) -> None:
    """Reads files once, so that all contenders find them in the page cache, if it can hold them."""
    subprocess.run(["cat", *map(str, files)], stdout=subprocess.DEVNULL, check=True)


def cold(files: Sequence[Path]) -> None:
    """Takes files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def weights(directory: Path) -> list[Path]:
    """The weight files of a checkpoint."""
    return sorted(directory.glob("*.safetensors"))
