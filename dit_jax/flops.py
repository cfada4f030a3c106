"""What a step costs: matmul FLOPs, bytes of weights read, bytes of activations moved, of any model, shape and plan.

Counted from the arithmetic alone, without padding: FLOPs are 2·m·k·n of every matrix product, which is all of a
diffusion transformer but for one or two percent. A dense step is a `StepWork`; each method of a plan says what it makes
of it.

Shapes: R batch rows (guidance branches included), N tokens, M tokens that a step refreshes, L text tokens, D width, F
MLP width, G blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.models.flux import Flux, FluxConfig
from dit_jax.models.network import grid
from dit_jax.models.wan import FP32_LEAVES, Wan, WanConfig
from dit_jax.parameters import Precision, cast

Config = WanConfig | FluxConfig
FIRST = "transformer"  # the only one, or the first of several experts


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one evaluation of a model is given.

    tokens     of a sample, without padding, at the model's own patch size
    text       text tokens of a row
    branches   of guidance
    image      tokens of the image encoder a row (image-to-video)
    timesteps  distinct ones of a row: two where a first frame is held
    itemsize   bytes of a weight and of an activation
    """

    tokens: int
    text: int
    samples: int = 1
    branches: int = 1
    image: int = 0
    timesteps: int = 1
    itemsize: int = 4

    @property
    def rows(self) -> int:
        """Batch rows: guidance branches of all samples."""
        return self.samples * self.branches

    @staticmethod
    def of(guided: Any, latents_shape: Sequence[int]) -> Shape:
        """The shape in which a `Guided` denoiser runs its model on latents [B, T, Y, X, C]."""
        told, rows = guided.conditioning, latents_shape[0] * guided.branches
        return Shape(
            samples=latents_shape[0],
            branches=guided.branches,
            tokens=math.prod(grid(latents_shape, guided.model.config.patch)),
            text=told.text.shape[1],
            image=0 if told.image is None else math.prod(told.image.shape[:2]) // rows,
            timesteps=1 if guided.held is None else 2,
            itemsize=guided.model.patch.kernel[...].dtype.itemsize,
        )


class BlockWork(NamedTuple):
    """What a step makes one block do in every row.

    tokens     through cross-attention and MLP
    projected  through the projections of self-attention; they are its queries
    keys       tokens that they attend
    share      of the block that is run: 0 if it is skipped, or the mean over steps or rows
    """

    tokens: float
    projected: float
    keys: float
    share: float = 1.0


class StepWork(NamedTuple):
    """What one step does: `tokens` are embedded and read out, each of `cells` of the model's own patches."""

    tokens: float
    cells: float
    blocks: tuple[BlockWork, ...]

    def in_blocks(self, change: Callable[[BlockWork], BlockWork]) -> StepWork:
        """The same change in every block."""
        return self._replace(blocks=tuple(change(block) for block in self.blocks))


class StepAt(NamedTuple):
    """Which step of how many, from 0; the first step of its stage; by a method's name, what was measured of this step
    of a run where the arithmetic does not tell it (`Measured`); the timestep; the transformer that it runs."""

    step: int
    steps: int
    first: int
    measured: Mapping[str, float]
    t: float = 0.0
    component: str = FIRST


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Matmul FLOPs; bytes of weights read, by each product that uses them; bytes of other operands and of results of
    products (attention's scores, which stay on the chip, left out)."""

    flops: float = 0.0
    weights: float = 0.0
    activations: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            weights=self.weights + other.weights,
            activations=self.activations + other.activations,
        )

    def __mul__(self, times: float) -> Cost:
        return Cost(flops=self.flops * times, weights=self.weights * times, activations=self.activations * times)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes held at once: the model's weights, what a method keeps between steps, and the activations of a block."""

    weights: int
    kept: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kept + self.activations


def dense_work(config: Config, shape: Shape) -> StepWork:
    """A step of the plain model."""
    count = sum(block_counts(config))
    return StepWork(shape.tokens, 1, (BlockWork(shape.tokens, shape.tokens, shape.tokens),) * count)


