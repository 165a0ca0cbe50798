"""``tests/conftest.py`` for mergekit's suite: installs the adapter, says what went through it."""

import os
from collections import Counter

DONE = Counter()


def pytest_configure(config):
    if os.environ["ADAPTER"] == "1":
        from fastmerge.adapters import mergekit
        from fastmerge.adapters.mergekit import merges, methods

        merges.attempt = counted("merges from disk to disk", merges.attempt)
        methods._merged = counted("calls of methods", methods._merged)
        mergekit.install()


def counted(what, function):
    """The function, with each call counted: those that did the work, and those that left it to mergekit."""

    def call(*args):
        DONE[f"{what}, tried"] += 1
        result = function(*args)  # the methods raise what they refuse, the merges return it
        DONE[what] += not isinstance(result, str)
        return result

    return call


def pytest_terminal_summary(terminalreporter):
    for what, count in sorted(DONE.items()):
        terminalreporter.write_line(f"through the engine: {count} {what}")
