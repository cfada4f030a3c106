"""A transformer with random weights that is told random things: its speed is that of a real one, its pictures are none.

Shapes: T Y X token grid, C latent channels.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint
from convert.components import Component
from convert.leaves import Leaf
from dit_jax.config import UserError
from dit_jax.flops import Config, Cost, attention_cost, step_cost
from dit_jax.methods.method import Part
from dit_jax.methods.pruning import pruned_config
from dit_jax.models import flux, wan
from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import Conditioning
from dit_jax.models.wan import Wan, WanConfig
from dit_jax.parameters import STACKS, Precision, cast, leaf_name, named_leaves
from dit_jax.sampling.sampler import Guided
from dit_jax.sampling.schedules import Schedule, Shift
from infer.adapt import KINDS
from infer.attention_only import AttentionFlux, AttentionWan
from infer.flux_pipeline import USUAL as FLUX_USUAL
from infer.pipeline import Pipeline, scales_of
from infer.programs import Programs
from infer.request import Defaults, Job, Limits
from infer.segments import Stage

TEXT_TOKENS = 512
IMAGE_TOKENS = 257  # of the image encoder
PRESETS: dict[str, Config] = {**wan.PRESETS, **flux.PRESETS}


@dataclass(frozen=True, kw_only=True)
class RandomKind:
    """What a random model is made of.

    attention_only  its blocks are self-attention and nothing else (`infer/attention_only.py`)
    pruned          share of the heads and neurons that it lacks
    """

    attention_only: bool = False
    pruned: float = 0.0


class RandomPipeline(Pipeline):
    """A pipeline that denoises; it has neither text encoders nor a VAE, and cannot `decode`. It has an untrained router
    and untrained adapters of larger patches.

    A picture's size in pixels is that of a VAE of 8 x 8 pixels and 4 frames a latent (16 x 16 for Wan2.2-TI2V-5B).
    """

    def __init__(
        self, name: str, config: Config, defaults: Defaults, dtype: Any = jnp.float32, kind: RandomKind = RandomKind()
    ):
        self.is_flux, self.attention_only = isinstance(config, FluxConfig), kind.attention_only
        config = pruned_config(config, kind.pruned, kind.pruned)
        component = transformer_component(config, kind.attention_only)
        self.checkpoint = Checkpoint(
            folder=Path(name),
            layout="native",
            settings={"transformer": {}},
            files={},
            _components={"transformer": component},
        )
        self.name, self.defaults, self.mesh, self.programs = name, defaults, None, Programs()
        self.shift = self._read_shift()
        self._drawn: dict[tuple[int, ...], jax.Array] = {}
        self._load_models(dtype, False)
        self.parts = {"transformer": {name: self._untrained(make) for name, make in KINDS.items()}}

    def _untrained(self, make: Callable[..., Part]) -> Part:
        part = make(self.checkpoint.component("transformer"), dict(map(_as_leaf, named_leaves(self.transformer))), 0)
        return part._replace(leaves=jax.tree.map(self.replicated, part.leaves))

    def _read_shift(self) -> Shift:
        return shift_of(self.transformer_config)

    def _load_models(self, dtype: Any, offload_expert: bool) -> None:
        component = self.checkpoint.component("transformer")
        self.transformer = _random_weights(component, component.precision(dtype))

    @property
    def _cost_of_step(self) -> Callable[..., Cost]:
        return attention_cost if self.attention_only else step_cost

    @property
    def _space(self) -> int:
        return 16 if self.transformer_config.in_channels == 48 else 8

    def latents_shape(self, size: tuple[int, int], frames: int) -> tuple[int, int, int, int]:
        return (
            (frames - 1) // 4 + 1,
            size[1] // self._space,
            size[0] // self._space,
            self.transformer_config.out_channels,
        )

    @property
    def limits(self) -> Limits:
        config = self.transformer_config
        return Limits(space=self._space * config.patch[1], time=4, video=self.defaults.video, scales=scales_of(config))

    def stages(self, job: Job, schedule: Schedule) -> list[Stage]:
        return [Stage(first=0, stop=job.steps, denoiser=lambda: self._denoiser(job))]

    def _denoiser(self, job: Job) -> Guided:
        samples, config = len(job.prompts), self.transformer_config
        scale = job.true_cfg if self.is_flux else job.guidance_scales[0]
        branches = 2 if scale > 1 else 1
        extra = config.in_channels - config.out_channels
        return Guided(
            model=self.transformer,
            conditioning=self._conditioning(samples * branches, job.guidance_scales[0]),
            guidance_scale=self.replicated(np.float32(scale)),
            extra=self._told(samples, *self.latents_shape(job.size, job.frames)[:3], extra) if extra else None,
            branches=branches,
        )

    def _conditioning(self, rows: int, guidance: float) -> Conditioning:
        config = self.transformer_config
        text = self._told(rows, TEXT_TOKENS, config.text_width)
        if not self.is_flux:
            seen = config.image_width
            return Conditioning(text, self._told(rows, IMAGE_TOKENS, seen) if seen else None)
        scales = self.rows(np.full(rows, guidance, np.float32)) if config.guidance else None
        return Conditioning(text, pooled=self._told(rows, config.pooled_width), guidance=scales)

    def _told(self, *shape: int) -> jax.Array:
        """Random numbers of this shape, always the same ones: drawing them is no part of a run's time."""
        if shape not in self._drawn:
            self._drawn[shape] = self.rows(np.random.default_rng(0).standard_normal(shape, np.float32))
        return self._drawn[shape]


