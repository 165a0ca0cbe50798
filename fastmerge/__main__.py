"""``python -m fastmerge``."""

from fastmerge.cli import main

main()
