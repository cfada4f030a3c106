"""What holds for every test."""

import gc
from pathlib import Path

import jax
import pytest

# A compiled program keeps mappings of memory, and a process dies that needs more than vm.max_map_count (65,530): a
# thousand tests have been seen to need 58,733.
MOST_MAPPINGS = 20_000


def _mappings() -> int:
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.fixture(scope="module", autouse=True)
def _programs_are_let_go():
    yield
    if _mappings() > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
