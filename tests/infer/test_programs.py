"""Programs from several threads at once, and from a store that an earlier process has filled."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import program_keys
from infer.program_store import ProgramStore
from infer.programs import Programs

LIMIT = 1 << 30
PATIENCE = 60  # seconds


@pytest.fixture
def known(monkeypatch):
    """Functions of this file are of a known version."""
    monkeypatch.setattr(program_keys, "SOURCES", (*program_keys.SOURCES, __name__))
    monkeypatch.setattr(program_keys, "_sources", lambda: "sources")


def moved(by):
    def function(x, y):
        return {"sum": x + by, "product": (x * y).sum()}

    return function


def test_a_program_is_compiled_once_and_counted():
    programs = Programs()
    for _ in range(2):
        found = programs.run("moved", moved(1), jnp.ones(3), jnp.full(3, 2.0))
    np.testing.assert_array_equal(found["sum"], [2, 2, 2])
    assert (len(programs), programs.compiled_count, programs.loaded_count) == (1, 1, 0)
    assert programs.seconds > 0 and len(programs.used) == 1 and programs.peak_bytes() > 0
    programs.compiled("moved", moved(1), jnp.ones(4), jnp.ones(4))
    assert (len(programs), programs.compiled_count, len(programs.used)) == (2, 2, 1)


def test_threads_wait_for_the_one_that_compiles():
    programs, traced, go_on = Programs(), [], threading.Event()

    def slow(x):
        traced.append(threading.get_ident())
        go_on.wait(PATIENCE)
        return x + 1

    with ThreadPoolExecutor(4) as threads:
        found = [threads.submit(programs.run, "slow", slow, jnp.ones(2)) for _ in range(4)]
        go_on.set()
        assert all(float(one.result()[0]) == 2 for one in found)
    assert len(traced) == 1
    assert (programs.compiled_count, len(programs), len(programs.used)) == (1, 1, 1)


def test_several_programs_are_compiled_at_once():
    programs, both = Programs(), threading.Barrier(2, timeout=PATIENCE)

    def meeting(x):
        both.wait()
        return x + 1

    with ThreadPoolExecutor(2) as threads:
        found = [
            threads.submit(programs.compiled, name, meeting, jnp.ones(size)) for name, size in (("a", 2), ("b", 3))
        ]
        assert all(callable(one.result()) for one in found)
    assert programs.compiled_count == 2


def test_what_fails_to_compile_fails_for_all_and_may_be_asked_for_again():
    programs, go_on, failing = Programs(), threading.Event(), [True]

    def function(x):
        go_on.wait(PATIENCE)
        if failing:
            raise ValueError("not today")
        return x

    with ThreadPoolExecutor(2) as threads:
        found = [threads.submit(programs.compiled, "name", function, jnp.ones(2)) for _ in range(2)]
        go_on.set()
        assert all(isinstance(one.exception(), ValueError) for one in found)
    assert len(programs) == programs.compiled_count == 0
    failing.clear()
    programs.compiled("name", function, jnp.ones(2))
    assert len(programs) == 1 and programs.compiled_count == 1


@pytest.mark.parametrize("indexed", [False, True], ids=["lowered", "by its call"])
def test_a_warm_store_compiles_nothing(tmp_path, request, monkeypatch, indexed):
    if indexed:
        request.getfixturevalue("known")
    arguments = jnp.arange(3.0), np.float32(2)
    cold, warm = (Programs(ProgramStore(tmp_path / "store", limit_bytes=LIMIT)) for _ in range(2))
    expected = cold.run("moved", moved(3), *arguments)
    lowered = []
    real = program_keys.Call.lowered_key
    monkeypatch.setattr(program_keys.Call, "lowered_key", lambda call, of: lowered.append(call.name) or real(call, of))
    found = warm.run("moved", moved(3), *arguments)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (cold.compiled_count, cold.loaded_count) == (1, 0)
    assert (warm.compiled_count, warm.loaded_count) == (0, 1)
    assert warm.peak_bytes() == cold.peak_bytes() and warm.seconds > 0
    assert lowered == ([] if indexed else ["moved"])
    assert len(warm) == 1 and warm.compiled("moved", moved(3), *arguments) and warm.loaded_count == 1


def test_another_function_is_not_found_under_a_name(tmp_path, known):
    cold, warm = (Programs(ProgramStore(tmp_path, limit_bytes=LIMIT)) for _ in range(2))
    cold.run("moved", moved(3), jnp.ones(2), jnp.ones(2))
    assert float(warm.run("moved", moved(4), jnp.ones(2), jnp.ones(2))["sum"][0]) == 5
    assert warm.compiled_count == 1


def test_donated_arguments_are_given_up_by_a_loaded_program(tmp_path, known):
    def function(x, y):
        return x + y, y * 2

    for loaded in (0, 1):
        programs = Programs(ProgramStore(tmp_path, limit_bytes=LIMIT))
        given, kept = jnp.ones(1000), jnp.ones(1000)
        programs.run("donating", function, given, kept, donate=(0,))
        assert programs.loaded_count == loaded
        assert given.is_deleted() and not kept.is_deleted()


def test_what_calls_python_runs_and_is_not_kept(tmp_path, known):
    called = []

    def function(x):
        return jax.pure_callback(lambda v: called.append(1) or v * 2, jax.ShapeDtypeStruct((2,), jnp.float32), x)

    for count in (1, 2):
        programs = Programs(ProgramStore(tmp_path, limit_bytes=LIMIT))
        np.testing.assert_array_equal(programs.run("calling", function, jnp.ones(2)), [2, 2])
        assert (programs.compiled_count, programs.loaded_count, len(called)) == (1, 0, count)
    assert list(tmp_path.iterdir()) == []


def test_what_needs_lapack_is_lowered_before_it_runs(tmp_path, known):
    """Or the process would die: LAPACK's routines are registered when something is lowered that calls them."""

    def function(x):
        return jnp.linalg.inv(x)

    Programs(ProgramStore(tmp_path, limit_bytes=LIMIT)).run("inverse", function, 2 * jnp.eye(3))
    assert [path.suffix for path in tmp_path.iterdir()] == [".program"]
    warm = Programs(ProgramStore(tmp_path, limit_bytes=LIMIT))
    np.testing.assert_allclose(warm.run("inverse", function, 2 * jnp.eye(3)), 0.5 * np.eye(3))
    assert warm.loaded_count == 1


def test_a_program_that_jax_has_already_compiled_is_not_kept(tmp_path):
    """What jax hands out twice may have been loaded from its own cache, of which nothing can be kept."""
    function = moved(7)
    Programs().run("moved", function, jnp.ones(2), jnp.ones(2))
    again = Programs(ProgramStore(tmp_path, limit_bytes=LIMIT))
    again.run("moved", function, jnp.ones(2), jnp.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_a_program_out_of_jaxs_own_cache_is_not_kept(tmp_path):
    """It would be loaded by the next process, and fail when it runs."""
    script = textwrap.dedent("""
        import sys
        import jax.numpy as jnp
        from infer.program_store import ProgramStore
        from infer.programs import Programs

        def function(x):
            return jnp.sin(x) @ x

        programs = Programs(ProgramStore(sys.argv[1], limit_bytes=1 << 30))
        print(programs.run("name", function, jnp.ones((20, 20))).sum(), programs.loaded_count)
    """)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    found = []
    for store in ("first", "second", "second", "first"):
        run = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / store)], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(run.stdout.split())
    assert len({total for total, _ in found}) == 1
    assert [loaded for _, loaded in found] == ["0", "0", "0", "1"]
