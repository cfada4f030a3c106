"""What holds for every test."""

import gc
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_here():
    """Commands called within a test turn jax's cache of programs on, for all that this process runs afterwards."""
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
