"""What is read from traced and compiled programs: products in loops, kernels and shards; what chips send each other."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from dit_jax.sharding import make_mesh
from infer.chips import GIB, tpu_devices
from infer.program_costs import CompiledText, Sent, matmul_flops, needed_bytes

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'dit-jax[dev]'"
)
ONE = 2 * 8 * 16 * 16  # FLOPs of [8, 16] @ [16, 16]
X, W = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)


def flops(function, *arguments, **options):
    return matmul_flops(jax.make_jaxpr(function)(*arguments), **options)


def test_a_loop_counts_as_often_as_it_runs_and_a_conditional_once():
    def loop(x, w):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops(loop, X, W) == 7 * ONE


def test_a_loop_of_unknown_length_needs_to_be_told():
    def loop(x, w, count):
        return jax.lax.fori_loop(0, count, lambda _, x: x @ w, x)

    assert flops(loop, X, W, jnp.int32(3), trips=4) == 4 * ONE
    with pytest.raises(ValueError, match="whose length only a run tells"):
        flops(loop, X, W, jnp.int32(3))


def test_gradients_and_recomputation_count():
    def loss(x, w):
        return jnp.sum(jax.checkpoint(lambda x, w: jnp.sin(x @ w) @ w)(x, w))

    # Two forward, one of them again, two for each of x and w.
    assert flops(jax.grad(loss, argnums=(0, 1)), X, W) == (2 + 1 + 4) * ONE


def test_a_kernel_counts_every_step_of_its_grid():
    def kernel(x, w, y):
        y[...] = x[...] @ w[...]

    def call(x, w):
        rows = pl.BlockSpec((2, 16), lambda i: (i, 0))
        whole = pl.BlockSpec((16, 16), lambda i: (0, 0))
        return pl.pallas_call(
            kernel,
            grid=(4,),
            in_specs=[rows, whole],
            out_specs=rows,
            out_shape=jax.ShapeDtypeStruct((8, 16), "float32"),
        )(x, w)

    assert flops(call, X, W) == ONE


def test_every_device_of_a_shard_map_counts():
    mesh = jax.sharding.AbstractMesh((4,), ("data",))
    spec = PartitionSpec("data")
    whole = functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert flops(whole(lambda x, w: x @ w), X, W) == ONE


@needs_libtpu
def test_bytes_sent_in_a_loop_are_those_of_the_ring():
    """A chip of four sends three quarters of what it gathers, as often as the loop runs."""
    mesh = make_mesh({"fsdp": 4}, tpu_devices("v5e:2x2"))

    def placed(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def step(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x = placed(256, 1024, spec=("fsdp",))
    weights = placed(6, 1024, 1024, spec=(None, None, "fsdp"))
    with jax.set_mesh(mesh):
        compiled = jax.jit(step, out_shardings=x.sharding).lower(x, weights).compile()
    sent = CompiledText(compiled.as_text(), 4).sent
    assert {each.kind for each in sent} <= {"all-gather", "collective-permute"}
    assert sum(each.size for each in sent) == pytest.approx(6 * 1024 * 1024 * 2 * 3 / 4, rel=0.02)


@needs_libtpu
@pytest.mark.parametrize("slices", [2, 4])
def test_what_crosses_the_network_between_slices_is_told_apart(slices):
    """Every chip has the rows of its slice, and a quarter of the columns: it reduces that quarter with its twins."""
    mesh = make_mesh({"data": slices, "fsdp": 4}, tpu_devices("v5e:2x2", slices))

    def placed(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    x, w = placed(64, 512, spec=("data",)), placed(512, 1024, spec=(None, "fsdp"))
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w)))
        compiled = jax.jit(gradient, out_shardings=w.sharding).lower(w, x).compile()
    sent = CompiledText(compiled.as_text(), 4 * slices, slices).sent
    assert {each.kind for each in sent if each.between_slices} == {"all-reduce"}
    size = sum(each.size for each in sent if each.between_slices)
    assert size in [2 * (slices - 1) / slices * 512 * 256 * width for width in (2, 4)]  # in bf16 or fp32


TEXT = """
%sum (a: f32[], b: f32[]) -> f32[] {
}
%all-reduce-scatter.1 (p: f32[8,128]) -> f32[2,128] {
  %all-reduce.9 = f32[8,128]{1,0} all-reduce(%p), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
}
%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %ag = f32[8,128]{1,0} all-gather(%x), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %f = f32[2,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
%condition (p: (s32[], f32[8,128])) -> pred[] {
  %n = s32[] constant(5)
}
ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %w = (s32[], f32[8,128]) while(%t), condition=%condition, body=%body
  %again = f32[8,128]{1,0} all-gather(%x), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %ar = (f32[4,128]{1,0}, bf16[4]{0}) all-reduce(%x, %y), channel_id=4, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %cp = f32[8]{0} collective-permute(%x), channel_id=5, source_target_pairs={{0,4},{4,0}}
  %host = (f32[99]{0}, u32[], token[]) send(%x, %t), channel_id=6, is_host_transfer=true
}
"""
BETWEEN = """ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %send.0 = (f32[2,8]{1,0}, u32[]{:S(2)}, token[]) send(%x, %t), channel_id=8, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="KIND"}
  %ar = f32[1]{0} all-reduce(%x), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%sum
}
"""


def test_a_printed_program_is_read_with_its_groups_loops_and_channels():
    sent = {each.kind: each for each in CompiledText(TEXT, 8, slices=2).sent}
    assert sent == {
        "all-gather": Sent("all-gather", 5 * 4096 / 2, True),
        "reduce-scatter": Sent("reduce-scatter", 5 * 4096 * 3 / 4, False),
        "all-reduce": Sent("all-reduce", 2 * (2048 + 8) * 3 / 4, False),
        "collective-permute": Sent("collective-permute", 32, True),
    }


@pytest.mark.parametrize(
    ("kind", "share"),
    [("ALL_REDUCE", 3 / 2), ("ALL_GATHER", 3), ("REDUCE_SCATTER", 3 / 4), ("ALL_TO_ALL", 3 / 4), ("ONE_TO_ONE", 1)],
)
def test_what_is_handed_to_the_network_is_the_ring_of_the_slices(kind, share):
    sent = CompiledText(BETWEEN.replace("KIND", kind), 16, slices=4).sent
    assert sent == [Sent(kind.lower().replace("_", "-"), 64 * share, True), Sent("all-reduce", 4, False)]


def test_what_a_refused_program_needs_is_read_from_the_refusal():
    refused = RuntimeError("Ran out of memory: program (41.50G) exceeds available HBM space")
    assert needed_bytes(refused) == round(41.5 * GIB)
    with pytest.raises(RuntimeError, match="something else"):
        needed_bytes(RuntimeError("something else"))
