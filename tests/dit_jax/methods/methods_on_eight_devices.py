"""What `test_methods_on_meshes.py` runs in a process of its own: plans on eight fake CPU devices, and on one.

The devices must exist before jax starts, hence the process. Arguments: plans. Prints one JSON object: `errors`
(relative, by plan, backbone and mesh) and `programs` (compiled for all segments of a run, alike).
"""

import json
import sys

import jax
import numpy as np
from small_models import CONFIGS, guided, noise, relative_error, sampled

from dit_jax.methods.method import Run
from dit_jax.methods.plan import parse_plan
from dit_jax.methods.routing import RouterConfig, new_router
from dit_jax.models import flux, wan
from dit_jax.sampling.sampler import Carry, sample
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler
from dit_jax.sharding import batch_shardings, make_mesh, parse_mesh, shardings

MESHES = ("data=2,context=4", "fsdp=2,context=2,tensor=2")
AXES = {"wan": wan.AXES, "flux": flux.AXES}
STEPS, SEGMENT = 12, 4


def applied(text, denoiser, latents):
    schedule = Euler().schedule(STEPS, Shift(constant=3.0), 40)
    run = Run(
        latents_shape=latents.shape, first=0, stop=STEPS, steps=STEPS, sigmas=schedule.sigmas,
        parts={"router": random_router(denoiser.model)},
    )  # fmt: skip
    return parse_plan(text).applied(denoiser, run), schedule


def random_router(model):
    """A router whose choice depends on the latents."""
    part = new_router(RouterConfig(content="latents", features=9, blocks=sum(model.stacks), hidden=16))
    rng = np.random.default_rng(0)
    leaves = {name: rng.standard_normal(leaf.shape).astype(np.float32) for name, leaf in part.leaves.items()}
    return part._replace(leaves=leaves)


def on_mesh(text, backbone, axes):
    """(final latents, how many programs all segments took)."""
    plain, latents = guided(CONFIGS[backbone]), noise(CONFIGS[backbone])
    mesh = make_mesh(parse_mesh(axes))

    def segment(denoiser, carry, schedule, first):
        return sample(denoiser, Euler(), carry, schedule, first, SEGMENT)

    with jax.set_mesh(mesh):
        placed = jax.device_put(plain, batch_shardings(plain, mesh))
        model = jax.device_put(plain.model, shardings(plain.model, AXES[backbone], mesh))
        latents = jax.device_put(latents, batch_shardings(latents, mesh))
        denoiser, schedule = applied(text, type(plain)(**{**vars(placed), "model": model}), latents)
        carry = Carry(latents, (), jax.jit(type(denoiser).init)(denoiser, latents))
        one = jax.jit(segment, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, carry))
        for first in range(0, STEPS, SEGMENT):
            carry = one(denoiser, carry, schedule, np.int32(first))
        return np.asarray(denoiser.finish(carry.latents)), one._cache_size()


def main(plans):
    errors, programs = {}, {}
    for text in plans:
        for backbone, config in CONFIGS.items():
            latents = noise(config)
            alone = sampled(applied(text, guided(config), latents)[0], latents, STEPS)
            for axes in MESHES if backbone == "wan" else MESHES[1:]:
                name = f"{text} {backbone} {axes}"
                found, programs[name] = on_mesh(text, backbone, axes)
                errors[name] = relative_error(found, alone)
    print(json.dumps({"errors": errors, "programs": programs}))


if __name__ == "__main__":
    main(sys.argv[1:])
