"""Models that stay resident: merges rendered into live tensors, again and again."""

from fastmerge.session.session import Session

__all__ = ["Session"]
