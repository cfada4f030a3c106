"""Keys under which compiled programs are kept on disk: all that a compiled program depends on, as a hash.

A program has its key from what it was lowered to. As lowering takes longer than loading, a call has a key too, told
without tracing: it knows the lowered program only as long as no source and no version has changed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from infer.stable_text import StableText, UnstableError

FORMAT = 1  # of what is kept
SOURCES = ("dit_jax", "convert", "infer")  # packages that a traced function may be of
TRACED_WITH = ("flax", "optax", "einops", "numpy", "ml_dtypes", "jax", "jaxlib")
COMPILERS = ("jax", "libtpu", "nvidia")  # how the names of distributions begin that compile, or are called by programs
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Calls that a program may make of what the compiler itself holds. What others name (LAPACK's routines, say) is there
# once something was traced that needs it: a program that was only loaded would call into nothing, and the process die.
CALLS = ("Sharding", "SPMD", "xla.sdy.", "annotate_device_placement", "tpu_custom_call", "__cudnn$", "__cublas$")
CALLED = re.compile(r'custom_call @"?([^("\s]+)')
# Of jax's configuration, what says where files and messages go.
NO_MATTER = ("jax_compilation_cache_", "jax_persistent_cache_", "jax_log", "jax_debug_log", "jax_dump_", "jax_platform")


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function and the arguments that it is to be compiled for; see `Programs.compiled`."""

    name: Hashable
    function: Callable
    arguments: tuple
    donate: tuple[int, ...]
    out_shardings: Any

    @cached_property
    def devices(self) -> tuple[jax.Device, ...]:
        """Where it runs, in the order of the mesh."""
        found = [_devices(getattr(leaf, "sharding", None)) for leaf in jax.tree.leaves(self.arguments)]
        return max(found, key=len, default=()) or _devices(jnp.zeros(()).sharding)

    @property
    def in_tree(self) -> Any:
        """Structure of the arguments, as a compiled program has it."""
        return jax.tree.structure((self.arguments, {}))

    def key(self) -> str:
        """Of the call before it is traced; UnstableError where it holds what cannot be told."""
        text = StableText((*SOURCES, *TRACED_WITH))
        leaves = jax.tree.leaves(self.arguments)
        try:
            return _hash(
                _sources(), _versions_traced_with(), _compiler(self.devices),
                text.of([self.name, self.function, self.donate]),
                text.of_tree(jax.tree.structure(self.arguments)),
                text.of([repr(jax.typeof(leaf)) for leaf in leaves]),
                text.of([(getattr(leaf, "sharding", None), getattr(leaf, "committed", None)) for leaf in leaves]),
                text.of_tree(jax.tree.structure(self.out_shardings)), text.of(jax.tree.leaves(self.out_shardings)),
                text.of([jax.sharding.get_abstract_mesh(), jax.sharding.get_mesh()]),
            )  # fmt: skip
        except RecursionError:
            raise UnstableError("what holds itself") from None

    def lowered_key(self, lowered: jax.stages.Lowered) -> str:
        """Of the program that the call was lowered to; UnstableError for one that only this process can run."""
        told: dict[str, Any] = getattr(lowered._lowering, "compile_args", {})
        if "kept_var_idx" not in told or "host_callbacks" not in told:
            raise UnstableError("a program of which jax does not say which arguments it keeps")
        if told["host_callbacks"] or told.get("keepalive") or jax.process_count() > 1:
            raise UnstableError("a program with calls of Python, or of several hosts")
        around = [  # what a program has beside its text
            sorted(told["kept_var_idx"]),
            [repr(leaf) for leaf in jax.tree.leaves((lowered.args_info, lowered.out_info))],
            [repr(getattr(leaf, "sharding", None)) for leaf in jax.tree.leaves(self.arguments)],
            [getattr(leaf, "committed", None) for leaf in jax.tree.leaves(self.arguments)],
        ]
        return _hash(_compiler(self.devices), json.dumps(around), lowered.as_text())


def runs_untraced(lowered: jax.stages.Lowered) -> bool:
    """Whether the program runs in a process in which nothing was traced."""
    return all(called.startswith(CALLS) for called in CALLED.findall(lowered.as_text()))


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _devices(sharding: Any) -> tuple[jax.Device, ...]:
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat) if isinstance(sharding.mesh, Mesh) else ()
    return () if sharding is None else tuple(sorted(sharding.device_set, key=lambda device: device.id))


def _compiler(devices: tuple[jax.Device, ...]) -> str:
    """All besides the program that decides what it is compiled to, or whether it runs here."""
    client = devices[0].client
    config = {name: getattr(jax.config, name, value) for name, value in jax.config.values.items()}
    return json.dumps(
        {
            "format": FORMAT,
            "versions": _compiler_versions(),
            "platform": [client.platform, client.platform_version, client.device_count()],
            "devices": [(device.id, device.device_kind, str(getattr(device, "coords", ""))) for device in devices],
            "processor": _processor() if client.platform == "cpu" else "",
            "flags": [os.environ.get(name, "") for name in FLAGS],
            "config": {name: str(config[name]) for name in sorted(config) if not name.startswith(NO_MATTER)},
        }
    )


@cache
def _compiler_versions() -> list[tuple[str, str]]:
    found = ((distribution.name.lower(), distribution.version) for distribution in importlib.metadata.distributions())
    return sorted(one for one in found if one[0].startswith(COMPILERS))


@cache
def _processor() -> str:
    """The processor with its features: a program compiled for another may hold instructions that this one lacks."""
    found = Path("/proc/cpuinfo")
    if not found.exists():
        return str(platform.uname())  # with the machine's name: features are not told, so only the same one will do
    first = found.read_text().partition("\n\n")[0]
    lasting = ("model name", "flags", "Features", "CPU ")
    told = sorted(line for line in first.splitlines() if line.startswith(lasting))
    return "\n".join([platform.machine(), str(os.cpu_count()), *told])


@cache
def _versions_traced_with() -> str:
    return json.dumps([sys.version, *((name, importlib.metadata.version(name)) for name in TRACED_WITH)])


@cache
def _sources() -> str:
    """Hash of the packages' sources; UnstableError where they are not those that this process runs."""
    hashed, began = hashlib.sha256(), _process_began()
    for name, file in _source_files():
        content = file.read_bytes()
        if file.stat().st_ctime >= began:
            raise UnstableError(f"sources: {file} has changed since this process began")
        hashed.update(f"{name}\0{len(content)}\0".encode() + content)
    return hashed.hexdigest()


def _source_files() -> Iterator[tuple[str, Path]]:
    for package in SOURCES:
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = [(folder, file) for folder in map(Path, folders) for file in sorted(folder.rglob("*.py"))]
        if not files:
            raise UnstableError(f"sources: {package} has none")
        yield from ((f"{package}/{file.relative_to(folder)}", file) for folder, file in files)


_IMPORTED = time.time()


def _process_began() -> float:
    """In seconds since the epoch; where the system does not say, when this module was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED
