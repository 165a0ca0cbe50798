"""Everything that fastmerge raises on purpose, as one small tree.

::

    FastMergeError                exit code 1
    ├── RecipeError               2  the recipe, its YAML or a parameter is wrong; all problems at once
    ├── CheckpointError           3  a model on disk is damaged, incomplete or hostile
    │   └── ShapeError            3  tensors that must agree do not
    ├── OutputError               4  the output exists, is locked, is full, or the journal does not fit
    ├── BudgetError               5  the memory budget is below the stated minimum
    ├── BackendUnavailable        6  a backend or device named explicitly cannot be used
    └── Interrupted               130 / 143  Ctrl-C or SIGTERM; what is done is kept for ``--resume``
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SHOWN = 200
"""Problems that an error prints; more are counted. All of them are in its ``problems``."""


def printable(text: str) -> str:
    """The text with control characters escaped: names from recipes and files must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class FastMergeError(Exception):
    """Base class: catch this to catch every deliberate error of fastmerge."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__())


class _Problems(FastMergeError):
    """An error that lists every problem found, not only the first one."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = f"{len(self.problems)} problems:\n  " if len(self.problems) > 1 else ""
        shown = self.problems
        if len(shown) > SHOWN + 1:  # one more takes no more room than saying so
            shown = [*shown[:SHOWN], f"... and {len(shown) - SHOWN:,} more"]
        super().__init__(head + "\n  ".join(shown))


class RecipeError(_Problems):
    """The recipe cannot be carried out as written."""

    exit_code = 2


class CheckpointError(_Problems):
    """A model on disk cannot be used as it is."""

    exit_code = 3


class ShapeError(CheckpointError):
    """Tensors that must have the same shape do not; nothing is ever broadcast."""


class OutputError(FastMergeError):
    """The output directory cannot be written, resumed or committed."""

    exit_code = 4


class BudgetError(FastMergeError):
    """The memory budget is smaller than the minimum that the message states."""

    exit_code = 5


class BackendUnavailable(FastMergeError):
    """A backend or device that was named explicitly cannot run here."""

    exit_code = 6


class Interrupted(FastMergeError):
    """The merge was asked to stop; finished ranges are kept for ``--resume``."""

    exit_code = 130


def hint(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where something known is close to ``word``; else empty."""
    import difflib

    close = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
