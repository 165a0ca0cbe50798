import numpy as np
import pytest

from fastmerge.errors import RecipeError
from fastmerge.sizes import DEFAULT_MEMORY, default_memory, parse_bytes, show_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GB", 8 * 10**9),
        ("64MiB", 64 << 20),
        ("5000", 5000),
        (7, 7),
        ("1.5 gb", 1_500_000_000),
        ("2g", 2 * 10**9),
        ("10b", 10),
        (2e9, 2 * 10**9),
        (np.int64(5), 5),
        (np.float32(8.0), 8),
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "8 apples", "-1GB", "GB", -1, float("nan"), float("inf"), [8], None, b"8"])
def test_nonsense_is_refused(text):
    with pytest.raises(RecipeError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (12_345_678, "12.3 MB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1.5e9, "1.5 GB"),
        (4.25e15, "4.25e+03 TB"),
    ],
)
def test_sizes_are_shown_with_three_digits(nbytes, text):
    assert show_bytes(nbytes) == text


def test_default_is_bounded():
    assert 0 < default_memory() <= DEFAULT_MEMORY
