"""mergekit's commands with the adapter: ``python -m fastmerge.adapters.mergekit mergekit-yaml CONFIG OUT [flags]``.

A command line of ``mergekit-yaml`` that this engine takes is carried out without loading mergekit, which takes several
times as long as the merge of a small model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from fastmerge import start
from fastmerge.adapters.mergekit import check_version, install
from fastmerge.errors import FastMergeError, printable

log = logging.getLogger("fastmerge")


def main(words: Sequence[str]) -> None:
    """Runs one of mergekit's commands."""
    from importlib.metadata import entry_points

    check_version()
    commands = {e.name: e for e in entry_points(group="console_scripts") if e.value.startswith("mergekit.")}
    if not words or words[0] not in commands:
        raise SystemExit(f"usage: python -m fastmerge.adapters.mergekit COMMAND ...; one of {', '.join(commands)}")
    command, *rest = words
    merges = True
    if command == "mergekit-yaml":
        reason = _fast(rest)
        if reason is None:
            return
        log.warning("mergekit merges this itself: %s", reason)
        merges = False  # was just refused
    install(merges=merges)
    sys.argv = [command, *rest]
    commands[command].load()()


def _fast(words: Sequence[str]) -> str | None:
    """Merges without mergekit; else why not."""
    from fastmerge.adapters.mergekit import options

    parsed = options.parse(words)
    if parsed is None:
        return "its command line has more than a merge"
    if parsed.options.quiet or parsed.options.verbosity:
        logging.getLogger("fastmerge").setLevel(logging.ERROR if parsed.options.quiet else logging.INFO)
    start.quickly()
    from fastmerge.adapters.mergekit.merges import attempt

    return attempt(parsed.config, parsed.out, parsed.options)


if __name__ == "__main__":
    logging.basicConfig(format="fastmerge: %(message)s")
    try:
        main(sys.argv[1:])
    except FastMergeError as error:
        print(f"fastmerge: {printable(error, lines=True)}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