def block_counts(config: Config) -> tuple[int, ...]:
    """Blocks of each stack."""
    return (config.blocks,) if isinstance(config, WanConfig) else (config.double_blocks, config.single_blocks)


def step_cost(config: Config, shape: Shape, work: StepWork) -> Cost:
    """Cost of one step."""
    parts = _parts(config, shape)
    total = parts.ends(work)
    for index, block in enumerate(work.blocks):
        total += parts.block(index, block) * block.share
    return total


def attention_cost(config: Config, shape: Shape, work: StepWork) -> Cost:
    """Cost of one step's self-attention alone, its projections included."""
    parts = _parts(config, shape)
    return sum((parts.self_attention(block) * block.share for block in work.blocks), Cost())


def plan_cost(
    config: Config,
    shape: Shape,
    methods: Sequence[Any],
    steps: int,
    *,
    timesteps: Sequence[float] | None = None,
    stages: Mapping[int, str] | None = None,
    measured: Mapping[str, Sequence[float]] | None = None,
    of_step: Callable[[Config, Shape, StepWork], Cost] = step_cost,
) -> Cost:
    """Cost of a whole run.

    methods    of a plan, in its order: each is asked `step_work(work, at)`
    timesteps  of the steps, in [0, 1000]; None spaces them evenly
    stages     first step of each stage -> the transformer that it runs; None is one stage of one transformer
    measured   by a method's name, what was measured of each step [S]
    of_step    `step_cost`, or `attention_cost`
    """
    total, dense, known = Cost(), dense_work(config, shape), {}
    begun, first, component = stages or {0: FIRST}, 0, FIRST
    for index, t in enumerate(np.linspace(1000, 0, steps, endpoint=False) if timesteps is None else timesteps):
        known_of_step = {name: of_steps[index] for name, of_steps in (measured or {}).items()}
        if index in begun:
            first, component = index, begun[index]
        work, at = dense, StepAt(index, steps, first, known_of_step, float(t), component)
        for method in methods:
            work = method.step_work(work, at)
        if work not in known:
            known[work] = of_step(config, shape, work)
        total += known[work]
    return total


def plan_memory(config: Config, shape: Shape, methods: Sequence[Any], experts: int = 1) -> Memory:
    """Memory of a run on one device: all weights, the state of its methods, and at the widest point of a block the
    residual stream with either q, k, v and attention's output or the MLP's hidden layer.

    experts  transformers of this config that are resident: two of Wan 2.2 A14B's, unless one is offloaded
    """
    inner = config.heads * config.head_width
    tokens = shape.tokens + (shape.text if isinstance(config, FluxConfig) else 0)
    widest = 2 * config.width + max(4 * inner, config.mlp_width)
    return Memory(
        weights=experts * weight_bytes(config, shape.itemsize),
        kept=sum(method.kept_bytes(config, shape) for method in methods),
        activations=shape.rows * tokens * widest * shape.itemsize,
    )


def residual_bytes(config: Config, shape: Shape) -> int:
    """Bytes of what the whole trunk added to the tokens of all rows."""
    return shape.rows * shape.tokens * config.width * shape.itemsize


