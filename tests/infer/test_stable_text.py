"""Texts of static choices: the same in every process, another for anything that differs."""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from dit_jax.methods.coredit import Coherent
from dit_jax.methods.plan import parse_plan
from dit_jax.models.network import NetworkCall
from dit_jax.sampling.solvers import SOLVERS
from infer.stable_text import StableText, UnstableError

TEXT = StableText(["dit_jax", "infer", "jax", "jaxlib", "numpy", "flax", __name__])


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Quiet:
    """Its repr says less than it holds."""

    shown: int
    hidden: int = field(default=0, repr=False, compare=False)


def scaled(by):
    def function(x):
        return x * by

    return function


def by_default(x):
    return x


def mesh(*names):
    return jax.make_mesh((1,) * len(names), names)


def samples():
    """Values of which no two are the same choice."""
    long, other = np.arange(5000), np.arange(5000)
    other[2500] = 1
    device = jax.devices()[0]
    return [
        None, True, 1, 1.0, "1", b"1", (1,), [1], {"a": 1}, {"a": 2}, frozenset({1, 2}), math.nan, ...,
        Colour.RED, Colour.BLUE, Quiet(1), Quiet(1, 2), replace(Quiet(1), shown=2),
        np.float32(1), np.float64(1), np.dtype("float32"), jnp.float32, np.float32, long, other, long.reshape(2, -1),
        scaled(1), scaled(2), by_default, functools.partial(by_default, 1), functools.partial(by_default, 2),
        functools.partial(by_default, x=2), SOLVERS["unipc"], SOLVERS["euler"], SOLVERS["unipc"].init,
        SOLVERS["euler"].init, jax.nn.silu, jax.nn.gelu, jax.lax.dot_general, math.sin, len, Quiet, dict,
        NetworkCall(), NetworkCall(attention=Coherent), parse_plan("hsa:50"), parse_plan("hsa:25"),
        PartitionSpec("a"), PartitionSpec(None, "a"), mesh("a"), mesh("b"), mesh("a").abstract_mesh, device,
        NamedSharding(mesh("a"), PartitionSpec("a")), NamedSharding(mesh("a"), PartitionSpec()),
        SingleDeviceSharding(device),
    ]  # fmt: skip


def test_what_differs_has_another_text():
    texts = [TEXT.of(value) for value in samples()]
    assert len(set(texts)) == len(texts)
    assert [TEXT.of(value) for value in samples()] == texts
    assert not any(" at 0x" in text for text in texts)


def test_another_process_says_the_same(tmp_path):
    code = "import json, test_stable_text as t; print(json.dumps([t.TEXT.of(value) for value in t.samples()]))"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "12", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(found.stdout) == [TEXT.of(value) for value in samples()]


def test_trees_are_told_with_their_static_fields():
    trees = [
        (1, 2), [1, 2], ((1,), 2), {"a": 1, "b": 2}, {"a": 1, "c": 2}, (1, None), (1, ()), 1, None,
        {"a": 1, "b": {"a": 2}}, jax.tree_util.Partial(by_default, 1), jax.tree_util.Partial(scaled(2), 1),
    ]  # fmt: skip
    texts = [TEXT.of_tree(jax.tree.structure(tree)) for tree in trees]
    assert len(set(texts)) == len(texts)


def local_class():
    @dataclass(frozen=True)
    class Local:
        number: int = 1

    return Local


def holding_itself():
    def function(x):
        return function(x)

    return function


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "builtins.object"),
        (lambda x: x, "a lambda of test_stable_text"),
        (local_class(), "class made by a function"),
        (local_class()(), "class made by a function"),
        (jnp.ones(3), "ArrayImpl"),
        (scaled(jnp.ones(3)), "ArrayImpl"),
        (np.array([object()]), "numpy.ndarray"),
        (pytest.approx, "version is not known"),
        ({"a": (1, [object()])}, "builtins.object"),
    ],
    ids=["object", "lambda", "local class", "of a local class", "array", "closure", "objects", "unknown", "inside"],
)
def test_what_cannot_be_told_is_refused(value, named):
    with pytest.raises(UnstableError, match=named):
        TEXT.of(value)


def test_what_holds_itself_ends():
    with pytest.raises(RecursionError):  # `Call.key` says so
        TEXT.of(holding_itself())
