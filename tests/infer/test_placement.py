"""How pictures are split for the VAE, on meshes without devices."""

import pytest
from jax.sharding import AbstractMesh

from dit_jax.sharding import parse_mesh
from infer.placement import picture_sharding

SMALL, LARGE = (60, 104), (90, 160)  # latents of 832x480 and 1280x720


@pytest.mark.parametrize(
    ("mesh", "batch", "picture", "shard"),
    [
        ("context=4", 1, SMALL, (1, 15, 104)),
        ("context=8", 1, SMALL, (1, 60, 13)),
        ("context=8", 1, LARGE, (1, 90, 20)),
        ("data=2,context=4", 2, SMALL, (1, 15, 104)),
        ("data=2,context=4", 1, SMALL, (1, 60, 13)),
        ("fsdp=4,tensor=2", 1, SMALL, (1, 60, 13)),
        ("fsdp=4,context=4", 1, SMALL, (1, 15, 26)),
        ("data=3,context=2", 1, SMALL, (1, 10, 104)),
        ("data=3,context=7", 1, SMALL, (1, 20, 104)),
        ("context=7", 1, SMALL, (1, 60, 104)),
    ],
)
def test_as_many_devices_as_divide_share_a_picture(mesh, batch, picture, shard):
    axes = parse_mesh(mesh)
    sharding = picture_sharding(AbstractMesh(tuple(axes.values()), tuple(axes)), batch, *picture)
    batch_shard, _, *picture_shard, _ = sharding.shard_shape((batch, 21, *picture, 16))
    assert (batch_shard, *picture_shard) == shard
