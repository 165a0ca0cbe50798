"""What messages look like: nothing in them acts on a terminal, and none is endless."""

import pytest

from fastmerge.errors import SHOWN, CheckpointError, OutputError, RecipeError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("models/a b", "models/a b"),
        ("模型 é 🎉", "模型 é 🎉"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nfastmerge: done", "a\\nfastmerge: done"),
        ("\x9b2J\x7f", "\\x9b2J\\x7f"),
        ("safe\u202etxt.exe\u2066", "safe\\u202etxt.exe\\u2066"),
        ("\udcff", "\\udcff"),
    ],
)
def test_text_of_others_is_escaped(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize("error", [CheckpointError, RecipeError, OutputError])
def test_errors_escape_what_they_quote(error):
    assert str(error("/m/\x1b[2J: truncated")) == "/m/\\x1b[2J: truncated"


def test_a_line_break_in_a_name_makes_no_line():
    error = CheckpointError(["a\nb", "c"])
    assert str(error).splitlines() == ["2 problems:", "  a\\nb", "  c"]
    assert error.problems == ["a\nb", "c"]


def test_a_message_is_short_whatever_is_wrong():
    lines = str(CheckpointError([f"t{i}" for i in range(50_000)])).splitlines()
    assert len(lines) == SHOWN + 2
    assert lines[-1] == f"  and {50_000 - SHOWN} more"
