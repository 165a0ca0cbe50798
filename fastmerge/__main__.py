"""The program: ``python -m fastmerge``, and ``fastmerge`` where it is installed."""

from fastmerge import start
from fastmerge.cli import main as commands


def main() -> None:
    """Runs the command line of the process."""
    start.program(commands)


if __name__ == "__main__":
    main()
