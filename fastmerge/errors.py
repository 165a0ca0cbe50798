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

import functools
import re
from collections.abc import Iterable, Sequence

SHOWN = 250
"""Problems that one message spells out; the rest is counted."""

_UNPRINTABLE = "\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"


@functools.cache
def _unprintable(*, lines: bool) -> re.Pattern[str]:
    """What is escaped, compiled where a text has any: that takes 4.5 million instructions."""
    low = "\x00-\x09\x0b-\x1f" if lines else "\x00-\x1f"
    return re.compile(f"[{low}{_UNPRINTABLE}]")


def printable(text: object, *, lines: bool = False) -> str:
    r"""Text that a terminal or a log shows as it is: whatever would act on it, hide or turn it round is escaped.

    File names, metadata and configurations of models are other people's: ``\x1b`` in one could rename the window,
    or erase the line that warns of it. Lone surrogates, which no UTF-8 stream takes, are escaped too.

    Args:
        text: anything; its ``str`` is shown.
        lines: keep line breaks, for text that was put together of several lines.
    """
    shown = str(text)
    if (shown.replace("\n", "") if lines else shown).isprintable():
        return shown
    return _unprintable(lines=lines).sub(lambda m: ascii(m[0])[1:-1], shown)


class FastMergeError(Exception):
    """Base class: catch this to catch every deliberate error of fastmerge."""

    exit_code = 1

    def __str__(self) -> str:
        return printable(super().__str__(), lines=True)


class _Problems(FastMergeError):
    """An error that lists every problem found, not only the first one.

    Attributes:
        problems: all of them, unescaped; the message shows the first :data:`SHOWN`.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = f"{len(self.problems)} problems:\n  " if len(self.problems) > 1 else ""
        lines = list(map(printable, self.problems[:SHOWN]))
        if len(self.problems) > SHOWN:
            lines.append(f"and {len(self.problems) - SHOWN} more")
        super().__init__(head + "\n  ".join(lines))


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


class NoSpace(OutputError):
    """The disk that the output goes to is full, or its quota is spent; what was finished stays."""


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