def _as_leaf(named: tuple[str, jax.Array]) -> tuple[str, Leaf]:
    name, values = named
    return name, Leaf(values.shape, values.dtype, stacked=False, read=lambda _: np.asarray(values))


def transformer_component(config: Config, attention_only: bool = False) -> Component:
    """A transformer of this config as a component that no file holds."""
    is_flux = isinstance(config, FluxConfig)
    models: dict[bool, Callable[..., Any]] = {False: Flux if is_flux else Wan}
    models[True] = AttentionFlux if is_flux else AttentionWan
    model = models[attention_only]
    return Component(
        class_name=model.__name__,
        config=config,
        model=model,
        rows=(),
        stem="",
        fp32=() if is_flux else wan.FP32_LEAVES,
        axes=flux.AXES if is_flux else wan.AXES,
    )


def shift_of(config: Config) -> Shift:
    """How the noise levels of a model of this config are shifted."""
    return Shift(dynamic=True, to_last_step=True) if isinstance(config, FluxConfig) else Shift(constant=3.0)


def usual(config: Config) -> Defaults:
    """What a model of this config is run with."""
    return FLUX_USUAL if isinstance(config, FluxConfig) else Defaults()


def preset_pipeline(name: str, kind: RandomKind = RandomKind()) -> RandomPipeline:
    """The random model of a preset's sizes: bf16 on an accelerator, fp32 on a CPU."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}")
    config = PRESETS[name]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return RandomPipeline(name, config, usual(config), dtype, kind)


def sized_pipeline(text: str, kind: RandomKind = RandomKind()) -> RandomPipeline:
    """`768x12x4096`: a Wan of this width, number of blocks and tokens, without guidance unless it is asked for."""
    config, (t, y, x) = sized_model(text)
    defaults = Defaults(size=(16 * x, 16 * y), frames=4 * t - 3, steps=40, guidance=1.0, solver="euler")
    return RandomPipeline(text, config, defaults, kind=kind)


def sized_model(text: str) -> tuple[WanConfig, tuple[int, int, int]]:
    """The config of `768x12x4096`, and its token grid."""
    width, blocks, tokens = _sizes(text)
    head_width = 64 if width % 64 == 0 else 16
    config = replace(
        wan.WAN_1_3B, width=width, blocks=blocks, heads=width // head_width, head_width=head_width, mlp_width=4 * width
    )
    return config, token_grid(tokens)


def _sizes(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts) or int(parts[0]) % 16:
        raise UserError(
            f"--random {text!r} is not understood: expected WIDTHxBLOCKSxTOKENS with a width that 16 divides, "
            "such as 768x12x4096"
        )
    width, blocks, tokens = (int(part) for part in parts)
    return width, blocks, tokens


def token_grid(tokens: int) -> tuple[int, int, int]:
    """(T, Y, X) of so many tokens: four latent frames where that divides, as square as it goes."""
    t = math.gcd(tokens, 4)
    of_frame = tokens // t
    y = max(n for n in range(1, math.isqrt(of_frame) + 1) if of_frame % n == 0)
    return t, y, of_frame // y


def _random_weights(component: Component, precision: Precision):
    """Uniform around 0; a kernel's variance is 1 over the number of its inputs, so that activations keep their size."""

    def fill(path, leaf):
        name = leaf_name(path)
        shape = leaf.shape[1:] if name.startswith(STACKS) else leaf.shape
        inputs = 2500.0
        if name.endswith("kernel"):
            # An output projection [H, K, D] sums over its heads, the others [D, H, K] over the width.
            inputs = math.prod(shape[:-1]) if name.endswith(".o.kernel") else shape[0]
        values = np.random.default_rng(zlib.crc32(name.encode())).random(leaf.shape, np.float32)
        values -= 0.5
        values *= (12 / inputs) ** 0.5
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, cast(component.abstract, precision))
