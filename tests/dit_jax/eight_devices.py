"""What `test_sharding.py` runs in a process of its own: tiny Wan and FLUX models on eight fake CPU devices, and on one.

The devices must exist before jax starts, hence the process. Prints one JSON object: `errors` (relative, by mesh and
case) and `compilations` (by the second segment, by mesh).
"""

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models import flux, wan
from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import Conditioning, NetworkCall, TokenTimesteps, layout, network, unlayout
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.sampling.sampler import Guided, sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import UniPC
from dit_jax.sharding import batch_shardings, make_mesh, parse_mesh, shardings

# A width of 40 and 12 MLP channels divide over some axes and not over others; 45 tokens divide over none.
T2V = WanConfig(
    blocks=3, width=40, heads=8, head_width=12, mlp_width=12, in_channels=4, out_channels=4, text_width=11,
    time_frequencies=8,
)  # fmt: skip
I2V = replace(T2V, in_channels=8, image_width=13)
FLUX = FluxConfig(
    double_blocks=2, single_blocks=2, width=64, heads=8, head_width=8, mlp_width=20, in_channels=4, out_channels=4,
    text_width=11, pooled_width=9, time_frequencies=8, rope_widths=(4, 2, 2),
)  # fmt: skip
VIDEO, PICTURE = (3, 6, 10, 4), (1, 6, 10, 4)
OTHERS = 3  # the image-to-video model, in a batch, a first frame that is held, and FLUX run on so many of the meshes
STEPS = 4
SOLVER = UniPC()
SCHEDULE = SOLVER.schedule(STEPS, Shift(constant=3.0), 45)


class Case(NamedTuple):
    """A denoiser with two rows a sample, its starting latents, and what one device makes of them."""

    name: str
    guided: Any
    latents: np.ndarray
    velocity: np.ndarray
    sampled: np.ndarray


def random_model(config: WanConfig | FluxConfig):
    """Every leaf of ordinary size: zero biases and unit norms would hide what they do."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[1:-1]) if leaf.ndim > 2 else 4
        return jnp.asarray(rng.standard_normal(leaf.shape) / fan_in**0.5, jnp.float32)

    model: Any = Flux if isinstance(config, FluxConfig) else Wan
    return jax.tree.map(fill, nnx.eval_shape(lambda: model(config, nnx.Rngs(0))))


def evaluate(guided: Guided, latents):
    """The network alone, on all branches, each row (or token, where a frame is held) at a time of its own."""
    seen = latents if guided.extra is None else jnp.concatenate([latents, guided.extra], -1)
    seen = jnp.repeat(seen, guided.branches, 0)
    tokens, t = layout(seen, guided.model.config.patch), jnp.linspace(900, 100, seen.shape[0])
    if guided.held is not None:
        which = jnp.broadcast_to(jnp.arange(tokens.rows.shape[1], dtype=jnp.int32) % 3, tokens.rows.shape[:2])
        t = TokenTimesteps(jnp.stack([t, t / 2, 0 * t], axis=1), which)
    rows, _ = network(guided.model, NetworkCall(), tokens, t, guided.conditioning)
    return unlayout(rows, seen.shape, guided.model.config.patch)


def conditioning(config: WanConfig | FluxConfig, rows: int, rng: np.random.Generator) -> Conditioning:
    text = rng.standard_normal((rows, 7, config.text_width), np.float32)
    if isinstance(config, FluxConfig):
        pooled = rng.standard_normal((rows, config.pooled_width), np.float32)
        return Conditioning(text, pooled=pooled, guidance=np.linspace(1, 4, rows, dtype=np.float32))
    image = rng.standard_normal((rows, 5, config.image_width), np.float32) if config.image_width else None
    return Conditioning(text, image)


def case(name: str, config: WanConfig | FluxConfig, samples: int, held: bool = False) -> Case:
    rng = np.random.default_rng(samples)
    shape = PICTURE if isinstance(config, FluxConfig) else VIDEO
    latents, extra = rng.standard_normal((2, samples, *shape), np.float32)
    told = conditioning(config, 2 * samples, rng)
    guided = Guided(
        model=random_model(config),
        conditioning=told,
        guidance_scale=np.linspace(3, 5, samples, dtype=np.float32),
        extra=extra if told.image is not None else None,
        held=extra[:, :1] if held else None,
        branches=2,
    )
    segment = jax.jit(sample, static_argnames=("solver", "count"))
    sampled = segment(guided, SOLVER, start(guided, SOLVER, latents), SCHEDULE, 0, STEPS).latents
    return Case(name, guided, latents, np.asarray(jax.jit(evaluate)(guided, latents)), np.asarray(sampled))


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


def sharded(case: Case, mesh) -> Guided:
    """The case's denoiser on the mesh: parameters by the model's table, inputs by rows."""
    axes = flux.AXES if isinstance(case.guided.model, Flux) else wan.AXES
    model = jax.device_put(case.guided.model, shardings(case.guided.model, axes, mesh))
    inputs = replace(case.guided, model=None)
    return replace(jax.device_put(inputs, batch_shardings(inputs, mesh)), model=model)


def check(cases: list[Case], text: str, compiled: list) -> tuple[dict[str, float], int]:
    """(relative errors by case, compilations by the second segment) on one mesh."""
    mesh, errors, late = make_mesh(parse_mesh(text)), {}, 0
    with jax.set_mesh(mesh):
        for case in cases:
            guided = sharded(case, mesh)
            errors[f"{text} {case.name} network"] = relative(jax.jit(evaluate)(guided, case.latents), case.velocity)
            carry = start(guided, SOLVER, jax.device_put(case.latents, batch_shardings(case.latents, mesh)))
            placed = batch_shardings(carry, mesh)
            run = partial(sample, solver=SOLVER, schedule=SCHEDULE, count=STEPS // 2)
            segment = jax.jit(run, donate_argnames="carry", out_shardings=placed)
            carry = segment(guided, carry=jax.device_put(carry, placed), first=0)
            before = len(compiled)
            carry = segment(guided, carry=carry, first=STEPS // 2)
            late += len(compiled) - before
            errors[f"{text} {case.name} sample"] = relative(carry.latents, case.sampled)
    return errors, late


def main(meshes: list[str]) -> None:
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    cases = [case("t2v", T2V, 1), case("i2v batch", I2V, 2), case("held", T2V, 1, held=True), case("flux", FLUX, 1)]
    errors: dict[str, float] = {}
    compilations = {}
    for number, text in enumerate(meshes):
        its_errors, compilations[text] = check(cases if number < OTHERS else cases[:1], text, compiled)
        errors |= its_errors
    print(json.dumps({"errors": errors, "compilations": compilations, "all": len(compiled)}))


if __name__ == "__main__":
    main(sys.argv[1:])
