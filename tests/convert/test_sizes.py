"""Sizes as people write them."""

import pytest

from convert.sizes import parse_bytes

SIZES = [("5GB", 5 * 10**9), ("20 kb", 20_000), ("7", 7), ("300MB", 3 * 10**8), ("2TB", 2 * 10**12)]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text, size):
    assert parse_bytes(text) == size
