"""What holds for every test."""

import gc
import os
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


@pytest.fixture(scope="session")
def _programs_of_this_run(tmp_path_factory):
    """A folder that all workers share."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_here(_programs_of_this_run):
    """Once in a run of the tests, and by none before it: commands called within a test turn jax's cache on, for all
    that this process runs afterwards."""
    jax.config.update("jax_compilation_cache_dir", str(_programs_of_this_run))
    compilation_cache.reset_cache()
