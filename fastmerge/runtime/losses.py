"""What results lose that are written as codes and scales."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmerge.ops.packing import Loss


class Losses:
    """Keeps the books of what codes are wrong by, for all workers."""

    def __init__(self) -> None:
        self._found: dict[str, Loss] = {}
        self._lock = threading.Lock()

    def add(self, name: str, loss: Loss) -> None:
        """Adds that of a piece of a tensor."""
        with self._lock:
            self._found[name] = self._found[name].and_(loss) if name in self._found else loss

    def facts(self) -> dict[str, Any]:
        """Of all tensors together, and of the one that loses most; empty where none was written as codes.

        ``relative_error`` is the root of the mean square of the differences between what was merged and what was
        written, over that of what was merged; ``largest_error`` is the largest difference. ``squares`` and
        ``squared_errors`` are the sums from which parts of a merge find that of all.
        """
        if not self._found:
            return {}
        total = functools.reduce(lambda a, b: a.and_(b), [self._found[name] for name in sorted(self._found)])
        worst = max(sorted(self._found), key=lambda n: self._found[n].relative)
        return {
            "tensors": len(self._found),
            "relative_error": total.relative,
            "largest_error": total.most,
            "squares": total.squares,
            "squared_errors": total.errors,
            "worst": {"tensor": worst, "relative_error": self._found[worst].relative},
        }
