"""The committed table of deviations covers what is registered; its rows are those that the code makes."""

import pytest

pytest.importorskip("mergekit")

from tests.conformance import table

TEXT = table.PAGE.read_text()


def test_the_page_names_every_method_and_parameter():
    assert table.missing(TEXT) == [], "python -m tests.conformance.table --write"


def test_the_page_has_every_setting():
    """The rows that the script would write today, but for their figures."""
    shared = table.peers()
    both = table.METHODS.keys() & shared.keys()
    rows = sorted(f"| `{n}` | {what} | " for n in both for what, *_ in table.settings(n, shared[n]))
    lines = TEXT.splitlines()
    assert [r for r in rows if not any(line.startswith(r) for line in lines)] == []


def test_a_new_method_or_parameter_is_missed():
    assert "ties" in table.missing(TEXT.replace("| `ties` ", "| `toes` ").replace("- `ties`", "- `toes`"))
    assert table.missing(TEXT.replace("`lambda: 0.7`", "").replace("`lambda: -1.0`", "")) != []
