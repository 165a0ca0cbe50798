"""What every deliberate error is: short enough to read, and no danger to a terminal."""

from fastmerge.errors import SHOWN, BudgetError, RecipeError, printable


def test_control_characters_are_escaped_in_every_error():
    assert str(RecipeError(["a\x1b[2J", "b\x9b\ud800"])) == "2 problems:\n  a\\x1b[2J\n  b\\x9b\\ud800"
    assert str(BudgetError("x\r\x07y")) == "x\\r\\x07y"
    assert printable("wörter, 漢字 and 🦙") == "wörter, 漢字 and 🦙"


def test_long_lists_are_cut_where_they_are_printed_only():
    error = RecipeError([f"p{i}" for i in range(50_000)])
    assert len(error.problems) == 50_000
    assert len(str(error).splitlines()) == SHOWN + 2
    assert str(error).endswith(f"\n  p{SHOWN - 1}\n  ... and 49,800 more")
