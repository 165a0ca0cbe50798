"""A plugin of pytest: writes down every test's outcome as it comes, and leaves out the tests of an earlier turn.

``pytest -p bench.gpu.outcomes``, with the two files named by environment variables; the processes of pytest-xdist
collect with it as well, and the one that gathers their reports writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.tests import DONE, OUTCOMES


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out what is done, after the mark chose; and says how many there are."""
    done = set(json.loads(Path(os.environ[DONE]).read_text()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]
    Path(f"{os.environ[OUTCOMES]}.count").write_text(str(len(items)))


def pytest_runtest_logreport(report: Any) -> None:
    """Writes a line: the call of a test that passed, whatever else went wrong."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.outcome == "passed" and report.when != "call"):
        return
    message = ""
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = " ".join(str(crash.message if crash else report.longrepr).split())[:150]
    with Path(os.environ[OUTCOMES]).open("a") as out:
        out.write(json.dumps([report.nodeid, report.outcome, message]) + "\n")
