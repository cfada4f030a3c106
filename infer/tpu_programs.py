"""Sampling programs of published models for TPU slices, lowered from shapes alone: weights, methods' parts and requests
without numbers.

A program is what a pipeline runs for one picture or video with a plan: `sample` over its denoiser in bf16, with both
guidance branches of Wan, with FLUX's embedded guidance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert.components import Component
from dit_jax.config import UserError
from dit_jax.flops import Config, Shape, plan_cost
from dit_jax.methods.ddit import Ddit
from dit_jax.methods.magcache import MagCache
from dit_jax.methods.method import Part, Run
from dit_jax.methods.patch_adapters import AdapterSettings, abstract_adapters, part_of, size_name
from dit_jax.methods.plan import DENSE, Plan, parse_plan
from dit_jax.methods.pruning import pruned_config
from dit_jax.methods.routing import ROUTER
from dit_jax.models import vae_wan
from dit_jax.models.network import Conditioning, grid
from dit_jax.models.wan import TWO_EXPERTS, WanConfig
from dit_jax.parameters import cast
from dit_jax.sampling.sampler import Guided, sample, start
from dit_jax.sampling.solvers import SOLVERS
from dit_jax.sharding import batch_shardings, replicated, shardings
from infer.adapt import untrained_router
from infer.random_pipeline import IMAGE_TOKENS, PRESETS, TEXT_TOKENS, shift_of, usual
from infer.request import parse_size
from infer.segments import Stage, cut, segment_length

STRIDES = {vae.z_dim: vae.space_factor for vae in vae_wan.PRESETS.values()}
MAGCACHE_THRESHOLD = 0.1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One program: a model, a slice or topology, a mesh over its chips, the picture's size and frames, and a plan.

    variant         patch size in units of the model's own, where the plan chooses among some
    heads, ffn      shares of the heads and of the MLPs' neurons that are pruned
    offload_expert  of a model of two experts, only the one that runs is on the chips
    """

    model: str
    topology: str
    mesh: str
    size: str
    frames: int = 81
    plan: str = DENSE
    variant: int = 1
    heads: float = 0
    ffn: float = 0
    offload_expert: bool = False


class Program(NamedTuple):
    """A traced program, and the bytes a chip that its method keeps from step to step (of its arguments).

    beside  bytes a chip of the weights that lie there while it runs and are none of its arguments: the other expert's
    steps   of the run that it makes
    tokens  of the latents at the model's own patch size, and `flops` of matrix products, on all chips together, where
            the plan is what it costs on average
    """

    traced: Any
    kept: int
    beside: int
    steps: int
    tokens: int
    flops: float


def check_offload(model: str, offload_expert: bool) -> None:
    """Raises UserError where what has no two experts is to have one offloaded."""
    if offload_expert and model not in TWO_EXPERTS:
        raise UserError(
            f"{model} has no second expert: expected one of {', '.join(TWO_EXPERTS)}; leave out --offload-expert"
        )


def config_of(case: Case) -> Config:
    """Sizes of the case's model, with the heads and neurons that `dit-prune` leaves of it."""
    return pruned_config(PRESETS[case.model], case.heads, case.ffn)


def plan_of(config: Config, text: str) -> Plan:
    """The plan as a model of this config runs it. `magcache` alone is MagCache with ratios of 1: its program is
    the same for all ratios of as many steps."""
    if text == MagCache.name:
        return Plan((MagCache(threshold=MAGCACHE_THRESHOLD, ratios=(1.0,) * usual(config).steps),), text)
    return parse_plan(text)


def latents_shape(size: str, frames: int, channels: int) -> tuple[int, ...]:
    """[1, T, Y, X, C] of a WxH video behind a VAE of so many channels: strides of 4 in time, 8 or 16 in space."""
    width, height = parse_size(size)
    stride = STRIDES.get(channels, 8)
    if width % (2 * stride) or height % (2 * stride) or not width * height:
        raise UserError(
            f"size {size} does not fit: width and height must be multiples of {2 * stride}; write 832x480 or 1280x704"
        )
    if frames < 1 or frames % 4 != 1:
        raise UserError(f"{frames} frames do not fit: expected 4·k + 1; ask for {4 * max(frames // 4, 1) + 1}")
    return 1, (frames - 1) // 4 + 1, height // stride, width // stride, channels


def abstract_request(component: Component, size: str, frames: int) -> tuple[Guided, Any]:
    """(denoiser, latents) of one picture or guided video as shapes alone, in bf16; UserError for a size that does not
    fit."""
    config = component.config
    if not usual(config).video and frames != 1:
        raise UserError(f"{frames} frames do not fit: expected 1 of a model of still images; leave out --frames")
    latents = latents_shape(size, frames, config.out_channels)
    extra = config.in_channels - config.out_channels
    branches = 2 if usual(config).video else 1
    guided = Guided(
        model=cast(component.abstract, component.precision(jnp.bfloat16)),
        conditioning=_conditioning(config, branches),
        guidance_scale=_shape(jnp.float32),
        extra=_shape(jnp.float32, *latents[:-1], extra) if extra else None,
        branches=branches,
    )
    return guided, _shape(jnp.float32, *latents)


