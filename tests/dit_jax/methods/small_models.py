"""Small Wan and FLUX models with weights of ordinary size, and denoisers of them, that the methods are tested on."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import Conditioning
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.sampling.sampler import Guided, sample, start
from dit_jax.sampling.schedules import Shift
from dit_jax.sampling.solvers import Euler

WAN = WanConfig(
    blocks=3, width=48, heads=4, head_width=12, mlp_width=80, in_channels=4, out_channels=4, text_width=11,
    time_frequencies=8,
)  # fmt: skip
FLUX = FluxConfig(
    double_blocks=2, single_blocks=3, width=32, heads=4, head_width=8, mlp_width=52, in_channels=4, out_channels=4,
    text_width=11, pooled_width=9, time_frequencies=8, rope_widths=(2, 2, 4),
)  # fmt: skip
VIDEO, PICTURE = (3, 6, 10, 4), (1, 10, 14, 4)  # 45 and 35 tokens
Config = WanConfig | FluxConfig
CONFIGS: dict[str, Config] = {"wan": WAN, "flux": FLUX}


def random_model(config: Config, seed: int = 0) -> Any:
    """Every leaf of ordinary size: zero biases and unit norms would hide what they do."""
    rng = np.random.default_rng(seed)
    model: Any = Flux if isinstance(config, FluxConfig) else Wan

    def fill(leaf):
        fan_in = np.prod(leaf.shape[1:-1]) if leaf.ndim > 2 else 4
        return jnp.asarray(rng.standard_normal(leaf.shape) / fan_in**0.5, jnp.float32)

    return jax.tree.map(fill, nnx.eval_shape(lambda: model(config, nnx.Rngs(0))))


def shape_of(config: Config) -> tuple[int, ...]:
    return PICTURE if isinstance(config, FluxConfig) else VIDEO


def conditioning(config: Config, rows: int, seed: int = 1) -> Conditioning:
    rng = np.random.default_rng(seed)
    text = jnp.asarray(rng.standard_normal((rows, 7, config.text_width)), jnp.float32)
    if not isinstance(config, FluxConfig):
        return Conditioning(text)
    pooled = jnp.asarray(rng.standard_normal((rows, config.pooled_width)), jnp.float32)
    return Conditioning(text, pooled=pooled, guidance=jnp.linspace(1, 4, rows))


def guided(config: Config, samples: int = 2, branches: int = 2, seed: int = 0) -> Guided:
    """A denoiser of a random model."""
    told = conditioning(config, samples * branches)
    return Guided(model=random_model(config, seed), conditioning=told, guidance_scale=jnp.float32(3), branches=branches)


def one_sample(denoiser: Guided, index: int) -> Guided:
    """The denoiser of one sample of a batch."""
    rows = slice(index * denoiser.branches, (index + 1) * denoiser.branches)
    told = Conditioning(*(None if part is None else part[rows] for part in denoiser.conditioning))
    held = None if denoiser.held is None else denoiser.held[index : index + 1]
    return replace(denoiser, conditioning=told, held=held)


def noise(config: Config, samples: int = 2, seed: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((samples, *shape_of(config))), jnp.float32)


def sampled(denoiser, latents, steps: int, count: int | None = None) -> np.ndarray:
    """Final latents of an Euler run in segments of `count` steps (all at once, if None)."""
    schedule = Euler().schedule(steps, Shift(constant=3.0), 40)
    carry = start(denoiser, Euler(), latents)
    for first in range(0, steps, count or steps):
        carry = _segment(denoiser, carry, schedule, first, count or steps)
    return np.asarray(denoiser.finish(carry.latents))


@partial(jax.jit, static_argnames="count")
def _segment(denoiser, carry, schedule, first, count):
    return sample(denoiser, Euler(), carry, schedule, first, count)


def segment_programs() -> int:
    """How many programs `sampled` has compiled."""
    return _segment._cache_size()


def relative_error(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
