"""The three bodies of `attend` against softmax written out; the TPU's in Pallas interpret mode."""

import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dit_jax.ops import attention
from dit_jax.ops.attention import TPU_BLOCK, attend, tpu_block
from dit_jax.sharding import make_mesh
from infer.chips import tpu_devices

BODIES = {
    "cpu": attention._cpu,
    "gpu": attention._gpu,  # in fp32, where it is XLA's own implementation
    "tpu": functools.partial(attention._tpu, interpret=True),
}
# (queries, keys): odd, fewer and more than a block, lengths that differ both ways.
LENGTHS = [(5, 5), (37, 131), (300, 1100), (1100, 300), (530, 7)]


def operands(queries, keys, width=12, seed=0):
    """q, k, v of three heads and two samples, and a mask that leaves each sample another half of the keys."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, length, 3, width), np.float32) for length in (queries, keys, keys))
    valid = rng.random((2, keys)) < 0.5
    valid[:, 0] = True
    return 2 * q, k, v, valid


def softmax_attention(q, k, v, valid, scale):
    """fp64, all scores at once."""
    scores = np.einsum("bnhk,bmhk->bhnm", q.astype(np.float64), k.astype(np.float64)) * scale
    if valid is not None:
        scores = np.where(valid[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhk->bnhk", weights / weights.sum(-1, keepdims=True), v.astype(np.float64))


def relative(a, b):
    return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_equals_softmax(body, lengths, masked):
    q, k, v, valid = operands(*lengths)
    valid = valid if masked else None
    out = jax.jit(functools.partial(BODIES[body], scale=0.4))(q, k, v, valid)
    assert relative(out, softmax_attention(q, k, v, valid, 0.4)) <= 1e-6


@pytest.mark.parametrize("body", BODIES)
def test_masked_keys_change_nothing(body):
    """Padding is never attended: other numbers in it, however large, give the very same result."""
    q, k, v, valid = operands(37, 131)
    other_k, other_v = (np.where(valid[..., None, None], x, 1e4) for x in (k, v))
    run = jax.jit(functools.partial(BODIES[body], scale=0.4))
    np.testing.assert_array_equal(run(q, k, v, valid), run(q, other_k, other_v, valid))


@pytest.mark.parametrize("body", BODIES)
def test_gradient(body):
    q, k, v, valid = operands(37, 131)
    weights = np.random.default_rng(1).standard_normal(q.shape, np.float32)

    def loss(function, q, k, v):
        return jnp.sum(function(q, k, v, valid, scale=0.4) * weights)

    def plain(q, k, v, valid, scale):
        scores = jnp.einsum("bnhk,bmhk->bhnm", q, k) * scale
        return jnp.einsum("bhnm,bmhk->bnhk", jax.nn.softmax(scores, where=valid[:, None, None], axis=-1), v)

    expected = jax.jit(jax.grad(functools.partial(loss, plain), (0, 1, 2)))(q, k, v)
    found = jax.jit(jax.grad(functools.partial(loss, BODIES[body]), (0, 1, 2)))(q, k, v)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, np.asarray(theirs)) <= 1e-5


@pytest.mark.parametrize("body", ["cpu", "tpu"])
def test_bf16(body):
    """Scores and sums are fp32: against the exact result of the same bf16 operands only rounding of weights and
    output is left.

    The scale is one that bf16 cannot hold.
    """
    q, k, v, valid = operands(37, 131, width=48)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    out = BODIES[body](q, k, v, valid, scale=0.1443)
    assert out.dtype == jnp.bfloat16
    assert 1e-4 < relative(out, softmax_attention(*(np.asarray(x) for x in (q, k, v)), valid, 0.1443)) <= 4e-3


@pytest.mark.parametrize(("width", "implementation"), [(24, "cudnn"), (18, "xla")])
def test_what_cudnn_is_asked_for_it_can_do(monkeypatch, width, implementation):
    """Heads of a multiple of 8, and a mask of every query; other heads go to XLA."""
    asked = {}

    def ask(q, k, v, *, mask, scale, implementation):
        asked.update(mask=mask.shape, implementation=implementation)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", ask)
    q, k, v, valid = operands(5, 9, width=width)
    attention._gpu(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), jnp.asarray(valid), scale=0.4)
    assert asked == {"mask": (2, 1, 5, 9), "implementation": implementation}


@pytest.mark.parametrize("masked", [False, True])
def test_on_a_mesh_a_body_gets_a_mask_only_if_there_is_one(monkeypatch, masked):
    """Also inside a `shard_map` over the whole mesh, where `attend` runs its body as it is."""
    got = []

    def body(q, k, v, valid_BM=None, *, scale):
        got.append(valid_BM is not None)
        return q

    monkeypatch.setitem(attention._BODIES, "cpu", body)
    q, k, v, valid = operands(8, 8)
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        inside = jax.shard_map(attend, in_specs=P("data"), out_specs=P("data"), check_vma=False)
        for function in (attend, inside):
            jax.eval_shape(function, q, k, v, *([valid] if masked else []))
    assert got == [masked, masked]


@pytest.mark.parametrize(("tensor", "heads"), [(3, 1), (2, 3)])
def test_heads_that_do_not_divide_are_left_whole(monkeypatch, tensor, heads):
    got = []
    monkeypatch.setitem(attention._BODIES, "cpu", lambda q, k, v, valid_BM=None, *, scale: got.append(q.shape[2]) or q)
    mesh = jax.sharding.AbstractMesh((tensor,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(attend, *operands(8, 8)[:3])
    assert got == [heads]


def test_large_scores_do_not_overflow():
    q, k, v, valid = operands(9, 300)
    out = jax.jit(attend)(q * 300, k, v, valid)
    assert relative(out, softmax_attention(q * 300, k, v, valid, 12**-0.5)) <= 1e-4


def test_the_scale_is_that_of_the_head_width():
    q, k, v, _ = operands(5, 9)
    np.testing.assert_array_equal(attend(q, k, v), attend(q, k, v, scale=12**-0.5))


def test_a_long_row_does_not_hold_all_scores():
    """The CPU body works in blocks: its temporaries are far below the [N, M] scores of one head."""
    x = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    memory = jax.jit(attend).lower(x, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096 * 4 / 8


@pytest.mark.parametrize(
    ("length", "block"),
    [(5, 128), (257, 384), (512, 512), (1100, 640), (4608, 768), (8192, 1024), (32768, 1024), (75648, 1024)],
)
def test_blocks_of_the_tpu_kernel_are_large_and_pad_little(length, block):
    """Keys of a prompt and of FLUX's text with its picture at 1024²; tokens of Wan's videos at 480p and 720p."""
    assert tpu_block(length) == block


def test_a_block_of_a_long_row_is_of_whole_lanes_and_never_small():
    for length in range(TPU_BLOCK + 1, 12_000, 77):
        block = tpu_block(length)
        assert block % 128 == 0
        assert TPU_BLOCK / 2 < block <= TPU_BLOCK
        assert -length % block <= -length % TPU_BLOCK


@pytest.mark.long
@pytest.mark.parametrize(("topology", "masked"), itertools.product(("v5e-4", "v5p-8", "v6e-4"), (False, True)))
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
def test_the_tpu_kernels_and_their_gradients_fit_in_on_chip_memory(topology, masked):
    """At their largest blocks; a kernel that does not is refused by the compiler."""
    row = jax.ShapeDtypeStruct((4, 2 * TPU_BLOCK, 1, 128), jnp.bfloat16)
    valid = jax.ShapeDtypeStruct(row.shape[:2], bool) if masked else None

    def loss(q, k, v, valid):
        return jnp.sum(attend(q, k, v, valid).astype(jnp.float32))

    with jax.set_mesh(make_mesh({"data": 4}, tpu_devices(topology))):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(row, row, row, valid).compile().as_text()
    assert text.count("tpu_custom_call") == 3
    assert text.count(f'\\"block_q\\": {TPU_BLOCK}') >= 3
