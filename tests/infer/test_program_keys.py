"""Keys of compiled programs: another for whatever would be compiled to something else."""

import os
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer import program_keys
from infer.program_keys import Call, runs_untraced
from infer.stable_text import UnstableError


def function(x, y):
    return x + 1


def other(x, y):
    return y + 1


other.__name__ = "function"  # which is what its program is called


def call(function=function, arguments=None, *, name="name", donate=(), out_shardings=None):
    arguments = (jnp.ones(3), jnp.ones(3)) if arguments is None else arguments
    return Call(name=name, function=function, arguments=arguments, donate=donate, out_shardings=out_shardings)


def lowered_key(call):
    jitted = jax.jit(call.function, donate_argnums=call.donate, out_shardings=call.out_shardings)
    return call.lowered_key(jitted.lower(*call.arguments))


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(program_keys, "SOURCES", (*program_keys.SOURCES, __name__))
    monkeypatch.setattr(program_keys, "_sources", lambda: "sources")


def calls():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return [
        call(), call(other), call(donate=(0,)), call(out_shardings=one), call(arguments=(jnp.ones(4), jnp.ones(3))),
        call(arguments=(jnp.ones(3, int), jnp.ones(3))), call(arguments=(1.0, jnp.ones(3))),
        call(arguments=(np.float32(1), jnp.ones(3))), call(arguments=(jax.device_put(jnp.ones(3), one), jnp.ones(3))),
    ]  # fmt: skip


def test_calls_that_differ_have_other_keys(known):
    found = [*calls(), call(name="other"), call(arguments=(jnp.ones(3), [jnp.ones(3)]))]
    keys = [one.key() for one in found]
    assert len(set(keys)) == len(keys)
    assert [one.key() for one in found] == keys


def test_lowered_programs_that_differ_have_other_keys():
    """`other` is lowered to the same text, of the other argument."""
    keys = [lowered_key(one) for one in calls()]
    assert len(set(keys)) == len(keys)
    assert [lowered_key(one) for one in calls()] == keys


def test_large_constants_are_told_apart():
    first, second = np.zeros(100_000, np.float32), np.zeros(100_000, np.float32)
    second[50_000] = 1
    keys = {lowered_key(call(lambda x, y, held=held: x[0] + held, name="held")) for held in (first, second)}
    assert len(keys) == 2


@pytest.mark.parametrize("key", [Call.key, lowered_key], ids=["call", "lowered"])
def test_what_compiles_otherwise_has_another_key(known, monkeypatch, key):
    keys = [key(call())]
    with jax.default_matmul_precision("highest"):
        keys.append(key(call()))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    keys.append(key(call()))
    for name, value in [
        ("_compiler_versions", [("jax", "0")]), ("_processor", "another"), ("FORMAT", program_keys.FORMAT + 1)
    ]:  # fmt: skip
        monkeypatch.setattr(program_keys, name, value if name == "FORMAT" else lambda value=value: value)
        keys.append(key(call()))
    assert len(set(keys)) == len(keys)


def test_a_call_has_another_key_with_other_sources_and_on_a_mesh(known, monkeypatch):
    keys = [call().key()]
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        keys.append(call().key())
    for name, value in [("_sources", "others"), ("_versions_traced_with", "others")]:
        monkeypatch.setattr(program_keys, name, lambda value=value: value)
        keys.append(call().key())
    assert len(set(keys)) == len(keys)


def test_folders_of_messages_and_caches_do_not_matter(known, tmp_path):
    before = call().key()
    held = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        assert call().key() == before
    finally:
        jax.config.update("jax_compilation_cache_dir", held)


def test_what_cannot_be_told_has_no_key(monkeypatch):
    monkeypatch.setattr(program_keys, "_sources", lambda: "sources")
    with pytest.raises(UnstableError, match="test_program_keys"):
        call().key()
    with pytest.raises(UnstableError, match="lambda"):
        call(lambda x, y: x).key()


def test_what_calls_python_has_no_key():
    def calling(x, y):
        jax.debug.callback(print, x)
        return x

    with pytest.raises(UnstableError, match="calls of Python"):
        lowered_key(call(calling))


def test_only_what_calls_the_compilers_own_runs_untraced():
    assert runs_untraced(jax.jit(function).lower(jnp.ones(3), jnp.ones(3)))
    assert not runs_untraced(jax.jit(jnp.linalg.inv).lower(jnp.eye(3)))


@pytest.fixture
def package(tmp_path):
    """A package of which a fresh process tells (key of a call of its function, or why it has none)."""
    folder = tmp_path / "studied"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "inner" / "code.py").write_text("def function(x):\n    return x + 1\n")
    script = textwrap.dedent("""
        import sys
        from infer import program_keys
        program_keys.SOURCES = ("studied",)
        from studied.inner import code
        exec(sys.argv[1])
        call = program_keys.Call(name="name", function=code.function, arguments=(1.0,), donate=(), out_shardings=None)
        try:
            print(call.key())
        except program_keys.UnstableError as error:
            print(error)
    """)

    def told(before: str = "") -> str:
        time.sleep(0.1)  # a process is known to have begun after a change no finer than that
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        found = subprocess.run(
            [sys.executable, "-c", script, before], env=environment, capture_output=True, text=True, timeout=300
        )
        assert found.returncode == 0, found.stderr[-3000:]
        return found.stdout.strip()

    return folder, told


def test_a_changed_source_has_another_key(package):
    folder, told = package
    first = told()
    assert len(first) == 64 and told() == first
    (folder / "inner" / "code.py").write_text("def function(x):\n    return x + 2\n")
    second = told()
    assert len(second) == 64 and second != first


def test_a_source_that_changed_while_the_process_runs_has_no_key(package):
    """The file says something else than what was imported."""
    changing = "open(code.__file__, 'a').write('# changed')"
    assert "code.py has changed since this process began" in package[1](changing)
