import pytest

from fastmerge.errors import RecipeError
from fastmerge.sizes import DEFAULT_MEMORY, default_memory, parse_bytes


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
    ],
)
def test_sizes(text, nbytes):
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "8 apples", "-1GB", "GB"])
def test_nonsense_is_refused(text):
    with pytest.raises(RecipeError, match="size"):
        parse_bytes(text)


def test_default_is_bounded():
    assert 0 < default_memory() <= DEFAULT_MEMORY