def _conditioning(config: Config, rows: int) -> Conditioning:
    text = _shape(jnp.bfloat16, rows, TEXT_TOKENS, config.text_width)
    if isinstance(config, WanConfig):
        seen = config.image_width
        return Conditioning(text, _shape(jnp.bfloat16, rows, IMAGE_TOKENS, seen) if seen else None)
    guidance = _shape(jnp.float32, rows) if config.guidance else None
    return Conditioning(text, pooled=_shape(jnp.bfloat16, rows, config.pooled_width), guidance=guidance)


def abstract_parts(component: Component) -> dict[str, Part]:
    """What methods need of a checkpoint, as `dit-adapt` attaches it."""
    settings = AdapterSettings()
    return {
        ROUTER: untrained_router(component, {}, 0),
        Ddit.name: part_of(abstract_adapters(component.config, settings), settings),
    }


def trace(component: Component, case: Case, mesh) -> Program:
    """The program of one sampling segment on the mesh; UserError for a size, plan or mesh that does not fit."""
    config = component.config
    guided, latents = abstract_request(component, case.size, case.frames)
    plan, parts = plan_of(config, case.plan), abstract_parts(component)
    plan.check(guided.model.stacks, parts)
    solver, steps = SOLVERS[plan.solver or usual(config).solver], plan.steps or usual(config).steps
    schedule = solver.schedule(steps, shift_of(config), math.prod(grid(latents.shape, config.patch)))
    breaks = plan.chooser.breaks(steps) if plan.chooser else ()
    count = segment_length(cut([Stage(first=0, stop=steps, denoiser=lambda: guided)], breaks))
    run = Run(
        latents_shape=latents.shape, first=0, stop=steps, steps=steps, sigmas=schedule.sigmas,
        parts=parts, variant=case.variant,
    )  # fmt: skip

    def segment(denoiser, carry, schedule, first):
        return sample(denoiser, solver, carry, schedule, first, count)

    with jax.set_mesh(mesh):
        placed = _on_mesh(guided, component, mesh)
        denoiser = _applied(plan, placed, run, mesh)
        schedule, first = _everywhere((schedule, np.int32(0)), mesh)
        latents = _placed(latents, batch_shardings(latents, mesh))
        started = jax.jit(lambda denoiser, latents: start(denoiser, solver, latents)).lower(denoiser, latents).compile()
        carry = jax.tree.map(_like, started.out_info, started.output_shardings)
        program = jax.jit(segment, donate_argnames="carry", out_shardings=started.output_shardings)
        traced = program.trace(denoiser, carry, schedule, first)
    tokens = math.prod(grid(latents.shape, config.patch))
    both = case.model in TWO_EXPERTS and not case.offload_expert
    return Program(
        traced=traced,
        kept=_bytes_a_chip(carry.denoiser),
        beside=_bytes_a_chip(placed.model) if both else 0,
        steps=count,
        tokens=tokens,
        flops=_flops(config, case, plan, tokens, steps) * count,
    )


def _flops(config: Config, case: Case, plan: Plan, tokens: int, steps: int) -> float:
    """Of a step of the plan, on average; at a patch size, of a step at that size."""
    methods = plan.methods
    if plan.chooser:
        fixed = f"{Ddit.name}:{size_name(case.variant)}@0-{steps - 1}"
        methods = () if case.variant == 1 else parse_plan(fixed).methods
    seen = config.image_width if isinstance(config, WanConfig) else None
    shape = Shape(
        tokens=tokens, text=TEXT_TOKENS, branches=2 if usual(config).video else 1, image=IMAGE_TOKENS if seen else 0
    )
    return plan_cost(config, shape, methods, steps).flops / steps


def _on_mesh(guided: Guided, component: Component, mesh) -> Guided:
    model = _placed(guided.model, shardings(guided.model, component.axes, mesh))
    told = replace(guided, model=None)
    return replace(_placed(told, batch_shardings(told, mesh)), model=model)


def _applied(plan: Plan, guided: Guided, run: Run, mesh) -> Any:
    """The plan's denoiser as shapes: arrays of the plain one lie as they lie there, all others whole on every chip.

    Methods make arrays, which no topology can hold: they are traced.
    """
    leaves = {name: _everywhere(part.leaves, mesh) for name, part in run.parts.items()}
    placed, structure = jax.tree.flatten((guided, leaves))
    found = []

    def trace(*arrays):
        guided, leaves = jax.tree.unflatten(structure, arrays)
        parts = {name: part._replace(leaves=leaves[name]) for name, part in run.parts.items()}
        places = {id(array): shape.sharding for array, shape in zip(arrays, placed, strict=True)}
        denoiser = plan.applied(guided, replace(run, parts=parts))
        found.append(jax.tree.map(lambda leaf: _like(leaf, places.get(id(leaf), replicated(mesh))), denoiser))

    jax.eval_shape(trace, *placed)
    return found[0]


def _everywhere(tree, mesh):
    return jax.tree.map(lambda leaf: _like(leaf, replicated(mesh)), tree)


def _shape(dtype, *sizes: int) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _like(leaf, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed(tree, placement):
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), tree, placement)


def _bytes_a_chip(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
