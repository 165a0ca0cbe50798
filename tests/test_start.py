"""How a process of ours ends: as the interpreter promises, but for the freeing of every object."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import atexit, sys, threading, time
from fastmerge import start

class Kept:
    def __del__(self, say=sys.stderr.write):
        say("freed ")

kept = Kept()

def late():
    time.sleep(0.2)
    print("joined", end=" ")

def commands():
    atexit.register(print, "registered", end=" ")
    threading.Thread(target=late).start()
    print("said", end=" ")
    {end}

{before}
start.program(commands)
"""


def ended(end: str, before: str = "", **how) -> subprocess.CompletedProcess[str]:
    code = SCRIPT.format(end=end, before=before)
    how = {"stdout": subprocess.PIPE, **how}
    return subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, **how)


@pytest.mark.parametrize("status", [0, 3])
def test_threads_handlers_and_output_come_first_and_the_status_is_that_of_the_commands(status):
    done = ended(f"sys.exit({status})")
    assert (done.returncode, done.stdout, done.stderr) == (status, "said joined registered ", "")


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [("sys.exit('a reason')", 1, "a reason"), ("raise RuntimeError('a fault')", 1, "a fault"), ("pass", 0, "")],
)
def test_any_other_end_is_the_interpreter_s(end, status, said):
    done = ended(end)
    assert done.returncode == status
    assert said in done.stderr
    assert done.stderr.endswith("freed ")
    assert done.stdout == "said joined registered "


def test_handlers_of_others_from_before_are_called():
    done = ended("sys.exit(3)", "atexit.register(print, 'first', end='')")
    assert (done.returncode, done.stdout) == (3, "said joined registered first")


def test_output_that_cannot_be_written_fails_as_ever():
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = ended("sys.exit(0)", stdout=full, env=environment)
    assert done.returncode == 120
    assert "No space left" in done.stderr


def test_a_program_without_streams_ends_too():
    assert ended("sys.stdout = sys.stderr = None; sys.exit(4)", stdout=subprocess.DEVNULL).returncode == 4