def weight_bytes(config: Config, itemsize: int) -> int:
    """Bytes of a model's weights, with the leaves that stay in fp32 under any policy."""
    model: Any = Wan if isinstance(config, WanConfig) else Flux
    exact = FP32_LEAVES if isinstance(config, WanConfig) else ()
    precision = Precision(weights=jnp.float32 if itemsize == 4 else jnp.bfloat16, exact=exact)
    leaves = jax.tree.leaves(cast(nnx.eval_shape(lambda: model(config, nnx.Rngs(0))), precision))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class _Parts(ABC):
    """The matrix products of a backbone, each for all R rows."""

    def __init__(self, config: Any, shape: Shape):
        self.config, self.shape = config, shape
        self.inner = config.heads * config.head_width

    def linear(self, tokens: float, inputs: float, outputs: float) -> Cost:
        """Of `tokens` vectors a row."""
        rows, size = self.shape.rows * tokens, self.shape.itemsize
        return Cost(
            flops=2 * rows * inputs * outputs,
            weights=inputs * outputs * size,
            activations=rows * (inputs + outputs) * size,
        )

    def mlp(self, tokens: float, inputs: int, hidden: int, outputs: int) -> Cost:
        return self.linear(tokens, inputs, hidden) + self.linear(tokens, hidden, outputs)

    def attention(self, queries: float, keys: float) -> Cost:
        """q·kᵀ and its product with v, of all heads together."""
        rows, size = self.shape.rows, self.shape.itemsize
        moved = 2 * rows * (queries + keys) * self.inner * size
        return Cost(flops=4 * rows * queries * keys * self.inner, activations=moved)

    def projections(self, tokens: float) -> Cost:
        """q, k, v and the output."""
        width = self.config.width
        return self.linear(tokens, width, self.inner) * 3 + self.linear(tokens, self.inner, width)

    def patches(self, work: StepWork) -> Cost:
        """Embedding of the patches, and the head."""
        config, cells = self.config, math.prod(self.config.patch) * work.cells
        read = self.linear(work.tokens, config.in_channels * cells, config.width)
        return read + self.linear(work.tokens, config.width, config.out_channels * cells)

    @abstractmethod
    def ends(self, work: StepWork) -> Cost:
        """All but the blocks."""

    @abstractmethod
    def block(self, index: int, work: BlockWork) -> Cost:
        """One block that is run."""

    @abstractmethod
    def self_attention(self, work: BlockWork) -> Cost:
        """Of one block, with its projections."""


class _WanParts(_Parts):
    def ends(self, work: StepWork) -> Cost:
        config, shape, width = self.config, self.shape, self.config.width
        total = self.patches(work) + self.mlp(shape.text, config.text_width, width, width)
        total += self.mlp(shape.timesteps, config.time_frequencies, width, width)
        total += self.linear(shape.timesteps, width, 6 * width)
        if config.image_width:
            total += self.mlp(shape.image, config.image_width, config.image_width, width)
        return total

    def block(self, index: int, work: BlockWork) -> Cost:
        config, shape, width = self.config, self.shape, self.config.width
        total = self.self_attention(work)
        total += self.linear(work.tokens, width, self.inner) + self.linear(work.tokens, self.inner, width)
        for context in (shape.text, shape.image) if config.image_width else (shape.text,):
            total += self.linear(context, width, self.inner) * 2 + self.attention(work.tokens, context)
        return total + self.mlp(work.tokens, width, config.mlp_width, width)

    def self_attention(self, work: BlockWork) -> Cost:
        return self.projections(work.projected) + self.attention(work.projected, work.keys)


class _FluxParts(_Parts):
    def ends(self, work: StepWork) -> Cost:
        config, width = self.config, self.config.width
        total = self.patches(work) + self.linear(self.shape.text, config.text_width, width)
        total += self.mlp(1, config.time_frequencies, width, width) * (2 if config.guidance else 1)
        return total + self.mlp(1, config.pooled_width, width, width) + self.linear(1, width, width) * 2

    def block(self, index: int, work: BlockWork) -> Cost:
        config, text, width = self.config, self.shape.text, self.config.width
        modulations = 12 if index < config.double_blocks else 3
        total = self.linear(1, width, modulations * width) + self.self_attention(work)
        return (
            total
            + self.mlp(work.tokens, width, config.mlp_width, width)
            + self.mlp(text, width, config.mlp_width, width)
        )

    def self_attention(self, work: BlockWork) -> Cost:
        text = self.shape.text
        projections = self.projections(work.projected) + self.projections(text)
        return projections + self.attention(work.projected + text, work.keys + text)


def _parts(config: Config, shape: Shape) -> _Parts:
    return (_WanParts if isinstance(config, WanConfig) else _FluxParts)(config, shape)
